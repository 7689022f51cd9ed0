"""Float and quantized model side by side: how far each tensor, and the outputs, are from what they
were.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.samples import Dataset
from calib.session import Sample, open_session, over_samples, run
from converter.data import synthetic_data
from converter.model import saved

TIMED_SECONDS, LEAST_SECONDS = 0.1, 1e-3
# Inner products of two tensors x and y: xx, yy, xy and that of the difference with itself.
Products = tuple[float, float, float, float]


@dataclass(frozen=True)
class TensorError:
    """How a quantized tensor differs from the float one over all samples compared."""

    name: str
    cosine: float
    sqnr_db: float


def compare(
    reference: ir.Model,
    other: ir.Model,
    tensors: Mapping[str, str],
    data: Dataset,
    count: int,
    threads: int,
) -> list[TensorError]:
    """The error of each tensor over the first `count` samples; `tensors` maps names of the one
    model to the other's.
    """
    with saved(reference, tensors) as first, saved(other, tensors.values()) as second:
        sessions = open_session(first), open_session(second)

    def step(index: int) -> Array:
        sample = data.sample(index)
        left = run(sessions[0], list(tensors), sample)
        right = run(sessions[1], list(tensors.values()), sample)
        return np.array(
            [products(left[name], right[counterpart]) for name, counterpart in tensors.items()]
        )

    sums = sum(over_samples(min(count, len(data)), step, threads))
    return [error_of(name, total) for name, total in zip(tensors, np.asarray(sums), strict=True)]


def output_errors(
    model: ir.Model, quantized: ir.Model, data: Dataset, threads: int
) -> list[TensorError]:
    """What the outputs lost over all samples."""
    outputs = {value.name or "": value.name or "" for value in model.graph.outputs}
    return compare(model, quantized, outputs, data, len(data), threads)


def products(x: Array, y: Array) -> Products:
    """The inner products that cosine and signal-to-noise ratio follow from."""
    x, y = x.ravel(), y.ravel()
    difference = np.subtract(x, y, dtype=np.float64)
    xx, yy, xy = (
        float(np.einsum("i,i->", *both, dtype=np.float64)) for both in ((x, x), (y, y), (x, y))
    )
    return xx, yy, xy, float(difference @ difference)


def error_of(name: str, total: Sequence[float]) -> TensorError:
    """The error that inner products, summed over samples, tell of."""
    xx, yy, xy, noise = total
    norms = np.sqrt(xx * yy)
    cosine = xy / norms if norms > 0 else float(xx == yy)
    # Noise where there should be nothing, or that is no number, is the worst there is.
    sqnr = np.inf if noise == 0 else 10 * np.log10(xx / noise) if xx > 0 and noise > 0 else -np.inf
    return TensorError(name, float(cosine), float(sqnr))


def speedup(reference: Path, other: Path, sample: Sample) -> float | None:
    """Least time of `reference` over that of `other` on one thread, runs interleaved for about
    TIMED_SECONDS.

    Whatever else the machine does only adds to the others. None where `reference` takes less than
    LEAST_SECONDS: then it is not the kernels that decide.
    """
    sessions = open_session(reference), open_session(other)
    outputs = [output.name for output in sessions[0].get_outputs()]
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + TIMED_SECONDS
    while len(times[0]) < 3 or time.perf_counter() < end:
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            run(session, outputs, sample)
            taken.append(time.perf_counter() - start)
    reference_time, other_time = map(min, times)
    return reference_time / other_time if reference_time >= LEAST_SECONDS else None


def largest_difference(model: ir.Model, other: ir.Model) -> float:
    """Largest difference of any output on one random sample, relative to the largest value; runs
    both unoptimized.

    Dynamic dimensions are 1. Raises CalibError or ModelError where a model does not run on such a
    sample.
    """
    with saved(model) as left, saved(other) as right:
        sessions = [open_session(path, optimize=False) for path in (left, right)]
    names = [value.name or "" for value in model.graph.outputs]
    results = [run(session, names, synthetic_data(model, 1).sample(0)) for session in sessions]
    extents = [extent(results[0][name], results[1][name]) for name in names]
    return max(difference / (largest or 1) for largest, difference in extents)


def extent(x: Array, y: Array) -> tuple[float, float]:
    """The largest magnitude in `x`, and of the difference of the two; 0 if they are empty."""
    difference = np.subtract(x, y, dtype=np.float64)
    return float(np.abs(x.astype(np.float64)).max(initial=0)), float(
        np.abs(difference).max(initial=0)
    )
