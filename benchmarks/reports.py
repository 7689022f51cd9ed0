#!/usr/bin/env python3
"""What verification and the debug reports cost, and that the cheap ranking of nodes is the thorough
one.

    python benchmarks/reports.py [MODEL ...] [--samples 8] [--pictures 100]

Prints the seconds of a conversion without verification, with it and with reports, in one process,
best of three, and Spearman's correlation of the two rankings' decibels at the output.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import CLASSIFIERS, Classifier

from converter.calibrate.data import open_data, resources_of
from converter.calibrate.runs import opened
from converter.config import load_config
from converter.emit.qdq import emit
from converter.job import Job, Watch
from converter.measure.errors import errors_between
from converter.measure.pairing import pair
from converter.measure.sensitivity import RANKED_ON, alone, only
from converter.modes.full_quant import quantize
from converter.pipeline.convert import convert, read

REPEATS = 3


def job(model: Classifier, folder: Path, samples: int, reports: bool = False) -> Job:
    """A full quantization, into `folder`."""
    extra = f"debug_info_save_path={folder / 'reports'}" if reports else ""
    return Job(
        model.path,
        folder / "out.onnx",
        load_config(model.config(folder, "FULL_QUANT", samples, extra)),
    )


def seconds(task: Job) -> float:
    """The least time of a few conversions."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        convert(task)
        times.append(time.perf_counter() - start)
    return min(times)


def correlation(model: Classifier, folder: Path, samples: int) -> tuple[float, float, float]:
    """Spearman's of both rankings, and the seconds that each takes."""
    task = job(model, folder, samples)
    result = quantize(read(task, Watch()), task, Watch())
    data, resources = open_data(result.reference, task, Watch()), resources_of(task)
    start = time.perf_counter()
    few, thorough = data.part(0, min(len(data), RANKED_ON)), {}
    for unit in result.plan.units():
        by_itself = result.reference.clone()
        emit(by_itself, only(result.plan, unit))
        sides = opened(result.reference, optimize=True), opened(by_itself, optimize=True)
        errors = errors_between(*sides, few, resources.threads)
        thorough[unit.name] = min(error.sqnr_db for error in errors)
    middle = time.perf_counter()
    pairing = pair(result.reference, result.model, result.plan)
    floats = opened(pairing.reference, pairing.tensors)
    cheap = alone(pairing, floats, data, count=RANKED_ON, threads=resources.threads)
    end = time.perf_counter()
    both = [[thorough[name], cheap[name].output.sqnr_db] for name in thorough if name in cheap]
    ranks = np.argsort(np.argsort(np.array(both).T))
    return float(np.corrcoef(ranks)[0, 1]), middle - start, end - middle


def main() -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        for model in (CLASSIFIERS[name] for name in arguments.models or ["mobilenet_v2_1.0_224"]):
            folder = Path(path)
            for count in (arguments.samples, arguments.pictures):
                task = job(model, folder, count)
                plain, verified = seconds(replace(task, verify=False)), seconds(task)
                ratio = f"{plain:.1f} s, verified {verified:.1f} s ({verified / plain:.2f} x)"
                print(f"{model.name}, {count} samples: {ratio}")
                if count == arguments.samples:
                    reported = seconds(job(model, folder, count, reports=True))
                    print(f"  with reports {reported:.1f} s ({reported / plain:.2f} x)")
            agreement, slow, quick = correlation(model, folder, arguments.samples)
            print(
                f"  rankings agree {agreement:.3f} (Spearman); {slow:.1f} s node by node, "
                f"{quick:.1f} s cut open"
            )


if __name__ == "__main__":
    main()
