"""Weight rounding that knows the data: the codes whose error hurts the layer's output least.

Column by column, every code's rounding error is made up for by the weights that are not rounded
yet: Frantar et al., "GPTQ" (2022), which is Optimal Brain Quantization (2022) in a fixed order.
Where GPTQ takes a root of the inverse of the inputs' second moments, this takes a root of the
moments themselves, which gives the same codes without an inverse (Chen et al., "The Geometry of LLM
Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025). Weights are seen as matrices (groups,
rows, columns): rows are output channels, columns the inputs one output element sums over.

Kernels that add pairs of u8 x s8 products in 16 bits (x86 without VNNI) are exact as long as the
two codes that share a pair sum up to no more than `pair_limit`; rounding honours that bound, so
that only the pairs concerned give way instead of the whole layer giving up a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calib import trellis
from calib.affine import SMALLEST_SCALE, Array, IntFormat

# Share of the mean diagonal added to the second moments, as GPTQ does; keeps their root stable.
DAMPING = 0.01
# Columns rounded before the others hear of their errors: even, so that no pair is parted.
BLOCK = 32
# Share of zeros from which a weight counts as pruned.
PRUNED = 0.3
# Weights of one search step: few enough to stay in cache.
CHUNK = 1 << 15
# Weights of rows that are fitted together, where each row is fitted by itself.
PART = 1 << 22
# Scales tried, as multiples of the one that covers the largest weight, in steps of 10 %; the first
# wins a tie. With many codes, clipping more than a quarter of the range never pays.
SHRINK = np.geomspace(1.0, 0.1, 25)
MANY_BITS = 7
LEAST_OF_MANY = 0.74
WIDEN = np.geomspace(1.1, 2.0, 7)
# Then multiples of the best of them: short rows gain from a scale that happens to suit them, long
# ones average out.
REFINE = np.concatenate([[1.0], np.linspace(0.95, 1.05, 30)])
LONG_ROW = 128
REFINE_LONG = np.concatenate([[1.0], np.linspace(0.95, 1.05, 6)])


@dataclass(frozen=True)
class Grid:
    """The codes a weight may take: a symmetric integer format and, where pairs can overflow, the
    bound of their sum.

    Columns 2 i and 2 i + 1 are a pair; |sum| <= `pair_limit`, which is no less than any code alone.
    """

    format: IntFormat
    pair_limit: int | None = None


def row_parts(weight: Array, most: int = PART) -> list[slice]:
    """Parts of the rows of `weight` (groups, rows, columns), so that little of what is made of it
    is in memory.
    """
    count = weight.shape[1]
    rows = most * count // max(1, weight.size)
    step = max(1, rows // trellis.GROUP) * trellis.GROUP
    return [slice(start, start + step) for start in range(0, count, step)]


def kept_weights(weight: Array) -> Array | None:
    """Where a pruned weight is not 0, as it should stay; None where too few are 0 to be meant."""
    kept = weight != 0
    return kept if kept.mean() <= 1 - PRUNED else None


def search_scales(weight: Array, importance: Array, grid: Grid, per_channel: bool) -> Array:
    """The scale of each row, shape (groups, rows), with the least error weighted by `importance`
    (groups, columns).

    Tries scales below the one that covers the largest weight and, where pairs are bounded, up to
    twice that. With `per_channel` false all rows get one scale. A row without weights gets scale 1.
    """
    if per_channel and len(parts := row_parts(weight)) > 1:
        scales = [search_scales(weight[:, i], importance, grid, per_channel) for i in parts]
        return np.concatenate(scales, axis=1)
    # Columns whose inputs are 0 everywhere do not decide the scale.
    loudest = importance.max(axis=1, keepdims=True)
    heard = (importance > 0) | (loudest == 0)
    magnitude = np.abs(weight) * heard[:, None]
    largest = magnitude.max(axis=2)
    if not per_channel:
        largest = np.full(largest.shape, largest.max())
    widest = largest / grid.format.qmax
    widest = np.where(widest < SMALLEST_SCALE, 1.0, widest)
    unit = (weight / widest[..., None]).astype(np.float32)
    relative = (importance / (importance.max() or 1.0)).astype(np.float32)
    best = np.ones_like(widest)
    for factors in _factors(grid, weight.shape[2]):
        tried = factors[:, None, None] * best
        errors = _errors(unit, relative, tried, grid)
        if not per_channel:
            total = errors.sum(axis=(1, 2), keepdims=True)
            errors = np.broadcast_to(total, errors.shape)
        least = errors.argmin(axis=0)
        best = np.take_along_axis(tried, least[None], axis=0)[0]
    return best * widest


def _factors(grid: Grid, columns: int) -> tuple[Array, Array]:
    """The multiples that are tried first, and those of the best of them."""
    first = SHRINK
    if grid.format.bits >= MANY_BITS:
        first = SHRINK[SHRINK > LEAST_OF_MANY]
    if grid.pair_limit is not None:
        first = np.concatenate([first, WIDEN])
    return first, REFINE if columns < LONG_ROW else REFINE_LONG


def _errors(weight: Array, importance: Array, scales: Array, grid: Grid) -> Array:
    """Weighted squared error of nearest codes for each of `scales` (tried, groups, rows), of the
    same shape.
    """
    errors = np.empty(scales.shape)
    step = max(
        1,
        CHUNK // (weight.shape[0] * weight.shape[2]),
    )
    for start in range(0, weight.shape[1], step):
        rows = slice(start, start + step)
        for i, scale in enumerate(scales[:, :, rows]):
            inverse = (1 / scale).astype(weight.dtype)
            scaled = weight[:, rows] * inverse[..., None]
            scaled -= nearest(scaled, grid)
            np.square(scaled, out=scaled)
            summed = np.matmul(scaled, importance[..., None])
            errors[i, :, rows] = scale**2 * summed[..., 0]
    return errors


def nearest(scaled: Array, grid: Grid) -> Array:
    """Nearest codes of `scaled` (..., columns); where they break the bound, the nearest pair that
    keeps it.
    """
    fmt, limit = grid.format, grid.pair_limit
    codes = np.clip(np.rint(scaled), fmt.qmin, fmt.qmax)
    if limit is None:
        return codes
    even = codes[..., :-1:2]
    odd = codes[..., 1::2]
    broken = np.abs(even + odd) > limit
    first = scaled[..., :-1:2][broken]
    second = scaled[..., 1::2][broken]
    even[broken] = np.rint(_with_room(first, second, 0.5, limit=limit, fmt=fmt))
    odd[broken] = np.copysign(limit, first + second) - even[broken]
    return codes


def helps_everywhere(x: Array, weight: Array, rounded: Array, *, bias: Array, shift: Array) -> bool:
    """Whether adding `shift` to a product makes its rows better in the mean, each by its own size.

    `x` are inputs (groups, drawn, columns), `weight` and `rounded` (groups, rows, columns), `bias`
    and `shift` (groups * rows,). What helps the mean of all may spoil quiet rows, which a
    normalisation behind makes as large as the others.
    """
    groups, rows, _ = weight.shape
    drawn = x.astype(np.float64)
    w = weight.swapaxes(1, 2)
    outputs = np.matmul(drawn, w) + bias.reshape(groups, 1, rows)
    errors = np.matmul(drawn, rounded.swapaxes(1, 2) - w)
    shifted = errors + shift.reshape(groups, 1, rows)
    energy = np.square(outputs).sum(axis=(0, 2))
    energy = np.maximum(energy, SMALLEST_SCALE)

    def badness(error: Array) -> float:
        noise = np.square(error).sum(axis=(0, 2))
        return float(np.minimum(noise / energy, 1.0).mean())

    return badness(shifted) <= badness(errors)


def _with_room(
    first: Array, second: Array, share: Array | float, *, limit: int, fmt: IntFormat
) -> Array:
    """`first`; where both break the bound, after it gave way by its `share`, and within what codes
    allow `second`.
    """
    total = np.clip(first, fmt.qmin, fmt.qmax) + np.clip(second, fmt.qmin, fmt.qmax)
    bound = np.copysign(limit, total)
    given = first - share * (first + second - bound)
    low = np.maximum(fmt.qmin, bound - fmt.qmax)
    high = np.minimum(fmt.qmax, bound - fmt.qmin)
    within = np.clip(given, low, high)
    return np.where(np.abs(total) > limit, within, first)


def chosen(aims: Array, weights: Array, fmt: IntFormat) -> Array:
    """The points of `fmt` nearest to `aims` (..., groups, rows); squared errors count as `weights`
    (groups, rows).
    """
    if not fmt.trellis:
        return np.clip(np.rint(aims), fmt.qmin, fmt.qmax)
    flat = aims.reshape(*aims.shape[:-2], -1)
    codes = trellis.nearest(flat, weights.reshape(-1), fmt.bits, fmt.trellis)
    return trellis.points(codes, fmt.bits, fmt.trellis).reshape(aims.shape)


def compensated(
    weight: Array, scale: Array, moments: Array, grid: Grid, *, fixed: Array | None = None
) -> Array:
    """Points Q of `weight` W (groups, rows, columns) for `scale` s (groups, rows): codes, or the
    levels of a trellis.

    They are to make tr (W - s Q) H (W - s Q)' small, the output's squared error, where `moments` H
    (groups, columns, columns) are E[x x'] of the inputs. Columns of large ones are rounded first,
    pairs one after the other. `fixed`, as the weight, are points that are given, NaN where they are
    to be found.
    """
    damping = DAMPING * np.einsum("gkk->g", moments) / moments.shape[1]
    columns = weight.shape[2]
    width = 1 if grid.pair_limit is None else 2
    codes = np.full(weight.shape, np.nan) if fixed is None else fixed.copy()
    if columns % width:
        # A silent partner for the last column: from here on all are in pairs.
        partner = ((0, 0), (0, 0), (0, 1))
        weight = np.pad(weight, partner)
        codes = np.pad(codes, partner)
        moments = np.pad(
            moments,
            ((0, 0), (0, 1), (0, 1)),
        )
    order = _order(np.einsum("gkk->gk", moments), width)
    group = np.arange(len(order))
    column = order.T
    # Inside, columns stand first: (columns, groups, rows).
    scaled = (weight / scale[..., None])[group, :, column]
    given = codes[group, :, column]
    root = _root(moments, order, damping)
    codes[group, :, column] = _sequential(
        scaled,
        given,
        scale=scale,
        root=root,
        grid=grid,
    )
    return codes[:, :, :columns]


def _order(diagonal: Array, width: int) -> Array:
    """The columns in the order they are rounded, by group; the `width` columns of a pair stay
    together.
    """
    pairs = diagonal.reshape(len(diagonal), -1, width)
    largest = pairs.max(axis=2).repeat(width, axis=1)
    pair = np.broadcast_to(
        np.arange(diagonal.shape[1]) // width,
        diagonal.shape,
    )
    return np.lexsort((-diagonal, pair, -largest), axis=1)


def _root(moments: Array, order: Array, damping: Array) -> Array:
    """Upper triangular V with V V' = H + d I, by Cholesky: H the moments in order, d the `damping`
    (groups,), or 1 where nothing comes in.
    """
    turned = order[:, ::-1]
    group = np.arange(len(order))
    damped = moments[group[:, None, None], turned[:, :, None], turned[:, None, :]]
    diagonal = np.einsum("gkk->gk", damped)
    diagonal += np.where(damping > 0, damping, 1.0)[:, None]
    return np.linalg.cholesky(damped)[:, ::-1, ::-1]


def _sequential(scaled: Array, codes: Array, *, scale: Array, root: Array, grid: Grid) -> Array:
    """Fills `codes` Q of `scaled` W / s (columns, groups, rows), each column aimed at what makes up
    for the errors E before it.

    For k = 1, 2, ...: Q_k = round(W_k / s + C_k), E_k = W_k / s - Q_k, where C_k is the sum of
    V_jk E_j / V_kk over j < k: at E_k = -C_k the output error |V' E|^2 loses its k-th term. Blocks
    of columns are told of the errors before them at once, as in GPTQ.
    """
    diagonal = np.einsum("gkk->gk", root)
    ratio = root / diagonal[:, None, :]
    share = _shares(ratio, diagonal)
    errors = np.empty_like(scaled)
    for start in range(0, len(scaled), BLOCK):
        block = slice(start, start + BLOCK)
        before = errors[:start].swapaxes(0, 1)
        carried = np.matmul(
            ratio[:, :start, block].swapaxes(1, 2),
            before,
        )
        within = ratio[:, block, block].transpose(1, 2, 0)[..., None]
        weights = [np.square(scale * step[:, None]) for step in diagonal[:, block].T]
        _fill(
            codes[block],
            scaled[block],
            carried.swapaxes(0, 1),
            ratio=within,
            share=share[block],
            weights=weights,
            grid=grid,
        )
        errors[block] = scaled[block] - codes[block]
    return codes


def _shares(ratio: Array, diagonal: Array) -> Array:
    """Of what a column and the next must give way together, the part of the first that costs the
    output least.

    The minimum over e_k + e_l = 1 of V_kk^2 e_k^2 + (V_kl e_k + V_ll e_l)^2; shape (columns - 1,
    groups, 1).
    """
    first = diagonal[:, :-1] / diagonal[:, 1:]
    second = 1 - np.diagonal(ratio, 1, 1, 2)
    shares: Array = second / (first**2 + second**2)
    return shares.T[..., None]


def _fill(
    codes: Array,
    scaled: Array,
    carried: Array,
    *,
    ratio: Array,
    share: Array,
    weights: Sequence[Array],
    grid: Grid,
) -> None:
    """The codes Q_k of a block's columns: `carried` is what of C_k comes from before it, `ratio`
    V_jk / V_kk (columns, columns, groups, 1) hands the rest on.

    The first of a pair makes room for the second, which takes what is left.
    """
    aim = scaled + carried
    limit, fmt = grid.pair_limit, grid.format
    for k in range(len(aim)):
        target, low, high = aim[k], fmt.qmin, fmt.qmax
        if limit is not None and k % 2 == 0:
            second = aim[k + 1] + ratio[k, k + 1] * (scaled[k] - target)
            target = _with_room(target, second, share[k], limit=limit, fmt=fmt)
        elif limit is not None:
            low = np.maximum(low, -limit - codes[k - 1])
            high = np.minimum(high, limit - codes[k - 1])
        if limit is None:
            point = chosen(target, weights[k], fmt)
        else:
            point = np.clip(np.rint(target), low, high)
        codes[k] = np.where(
            np.isnan(codes[k]),
            point,
            codes[k],
        )
        aim[k + 1 :] += ratio[k, k + 1 :] * (scaled[k] - codes[k])
