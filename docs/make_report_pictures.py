"""Draws docs/report_light.png and docs/report_dark.png: report.html of the README's example, made
here and now.

Run `python docs/make_report_pictures.py` where Chromium is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from converter import convert

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "digits"
WIDTH, HEIGHT = 1200, 1960
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--virtual-time-budget=8000",
)
# What the browser takes the system's theme for.
THEMES = {
    "light": "--blink-settings=preferredColorScheme=1",
    "dark": "--blink-settings=preferredColorScheme=0",
}


def report(folder: Path) -> Path:
    """The report of the example, with right answers counted."""
    wanted = {
        "common_quant_param.debug_info_save_path": str(folder),
        "data_preprocess_param.label_file": str(EXAMPLE / "calib.csv"),
    }
    model, config = EXAMPLE / "digits_cnn.onnx", ROOT / "configs" / "full_quant.cfg"
    convert(model, config, folder / "digits_cnn_quant.onnx", overrides=wanted)
    return folder / "report.html"


def draw(page: Path, theme: str) -> None:
    """The top of the page as a browser shows it, in few colours."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install Chromium"
    picture = page.with_suffix(".png")
    size = f"--window-size={WIDTH},{HEIGHT}"
    command = [browser, *FLAGS, THEMES[theme], size, f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, capture_output=True, check=True)
    small = Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(ROOT / "docs" / f"report_{theme}.png", optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name in THEMES:
            draw(report(Path(temporary)), name)
