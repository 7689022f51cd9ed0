"""The same conversion on an emulated processor without VNNI, whose kernels saturate in 16 bits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import DIGITS, MODEL, digits, outputs

EMULATOR = shutil.which("qemu-x86_64")
TARGET, OTHER = "ARM", "Haswell"
CONFIG = f"""[common_quant_param]
quant_type = FULL_QUANT
thread_num = 1
[full_quant_param]
target_device = {TARGET}
[data_preprocess_param]
calibrate_path = image:{DIGITS}/calib
calibrate_size = 4
input_type = IMAGE
normalize_mean = [127.5]
normalize_std = [127.5]
"""
# One signal to noise ratio of the outputs where only float kernels differ, in their last bits; where
# saturating kernels decided, it was 22 dB.
LEAST_DB = 45.0


def converted(folder: Path, name: str, *emulator: str) -> tuple[Path, str]:
    """The output file, and what the command printed."""
    command = [*emulator, sys.executable, "-m", "converter", f"--modelFile={MODEL}"]
    command += [f"--configFile={folder}/c.cfg", f"--outputFile={folder}/{name}.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / f"{name}.onnx", done.stdout


@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="there is no qemu-x86_64")
def test_what_is_converted_does_not_depend_on_the_processor(tmp_path: Path) -> None:
    (tmp_path / "c.cfg").write_text(CONFIG)
    here, _ = converted(tmp_path, "here")
    there, said = converted(tmp_path, "there", str(EMULATOR), "-cpu", OTHER)
    samples = [{"image": image[None]} for image in digits("dev")[0][:20]]
    x, y = (
        np.concatenate([outputs(path, sample, optimized=True)[0] for sample in samples])
        for path in (here, there)
    )
    noise = np.sum((x.astype(np.float64) - y) ** 2)
    assert noise <= 10 ** (-LEAST_DB / 10) * np.sum(x.astype(np.float64) ** 2)
    assert "On this processor, whose kernels lose bits, the file gives other answers" in said
    assert "can overflow" not in said
