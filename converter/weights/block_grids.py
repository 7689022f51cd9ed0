"""Grids with integer zeros for the blocks or channels of a weight, found from the weight alone, a
part of it at a time.

A weight is seen as (blocks, block size, channels): float32, channels last, so that what is common
to a block lies side by side for vector units. Tried are grids about the middle of a block, wider
and narrower than it, each with the scale that least squares give its codes, as the k-quants of
llama.cpp do, and in the end the codes of the best scale once more. Normal numbers have 22.3 dB in
4 bits and blocks of 32, where the grids that cover a block have 21.9, k-quants 22.3 and half-
quadratic quantization (HQQ), which moves zeros alone, 21.9.

Errors count as `importance`, the mean square of the input that a column multiplies: on a decoder of
135 million weights perplexity is 22.1 to 22.6 (float 20.5) with what random tokens show of it, 25.1
with none, 24.2 with the weights' own magnitudes as k-quants have them, 25.4 by HQQ.

Weights that are whole multiples of one number already, as those of a quantized model, keep their
codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from calib.affine import SMALLEST_SCALE, Array, IntFormat, QParams
from converter.plan.plan import PerBlock, QuantizedWeight, WeightPlan

# Weights of a part: few enough to stay in cache.
PART = 1 << 17
# Widths tried, as shares of the one that covers a block: where all columns count alike, where few
# count more, and with many bits.
SHARES = (1.05, 1.0, 0.95, 0.9, 0.85)
WEIGHTED_SHARES = (1.05, 0.95, 0.85, 0.74, 0.6)
FEW_SHARES = (1.0,)
MANY_BITS = 7
# How far from a whole number a multiple may be, and weights of a block that are looked at first.
CLOSE = 1e-3
PROBED = 4
# Blocks that are looked at, and the share of them that tells of a weight which was quantized
# before.
LOOKED_AT = 64
MOST = 0.75
# What every column counts at the least, as a share of their mean.
DAMPING = 0.01


@dataclass(frozen=True)
class _Grid:
    """`scale` and whole `zero` of every block: float32 (blocks, 1, channels); `gain` is what its
    codes explain of a block's energy.
    """

    scale: Array
    zero: Array
    gain: Array

    def better(self, other: _Grid) -> _Grid:
        """Of every block the one that explains more."""
        first = self.gain >= other.gain
        scale = np.where(first, self.scale, other.scale)
        zero = np.where(first, self.zero, other.zero)
        gain = np.where(first, self.gain, other.gain)
        return _Grid(scale, zero, gain)


def fitted(weight: Array, wanted: WeightPlan, importance: Array | None) -> QuantizedWeight:
    """Codes and grids of a float32 `weight` with an axis of channels; `importance` is (columns,),
    all that is summed in one output being a row of columns, or None.
    """
    axis = wanted.axis or 0
    fmt = wanted.format
    matrix = np.moveaxis(weight, axis, -1).reshape(
        -1,
        weight.shape[axis],
    )
    size = len(matrix)
    if isinstance(wanted.granularity, PerBlock):
        size = wanted.granularity.size
    blocks = matrix.reshape(-1, size, matrix.shape[1])
    counts = _importance(importance, blocks)
    divisors = _divisors(blocks, fmt)
    codes = np.empty(blocks.shape, fmt.dtype)
    scale = np.empty(blocks.shape[::2], np.float32)
    zero = np.empty_like(scale)
    for rows, columns in _parts(blocks.shape):
        part = np.ascontiguousarray(blocks[rows, :, columns])
        counted = None if counts is None else counts[rows]
        grid = _best(part, counted, fmt, divisors)
        points = _points(part, grid.scale, grid.zero, fmt)
        codes[rows, :, columns] = points + grid.zero
        scale[rows, columns] = grid.scale[:, 0]
        zero[rows, columns] = grid.zero[:, 0]
    return _packed(codes, (scale, zero), weight.shape, wanted)


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Slices of blocks and of channels."""
    blocks, size, channels = shape
    columns = max(1, min(channels, PART // size))
    rows = max(1, PART // (size * columns))
    for row in range(0, blocks, rows):
        for column in range(0, channels, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _importance(importance: Array | None, blocks: Array) -> Array | None:
    """(blocks, size, 1), 1 in the mean; None where all columns count alike, or there are others."""
    if importance is None or importance.size != blocks.shape[0] * blocks.shape[1]:
        return None
    mean = importance.mean()
    if not np.isfinite(mean) or mean <= 0:
        return None
    # A column that nothing came in by may still be read.
    relative = (importance / mean).astype(np.float32)
    counted: Array = relative + np.float32(DAMPING)
    return counted.reshape(*blocks.shape[:2], 1)


def _best(part: Array, counts: Array | None, fmt: IntFormat, divisors: Array) -> _Grid:
    low = np.minimum(part.min(axis=1, keepdims=True), 0)
    high = np.maximum(part.max(axis=1, keepdims=True), 0)
    counted = part if counts is None else part * counts
    width = high - low
    middle = (high + low) / 2

    def tried(scale: Array, zero: Array) -> _Grid:
        scale = np.where(scale > SMALLEST_SCALE, scale, np.float32(1))
        zero = np.clip(zero, fmt.qmin, fmt.qmax)
        return _refitted(part, counted, counts, (scale, zero), fmt=fmt)

    shares: Sequence[float] = SHARES if counts is None else WEIGHTED_SHARES
    if fmt.bits >= MANY_BITS:
        shares = FEW_SHARES
    best = None
    for share in shares:
        scale = width * np.float32(share / fmt.qmax)
        safe = np.where(scale > SMALLEST_SCALE, scale, np.float32(1))
        zero = np.float32(fmt.qmax / 2) - middle / safe
        found = tried(scale, np.rint(zero))
        best = found if best is None else best.better(found)
    assert best is not None
    again = tried(best.scale, best.zero)
    return _with_exact(part, best.better(again), fmt, divisors)


def _refitted(
    part: Array,
    counted: Array,
    counts: Array | None,
    grid: tuple[Array, Array],
    *,
    fmt: IntFormat,
) -> _Grid:
    """The grid with the best scale for its codes: of error |w|^2 - (w'q)^2 / q'q."""
    scale, zero = grid
    points = _points(part, scale, zero, fmt)
    along = np.einsum("bkc,bkc->bc", points, counted)[:, None]
    if counts is None:
        norm = np.einsum("bkc,bkc->bc", points, points)[:, None]
    else:
        norm = np.einsum("bkc,bkc,bk->bc", points, points, counts[..., 0])[:, None]
    useful = (along > 0) & (norm > 0)
    ratio = along / np.where(useful, norm, np.float32(1))
    scale = np.where(useful & (ratio > SMALLEST_SCALE), ratio, scale)
    gain = np.where(useful, along * ratio, np.float32(0))
    return _Grid(scale, zero, gain)


def _points(part: Array, scale: Array, zero: Array, fmt: IntFormat) -> Array:
    """The nearest codes less their zero."""
    points = part * (1 / scale)
    np.rint(points, out=points)
    # Faster than clip.
    np.maximum(points, fmt.qmin - zero, out=points)
    np.minimum(points, fmt.qmax - zero, out=points)
    return points


# --- weights that are on a grid already


def _divisors(blocks: Array, fmt: IntFormat) -> Array:
    """The multiples of a common number that the largest of a block may be, commonest first; none
    where few blocks have one.
    """
    count, _, channels = blocks.shape
    numbers = np.linspace(0, count * channels - 1, LOOKED_AT).astype(int)
    rows, columns = np.divmod(np.unique(numbers), channels)
    some = blocks[rows, :, columns]
    some = some[some.any(axis=1)]
    divisors = np.arange(1, fmt.qmax + 1)
    exact = np.array([_exact(some, int(divisor), fmt)[0] for divisor in divisors])
    if not len(some) or exact.any(axis=0).mean() < MOST:
        return np.zeros(0)
    order = np.argsort(-exact.sum(axis=1), kind="stable")
    return np.asarray(divisors[order])


def _exact(some: Array, divisor: int, fmt: IntFormat) -> tuple[Array, Array, Array]:
    """Which of the blocks (blocks, size) are whole multiples of their largest number over
    `divisor`, within the codes; with that number and the lowest multiple.
    """
    largest = np.abs(some).max(axis=1, initial=0)
    unit = np.where(largest > 0, largest, 1) / np.float32(divisor)
    exact = _whole(some[:, :PROBED] / unit[:, None])
    codes = some[exact] / unit[exact, None]
    whole = np.rint(codes)
    low = whole.min(axis=1, initial=0)
    high = whole.max(axis=1, initial=0)
    lowest = np.zeros(len(some), np.float32)
    lowest[exact] = low
    exact[exact] = _whole(codes) & (high - low <= fmt.qmax)
    return exact, unit, lowest


def _whole(codes: Array) -> Array:
    """Whether all of a row are whole numbers."""
    distance = np.abs(codes - np.rint(codes))
    return np.asarray((distance <= CLOSE).all(axis=1))


def _with_exact(part: Array, grid: _Grid, fmt: IntFormat, divisors: Array) -> _Grid:
    """The grid, but for blocks that are whole multiples of one number: on that number's."""
    scale = grid.scale[:, 0].copy()
    zero = grid.zero[:, 0].copy()
    block, channel = np.nonzero(np.ones(scale.shape, bool))
    for divisor in divisors:
        exact, unit, lowest = _exact(
            part[block, :, channel],
            int(divisor),
            fmt,
        )
        found = block[exact], channel[exact]
        scale[found] = unit[exact]
        zero[found] = fmt.qmin - lowest[exact]
        block = block[~exact]
        channel = channel[~exact]
        if not len(block):
            break
    return _Grid(scale[:, None], zero[:, None], grid.gain)


def _packed(
    codes: Array, grids: tuple[Array, Array], shape: tuple[int, ...], wanted: WeightPlan
) -> QuantizedWeight:
    """In the weight's shape; numbers of blocks with as many axes."""
    axis = wanted.axis or 0
    scale, zero = grids
    moved = [*(size for i, size in enumerate(shape) if i != axis), shape[axis]]
    stored = np.moveaxis(codes.reshape(moved), -1, axis)
    if isinstance(wanted.granularity, PerBlock):
        scale = np.moveaxis(scale, -1, axis)
        zero = np.moveaxis(zero, -1, axis)
    else:
        scale = scale[0]
        zero = zero[0]
    scale, zero = map(np.ascontiguousarray, (scale, zero))
    qparams = QParams(scale, zero, wanted.format, axis)
    return QuantizedWeight(np.ascontiguousarray(stored), qparams)
