#!/usr/bin/env python3
"""Proof that no x86 processor saturates: the same files run here and under an emulated CPU with
AVX2 but without VNNI.

    python benchmarks/saturation.py [MODEL ...] [--pictures 4]

Needs `qemu-x86_64` (Debian: qemu-user) and a CPU with VNNI, which is exact. Converts with
overflow_safe true and false and prints the largest difference of the outputs between this CPU and
the emulated one, relative to the largest output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import CLASSIFIERS, measure, qconvert, session

RUN = """
import sys, numpy, onnxruntime
o = onnxruntime.SessionOptions()
o.log_severity_level = 4
o.intra_op_num_threads = 1
s = onnxruntime.InferenceSession(sys.argv[1], o)
name = s.get_inputs()[0].name
numpy.save(sys.argv[3], numpy.stack([s.run(None, {name: x})[0] for x in numpy.load(sys.argv[2])]))
"""


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(CLASSIFIERS))
    parser.add_argument("--pictures", type=int, default=4)
    args = parser.parse_args()
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        sys.exit("qemu-x86_64 is not installed (Debian: apt-get install qemu-user).")
    print(f"{'':28s} overflow_safe   largest difference")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in args.models:
            classifier = CLASSIFIERS[model]
            data, _ = classifier.samples("dev", args.pictures)
            samples = np.stack([data.sample(i)[classifier.input] for i in range(len(data))])
            np.save(folder / "in.npy", samples)
            for safe in ("true", "false"):
                config = classifier.config(
                    folder, "FULL_QUANT", extra=f"[full_quant_param]\noverflow_safe={safe}"
                )
                qconvert(classifier.path, config, folder / "out.onnx")
                runner = session(folder / "out.onnx", 1)
                here = np.stack([runner.run(None, {classifier.input: x})[0] for x in samples])
                single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                paths = [str(folder / part) for part in ("out.onnx", "in.npy", "there.npy")]
                measure(
                    [emulator, "-cpu", "Haswell", sys.executable, "-c", RUN, *paths],
                    {**os.environ, **single},
                )
                there = np.load(folder / "there.npy")
                print(
                    f"{model:28s} {safe:13s}   "
                    f"{np.abs(there - here).max() / np.abs(here).max():.6f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
