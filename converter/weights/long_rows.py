"""Scales of long rows that are multiplied in 8 bits, found from their largest numbers.

What rounding to steps of s costs a row of n weights is n s^2 / 12, whatever the weights: with many
of them, they lie anywhere between two codes. What tells scales apart are the few numbers that do
not fit: weights beyond the codes, and pairs beyond the bound of their sum (see `gptq`), which lose
a half each of what they are beyond it.
"""

from __future__ import annotations

import numpy as np

from calib.affine import SMALLEST_SCALE, Array
from converter.weights.gptq import Grid, nearest, row_parts

# Rows from which on this holds, and the share of them that may not fit.
LEAST_COLUMNS, SHARE = 512, 16
# Weights of rows that are rounded together: few enough to stay in cache.
PART = 1 << 18
# Scales tried, as multiples of the one that covers the largest weight.
SHARES = np.geomspace(0.75, 2.0, 26)


def rounded_to_nearest(matrix: Array, grid: Grid) -> tuple[Array, Array]:
    """Nearest codes of a float32 `matrix` (1, rows, columns) and their scales (1, rows), where each
    row is rounded by itself; codes are of the grid's format.
    """
    codes = np.empty(matrix.shape, grid.format.dtype)
    scales = np.empty(matrix.shape[:2])
    for part in row_parts(matrix, PART):
        rows = np.ascontiguousarray(matrix[:, part])
        scales[:, part] = scales_of(rows, grid)
        steps = (1 / scales[:, part]).astype(np.float32)
        codes[:, part] = nearest(rows * steps[..., None], grid)
    return codes, scales


def scales_of(rows: Array, grid: Grid) -> Array:
    """The scale of each of `rows` (1, rows, columns) with the least error; a row without weights
    gets 1. As float32 holds them.
    """
    columns, fmt = rows.shape[2], grid.format
    largest = _largest(np.abs(rows), columns // SHARE)
    widest = largest[..., -1] / fmt.qmax
    widest = np.where(widest < SMALLEST_SCALE, 1.0, widest)
    tried = SHARES[:, None, None] * widest
    errors = columns / 12 * np.square(tried) + _beyond(largest, tried * (fmt.qmax + 0.5))
    if grid.pair_limit is not None:
        sums = np.abs(rows[..., :-1:2] + rows[..., 1::2])
        errors += _beyond(_largest(sums, columns // SHARE), tried * (grid.pair_limit + 0.5)) / 2
    best = np.take_along_axis(tried, errors.argmin(axis=0)[None], axis=0)[0]
    best = np.where(largest[..., -1] > 0, best, 1.0)
    return np.asarray(best.astype(np.float32), np.float64)


def _largest(numbers: Array, count: int) -> Array:
    """The `count` largest of each row, the very largest last, float64."""
    found = np.partition(numbers, -count, axis=2)[..., -count:].astype(np.float64)
    return np.sort(found, axis=2)


def _beyond(numbers: Array, bounds: Array) -> Array:
    """Sum of squares of what the numbers of a row are beyond each of `bounds` (tried, 1, rows)."""
    over = numbers[None] - bounds[..., None]
    return np.asarray(np.square(np.maximum(over, 0, out=over), out=over).sum(axis=3))
