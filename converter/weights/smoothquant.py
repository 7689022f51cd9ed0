"""Outlier channels of activations, made up for in the weights behind them.

A tensor with one scale is as coarse as its widest channel makes it. As x W = (x / s) (s W), factors
s > 1 for the channels that stand out refine all others: Xiao et al., "SmoothQuant" (2022), with
factors that cut the channels off at a limit, and with the limit that makes the expected error of
the product least.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from calib.affine import INT8_NARROW, UINT8, Array

# Limits tried, as shares of the largest magnitude.
LIMITS = 2.0 ** -np.arange(0, 5.5, 0.5)
# Dividing by s costs time: worth it for a fourth of the error energy, which is one bit. Where
# constants before take the division in, any gain is.
LEAST_GAIN, LEAST_FREE_GAIN = 4.0, 1.0
# Values that crowd around zero in a wide step are rounded alike, so that their errors add up: this
# much, measured.
CORRELATION = 4.0


@dataclass(frozen=True)
class Channels:
    """What samples hold in each channel of a tensor's last axis: extremes and mean square, of shape
    (channels,).
    """

    lo: Array
    hi: Array
    square: Array


def channels_of(x: Array) -> Channels:
    """The channels of one sample."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows[np.isfinite(rows).all(axis=1)]
    if not len(rows):
        rows = np.zeros((1, x.shape[-1]), x.dtype)
    return Channels(
        rows.min(axis=0),
        rows.max(axis=0),
        np.asarray(np.mean(np.square(rows, dtype=np.float64), axis=0)),
    )


def joined(parts: Iterable[Channels]) -> Channels:
    """The channels of all samples."""
    columns = zip(
        *((part.lo, part.hi, part.square) for part in parts),
        strict=True,
    )
    lo, hi, square = (np.stack(column) for column in columns)
    return Channels(
        lo.min(axis=0),
        hi.max(axis=0),
        square.mean(axis=0),
    )


def smoothing_factors(channels: Channels, weight: Array, free: bool = False) -> Array | None:
    """The factors s >= 1 (channels,) before `weight` (channels, columns); None if there is little
    to gain.

    `free` tells that dividing by them costs no time.
    """
    magnitude = np.maximum(-channels.lo, channels.hi).astype(np.float64)
    if not magnitude.any():
        return None
    tried = [np.maximum(1.0, magnitude / (limit * magnitude.max())) for limit in LIMITS]
    columns = _Columns.of(weight)
    errors = [columns.expected_error(channels, factors) for factors in tried]
    best = int(np.argmin(errors))
    least = LEAST_FREE_GAIN if free else LEAST_GAIN
    return tried[best] if errors[0] > least * errors[best] else None


def expected_error(channels: Channels, weight: Array, factors: Array) -> float:
    """Mean square of the error of (x / s) (s W) for one row of x, summed over the columns of W.

    Rounding to steps of d is off by d^2 / 12 in the mean square. The steps of x / s are one for the
    whole tensor, those of s W one a column.
    """
    return _Columns.of(weight).expected_error(channels, factors)


@dataclass(frozen=True)
class _Columns:
    """A weight (channels, columns), the energy of its channels and the largest magnitudes of its
    columns.
    """

    weight: Array
    energy: Array
    largest: Array

    @classmethod
    def of(cls, weight: Array) -> _Columns:
        """What all errors of a weight have in common."""
        energy = np.einsum("kn,kn->k", weight, weight, dtype=np.float64)
        return cls(
            weight,
            energy,
            np.maximum(weight.max(axis=0), -weight.min(axis=0)),
        )

    def expected_error(self, channels: Channels, factors: Array) -> float:
        """See the function of that name."""
        span = max(0.0, (channels.hi / factors).max()) - min(0.0, (channels.lo / factors).min())
        x_steps = span / (UINT8.qmax - UINT8.qmin)
        w_steps = self._largest(factors) / INT8_NARROW.qmax
        of_x = x_steps**2 * (factors**2 * self.energy).sum()
        of_w = np.square(w_steps).sum() * (channels.square / factors**2).sum()
        return float(CORRELATION * of_x + of_w) / 12

    def _largest(self, factors: Array) -> Array:
        """Of the columns of s W: those that factors leave alone are known."""
        moved = factors > 1
        scaled = np.abs(self.weight[moved]) * factors[moved, None].astype(self.weight.dtype)
        return np.asarray(
            np.maximum(self.largest, scaled.max(axis=0, initial=0)),
            np.float64,
        )
