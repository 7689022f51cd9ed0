"""PERCENTILE: without the largest magnitudes."""

from __future__ import annotations

from calib.affine import Range
from calib.ranges.spec import RangeSpec, within_data
from calib.stats import TensorStats


def percentile(stats: TensorStats, spec: RangeSpec) -> Range:
    """[-T, T], as far as the data reaches, with T the given percentile of |x| over all samples.

    Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical
    Evaluation" (2020), section 3.2. Unlike REMOVAL_OUTLIER, it may clip one end alone: the end the
    large magnitudes are at.
    """
    threshold = stats.histogram().magnitudes().quantile(spec.percentile / 100)
    return within_data(stats, -threshold, threshold)
