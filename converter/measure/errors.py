"""Float and quantized model side by side: how far each tensor, and the outputs, are from what they
were.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, starmap

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.affine import Array
from calib.intervals import ratio_interval
from calib.samples import Dataset
from calib.session import Sample, run
from calib.workers import over_samples
from converter.calibrate.data import synthetic_data
from converter.calibrate.runs import Opened, opened
from converter.errors import ModelError
from converter.graph.dimensions import name_apart, shared_names, told_apart

# Seconds of processor time that timing may take, and that a model takes at the least to be timed;
# runs of each; how narrow an interval is sought, and how wide one tells nothing.
TIMED_SECONDS, LEAST_SECONDS = 3.0, 1e-3
LEAST_RUNS, MOST_RUNS = 8, 400
NARROW, SURE = 1.06, 1.5
# A cosine similarity that is called a loss, also where all but few values are background, and dB of
# what stands out: its error is half as large.
LOST_COSINE, WRONG_COSINE, LOST_DB = 0.95, 0.5, 6.0
# What two tensors x and y have in common, numbers that sum up over samples: the inner products
# xx, yy, xy and that of the difference with itself over values that are finite in both, and the
# counts of a TensorError.
Tally = tuple[float, ...]
NOTHING, APART = (0.0,) * 9, (0.0,) * 8 + (1.0,)
# Of larger numbers, which float64 alone holds, there are no fourth powers: they are made smaller.
LARGEST = 1e75


@dataclass(frozen=True)
class Few:
    """The few values of a tensor that stand out: how alike they are, measured from the median they
    stand out from, and which `share` of all squared distances from it they hold.
    """

    cosine: float
    sqnr_db: float
    share: float

    @property
    def lost(self) -> bool:
        """Whether they miss half of their height, and may be on the background's side."""
        return self.sqnr_db < LOST_DB

    @property
    def decides(self) -> bool:
        """Whether all others are background, whose noise tells nothing."""
        return self.share > 0.5


@dataclass(frozen=True)
class TensorError:
    """How a quantized tensor differs from the float one over all samples compared.

    `compared` is the number of values and `lost` that of those among them which only one of the two
    has as a finite number, or which are other infinities. `infinite` is the number of values that
    are the same infinity in both, `undefined` that of those that are NaN in the float model, and
    `apart` that of samples in which the two have other shapes. Texts count as numbers do, 1 for the
    text and 0 for all others. `where` says which slice of the tensor it is, empty for all of it;
    `few` are the values that stand out, None where none do or nobody looked.
    """

    name: str
    cosine: float
    sqnr_db: float
    compared: int = 1
    lost: int = 0
    infinite: int = 0
    undefined: int = 0
    apart: int = 0
    where: str = ""
    few: Few | None = None

    @property
    def title(self) -> str:
        """Its name in quotes, and which slice it is."""
        return f"'{self.name}', {self.where}" if self.where else f"'{self.name}'"

    @property
    def ruined(self) -> bool:
        """Whether its few answers are lost, or its whole."""
        return bool(self.few and self.few.lost) or self.spoilt

    @property
    def spoilt(self) -> bool:
        """Whether its whole is lost: where few values decide, so much that no noise explains it."""
        return self.cosine < (WRONG_COSINE if self.few and self.few.decides else LOST_COSINE)

    @property
    def left_out(self) -> int:
        """How many values are not finite, and not lost."""
        return self.infinite + self.undefined


def errors_between(
    reference: Opened,
    other: Opened,
    data: Dataset,
    threads: int,
    *,
    tensors: Mapping[str, str] | None = None,
    count: int = sys.maxsize,
) -> list[TensorError]:
    """The error of each output over the first `count` samples, or of `tensors`, which map names of
    the one model to the other's.
    """
    pairs = tensors or {name: name for name in reference.outputs}

    def step(index: int) -> Array:
        sample = data.sample(index)
        left = reference.fetch(pairs, sample)
        right = other.fetch(pairs.values(), sample)
        return np.array([tally(left[name], right[there]) for name, there in pairs.items()])

    sums = sum(over_samples(min(count, len(data)), step, threads))
    return list(map(error_of, pairs, np.asarray(sums)))


