"""Range methods: which interval of the reals a tensor's integer codes should cover. One method a
file, one row each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from calib.affine import Range
from calib.ranges.auto import auto
from calib.ranges.kl import kl
from calib.ranges.max_min import max_min
from calib.ranges.moving_average import moving_average, range_abs_max
from calib.ranges.mse import mse, squared_error
from calib.ranges.percentile import percentile
from calib.ranges.removal_outlier import removal_outlier
from calib.ranges.spec import RangeSpec
from calib.stats import TensorStats

__all__ = ["RANGE_METHODS", "RangeMethod", "RangeSpec", "range_of", "squared_error"]


@dataclass(frozen=True)
class RangeMethod:
    """A method's name in a config, the function that chooses the range, and what it needs the
    statistics to hold.
    """

    name: str
    function: Callable[[TensorStats, RangeSpec], Range]
    needs_histogram: bool = False
    needs_samples: bool = False

    def new_stats(self) -> TensorStats:
        """Empty statistics that hold what this method needs."""
        return TensorStats(self.needs_histogram, self.needs_samples)


_METHODS = (
    RangeMethod("MAX_MIN", max_min),
    RangeMethod("KL", kl, needs_histogram=True),
    RangeMethod("REMOVAL_OUTLIER", removal_outlier, needs_histogram=True),
    RangeMethod("PERCENTILE", percentile, needs_histogram=True),
    RangeMethod("MSE", mse, needs_histogram=True),
    RangeMethod("MOVING_AVERAGE", moving_average, needs_samples=True),
    RangeMethod("RANGE_ABS_MAX", range_abs_max, needs_samples=True),
    RangeMethod("AUTO", auto, needs_histogram=True),
)
RANGE_METHODS = {method.name: method for method in _METHODS}


def range_of(method: RangeMethod, stats: TensorStats, spec: RangeSpec) -> Range:
    """The interval that `method` chooses: float64 scalars, within the data and containing 0.

    Statistics without any finite value give (0, 0); ValueError for statistics that lack what the
    method needs.
    """
    return method.function(stats, spec) if stats.count else Range(np.array(0.0), np.array(0.0))
