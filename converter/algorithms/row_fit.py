"""Weights as codes on a grid of their own for every row: w = scale (code - zero), zero any number.

Weights are matrices (groups, rows, columns) as in `matrices`. Codes and grid are found in turn: with the codes fixed,
the best scale and zero of a row are a least squares problem of two unknowns; with the grid fixed, error-compensating
rounding finds codes, and coordinate descent, which moves one code at a time to its optimum given all others, betters
them. The error is that of the outputs, e' M e with M the inputs' second moments, or of the weights where M is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from calib.affine import SMALLEST_SCALE, Array, IntFormat
from converter.algorithms.rounding import DAMPING, Grid, compensated

# Widths tried for the first grid, as shares of the one that covers all weights of a row.
SHARES = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.55)
# Times that grid and codes are found in turn.
ROUNDS = 6
# Columns whose codes change before the others hear of it.
BLOCK = 64
# Codes of up to this many bits are worth scales and zeros of float16.
HALF_BITS = 8


@dataclass(frozen=True)
class Rows:
    """`codes` (groups, rows, columns) on the grids `scale`, `zero` (groups, rows)."""

    codes: Array
    scale: Array
    zero: Array

    def values(self) -> Array:
        """The weights they stand for."""
        return (self.codes - self.zero[..., None]) * self.scale[..., None]


def fit(weight: Array, moments: Array | None, fmt: IntFormat, per_row: bool) -> Rows:
    """`weight` (groups, rows, columns) on unsigned codes of `fmt`; `moments` are (groups, columns, columns) or None."""
    importance = np.ones(weight.shape[::2]) if moments is None else np.einsum("gkk->gk", moments)
    rows = _first(weight, importance, fmt, per_row)
    if moments is not None:
        moments = _damped(moments)
        shifted = weight + (rows.scale * rows.zero)[..., None]
        rows = replace(rows, codes=compensated(shifted, rows.scale, moments, Grid(fmt)))
    for _ in range(ROUNDS if fmt.bits < HALF_BITS else 1):
        rows = _descended(weight, moments, _refitted(weight, moments, rows, fmt, per_row), fmt)
    return rows


def _damped(moments: Array) -> Array:
    diagonal = np.einsum("gkk->gk", moments)
    share = DAMPING * diagonal.mean(axis=1, keepdims=True)
    return moments + (share + (diagonal + share <= 0))[..., None] * np.eye(moments.shape[1])


def _first(weight: Array, importance: Array, fmt: IntFormat, per_row: bool) -> Rows:
    """Nearest codes on the best of grids around the middle of each row's weights."""
    axis = 2 if per_row else None
    low, high = (np.broadcast_to(f(weight, axis=axis), weight.shape[:2]) for f in (np.min, np.max))
    found, least = None, np.full(weight.shape[:2], np.inf)
    for share in SHARES if fmt.bits < 2 * HALF_BITS else SHARES[:1]:
        rows = _on_grid(weight, share * (high - low) / fmt.qmax, (high + low) / 2, fmt)
        error = np.matmul((rows.values() - weight) ** 2, importance[..., None])[..., 0]
        error = error if per_row else np.full_like(error, error.sum())
        better, least = error < least, np.minimum(error, least)
        found = rows if found is None else _chosen(better, rows, found)
    assert found is not None
    return found


def _on_grid(weight: Array, scale: Array, middle: Array, fmt: IntFormat) -> Rows:
    scale, zero = _storable(scale, fmt.qmax / 2 - middle / np.where(scale > 0, scale, 1.0), fmt)
    return Rows(_nearest(weight, scale, zero, fmt), scale, zero)


def _nearest(weight: Array, scale: Array, zero: Array, fmt: IntFormat) -> Array:
    return np.clip(np.rint(weight / scale[..., None] + zero[..., None]), fmt.qmin, fmt.qmax)


def _chosen(take: Array, new: Rows, old: Rows) -> Rows:
    codes = np.where(take[..., None], new.codes, old.codes)
    return Rows(codes, np.where(take, new.scale, old.scale), np.where(take, new.zero, old.zero))


def _storable(scale: Array, zero: Array, fmt: IntFormat) -> tuple[Array, Array]:
    """The nearest numbers of the type they are stored in; float16 where its range allows."""
    scale = np.where(scale < SMALLEST_SCALE, 1.0, scale)
    small = scale.min() < np.finfo(np.float16).smallest_normal or scale.max() > 60000 or np.abs(zero).max() > 2048
    dtype = np.float32 if fmt.bits > HALF_BITS or small else np.float16
    return scale.astype(dtype).astype(np.float64), zero.astype(dtype).astype(np.float64)


def _refitted(weight: Array, moments: Array | None, rows: Rows, fmt: IntFormat, per_row: bool) -> Rows:
    """The same codes on the grids with the least error: weight = scale code + offset, by least squares."""
    codes, ones = rows.codes, np.ones_like(rows.codes)
    m_codes, m_ones = (x if moments is None else np.matmul(x, moments) for x in (codes, ones))
    sums = [(a * b).sum(axis=2) for a, b in ((codes, m_codes), (codes, m_ones), (ones, m_ones))]
    sums += [(weight * m).sum(axis=2) for m in (m_codes, m_ones)]
    if not per_row:
        sums = [np.full_like(x, x.sum()) for x in sums]
    qq, q1, one, qw, w1 = sums
    determinant = qq * one - q1**2
    safe = determinant > 1e-9 * qq * one
    determinant = np.where(safe, determinant, 1.0)
    scale, offset = (one * qw - q1 * w1) / determinant, (qq * w1 - q1 * qw) / determinant
    safe &= scale > SMALLEST_SCALE
    scale = np.where(safe, scale, rows.scale)
    return Rows(codes, *_storable(scale, np.where(safe, -offset / scale, rows.zero), fmt))


def _descended(weight: Array, moments: Array | None, rows: Rows, fmt: IntFormat) -> Rows:
    """The same grids with every code moved once to its optimum, given all others."""
    if moments is None:
        return replace(rows, codes=_nearest(weight, rows.scale, rows.zero, fmt))
    # Columns first: (columns, groups, rows).
    errors, codes = np.moveaxis(weight - rows.values(), 2, 0).copy(), np.moveaxis(rows.codes, 2, 0).copy()
    aim, step = np.moveaxis(weight / rows.scale[..., None] + rows.zero[..., None], 2, 0), rows.scale
    by_column = np.ascontiguousarray(moments.transpose(1, 0, 2))
    for start in range(0, len(codes), BLOCK):
        block = slice(start, min(start + BLOCK, len(codes)))
        gradient = np.matmul(errors.transpose(1, 2, 0), moments[:, :, block]).transpose(2, 0, 1).copy()
        for k in range(block.start, block.stop):
            row = by_column[k][:, block].T[..., None]
            wanted = errors[k] - gradient[k - start] / by_column[k][:, k, None]
            code = np.clip(np.rint(aim[k] - wanted / step), fmt.qmin, fmt.qmax)
            change = (codes[k] - code) * step
            codes[k], errors[k] = code, errors[k] + change
            gradient += row * change
    return replace(rows, codes=np.moveaxis(codes, 0, 2))
