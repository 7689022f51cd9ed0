#!/usr/bin/env python3
"""target_device=OPENVINO and the default target, in OpenVINO: accuracy, agreement and speed against
float there.

pip install openvino && python benchmarks/openvino_runtime.py [MODEL ...] [--pictures 200]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
from common import CLASSIFIERS, qconvert, score

Runner = Callable[[np.ndarray], np.ndarray]


def compiled(path: Path) -> Runner:
    """The model in OpenVINO on one CPU thread."""
    model = ov.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda x: np.asarray(next(iter(model(x).values())))


def speedup(reference: Runner, other: Runner, x: np.ndarray, runs: int = 60) -> float:
    """Median time of `reference` over that of `other`, interleaved."""
    times: list[list[float]] = [[], []]
    for _ in range(runs):
        for i, runner in enumerate((reference, other)):
            start = time.perf_counter()
            runner(x)
            times[i].append(time.perf_counter() - start)
    return statistics.median(times[0][5:]) / statistics.median(times[1][5:])


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(CLASSIFIERS))
    parser.add_argument("--pictures", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            classifier, out = CLASSIFIERS[name], Path(folder) / f"{name}.onnx"
            data, labels = classifier.samples("dev", args.pictures)
            inputs = [data.sample(i)[classifier.input] for i in range(len(data))]
            reference = compiled(classifier.path)
            scores = np.stack([reference(x).ravel() for x in inputs])
            print(
                f"{name}: float top-1 {score(scores, scores, labels)[0]:.4f} in OpenVINO, "
                f"{len(data)} pictures"
            )
            for target in ("OPENVINO", "CPU"):
                config = classifier.config(
                    Path(folder), "FULL_QUANT", extra=f"[full_quant_param]\ntarget_device={target}"
                )
                qconvert(classifier.path, config, out)
                runner = compiled(out)
                top1, agree = score(scores, np.stack([runner(x).ravel() for x in inputs]), labels)
                faster = speedup(reference, runner, inputs[0])
                print(
                    f"  {target:10s} top-1 {top1:.4f}  agree {agree:.4f}  speed {faster:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