def tally(x: object, y: object) -> Tally:
    """What two tensors, or outputs of other kinds (texts, sequences, maps), have in common."""
    if (pairs := side_by_side(x, y)) is None:
        return APART
    tallies = [_tally_of(left.ravel(), right.ravel()) for left, right in pairs]
    return tallies[0] if len(tallies) == 1 else tuple(np.sum([NOTHING, *tallies], axis=0).tolist())


def side_by_side(x: object, y: object) -> list[tuple[Array, Array]] | None:
    """The arrays of equal shapes that two outputs of the runtime consist of; None where the two are
    not built alike.

    A tensor is one array, as are the values of a map; a sequence holds those of its elements, and
    an optional output without a value none.
    """
    if isinstance(x, list) and isinstance(y, list):
        parts = [side_by_side(*both) for both in zip(x, y, strict=False)]
        built_alike = [pairs for pairs in parts if pairs is not None]
        return [*chain.from_iterable(built_alike)] if len(built_alike) == len(x) == len(y) else None
    if isinstance(x, dict) and isinstance(y, dict):
        same = x.keys() == y.keys()
        return side_by_side(*(np.array([z[k] for k in x]) for z in (x, y))) if same else None
    if x is None or y is None:
        return [] if x is y else None
    left, right = np.asarray(x), np.asarray(y)
    alike = left.shape == right.shape and _is_numeric(left) == _is_numeric(right)
    return [(left, right)] if alike else None


def _tally_of(x: Array, y: Array) -> Tally:
    if not _is_numeric(x):
        same, size = int(np.count_nonzero(x == y)), x.size
        return size, size, same, 2 * (size - same), size, 0, 0, 0, 0
    both = np.isfinite(x) & np.isfinite(y)
    lost = infinite = undefined = 0
    if not both.all():
        undefined = int(np.count_nonzero(np.isnan(x)))
        infinite = int(np.count_nonzero(~both & (x == y)))
        lost = x.size - int(np.count_nonzero(both)) - undefined - infinite
        x, y = x[both], y[both]
    if x.dtype == np.float64:
        largest = max(np.abs(each).max(initial=0) for each in (x, y))
        x, y = (x / largest, y / largest) if largest > LARGEST else (x, y)
    difference = np.subtract(x, y, dtype=np.float64)
    pairs = (x, x), (y, y), (x, y)
    xx, yy, xy = (float(np.einsum("i,i->", *each, dtype=np.float64)) for each in pairs)
    counts = x.size + lost, lost, infinite, undefined, 0
    return xx, yy, xy, float(difference @ difference), *counts


def _is_numeric(x: Array) -> bool:
    return x.dtype.kind in "fiub"


def error_of(name: str, total: Iterable[float]) -> TensorError:
    """The error that a tally, summed over samples, tells of.

    A value that was lost counts as one of average size in whose place there is something unrelated,
    and the same infinity as two equal values.
    """
    xx, yy, xy, noise, *counts = map(float, total)
    compared, lost, infinite = counts[:3]
    norms = np.sqrt(xx * yy) if xx else 0.0
    cosine = xy / norms if norms > 0 else float(xx == yy)
    if lost:
        cosine *= 1 - lost / (compared + infinite)
        noise += lost * xx / (compared - lost) if xx else np.inf
    # Noise where there should be nothing is the worst there is.
    ratio = xx / noise if noise else np.inf
    sqnr = 10 * np.log10(ratio) if ratio > 0 else -np.inf
    infinite, undefined, apart = map(int, counts[2:])
    return TensorError(
        name, float(cosine), float(sqnr), int(compared), int(lost), infinite, undefined, apart
    )


def worst_of(errors: Iterable[TensorError]) -> TensorError | None:
    """The one with the least cosine similarity of those that could be compared, ruined ones
    first.
    """
    compared = (error for error in errors if error.compared)
    return min(
        compared,
        key=lambda error: (not error.ruined, error.cosine),
        default=None,
    )


@dataclass(frozen=True)
class Speed:
    """How many times as fast a model is as another, with its 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the machine was quiet enough to tell."""
        return self.high <= SURE * self.low


