"""AUTO: for each tensor, the method that serves it best."""

from __future__ import annotations

from calib.affine import Range
from calib.ranges.kl import kl
from calib.ranges.max_min import max_min
from calib.ranges.mse import mse, squared_error
from calib.ranges.percentile import percentile
from calib.ranges.removal_outlier import removal_outlier
from calib.ranges.spec import RangeSpec
from calib.stats import TensorStats

# On ties, the first.
CANDIDATES = (max_min, removal_outlier, percentile, kl, mse)


def auto(stats: TensorStats, spec: RangeSpec) -> Range:
    """The range, of those of the other methods, with the least mean squared error measured on the
    histogram.
    """
    histogram = stats.histogram()
    ranges = [method(stats, spec) for method in CANDIDATES]
    return min(
        ranges,
        key=lambda span: float(squared_error(histogram, spec.qparams(span))),
    )
