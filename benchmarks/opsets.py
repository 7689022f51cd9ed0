#!/usr/bin/env python3
"""Converts with one ONNX and ONNX Runtime and runs in another, in both directions, opset by opset.

    python benchmarks/opsets.py PYTHON [--opsets 13,17,21,23,25,28]

PYTHON is an interpreter of an environment with other versions of onnxruntime and onnx (the oldest
that are supported: 1.22 and 1.19) and what else qconvert needs. Rows are opsets, columns modes of
the shipped example; a cell says how far the outputs there are from those here, over the largest, or
why one of the two does not load or convert it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import measure

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "examples" / "digits"
MODES = {
    "FULL 8": "quant_type=FULL_QUANT",
    "FULL 16": "quant_type=FULL_QUANT\n[full_quant_param]\nactivation_bits=16\ntarget_device=QNN",
    "WEIGHT 4": "quant_type=WEIGHT_QUANT\nbit_num=4\nmin_quant_weight_channel=0",
    "FLY 4": "quant_type=WEIGHT_QUANT\nbit_num=4\nmin_quant_weight_channel=0\n"
    "[weight_quant_param]\ndequant_strategy=ON_THE_FLY",
    "DYNAMIC": "quant_type=DYNAMIC_QUANT",
}
RUN = """
import sys, numpy, onnxruntime
o = onnxruntime.SessionOptions()
o.log_severity_level = 4
s = onnxruntime.InferenceSession(sys.argv[1], o, providers=["CPUExecutionProvider"])
shape = [4, *[d if isinstance(d, int) else 1 for d in s.get_inputs()[0].shape[1:]]]
x = numpy.random.default_rng(0).standard_normal(shape).astype("float32")
numpy.save(sys.argv[2], s.run(None, {s.get_inputs()[0].name: x})[0])
"""
VERSIONS = "import onnx, onnxruntime; print(onnx.__version__, onnxruntime.__version__)"


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python")
    parser.add_argument("--opsets", default="13,17,21,23,25,28")
    args = parser.parse_args()
    pair = sys.executable, args.python
    print("here", *(measure([python, "-c", VERSIONS]).output.strip() for python in pair), "there")
    for title, maker, user in (("converted here", *pair), ("converted there", *pair[::-1])):
        print(f"{title:16s}" + "".join(f"{mode:>22s}" for mode in MODES))
        for opset in args.opsets.split(","):
            cells = (cell(lines, int(opset), maker, user) for lines in MODES.values())
            print(f"opset {opset:10s}" + "".join(f"{text:>22.20s}" for text in cells), flush=True)


def cell(lines: str, opset: int, maker: str, user: str) -> str:
    """What running with `user` says of a conversion by `maker`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "out.onnx"
        try:
            convert(folder, lines, opset, maker)
        except RuntimeError as error:
            return reason(error)
        found = []
        for python in (maker, user):
            try:
                measure([python, "-c", RUN, str(out), str(folder / "y.npy")])
            except RuntimeError as error:
                return reason(error)
            found.append(np.load(folder / "y.npy").astype(np.float64))
        return f"{np.abs(found[0] - found[1]).max() / np.abs(found[0]).max():.1e}"


def convert(folder: Path, lines: str, opset: int, python: str) -> None:
    """Converts the example."""
    first, *others = lines.split("\n", 1)
    config = folder / "c.cfg"
    config.write_text(
        f"[common_quant_param]\nopset={opset}\nthread_num=1\n{first}\n{''.join(others)}\n"
        f"[data_preprocess_param]\ncalibrate_path=image:'{DIGITS / 'calib'}'\n"
        "calibrate_size=20\ninput_type=IMAGE\nnormalize_mean=[127.5]\nnormalize_std=[127.5]\n"
    )
    arguments = [f"--modelFile={DIGITS / 'digits_cnn.onnx'}", f"--configFile={config}"]
    command = [python, "-m", "converter", *arguments, f"--outputFile={folder / 'out.onnx'}"]
    measure([*command, "--verify=off", "--quiet"], {**os.environ, "PYTHONPATH": str(ROOT)})


def reason(error: Exception) -> str:
    """The last words of a process, in short."""
    text = str(error)
    for known in ("opset", "Unsupported model IR version", "need"):
        if known in text:
            return f"refused: {known}"
    return text.strip().splitlines()[-1][:20]


if __name__ == "__main__":
    main()
