"""The same model, config and data give the same bytes: whatever the threads, order of files, locale
or hash seed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DIGITS, MODEL, ROOT

CONFIGS = {
    "full": "[common_quant_param]\nquant_type = FULL_QUANT\n",
    "weight": "[common_quant_param]\nquant_type = WEIGHT_QUANT\nbit_num = 4\n",
    "mixed": "[common_quant_param]\nquant_type = WEIGHT_QUANT\nbit_num = 0\n",
    "dynamic": "[common_quant_param]\nquant_type = DYNAMIC_QUANT\n",
}
DATA = (
    "[data_preprocess_param]\ncalibrate_path = image:{}\ncalibrate_size = 8\ninput_type = IMAGE\n"
)
SURROUNDINGS = {
    "one thread": {"threads": 1},
    "two threads": {"threads": 2},
    "another locale": {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"},
    "another hash seed": {"PYTHONHASHSEED": "4711"},
    "files made in another order": {"order": 1},
}


def _pictures(folder: Path, order: int) -> Path:
    """The first calibration pictures, copied in some order, which is that of a plain directory
    listing.
    """
    files = sorted((DIGITS / "calib").iterdir())[:10]
    random.Random(order).shuffle(files)
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder)
    return folder


def _convert(folder: Path, kind: str, surrounding: dict[str, object]) -> bytes:
    folder.mkdir()
    pictures = _pictures(folder / "pictures", int(str(surrounding.get("order", 0))))
    lines = CONFIGS[kind] + f"thread_num = {surrounding.get('threads', 2)}\n"
    (folder / "c.cfg").write_text(lines + (DATA.format(pictures) if kind != "mixed" else ""))
    variables = {name: str(value) for name, value in surrounding.items() if name.isupper()}
    command = [
        sys.executable,
        "-m",
        "converter",
        f"--modelFile={MODEL}",
        f"--configFile={folder}/c.cfg",
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "0", **variables, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, f"--outputFile={folder}/q.onnx"], env=environment, cwd=folder, check=True
    )
    return (folder / "q.onnx").read_bytes()


@pytest.mark.parametrize("kind", CONFIGS)
def test_surroundings_do_not_change_a_byte(tmp_path: Path, kind: str) -> None:
    # Everything at once first; where that differs, each alone names the culprit.
    everything = {key: value for one in SURROUNDINGS.values() for key, value in one.items()} | {
        "threads": 1
    }
    plain = _convert(tmp_path / "plain", kind, {"threads": 2})
    if _convert(tmp_path / "everything", kind, everything) != plain:
        culprits = [
            name
            for name, one in SURROUNDINGS.items()
            if _convert(tmp_path / name, kind, one) != plain
        ]
        pytest.fail(f"{kind}: {culprits or 'all together'} change the output")
