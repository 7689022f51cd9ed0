"""MSE: the range with the least squared error after quantization."""

from __future__ import annotations

import numpy as np

from calib.affine import Array, QParams, Range
from calib.ranges.spec import RangeSpec, within_data
from calib.stats import Histogram, TensorStats

# Thresholds tried first, as parts of the largest magnitude: four to each factor of two, down to 1 /
# 4096.
FIRST_FACTORS = 2.0 ** -np.arange(0, 12.01, 1 / 4)
# Then each end is moved by powers of two around the best so far, in rounds of (step of the
# exponent, steps each way). The first round is wide because with few codes the error has several
# valleys, one for each zero point.
ROUNDS = ((1 / 4, 4), (1 / 8, 2), (1 / 16, 2), (1 / 32, 2), (1 / 64, 2))


def mse(stats: TensorStats, spec: RangeSpec) -> Range:
    """The range of least mean squared error, rounding and clipping together, in the given format
    with its zero point.

    The search is over thresholds on |x| first, then over both ends, where both matter. The idea is
    that of Banner et al., "Post training 4-bit quantization of convolutional networks for
    rapid-deployment" (2019), section 3; the error is measured on the histogram instead of following
    from an assumed distribution.
    """
    threshold = max(-stats.lo, stats.hi) * FIRST_FACTORS
    lo, hi = _best(stats, spec, -threshold, threshold)
    for step, reach in ROUNDS:
        # Not moving comes first, so that on ties nothing moves.
        factors = 2.0 ** (step * np.array(sorted(range(-reach, reach + 1), key=abs)))
        if spec.symmetric or lo == 0 or hi == 0:
            lo, hi = _best(
                stats,
                spec,
                -max(-lo, hi) * factors,
                max(-lo, hi) * factors,
            )
        else:
            lo, hi = _best(
                stats,
                spec,
                lo * np.repeat(factors, factors.size),
                hi * np.tile(factors, factors.size),
            )
    return within_data(stats, lo, hi)


def _best(stats: TensorStats, spec: RangeSpec, lo: Array, hi: Array) -> tuple[float, float]:
    """The pair of `lo` and `hi`, each of shape (n,), with the least error, cut to where the data
    reaches.
    """
    candidates = Range(
        np.minimum(np.maximum(lo, stats.lo), 0.0),
        np.maximum(np.minimum(hi, stats.hi), 0.0),
    )
    best = int(np.argmin(squared_error(stats.histogram(), spec.qparams(candidates))))
    return float(candidates.lo[best]), float(candidates.hi[best])


def squared_error(histogram: Histogram, q: QParams) -> Array:
    """The mean squared error of quantizing the values with each scale of `q`: float64 of the same
    shape.

    Exact for values spread evenly within each bin, whatever the step. Values that are exactly 0
    have no error.
    """
    counts = histogram.nonzero_counts
    # The sum of count * (F(upper edge) - F(lower edge)), arranged by edges.
    weights = np.diff(-counts, prepend=0, append=0).astype(np.float64)
    used = np.flatnonzero(weights)
    edges, weights = histogram.edges[used], weights[used]
    sums = [
        scale**3
        * _error_integral(
            edges / scale,
            q.format.qmin - zero_point,
            q.format.qmax - zero_point,
            weights,
        )
        for scale, zero_point in zip(
            q.scale.ravel().tolist(), q.zero_point.ravel().tolist(), strict=True
        )
    ]
    return np.array(sums).reshape(q.scale.shape) / (histogram.width * float(histogram.counts.sum()))


def _error_integral(t: Array, qmin: int, qmax: int, weights: Array) -> float:
    """The weighted sum of F(t), an antiderivative of the squared error of rounding to whole numbers
    from qmin to qmax.

    With n the number t is rounded to and r = t - n, F = n / 12 + r ** 3 / 3: continuous, and right
    where t is clipped.
    """
    n = np.clip(np.rint(t), qmin, qmax)
    r = t - n
    # Not a dot product: the order of its sums depends on the number of threads.
    return float(np.einsum("i,i->", n / 12 + r * r * r / 3, weights))
