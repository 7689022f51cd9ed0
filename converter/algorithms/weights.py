"""Integer weights: one scale a channel, nearest rounding."""

from __future__ import annotations

import numpy as np

from calib.affine import Array, IntFormat, QParams, Range, qparams_of, quantize
from converter.plan import QuantizedWeight

# |bias| / scale stays below this share of int32, leaving room for what the products add.
BIAS_LIMIT = 2.0**30


def weight_range(weight: Array, axis: int | None) -> Range:
    """Extremes of a weight: scalars, or one pair a channel of `axis`."""
    others = tuple(i for i in range(weight.ndim) if axis is None or i != axis % weight.ndim)
    return Range(weight.min(axis=others).astype(np.float64), weight.max(axis=others).astype(np.float64))


def scale_floor(bias: Array | None, data_scale: float) -> Array | float:
    """The least weight scale a channel for which the int32 bias, of scale data_scale * weight scale, cannot overflow."""
    return 0.0 if bias is None else np.abs(bias.astype(np.float64)) / (data_scale * BIAS_LIMIT)


def weight_qparams(weight: Array, fmt: IntFormat, axis: int | None, floor: Array | float = 0.0) -> QParams:
    """Symmetric parameters that cover the weight, no scale below `floor`."""
    q = qparams_of(weight_range(weight, axis), fmt, symmetric=True, axis=axis)
    least = floor if axis is not None else np.max(floor)
    return QParams(np.maximum(q.scale, least).astype(np.float32), q.zero_point, fmt, axis)


def nearest(weight: Array, q: QParams) -> QuantizedWeight:
    """Every weight rounded to its nearest code."""
    return QuantizedWeight(quantize(weight, q), q)
