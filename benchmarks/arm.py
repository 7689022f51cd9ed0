#!/usr/bin/env python3
"""Proof that results hold on ARM: what ONNX Runtime for aarch64, emulated, computes of a file.

    python benchmarks/arm.py FOLDER [MODEL ...] [--cpus cortex-a53,neoverse-n1] [--targets CPU,ARM]

Needs `qemu-aarch64` (Debian: qemu-user) and a FOLDER with `root`, Debian's arm64 packages of
python3.11-minimal, libpython3.11-stdlib and what they depend on, each unpacked by `dpkg -x`, and
`site`, where the wheels of numpy and onnxruntime for aarch64 are unzipped (1.24.4 runs under
qemu 7.2, where 1.31 and newer crash at the import). The first processor has no instructions for
dot products of bytes, the second one has.

Columns: the share of the values of all outputs that are the same to the bit, the largest difference
over the largest output, and how far above the difference the outputs are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from common import measure, qconvert
from saturation import KINDS, SMALL, Small

from converter.calibrate.exact import exact_here

# All outputs of a model for every sample, one behind the other.
RUN = """
import sys
sys.path[:0] = sys.argv[4:]
import numpy, onnxruntime
o = onnxruntime.SessionOptions()
o.log_severity_level = 4
o.intra_op_num_threads = 1
s = onnxruntime.InferenceSession(sys.argv[1], o, providers=["CPUExecutionProvider"])
name = s.get_inputs()[0].name
found = [y for x in numpy.load(sys.argv[2]) for y in s.run(None, {name: x[None]})]
numpy.save(sys.argv[3], numpy.concatenate([y.ravel() for y in found]))
"""


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=list(SMALL))
    parser.add_argument("--cpus", default="cortex-a53,neoverse-n1")
    parser.add_argument("--targets", default="CPU,ARM")
    args = parser.parse_args()
    if shutil.which("qemu-aarch64") is None:
        sys.exit("qemu-aarch64 is not installed (Debian: apt-get install qemu-user).")
    print(f"{'':24s} {'':8s} {'':14s} same bits   difference   outputs")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            for target in args.targets.split(","):
                samples = quantized(Path(folder), SMALL[name], target)
                for cpu in args.cpus.split(","):
                    found = compared(Path(folder), args.folder, cpu, samples)
                    print(f"{name:24s} {target:8s} {cpu:14s} {found}", flush=True)


def quantized(folder: Path, small: Small, target: str) -> np.ndarray:
    """Writes the quantized model, and samples that both run on, which it returns."""
    samples = small.samples()
    np.save(folder / "x.npy", samples)
    np.save(folder / "in.npy", samples[:2])
    (folder / "c.cfg").write_text(
        f"[common_quant_param]\n{KINDS[target]}\n[data_preprocess_param]\n"
        f"calibrate_path={small.input}:x.npy\ninput_type=NPY\ncalibrate_size={len(samples)}\n"
    )
    qconvert(small.path, folder / "c.cfg", folder / "out.onnx", "--verify=off")
    return samples[:2]


def compared(folder: Path, arm: Path, cpu: str, samples: Sequence[np.ndarray]) -> str:
    """What an emulated processor computes, against this one or, if it saturates, exact sums."""
    there, here = folder / "there.npy", folder / "here.npy"
    ir.save(exact_here(ir.load(folder / "out.onnx")), folder / "exact.onnx")
    emulator = ["qemu-aarch64", "-cpu", cpu, "-L", str(arm / "root")]
    python = str(arm / "root" / "usr" / "bin" / "python3.11")
    files = [str(folder / name) for name in ("out.onnx", "in.npy")]
    environment = {**os.environ, "PYTHONHOME": str(arm / "root" / "usr")}
    code = [python, "-S", "-c", RUN, *files, str(there), str(arm / "site")]
    measure([*emulator, *code], environment)
    measure([sys.executable, "-c", RUN, str(folder / "exact.onnx"), files[1], str(here)])
    x, y = (np.load(path).astype(np.float64) for path in (here, there))
    noise = float(np.square(x - y).sum())
    decibels = 10 * np.log10(np.square(x).sum() / noise) if noise else np.inf
    largest = np.abs(x - y).max() / np.abs(x).max()
    return f"{np.mean(x == y):9.2%}   {largest:10.1e}   {decibels:5.1f} dB"


if __name__ == "__main__":
    main()
