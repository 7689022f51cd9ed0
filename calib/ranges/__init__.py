"""Range methods: which interval of the reals a tensor's integer codes should cover. One method a file, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from calib.affine import Range
from calib.ranges.max_min import max_min
from calib.ranges.spec import RangeSpec
from calib.stats import TensorStats

__all__ = ["RANGE_METHODS", "RangeMethod", "RangeSpec", "range_of"]


@dataclass(frozen=True)
class RangeMethod:
    """A method's name in a config, the function (lo, hi) of statistics, and what these statistics must hold."""

    name: str
    function: Callable[[TensorStats, RangeSpec], tuple[float, float]]
    needs_histogram: bool = False
    needs_samples: bool = False

    def new_stats(self) -> TensorStats:
        """Empty statistics that hold what this method needs."""
        return TensorStats(self.needs_histogram, self.needs_samples)


RANGE_METHODS = {
    method.name: method
    for method in (
        RangeMethod("MAX_MIN", max_min),
    )
}  # fmt: skip


def range_of(name: str, stats: TensorStats, spec: RangeSpec) -> Range:
    """The interval that method `name` chooses: float64 scalars, within the data and containing 0.

    Statistics without any finite value give (0, 0). KeyError for an unknown name; ValueError for statistics that lack
    what the method needs.
    """
    lo, hi = RANGE_METHODS[name].function(stats, spec) if stats.count else (0.0, 0.0)
    lo, hi = max(lo, stats.lo), min(hi, stats.hi)
    return Range(np.array(min(lo, 0.0)), np.array(max(hi, 0.0)))
