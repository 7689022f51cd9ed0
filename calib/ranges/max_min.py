"""MAX_MIN: everything that was observed."""

from __future__ import annotations

from calib.affine import Range
from calib.ranges.spec import RangeSpec, within_data
from calib.stats import TensorStats


def max_min(stats: TensorStats, spec: RangeSpec) -> Range:
    """The extremes of all samples: nothing is clipped, so one outlier costs everything else
    resolution.
    """
    return within_data(stats, stats.lo, stats.hi)
