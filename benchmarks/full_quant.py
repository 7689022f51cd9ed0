#!/usr/bin/env python3
"""FULL_QUANT beside onnxruntime's and NNCF's static quantization: accuracy, agreement, speed and
size in one run.

    python benchmarks/full_quant.py [MODEL ...] [--ablation] [--ours] [--nncf PYTHON]

PYTHON is an interpreter of an environment with nncf installed. Columns: top-1 on the dev split,
agreement with the float model's best class, agreement with kernels that cannot saturate
(session.x64quantprecision=1), speed-up over float (1 thread, median of interleaved runs), times
smaller.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import CLASSIFIERS, Classifier, measure, outputs, qconvert, score, speedup

FULL = "[full_quant_param]\n"
OURS = {
    "qconvert (defaults)": "",
    "qconvert MSE": f"{FULL}activation_quant_method=MSE",
}
ABLATION = {
    "  nearest, no bias correction": f"{FULL}weight_rounding=NEAREST\nbias_correction=false",
    "  nearest rounding": f"{FULL}weight_rounding=NEAREST",
    "  no bias correction": f"{FULL}bias_correction=false",
    "  overflow_safe=false": f"{FULL}overflow_safe=false",
    "  per_channel=false": f"{FULL}per_channel=false",
    "  per_channel=false, equalize=false": f"{FULL}per_channel=false\nequalize=false",
    "  KL": f"{FULL}activation_quant_method=KL",
    "  REMOVAL_OUTLIER": f"{FULL}activation_quant_method=REMOVAL_OUTLIER",
    "  PERCENTILE": f"{FULL}activation_quant_method=PERCENTILE",
    "  AUTO": f"{FULL}activation_quant_method=AUTO",
}
PEER_OPTIONS = {
    "onnxruntime default": {"weight_type": "QInt8", "reduce_range": False},
    "onnxruntime 7-bit": {"weight_type": "QInt8", "reduce_range": True},
    "onnxruntime u8 x u8": {"weight_type": "QUInt8", "reduce_range": False},
}
NNCF = """
import sys, numpy, nncf, onnx
model, samples, out = sys.argv[1:]
rows, loaded = numpy.load(samples), onnx.load(model)
name = loaded.graph.input[0].name
for i, node in enumerate(loaded.graph.node):
    node.name = node.name or f"node_{i}"  # NNCF fails on nodes without names
data = nncf.Dataset([{name: x} for x in rows])
onnx.save(nncf.quantize(loaded, data, subset_size=len(rows), fast_bias_correction=False), out)
"""


def peer(classifier: Classifier, options: dict[str, object], out: Path) -> None:
    """onnxruntime.quantization with per-channel weights on the same samples."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    data, _ = classifier.samples("calib", 100)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[int] = iter(range(len(data)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            index = next(self.rows, None)
            return None if index is None else dict(data.sample(index))

    clean = out.with_suffix(".pre.onnx")
    quant_pre_process(classifier.path, clean)
    quantize_static(
        clean,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=bool(options["reduce_range"]),
        activation_type=QuantType.QUInt8,
        weight_type=getattr(QuantType, str(options["weight_type"])),
        calibrate_method=getattr(CalibrationMethod, str(options.get("method", "MinMax"))),
    )


def nncf(classifier: Classifier, python: str, out: Path) -> None:
    """NNCF's ONNX backend with full bias correction, in its own environment."""
    data, _ = classifier.samples("calib", 100)
    rows = out.with_suffix(".npy")
    np.save(rows, np.stack([data.sample(i)[classifier.input] for i in range(len(data))]))
    measure([python, "-c", NNCF, str(classifier.path), str(rows), str(out)])


def compare(classifier: Classifier, args: argparse.Namespace, folder: Path) -> None:
    """Prints one model's table."""
    data, labels = classifier.samples("dev")
    reference = outputs(classifier.path, data)
    print(
        f"\n{classifier.name}: float top-1 {score(reference, reference, labels)[0]:.4f}, "
        f"{len(data)} images"
    )
    print(f"{'':36s} top-1   agree   exact   speed  smaller")
    out = folder / f"{classifier.name}.onnx"
    for label, extra in {**OURS, **(ABLATION if args.ablation else {})}.items():
        qconvert(classifier.path, classifier.config(folder, "FULL_QUANT", extra=extra), out)
        row(label, classifier, out, reference, labels, data)
    for label, options in ({} if args.ours else PEER_OPTIONS).items():
        peer(classifier, options, out)
        row(label, classifier, out, reference, labels, data)
    if args.nncf:
        try:
            nncf(classifier, args.nncf, out)
        except RuntimeError as error:
            print(
                "NNCF, full bias correction           fails: "
                f"{str(error).strip().splitlines()[-1][:80]}"
            )
            return
        row("NNCF, full bias correction", classifier, out, reference, labels, data)


def row(label, classifier, out, reference, labels, data) -> None:
    """One line of the table."""
    top1, agree = score(reference, outputs(out, data), labels)
    exact = score(reference, outputs(out, data, exact=True), labels)[1]
    faster = speedup(classifier.path, out, data)
    smaller = classifier.path.stat().st_size / out.stat().st_size
    print(
        f"{label:36s} {top1:.4f}  {agree:.4f}  {exact:.4f}  {faster:5.2f}  {smaller:5.2f}",
        flush=True,
    )


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(CLASSIFIERS))
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--ours", action="store_true", help="leave out onnxruntime's tool")
    parser.add_argument("--nncf", metavar="PYTHON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            compare(CLASSIFIERS[name], args, Path(folder))


if __name__ == "__main__":
    main()
