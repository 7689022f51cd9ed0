"""Streaming statistics of one tensor, the same to the bit for any batch size, sample order,
grouping or worker count.

The histogram needs one pass only. Its bin width is a power of two, the finest for which the largest
magnitude fits, and bin i holds the values of [i * width, (i + 1) * width). When the magnitude
grows, whole groups of bins merge, and since floor(floor(x / w) / 2) = floor(x / 2w), and dividing
by a power of two is exact, the final counts depend on the values alone. Counts are int64 and there
are no floating point sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from calib import CalibError
from calib.affine import Array

# Bins on each side of zero: the largest magnitude reaches into the upper half of them.
SIDE_BITS = 13
SIDE = 1 << SIDE_BITS
# The width exponent of the smallest float32, 2 ** -149, which is where the grid starts.
LEAST_EXPONENT = -148 - SIDE_BITS
# A row of extremes widens to the smaller lo and the smaller -hi.
SIGNS = np.array([1, -1], np.float32)
# Values binned at a time: small enough that the temporaries stay in the processor's cache.
BLOCK = 1 << 15


@dataclass(frozen=True)
class Histogram:
    """Counts of the finite values: `counts[i]` of them lie in [edges[i], edges[i + 1]); the end
    bins are not empty.

    `counts` is int64 of shape (bins,); bin i starts at (first + i) * width. `zeros` of the values
    are exactly 0.
    """

    counts: Array
    first: int
    width: float
    zeros: int

    @property
    def edges(self) -> Array:
        """The bin edges: float64 of shape (bins + 1,), exact multiples of the width."""
        return (self.first + np.arange(self.counts.size + 1)) * self.width

    @property
    def nonzero_counts(self) -> Array:
        """`counts` without the values that are exactly 0, which every quantization keeps as they
        are.
        """
        counts = self.counts.copy()
        if self.zeros:
            counts[-self.first] -= self.zeros
        return counts

    def magnitudes(self) -> Histogram:
        """The histogram of |x|, from bin 0 on (-x of a bin's lower edge counts in the bin below
        that edge).
        """
        index = self.first + np.arange(self.counts.size)
        counts = np.bincount(
            np.where(index < 0, -1 - index, index),
            self.counts,
        )
        return Histogram(counts.astype(np.int64), 0, self.width, self.zeros)

    def quantile(self, fraction: float) -> float:
        """The value below which `fraction` (0 to 1) of the values lie, linear within a bin."""
        cumulative = np.cumsum(self.counts)
        rank = fraction * float(cumulative[-1])
        i = min(
            int(np.searchsorted(cumulative, rank)),
            self.counts.size - 1,
        )
        inside = (rank - float(cumulative[i] - self.counts[i])) / float(self.counts[i])
        return (self.first + i + inside) * self.width


def _exponent_for(magnitude: float) -> int:
    """The least k for which `magnitude` lies below SIDE * 2 ** k."""
    return math.frexp(magnitude)[1] - SIDE_BITS if magnitude else LEAST_EXPONENT


def _coarsened(counts: Array, steps: int) -> Array:
    """`counts` of bins 2 ** steps times as wide, still with zero in the middle."""
    # From SIDE_BITS steps on, every value lies in one of the two bins next to zero, whatever the
    # width.
    merged = counts.reshape(-1, 1 << min(steps, SIDE_BITS)).sum(axis=1)
    return np.pad(merged, SIDE - merged.size // 2)


class TensorStats:
    """Statistics of one tensor over a stream of samples, in memory that does not depend on their
    number.

    Values are taken as float32. NaN and infinite ones (a float64 too large for float32 included)
    are counted and left out of everything else. `count` is the number of finite values,
    `zero_count` that of exact zeros (0 without a histogram). `histogram=False` keeps the extremes
    only and is about 20 times as fast. `samples=True` also keeps the extremes of each sample, the
    one exception to constant memory: 8 bytes a sample.
    """

    def __init__(self, histogram: bool, samples: bool = False) -> None:
        self.count = self.nan_count = self.inf_count = self.zero_count = 0
        self._lo, self._hi = math.inf, -math.inf
        self._exponent = LEAST_EXPONENT
        self._counts = np.zeros(2 * SIDE, np.int64) if histogram else None
        self._samples = np.empty((0, 2), np.float32) if samples else None

    @property
    def lo(self) -> float:
        """The least finite value; 0 if there is none."""
        return self._lo if self.count else 0.0

    @property
    def hi(self) -> float:
        """The largest finite value; 0 if there is none."""
        return self._hi if self.count else 0.0

    @property
    def sample_extremes(self) -> Array:
        """The least and the largest finite value of each sample that has one: float32 of shape
        (samples, 2), in order.

        ValueError if they were not asked for.
        """
        if self._samples is None:
            msg = "these statistics were made without the extremes of each sample"
            raise ValueError(msg)
        return self._samples[self._samples[:, 0] <= self._samples[:, 1]]

    def histogram(self) -> Histogram:
        """The histogram of the finite values; ValueError if none was asked for or there are no such
        values.
        """
        if self._counts is None:
            msg = "these statistics were made without a histogram"
            raise ValueError(msg)
        if not self.count:
            msg = "there is no histogram without finite values"
            raise ValueError(msg)
        first, last = np.flatnonzero(self._counts)[[0, -1]].tolist()
        return Histogram(
            self._counts[first : last + 1].copy(),
            first - SIDE,
            2.0**self._exponent,
            self.zero_count,
        )

    def update(self, x: Array, index: int) -> None:
        """Take in `x`, an array of any shape, as sample number `index` or a part of it."""
        with np.errstate(over="ignore"):
            values: Array = np.asarray(x).astype(np.float32, copy=False).ravel()
        lo, hi = _extremes(values)
        if not math.isfinite(hi - lo):
            values = self._finite(values)
            lo, hi = _extremes(values)
        self.count += values.size
        if not values.size:
            return
        self._lo, self._hi = min(self._lo, lo), max(self._hi, hi)
        if self._samples is not None:
            self._samples = _widened(
                self._samples,
                index,
                np.array([[lo, hi]], np.float32),
            )
        if self._counts is not None:
            self.zero_count += values.size - int(np.count_nonzero(values))
            self._coarsen(_exponent_for(max(-lo, hi)))
            self._bin(values, lo)

    def merge(self, other: TensorStats) -> TensorStats:
        """The statistics of both streams together, a new object; ValueError if the two keep
        different things.
        """
        if (self._counts is None, self._samples is None) != (
            other._counts is None,
            other._samples is None,
        ):
            msg = "statistics that keep different things cannot be merged"
            raise ValueError(msg)
        merged = copy.deepcopy(self)
        merged.count += other.count
        merged.nan_count += other.nan_count
        merged.inf_count += other.inf_count
        merged.zero_count += other.zero_count
        merged._lo, merged._hi = min(self._lo, other._lo), max(self._hi, other._hi)
        if merged._samples is not None and other._samples is not None:
            merged._samples = _widened(merged._samples, 0, other._samples)
        if merged._counts is not None and other._counts is not None:
            merged._coarsen(other._exponent)
            merged._counts += _coarsened(other._counts, merged._exponent - other._exponent)
        return merged

    def to_arrays(self) -> dict[str, Array]:
        """Everything there is to know, as plain arrays for `from_arrays`."""
        totals = (
            self.count,
            self.nan_count,
            self.inf_count,
            self.zero_count,
            self._exponent,
        )
        arrays: dict[str, Array] = {"totals": np.array(totals, np.int64)}
        arrays["extremes"] = np.array([self._lo, self._hi], np.float32)
        if self._counts is not None:
            arrays["counts"] = self._counts.copy()
        if self._samples is not None:
            used = np.flatnonzero(self._samples[:, 0] <= self._samples[:, 1])
            arrays["samples"] = self._samples[: used[-1] + 1 if used.size else 0].copy()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> TensorStats:
        """The statistics that `to_arrays` made `arrays` of; CalibError if it cannot have made
        them.
        """
        stats = cls("counts" in arrays, "samples" in arrays)
        for name, like in stats.to_arrays().items():
            saved = arrays.get(name, np.empty(0))
            shape = (*saved.shape[:1], 2) if name == "samples" else like.shape
            if (saved.shape, saved.dtype) != (shape, like.dtype):
                msg = (
                    f"saved statistics hold no valid {name!r}; delete the file they come from "
                    "and calibrate again."
                )
                raise CalibError(msg)
        (
            stats.count,
            stats.nan_count,
            stats.inf_count,
            stats.zero_count,
            stats._exponent,
        ) = arrays["totals"].tolist()
        stats._lo, stats._hi = arrays["extremes"].tolist()
        if stats._counts is not None:
            stats._counts += arrays["counts"]
        if stats._samples is not None:
            stats._samples = arrays["samples"].copy()
        return stats

    def _finite(self, values: Array) -> Array:
        """The finite ones of `values`; the others are counted."""
        nans, infs = np.isnan(values), np.isinf(values)
        self.nan_count += int(np.count_nonzero(nans))
        self.inf_count += int(np.count_nonzero(infs))
        return values[~(nans | infs)]

    def _coarsen(self, exponent: int) -> None:
        """Widen the bins to 2 ** exponent, if they are narrower."""
        if self._counts is not None and exponent > self._exponent:
            self._counts = _coarsened(self._counts, exponent - self._exponent)
            self._exponent = exponent

    def _bin(self, values: Array, lo: float) -> None:
        """Count finite `values`, `lo` the least of them; in float64, where the division by the
        width is exact.
        """
        assert self._counts is not None
        inverse = np.float64(2.0**-self._exponent)
        first = min(0, math.floor(lo * inverse))
        for start in range(0, values.size, BLOCK):
            index = values[start : start + BLOCK] * inverse
            if first < 0:  # else the conversion below cuts off what floor would
                np.floor(index, out=index)
                index -= first
            counts = np.bincount(index.astype(np.intp))
            self._counts[first + SIDE : first + SIDE + counts.size] += counts


def _extremes(values: Array) -> tuple[float, float]:
    """The least and the largest of `values`, NaN if any is; inf and -inf of none."""
    # + 0.0 makes a minimum of -0.0, which would tell of the order of the values, 0.0.
    return float(values.min(initial=np.inf)) + 0.0, float(values.max(initial=-np.inf)) + 0.0


def _widened(samples: Array, first: int, others: Array) -> Array:
    """`samples`, rows of (lo, hi), with those from `first` on widened to contain `others`; new rows
    are empty.
    """
    end = first + len(others)
    if end > len(samples):
        # Doubles, so that growing costs little.
        grown = np.tile(
            np.array([np.inf, -np.inf], np.float32),
            (max(end, 2 * len(samples)), 1),
        )
        grown[: len(samples)] = samples
        samples = grown
    samples[first:end] = SIGNS * np.minimum(SIGNS * samples[first:end], SIGNS * others)
    return samples
