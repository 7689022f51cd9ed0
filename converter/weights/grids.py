"""Weights as points on a grid of their own for every row: w = scale (point - zero); codes or levels
of a trellis.

Weights are matrices (groups, rows, columns) as in `matrices`. Points and grid are found in turn:
with the points fixed, the best scale and zero of a row are a least squares problem of two unknowns;
with the grid fixed, error-compensating rounding finds points, and coordinate descent, which moves
one column at a time to its optimum given all others, betters them. The error of a row e is e' M e,
that of the outputs, with M the inputs' second moments; without M it is e' e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from calib import trellis
from calib.affine import SMALLEST_SCALE, Array, IntFormat, byte_zeros
from converter.plan.plan import HALF_BITS
from converter.weights.gptq import DAMPING, Grid, chosen, compensated, row_parts

# Widths tried for the first grid, as shares of the one that covers all weights of a row.
SHARES = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.55)
# The same for a trellis, whose levels are dense in the middle.
TRELLIS_SHARES = 0.8 ** np.arange(8)
# Times that grid and codes are found in turn, once with many bits, where there is little left to
# find. With two the divergence of a mobilenet_v1 in 2 bits is 1.33 instead of 1.29 (12 draws).
ROUNDS = 6
# Rows with a smaller share of the largest scale are as good as 0, and so is what float16's least
# scale makes of them where the largest is so many times that.
SILENT, LOUD = 2.0**-32, 2.0**10
# Columns whose codes change before the others hear of it.
BLOCK = 64


@dataclass(frozen=True)
class Rows:
    """`points` (groups, rows, columns) of `format` on the grids `scale`, `zero` (groups, rows)."""

    points: Array
    scale: Array
    zero: Array
    format: IntFormat

    def values(self) -> Array:
        """The weights they stand for."""
        return (self.points - self.zero[..., None]) * self.scale[..., None]

    def codes(self) -> Array:
        """The codes that stand for the points."""
        if not self.format.trellis:
            return self.points
        flat = self.points.reshape(-1, self.points.shape[2]).T
        alike = np.ones(flat.shape[1])
        codes = trellis.nearest(flat, alike, self.format.bits, self.format.trellis)
        return codes.T.reshape(self.points.shape)

    def relative_error(self, weight: Array, moments: Array | None) -> float:
        """What of the outputs, or of the weights, is error: |W x - V x| / |W x| over all rows."""
        noise = _energy(self.values() - weight, moments)
        power = _energy(weight, moments)
        return float(np.sqrt(noise / power)) if power > 0 else 0.0


def _energy(weight: Array, moments: Array | None) -> Array:
    """|W x|^2 over all rows."""
    weighted = weight if moments is None else np.matmul(weight, moments)
    return np.asarray(np.vdot(weight, weighted))


@dataclass(frozen=True)
class Grids:
    """Which grids may be used: unsigned `format`, one for every row or one for all, integer zeros
    only or any; `symmetric` ones have the zero in the middle of the codes.
    """

    format: IntFormat
    per_row: bool = True
    integer_zero: bool = False
    symmetric: bool = False

    def of(self, memory: int) -> Grids:
        """Those of another trellis; only its levels and integer zeros are worth a middle."""
        symmetric = self.symmetric and (memory > 0 or self.integer_zero)
        return replace(self, format=replace(self.format, trellis=memory), symmetric=symmetric)

    @property
    def center(self) -> float:
        """The middle of the codes, or of the levels of a trellis."""
        fmt = self.format
        return trellis.middle(fmt.bits) if fmt.trellis else (fmt.qmax + 1) // 2


def fit(weight: Array, moments: Array | None, grids: Grids, kept: Array | None = None) -> Rows:
    """The points of `weight` (groups, rows, columns); `moments` are (groups, columns, columns) or
    None.

    Where `kept` is false, weights become exact zeros; grids must have integer ones then. Where a
    trellis is wanted, rows may still be too short for it: then codes stand for themselves. Rotated
    ones are long enough.
    """
    memories = {grids.format.trellis} if grids.format.rotated else {grids.format.trellis, 0}
    ways = [grids.of(memory) for memory in memories]
    firsts = [_first(weight, moments, way) for way in ways]
    best = min(
        range(len(ways)),
        key=lambda i: firsts[i][0],
    )
    grids = ways[best]
    _, scale, zero = firsts[best]
    moments = None if moments is None else _damped(moments)

    def better(part: slice) -> Rows:
        some = weight[:, part]
        free = None if kept is None else kept[:, part]
        first = _on(
            some,
            scale[:, part],
            zero[:, part],
            grids.format,
        )
        return _bettered(some, moments, _zeroed(first, free), grids, kept=free)

    alone = moments is None and grids.per_row
    parts = row_parts(weight) if alone else [slice(None)]
    return _joined([better(part) for part in parts])


def _joined(parts: Sequence[Rows]) -> Rows:
    """All rows; what is made of every row alone was made in parts."""
    points = [rows.points for rows in parts]
    return Rows(
        np.concatenate(points, axis=1, dtype=np.float32, casting="same_kind"),
        np.concatenate([rows.scale for rows in parts], axis=1),
        np.concatenate([rows.zero for rows in parts], axis=1),
        parts[0].format,
    )


def _bettered(
    weight: Array, moments: Array | None, rows: Rows, grids: Grids, *, kept: Array | None
) -> Rows:
    if moments is not None:
        shifted = weight + (rows.scale * rows.zero)[..., None]
        fixed = None if kept is None else np.where(kept, np.nan, rows.zero[..., None])
        points = compensated(shifted, rows.scale, moments, Grid(grids.format), fixed=fixed)
        rows = replace(rows, points=points)
    for _ in range(ROUNDS if grids.format.bits < HALF_BITS else 1):
        rows = _refitted(weight, moments, rows, grids)
        rows = _descended(weight, moments, _zeroed(rows, kept), kept)
    return rows


def _zeroed(rows: Rows, kept: Array | None) -> Rows:
    """The same with points that stand for 0 where weights are not `kept`."""
    if kept is None:
        return rows
    points = np.where(kept, rows.points, rows.zero[..., None])
    return replace(rows, points=points)


def with_variance(weight: Array, rows: Rows, grids: Grids) -> Rows:
    """The same points with scales and zeros that give every row of `weight` its mean and standard
    deviation back.

    A factor beyond 0.1 to 10 would follow from a row that is lost: it stays as it is.
    """
    mean = _by_row(np.mean, weight)
    wanted = _by_row(np.std, weight)
    deviation = rows.points.std(axis=2, dtype=np.float64) * rows.scale
    ratio = wanted / np.maximum(deviation, SMALLEST_SCALE)
    ratio = np.where((ratio > 0.1) & (ratio < 10), ratio, 1.0)
    scale = rows.scale * ratio
    zero = rows.points.mean(axis=2, dtype=np.float64) - mean / scale
    scale, zero = _storable(scale, zero, grids)
    return replace(rows, scale=scale, zero=zero)


def _by_row(f: Callable[..., Array], weight: Array) -> Array:
    """Of every row, in float64, whose squares float32 may not hold, and not of all at once."""
    parts = [f(weight[:, part], axis=2, dtype=np.float64) for part in row_parts(weight)]
    return np.concatenate(parts, axis=1)


def _damped(moments: Array) -> Array:
    diagonal = np.einsum("gkk->gk", moments)
    share = DAMPING * diagonal.mean(axis=1, keepdims=True)
    added = share + (diagonal + share <= 0)
    damped: Array = moments + added[..., None] * np.eye(moments.shape[1])
    return damped


def _first(weight: Array, moments: Array | None, grids: Grids) -> tuple[float, Array, Array]:
    """The best of grids around the middle of each row's weights, for a trellis their mean: error,
    scale and zero.
    """
    axis = 2 if grids.per_row else None
    coded = grids.format.trellis
    low, high, mean = (
        np.broadcast_to(f(weight, axis=axis), weight.shape[:2])
        for f in (np.min, np.max, partial(np.mean, dtype=np.float64))
    )
    middle = np.zeros_like(low) if grids.symmetric else mean if coded else (high + low) / 2
    width = 2 * np.maximum(high - middle, middle - low)
    importance = np.ones(weight.shape[::2]) if moments is None else np.einsum("gkk->gk", moments)

    def error(scale: Array, zero: Array) -> Array:
        difference = _on(weight, scale, zero, grids.format).values() - weight
        summed = np.matmul(difference**2, importance[..., None])
        return np.asarray(summed[..., 0])

    shares = TRELLIS_SHARES if coded else SHARES
    tried = [_grid(share * width, middle, grids) for share in shares]
    errors = np.stack([error(*grid) for grid in tried])
    if not grids.per_row:
        total = errors.sum(axis=(1, 2), keepdims=True)
        errors = np.broadcast_to(total, errors.shape)
    least = errors.argmin(axis=0)
    scale, zero = (np.choose(least, numbers) for numbers in zip(*tried, strict=True))
    return float(error(scale, zero).sum()), scale, zero


def _on(weight: Array, scale: Array, zero: Array, fmt: IntFormat) -> Rows:
    """The nearest points on the grids `scale`, `zero`.

    All rows of a trellis count alike, each in its own steps: a table looks up one at a time, and a
    quiet one shall not pay for the others.
    """
    aims = np.moveaxis(
        weight / scale[..., None] + zero[..., None],
        2,
        0,
    )
    points = chosen(aims, np.ones_like(scale), fmt)
    return Rows(np.moveaxis(points, 0, 2), scale, zero, fmt)


def _grid(width: Array, middle: Array, grids: Grids) -> tuple[Array, Array]:
    """Scale and zero of grids as wide as `width` about `middle`, which is on them itself where
    there is no width.
    """
    qmax = grids.format.qmax
    wide = width > SMALLEST_SCALE * qmax
    scale = np.where(wide, width / qmax, np.abs(middle))
    scale = np.where(scale > 0, scale, scale.max() or 1.0)
    zero = np.where(wide, qmax / 2, qmax // 2) - middle / scale
    return _storable(scale, zero, grids)


def _storable(scale: Array, zero: Array, grids: Grids) -> tuple[Array, Array]:
    """The nearest grid that the file holds: float16 where its range allows."""
    if grids.symmetric:
        zero = np.full_like(zero, grids.center)
    elif grids.integer_zero:
        zero = np.clip(np.rint(zero), 0, grids.format.qmax)
    # From here on steps of 2^-24 round a scale by less than 2^-(bits + 3), far less than codes do.
    least = 2.0 ** (grids.format.bits - 22)
    if scale.max() > LOUD * least:
        # One row that is as good as 0 does not take float32 for all.
        silent = scale < SILENT * scale.max()
        raised = np.where(silent, np.maximum(scale, least), scale)
        if not (grids.symmetric or grids.integer_zero):
            zero = zero * scale / raised
        scale = raised
    largest = max(scale.max(), np.abs(zero).max())
    fits = least <= scale.min() and largest <= np.finfo(np.float16).max
    dtype = np.float16 if fits and grids.format.bits <= HALF_BITS else np.float32
    zero = byte_zeros(zero, grids.format.bits)
    return scale.astype(dtype).astype(np.float64), zero.astype(dtype).astype(np.float64)


def _refitted(weight: Array, moments: Array | None, rows: Rows, grids: Grids) -> Rows:
    """The same points on the grids with the least error: weight = scale point + offset, by least
    squares.
    """
    points = m_points = rows.points
    ones = m_ones = np.ones_like(points)
    if moments is not None:
        m_points = np.matmul(points, moments)
        m_ones = np.matmul(ones, moments)
    factors = (
        (points, m_points),
        (points, m_ones),
        (ones, m_ones),
        (weight, m_points),
        (weight, m_ones),
    )
    sums = [(a * b).sum(axis=2) for a, b in factors]
    if not grids.per_row:
        sums = [np.full_like(x, x.sum()) for x in sums]
    qq, q1, one, qw, w1 = sums
    if grids.symmetric:
        return _rescaled(
            rows, qw - grids.center * w1, qq - grids.center * (2 * q1 - grids.center * one), grids
        )
    determinant = qq * one - q1**2
    safe = determinant > 1e-9 * qq * one
    determinant = np.where(safe, determinant, 1.0)
    scale = (one * qw - q1 * w1) / determinant
    offset = (qq * w1 - q1 * qw) / determinant
    safe &= scale > SMALLEST_SCALE
    scale = np.where(safe, scale, rows.scale)
    zero = np.where(safe, -offset / scale, rows.zero)
    scale, zero = _storable(scale, zero, grids)
    return Rows(points, scale, zero, grids.format)


def _rescaled(rows: Rows, cross: Array, power: Array, grids: Grids) -> Rows:
    """The same points with the scale of least error, `cross` over `power`, the zero staying."""
    safe = (power > SMALLEST_SCALE) & (cross > SMALLEST_SCALE * power)
    scale = np.where(
        safe,
        cross / np.where(safe, power, 1.0),
        rows.scale,
    )
    scale, zero = _storable(scale, rows.zero, grids)
    return Rows(rows.points, scale, zero, grids.format)


def _descended(weight: Array, moments: Array | None, rows: Rows, kept: Array | None) -> Rows:
    """The same grids with every column moved once to its optimum, given all others."""
    if moments is None:
        return _zeroed(_on(weight, rows.scale, rows.zero, rows.format), kept)
    # Columns first: (columns, groups, rows).
    errors = np.moveaxis(weight - rows.values(), 2, 0).copy()
    points = np.moveaxis(rows.points, 2, 0).copy()
    step = rows.scale
    aim = np.moveaxis(
        weight / step[..., None] + rows.zero[..., None],
        2,
        0,
    )
    by_column = np.ascontiguousarray(moments.transpose(1, 0, 2))
    for start in range(0, len(points), BLOCK):
        block = slice(start, min(start + BLOCK, len(points)))
        gradient = np.matmul(
            errors.transpose(1, 2, 0),
            moments[:, :, block],
        )
        gradient = gradient.transpose(2, 0, 1).copy()
        for k in range(block.start, block.stop):
            row = by_column[k][:, block].T[..., None]
            curvature = by_column[k][:, k, None]
            wanted = errors[k] - gradient[k - start] / curvature
            point = chosen(aim[k] - wanted / step, curvature * step**2, rows.format)
            if kept is not None:
                point = np.where(kept[:, :, k], point, points[k])
            change = (points[k] - point) * step
            points[k] = point
            errors[k] += change
            gradient += row * change
    return replace(rows, points=np.moveaxis(points, 0, 2))
