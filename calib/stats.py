"""Streaming statistics of one tensor, the same to the bit for any batch size, sample order, grouping or worker count.

The histogram needs one pass only. Its bin width is a power of two, the finest for which the largest magnitude fits, and
bin i holds the values of [i * width, (i + 1) * width). When the magnitude grows, whole groups of bins merge, and since
floor(floor(x / w) / 2) = floor(x / 2w), and dividing by a power of two is exact, the final counts depend on the values
alone. Counts are int64 and there are no floating point sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from calib import CalibError
from calib.affine import Array

# Bins on each side of zero: the largest magnitude fills between half of them and all of them.
SIDE_BITS = 13
SIDE = 1 << SIDE_BITS
# 2 ** 126 is the largest inverse width that float32 still holds.
LEAST_EXPONENT = -126
# Small enough that the temporaries of one block stay in the processor's cache.
BLOCK = 1 << 14


@dataclass(frozen=True)
class Histogram:
    """Counts of the finite values: `counts[i]` of them lie in [edges[i], edges[i + 1]); no edge bin is empty.

    `counts` is int64 of shape (bins,); bin i starts at (first + i) * width. `zeros` of the values are exactly 0.
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
        """`counts` without the values that are exactly 0, which every quantization reproduces exactly."""
        counts = self.counts.copy()
        if self.zeros:
            counts[-self.first] -= self.zeros
        return counts

    def magnitudes(self) -> Histogram:
        """The histogram of |x|."""
        split = min(max(-self.first, 0), self.counts.size)
        below, above = self.counts[:split][::-1], self.counts[split:]
        near_below, near_above = -(self.first + split), self.first + split
        size = max(near_below + below.size if below.size else 0, near_above + above.size if above.size else 0)
        counts = np.zeros(size, np.int64)
        counts[near_below : near_below + below.size] += below
        counts[near_above : near_above + above.size] += above
        return Histogram(counts, 0, self.width, self.zeros)
