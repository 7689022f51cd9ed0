"""The same model, config and data give the same bytes: whatever the threads, order of files, locale
or hash seed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from command_line import DIGITS, MODEL, ROOT

CONFIGS = {
    "full": "[common_quant_param]\nquant_type = FULL_QUANT\n",
    "weight": "[common_quant_param]\nquant_type = WEIGHT_QUANT\nbit_num = 4\n",
    "mixed": "[common_quant_param]\nquant_type = WEIGHT_QUANT\nbit_num = 0\n",
    "dynamic": "[common_quant_param]\nquant_type = DYNAMIC_QUANT\n",
}
CONVERT = """
import sys
from converter.cli import main
model, *kinds = sys.argv[1:]
for kind in kinds:
    main([f"--modelFile={model}", f"--configFile={kind}.cfg", f"--outputFile={kind}.onnx"])
"""
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


def _convert(folder: Path, surrounding: Mapping[str, object]) -> dict[str, bytes]:
    """What every kind of quantization writes, all by one process."""
    folder.mkdir()
    pictures = _pictures(folder / "pictures", int(str(surrounding.get("order", 0))))
    for kind, config in CONFIGS.items():
        lines = config + f"thread_num = {surrounding.get('threads', 2)}\n"
        data = DATA.format(pictures) if kind != "mixed" else ""
        (folder / f"{kind}.cfg").write_text(lines + data)
    variables = {name: str(value) for name, value in surrounding.items() if name.isupper()}
    subprocess.run(
        [sys.executable, "-c", CONVERT, str(MODEL), *CONFIGS],
        env={**os.environ, "PYTHONHASHSEED": "0", **variables, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        check=True,
    )
    return {kind: (folder / f"{kind}.onnx").read_bytes() for kind in CONFIGS}


def test_surroundings_do_not_change_a_byte(tmp_path: Path) -> None:
    # Everything at once first; where that differs, each alone names the culprit.
    everything = {key: value for one in SURROUNDINGS.values() for key, value in one.items()} | {
        "threads": 1
    }
    plain = _convert(tmp_path / "plain", {"threads": 2})
    if _convert(tmp_path / "everything", everything) != plain:
        found = {name: _convert(tmp_path / name, one) for name, one in SURROUNDINGS.items()}
        culprits = [
            f"{kind}: {name}"
            for name, files in found.items()
            for kind in CONFIGS
            if files[kind] != plain[kind]
        ]
        pytest.fail(f"{culprits or 'all together'} change the output")
