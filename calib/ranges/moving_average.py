"""MOVING_AVERAGE and RANGE_ABS_MAX: from the extremes of each sample, by sample index."""

from __future__ import annotations

import numpy as np

from calib.affine import Range
from calib.ranges.spec import RangeSpec, within_data
from calib.stats import TensorStats


def moving_average(stats: TensorStats, spec: RangeSpec) -> Range:
    """Exponential moving averages of the samples' minima and maxima, starting from the first
    sample.

    m_0 = x_0, m_t = (1 - c) * m_(t-1) + c * x_t with c the averaging constant: Jacob et al. 2018,
    section 3.1, and PyTorch's MovingAverageMinMaxObserver. The order is that of the sample indices,
    whatever order they were taken in.
    """
    lows, highs = stats.sample_extremes.astype(np.float64).T
    c = spec.averaging_constant
    weights = (1 - c) ** np.arange(lows.size - 1, -1, -1.0)
    weights[1:] *= c
    return within_data(
        stats,
        float((weights * lows).sum()),
        float((weights * highs).sum()),
    )


def range_abs_max(stats: TensorStats, spec: RangeSpec) -> Range:
    """[-T, T], as far as the data reaches, with T the largest magnitude in the last `window`
    samples.

    PaddlePaddle's fake_quantize_range_abs_max, whose window is 10,000 steps too.
    """
    threshold = float(np.abs(stats.sample_extremes[-spec.window :]).max())
    return within_data(stats, -threshold, threshold)
