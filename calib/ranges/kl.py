"""KL: the threshold at which the quantized distribution says most about the original one."""

from __future__ import annotations

import numpy as np

from calib.affine import Array, Range
from calib.ranges.spec import RangeSpec, within_data
from calib.stats import Histogram, TensorStats

BINS = 2048


def kl(stats: TensorStats, spec: RangeSpec) -> Range:
    """[-T, T], as far as the data reaches, with the T of least Kullback-Leibler divergence; the
    least such T on ties.

    Szymon Migacz, "8-bit Inference with TensorRT" (GTC 2017, S7310): 2048 bins of |x| over [0,
    max|x|], T between bins `levels` and 2048. Values that are exactly 0 take no part: they cost
    nothing at any T. Beyond 8 bits there are as many levels as bins and nothing is clipped.
    """
    top = max(-stats.lo, stats.hi)
    counts = _rebinned(stats.histogram().magnitudes(), top)
    if not counts.any():
        return within_data(stats, stats.lo, stats.hi)
    levels = _levels(stats, spec)
    best = levels + int(np.argmin(divergences(counts, levels)))
    threshold = (best + 0.5) * top / BINS
    return within_data(stats, -threshold, threshold)


def _levels(stats: TensorStats, spec: RangeSpec) -> int:
    """How many of the format's codes cover [0, max|x|] when the range is the data's.

    That is half of them (128 of 8 bits, as in S7310) for a symmetric range or data as large below
    zero as above, and all of them for an asymmetric range over data of one sign, such as a Relu's.
    """
    lo = min(stats.lo, 0.0)
    hi = max(stats.hi, 0.0)
    share = 0.5 if spec.symmetric else max(-lo, hi) / (hi - lo)
    return min(round((1 << spec.format.bits) * share), BINS)


def _rebinned(magnitudes: Histogram, top: float) -> Array:
    """The non-zero values' counts in BINS equal bins over [0, top]; a finer bin across an edge is
    shared out evenly.
    """
    counted = np.cumsum(magnitudes.nonzero_counts)
    cumulative = np.concatenate(([0], counted))
    edges = np.minimum(magnitudes.edges, top)
    wanted = np.linspace(0, top, BINS + 1)
    below = np.rint(np.interp(wanted, edges, cumulative))
    return np.diff(below)


def divergences(counts: Array, levels: int) -> Array:
    """KL(P || Q) in nats for each cut i = levels, ..., counts.size: float64 of shape (counts.size -
    levels + 1,).

    P is counts[:i] with everything beyond added to its last bin. Q is counts[:i] merged into
    `levels` runs of bins, bin k going to run floor(k * levels / i), each run then spread evenly
    over those of its bins that are not empty in P; infinite where Q has nothing and P has
    something. `counts` are whole numbers.
    """
    cuts = np.arange(levels, counts.size + 1)
    total = np.concatenate(([0], np.cumsum(counts)))
    filled = np.concatenate(([0], np.cumsum(counts > 0)))
    runs = np.arange(levels + 1)
    starts = -(-runs * cuts[:, None] // levels)
    mass = np.diff(total[starts])
    bins = np.diff(filled[starts])
    last = counts[cuts - 1]
    beyond = total[-1] - total[cuts]
    bins[:, -1] += (last == 0) & (beyond > 0)
    lost = (beyond > 0) & (mass[:, -1] == 0)
    summed = np.cumsum(_x_log_x(counts))
    before = np.concatenate(([0], summed))
    p_log_p = before[cuts - 1] + _x_log_x(last + beyond)
    in_runs = (_x_log_x(mass) - mass * _log(bins)).sum(axis=1)
    in_last = _log(mass[:, -1]) - _log(bins[:, -1])
    p_log_q = in_runs + beyond * in_last
    whole = total[-1]
    divergence = (p_log_p - p_log_q) / whole + _log(total[cuts]) - _log(whole)
    return np.where(lost, np.inf, divergence)


def _log(counts: Array) -> Array:
    """The logarithm of whole numbers; 0 for 0, which is only ever multiplied by 0."""
    return np.log(np.maximum(counts, 1))


def _x_log_x(counts: Array) -> Array:
    return counts * _log(counts)
