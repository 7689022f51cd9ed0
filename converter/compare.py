"""Float and quantized model side by side: how far each tensor, and the outputs, are from what they
were.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime import InferenceSession

from calib import CalibError
from calib.affine import Array
from calib.samples import Dataset
from calib.session import Sample, open_session, over_samples, run
from converter.data import synthetic_data
from converter.dimensions import name_apart, shared_names, told_apart
from converter.errors import ModelError
from converter.exact import runnable
from converter.model import saved

TIMED_SECONDS, LEAST_SECONDS = 0.1, 1e-3
# What two tensors x and y have in common, numbers that sum up over samples: the inner products
# xx, yy, xy and that of the difference with itself, how many values they are of, how many are left
# out as x is not finite there, and 1 where the two cannot be compared.
Tally = tuple[float, ...]
SAME, APART = (0.0,) * 7, (0.0,) * 6 + (1.0,)


@dataclass(frozen=True)
class TensorError:
    """How a quantized tensor differs from the float one over all samples compared.

    `compared` is the number of values, `left_out` that of values that are not finite in the float
    model, `apart` that of samples in which the two have other shapes, or other texts.
    """

    name: str
    cosine: float
    sqnr_db: float
    compared: int = 1
    left_out: int = 0
    apart: int = 0


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
    with runnable(reference, tensors) as first, runnable(other, tensors.values()) as second:
        sessions = open_session(first), open_session(second)

    def step(index: int) -> Array:
        sample = data.sample(index)
        left = run(sessions[0], list(tensors), sample)
        right = run(sessions[1], list(tensors.values()), sample)
        return np.array(
            [tally(left[name], right[counterpart]) for name, counterpart in tensors.items()]
        )

    sums = sum(over_samples(min(count, len(data)), step, threads))
    return [error_of(name, total) for name, total in zip(tensors, np.asarray(sums), strict=True)]


def output_errors(
    model: ir.Model, quantized: ir.Model, data: Dataset, threads: int
) -> list[TensorError]:
    """What the outputs lost over all samples."""
    outputs = {value.name or "": value.name or "" for value in model.graph.outputs}
    return compare(model, quantized, outputs, data, len(data), threads)


def tally(x: object, y: object) -> Tally:
    """What two tensors, or outputs of other kinds (texts, sequences, maps), have in common."""
    if not (_is_numeric(x) and _is_numeric(y)):
        return SAME if _same(x, y) else APART
    left, right = np.asarray(x), np.asarray(y)
    return APART if left.shape != right.shape else _tally_of_values(left.ravel(), right.ravel())


def _tally_of_values(x: Array, y: Array) -> Tally:
    finite = np.isfinite(x)
    left_out = x.size - int(np.count_nonzero(finite))
    if left_out:
        x, y = x[finite], y[finite]
    if not np.isfinite(y).all():
        # Noise without bounds, which no other sample makes up for.
        return (
            float(np.square(x, dtype=np.float64).sum()),
            np.inf,
            0.0,
            np.inf,
            x.size,
            left_out,
            0.0,
        )
    difference = np.subtract(x, y, dtype=np.float64)
    pairs = (x, x), (y, y), (x, y)
    xx, yy, xy = (float(np.einsum("i,i->", *both, dtype=np.float64)) for both in pairs)
    return xx, yy, xy, float(difference @ difference), x.size, left_out, 0.0


def _is_numeric(x: object) -> bool:
    return isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "fiub"


def _same(x: object, y: object) -> bool:
    """Whether two outputs that are no numbers hold the same."""
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return np.array_equal(x, y)
    return bool(x == y)


def error_of(name: str, total: Iterable[float]) -> TensorError:
    """The error that a tally, summed over samples, tells of."""
    xx, yy, xy, noise, *counts = map(float, total)
    norms = np.sqrt(xx * yy) if xx else 0.0
    cosine = xy / norms if norms > 0 else float(xx == yy)
    # Noise where there should be nothing is the worst there is.
    ratio = xx / noise if noise else np.inf
    sqnr = 10 * np.log10(ratio) if ratio > 0 else -np.inf
    return TensorError(name, float(cosine), float(sqnr), *map(int, counts))


def worst_of(errors: Iterable[TensorError]) -> TensorError | None:
    """The one with the least cosine similarity of those that could be compared."""
    return min((e for e in errors if e.compared), key=lambda error: error.cosine, default=None)


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
    sample = synthetic_data(model, 1).sample(0)
    before, after = (run(session, names, sample) for session in sessions)
    extents = [extent(before[name], after[name]) for name in names]
    return max((difference / (largest or 1) for largest, difference in extents), default=0.0)


def independent_names(model: ir.Model) -> set[str]:
    """The names that several dimensions of inputs share without need: the model runs on a random
    sample in which they differ.
    """
    shared = shared_names(model)
    if not shared:
        return set()
    name_apart(apart := model.clone(), shared)
    try:
        with saved(apart) as path:
            session = open_session(path, optimize=False)
    except CalibError:
        return set()
    return {name for name in shared if _runs(session, told_apart(model, name))}


def _runs(session: InferenceSession, model: ir.Model) -> bool:
    try:
        outputs = [output.name for output in session.get_outputs()]
        return bool(run(session, outputs, synthetic_data(model, 1).sample(0)))
    except (CalibError, ModelError):
        return False


def extent(x: object, y: object) -> tuple[float, float]:
    """The largest finite magnitude in `x`, and of the difference of the two; 0 if they are empty.

    The difference is infinite where they have other shapes, other texts or other values that are
    not finite.
    """
    if not (_is_numeric(x) and _is_numeric(y)):
        return 0.0, 0.0 if _same(x, y) else np.inf
    left, right = (np.asarray(each, np.float64) for each in (x, y))
    if left.shape != right.shape:
        return 0.0, np.inf
    finite = np.isfinite(left) & np.isfinite(right)
    if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
        return 0.0, np.inf
    left, right = left[finite], right[finite]
    return float(np.abs(left).max(initial=0)), float(np.abs(left - right).max(initial=0))
