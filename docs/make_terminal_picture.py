"""Draws docs/terminal.svg: the README's example command, run here and now, and every line that it
printed.

Run `pip install -e '.[docs]'` once, then `python docs/make_terminal_picture.py`.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "qconvert --modelFile=examples/digits/digits_cnn.onnx --configFile=configs/full_quant.cfg"
WIDTH = 136
# Viewers that show an SVG as a picture load no fonts from elsewhere; theirs is as good.
WEB_FONTS = re.compile(r"@font-face \{.*?\}\n?", re.DOTALL)


def printed() -> list[str]:
    """What the command prints, run on a copy of the repository's example so that nothing is left
    behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("examples", "configs"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        command = [sys.executable, "-m", "converter", *COMMAND.split()[1:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def picture(lines: list[str]) -> str:
    """The lines behind the prompt and the command, as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(Text.assemble(("$ ", "bold green"), (COMMAND, "bold")))
    for line in lines:
        console.print(Text(line, style="green" if line.startswith("CONVERT RESULT") else ""))
    return WEB_FONTS.sub(
        "", console.export_svg(title="qconvert", theme=MONOKAI, unique_id="qconvert")
    )


if __name__ == "__main__":
    (ROOT / "docs" / "terminal.svg").write_text(picture(printed()))