def speedup(reference: Opened, other: Opened, sample: Sample) -> Speed | None:
    """The median processor time of `reference` over that of `other` on one thread.

    Runs are interleaved, until the interval of the ratio is within NARROW or TIMED_SECONDS are
    spent. Whatever else the machine does takes none of this time, and what it slows down both have.
    None where `reference` takes less than LEAST_SECONDS: then it is not the kernels that decide.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(MOST_RUNS):
        for model, taken in zip((reference, other), times, strict=True):
            start = time.thread_time()
            run(model.session, reference.outputs, sample)
            taken.append(time.thread_time() - start)
        if len(times[0]) >= LEAST_RUNS and _is_enough(times):
            break
    first, second = (sorted(taken[1:])[len(taken) // 2] for taken in times)
    if first < LEAST_SECONDS or not second:
        return None
    return Speed(
        first / second,
        *ratio_interval(times[0][1:], times[1][1:]),
    )


def _is_enough(times: tuple[list[float], list[float]]) -> bool:
    spent = sum(map(sum, times))
    if len(times[0]) % LEAST_RUNS and spent < TIMED_SECONDS:
        return False
    if spent >= TIMED_SECONDS or min(min(taken[1:]) for taken in times) <= 0:
        return True
    low, high = ratio_interval(
        times[0][1:],
        times[1][1:],
    )
    return high <= NARROW * low


def largest_difference(model: ir.Model, other: ir.Model) -> float:
    """Largest difference of any output on one random sample, relative to the largest value; runs
    both unoptimized.

    Dynamic dimensions are 1. Raises CalibError or ModelError where a model does not run on such a
    sample, or gives nothing that can be compared.
    """
    both = opened(model), opened(other)
    given = synthetic_data(model, 1).sample(0)
    # Roots and logarithms may want positive numbers.
    for sample in (given, {name: abs(x) for name, x in given.items()}):
        pairs = list(zip(*(each.answer(sample) for each in both), strict=True))
        errors = [error_of("", tally(*pair)) for pair in pairs]
        if any(error.compared or error.apart for error in errors):
            return max(
                difference / (largest or 1) for largest, difference in starmap(extent, pairs)
            )
    msg = "the outputs hold no finite value for random input."
    raise ModelError(msg)


def first_change(model: ir.Model, other: ir.Model, tolerance: float) -> ir.Node | None:
    """The first node of the main graph whose outputs differ by more than a share of their largest
    value, on the sample of `largest_difference`; None where no tensor that both have does.

    Raises CalibError where a model does not run.
    """
    known = {value.name for node in other.graph for value in node.outputs}
    nodes = [n for n in model.graph if n.outputs[0].name in known]
    names = [node.outputs[0].name or "" for node in nodes]
    sample = synthetic_data(model, 1).sample(0)
    x, y = (opened(each, names).fetch(names, sample) for each in (model, other))
    for node, name in zip(nodes, names, strict=True):
        largest, difference = extent(x[name], y[name])
        if not difference <= tolerance * (largest or 1):
            return node
    return None


def independent_names(model: ir.Model) -> set[str]:
    """The names that several dimensions of inputs share without need: the model runs on a random
    sample in which they differ.
    """
    shared = shared_names(model)
    if not shared:
        return set()
    name_apart(apart := model.clone(), shared)
    try:
        other = opened(apart)
    except CalibError:
        return set()
    return {name for name in shared if _runs(other, told_apart(model, name))}


def _runs(other: Opened, model: ir.Model) -> bool:
    try:
        return bool(other.answer(synthetic_data(model, 1).sample(0)))
    except (CalibError, ModelError):
        return False


def extent(x: object, y: object) -> tuple[float, float]:
    """The largest finite magnitude in `x`, and of the difference of the two; 0 if they are empty.

    The difference is infinite where they have other shapes, other texts or other values that are
    not finite.
    """
    if (pairs := side_by_side(x, y)) is None:
        return 0.0, np.inf
    largest, difference = np.max(
        [(0.0, 0.0), *(_extents(*both) for both in pairs)],
        axis=0,
    )
    return float(largest), float(difference)


def _extents(x: Array, y: Array) -> tuple[float, float]:
    if not _is_numeric(x):
        return 0.0, 0.0 if np.array_equal(x, y) else np.inf
    left, right = x.astype(np.float64), y.astype(np.float64)
    finite = np.isfinite(left) & np.isfinite(right)
    if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
        return 0.0, np.inf
    left, right = left[finite], right[finite]
    return float(np.abs(left).max(initial=0)), float(np.abs(left - right).max(initial=0))
