"""What a range method is told besides the statistics, and the bounds of what it may answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.affine import IntFormat, QParams, Range, qparams_of
from calib.stats import TensorStats


@dataclass(frozen=True)
class RangeSpec:
    """The integer format a range is for, how its parameters will be made of it, and the options of
    the methods.

    `outlier_ratio` is the part of the values REMOVAL_OUTLIER drops at each end; `percentile` (0 to
    100) that of the magnitudes PERCENTILE keeps; `averaging_constant` (0 to 1) the weight of a new
    sample in MOVING_AVERAGE; `window` the number of last samples RANGE_ABS_MAX looks at.
    """

    format: IntFormat
    symmetric: bool
    power_of_two: bool = False
    outlier_ratio: float = 1e-4
    percentile: float = 99.999
    averaging_constant: float = 0.01
    window: int = 10_000

    def qparams(self, span: Range) -> QParams:
        """The parameters that `span` leads to."""
        return qparams_of(span, self.format, self.symmetric, power_of_two=self.power_of_two)


def within_data(stats: TensorStats, lo: float, hi: float) -> Range:
    """The part of [lo, hi] that the data reaches, with zero: every code outside the data would be
    lost.
    """
    return Range(
        np.array(min(max(lo, stats.lo), 0.0)),
        np.array(max(min(hi, stats.hi), 0.0)),
    )
