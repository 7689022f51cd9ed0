"""What of an output is judged by itself: slices whose values are of another size than those beside
them, as boxes and scores in one tensor are, and the few values that stand out, as answers do from
background.

Both are found from the float model alone, a sample at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calib.affine import Array
from converter.measure.errors import Few, TensorError, error_of, tally

# Values of another kind are so many times as large in every sample. Shares of a whole (a softmax'
# classes, a detector's scores) are of one kind, and rare if their mean is so much below the peak.
FACTOR = 16.0
# An axis is cut where an index has so many values in a sample, among so many indices, and into so
# few slices: else it tells of places or samples, not of kinds.
LEAST_VALUES = 8
MOST_INDICES = 1024
MOST_SLICES = 8
# The values that stand out most, but so many at least, of ten times as many.
SHARE = 1e-3
LEAST_FEW = 16
MANY = 10
# Values of a sample that tell its median, spread by Knuth's multiplier over all positions.
MOST_DRAWN = 16384
STRIDE = 2654435761
# What stands out less, relative to what it stands out from, is nothing that eight bits would hold.
QUIET = 0.01
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Slice:
    """Indices `start` to `end` of an axis."""

    axis: int
    start: int
    end: int

    def of(self, x: Array) -> Array:
        """That part of an output."""
        before = (slice(None),) * self.axis
        return x[(*before, slice(self.start, self.end))]

    def __str__(self) -> str:
        return f"slice {self.start}:{self.end} of axis {self.axis}"


@dataclass(frozen=True)
class _Run:
    """Neighbouring indices of an axis: the magnitudes of each index in each sample, `mean` and
    `peak` (indices, samples), and whether all values lie from 0 to 1.
    """

    start: int
    end: int
    mean: Array
    peak: Array
    shares: bool

    @property
    def rare(self) -> bool:
        """Whether few of the values are anything but background."""
        return bool(self.mean.mean() * FACTOR < self.peak.max())

    def with_next(self, other: _Run) -> _Run:
        """Both as one."""
        mean = np.vstack([self.mean, other.mean])
        peak = np.vstack([self.peak, other.peak])
        shares = self.shares and other.shares
        return _Run(self.start, other.end, mean, peak, shares)


def judged_apart(name: str, pairs: Sequence[Pair]) -> Iterator[TensorError]:
    """The errors of an output's slices, by its values in both models for each sample; none where
    it is of one kind.
    """
    for part in slices_of([x for x, _ in pairs]):
        own = [(part.of(x), part.of(y)) for x, y in pairs]
        tallies = [tally(*pair) for pair in own]
        error = error_of(name, np.sum(tallies, axis=0))
        yield replace(error, where=str(part), few=few_of(own))


def comparable(x: object, y: object) -> bool:
    """Whether both are arrays of one shape whose values may be of several sizes."""
    if not (isinstance(x, np.ndarray) and isinstance(y, np.ndarray)):
        return False
    return bool(x.shape == y.shape and x.dtype.kind == y.dtype.kind == "f")


# --- slices


def slices_of(samples: Sequence[Array]) -> list[Slice]:
    """The slices of an output by its values in every sample, those of the axis that has the
    fewest; none where it is of one kind.
    """
    ranks = {x.ndim for x in samples}
    axes = range(ranks.pop()) if len(ranks) == 1 else range(0)
    cuts = [_cut(samples, axis) for axis in axes]
    useful = [cut for cut in cuts if 1 < len(cut) <= MOST_SLICES]
    return min(useful, key=len, default=[])


def _cut(samples: Sequence[Array], axis: int) -> list[Slice]:
    return [Slice(axis, run.start, run.end) for run in _runs(samples, axis)]


def _runs(samples: Sequence[Array], axis: int) -> list[_Run]:
    """Neighbours of one kind together, from left to right."""
    sizes = {x.shape[axis] for x in samples}
    seen = [x for x in samples if x.size >= LEAST_VALUES * x.shape[axis] > 0]
    if len(sizes) > 1 or not seen or max(sizes) > MOST_INDICES:
        return []
    runs: list[_Run] = []
    for run in _indices(seen, axis):
        grown = run
        while runs and not _apart(runs[-1], grown):
            grown = runs.pop().with_next(grown)
        runs.append(grown)
        if len(runs) > 2 and _stands_alone(*runs[-3:]):
            left, alone, right = runs[-3:]
            runs[-3:] = [left.with_next(alone).with_next(right)]
    return runs


def _stands_alone(left: _Run, run: _Run, right: _Run) -> bool:
    """Whether one index between others of one kind is an exception, as a dead channel, and no
    kind.
    """
    return run.end - run.start == 1 and not _apart(left, right)


def _indices(samples: Sequence[Array], axis: int) -> Iterator[_Run]:
    """Every index of an axis by itself."""
    means, peaks, lows = [], [], []
    for x in samples:
        others = tuple(k for k in range(x.ndim) if k != axis)
        finite = np.nan_to_num(x.astype(np.float32), posinf=0.0, neginf=0.0)
        size = np.abs(finite)
        means.append(size.mean(axis=others, dtype=np.float64))
        peaks.append(size.max(axis=others))
        lows.append(finite.min(axis=others))
    mean = np.transpose(means)
    peak = np.transpose(peaks).astype(np.float64)
    shares = (np.min(lows, axis=0) >= 0) & (peak.max(axis=1) <= 1)
    for k in range(len(mean)):
        yield _Run(k, k + 1, mean[[k]], peak[[k]], bool(shares[k]))


def _apart(left: _Run, right: _Run) -> bool:
    """Whether two neighbours are of different kinds.

    A share that never comes near others, as that of a class or place without an object, is none of
    its own.
    """
    if not _outdone(left.mean, right.mean):
        return False
    louder = _outdone(
        left.peak.max(axis=0),
        right.peak.max(axis=0),
    )
    differ = left.rare != right.rare
    if left.shares and right.shares:
        return differ and not louder
    return differ or louder


def _outdone(left: Array, right: Array) -> bool:
    """Whether every index of one is FACTOR times as large as all of the other, in every sample."""
    left_least, left_most = _bounds(left)
    right_least, right_most = _bounds(right)
    heard = (left_most > 0) & (right_most > 0)
    left_louder = left_least >= FACTOR * right_most
    right_louder = right_least >= FACTOR * left_most
    alike = left_louder[heard].all() or right_louder[heard].all()
    return bool(heard.any() and alike)


def _bounds(sizes: Array) -> tuple[Array, Array]:
    """The least and the greatest of `sizes` above 0 in every sample; infinity and 0 where none is
    above.
    """
    rows = np.atleast_2d(sizes)
    heard = rows > 0
    least = rows.min(axis=0, initial=np.inf, where=heard)
    most = rows.max(axis=0, initial=0.0, where=heard)
    return least, most


# --- values that stand out


def few_of(pairs: Sequence[Pair]) -> Few | None:
    """How alike the SHARE of values are that lie farthest from the float model's median in either
    model, measured from there; None where nothing stands out from it, or no value is one of many.
    """
    typical = [_typical(x) for x, _ in pairs]
    count = sum(each for _, each in typical)
    if count < MANY * LEAST_FEW:
        return None
    middle = float(np.nanmedian([median for median, _ in typical]))
    most = max(LEAST_FEW, math.ceil(SHARE * count))
    left, right, energy = _farthest(pairs, middle, most)
    error = error_of("", tally(left, right))
    held = float(np.dot(left, left))
    if not (QUIET * middle) ** 2 * left.size < held < math.inf:
        return None
    return Few(error.cosine, error.sqnr_db, min(held / energy, 1.0))


def _typical(x: Array) -> tuple[float, int]:
    """The median of a sample's finite values, of a large one by some of them, and their number."""
    count = int(np.count_nonzero(np.isfinite(x)))
    drawn = x.ravel()
    if x.size > MOST_DRAWN:
        drawn = drawn[np.arange(MOST_DRAWN) * STRIDE % x.size]
    drawn = drawn[np.isfinite(drawn)]
    return float(np.median(drawn)) if drawn.size else np.nan, count


def _farthest(pairs: Sequence[Pair], middle: float, most: int) -> tuple[Array, Array, float]:
    """What both models have where either is farthest from `middle`, and the sum of all squares of
    the float model, measured from there.
    """
    energy = 0.0
    left = right = height = np.zeros(0, np.float32)
    for x, y in pairs:
        known = np.isfinite(x)
        a = np.subtract(x[known], middle, dtype=np.float32)
        b = np.subtract(y[known], middle, dtype=np.float32)
        energy += float(np.dot(a, a))
        far = np.maximum(np.abs(a), np.abs(b))
        # Only what is farther than the least of those known; what is no number is.
        least = height.min() if height.size == most else -1
        new = ~(far <= least)
        left = np.concatenate([left, a[new]])
        right = np.concatenate([right, b[new]])
        height = np.concatenate([height, far[new]])
        if height.size > most:
            kept = np.argpartition(height, -most)[-most:]
            left = left[kept]
            right = right[kept]
            height = height[kept]
    return left, right, energy
