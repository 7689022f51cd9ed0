"""REMOVAL_OUTLIER: without a small part of the values at each end."""

from __future__ import annotations

from calib.affine import Range
from calib.ranges.spec import RangeSpec, within_data
from calib.stats import TensorStats


def removal_outlier(stats: TensorStats, spec: RangeSpec) -> Range:
    """The quantiles `outlier_ratio` and 1 - `outlier_ratio` of the values of all samples together.

    MindSpore Lite averages the quantiles of each sample, which removes nothing from a tensor of
    under 10,000 values; pooling the samples removes the same part from every tensor.
    """
    histogram = stats.histogram()
    return within_data(
        stats,
        histogram.quantile(spec.outlier_ratio),
        histogram.quantile(1 - spec.outlier_ratio),
    )
