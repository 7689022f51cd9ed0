"""Weight rounding that knows the data: the codes whose error hurts the layer's output least.

Column by column, every code's rounding error is made up for by the weights that are not rounded yet, along the inverse
second moments of the layer's inputs: Frantar et al., "GPTQ" (2022), which is Optimal Brain Quantization (2022) in a
fixed order. Weights are seen as matrices (groups, rows, columns): rows are output channels, columns the inputs one
output element sums over. Everything is float64.

Kernels that add pairs of u8 x s8 products in 16 bits (x86 without VNNI) are exact as long as two codes of equal sign
that share a pair sum up to no more than `pair_limit`; rounding honours that bound, so that only the pairs concerned
give way instead of the whole layer giving up a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.affine import Array, IntFormat

# Share of the mean diagonal added to the second moments, as GPTQ does; keeps their inverse stable.
DAMPING = 0.01
BLOCK = 64
# Shrink factors tried for the scale that covers the largest weight.
SHRINK = np.linspace(0.55, 1.0, 19)
WIDEN = np.linspace(1.05, 2.0, 20)


@dataclass(frozen=True)
class Grid:
    """The codes a weight may take: a symmetric integer format and, where pairs can overflow, the bound of their sum."""

    format: IntFormat
    pair_limit: int | None = None


def search_scales(weight: Array, importance: Array, grid: Grid, per_channel: bool) -> Array:
    """The scale of each row, shape (groups, rows), with the least error weighted by `importance` (groups, columns).

    Tries scales around the one that covers the largest weight and, where pairs are bounded, up to twice that. With
    `per_channel` false all rows get one scale.
    """
    largest = np.abs(weight).max(axis=2) if per_channel else np.full(weight.shape[:2], np.abs(weight).max())
    factors = SHRINK if grid.pair_limit is None else np.concatenate([SHRINK, WIDEN])
    best_error = np.full(largest.shape, np.inf)
    best = np.ones(largest.shape)
    for factor in factors:
        scale = np.where(largest > 0, largest, grid.format.qmax) * (factor / grid.format.qmax)
        error = weight - nearest(weight / scale[..., None], grid) * scale[..., None]
        weighted = np.einsum("grk,gk->gr", error * error, importance)
        weighted = weighted if per_channel else np.broadcast_to(weighted.sum(), largest.shape)
        better = weighted < best_error
        best_error, best = np.where(better, weighted, best_error), np.where(better, scale, best)
    return best


def nearest(scaled: Array, grid: Grid) -> Array:
    """Nearest codes, pairs that break the bound brought back to it by equal parts."""
    codes = np.clip(np.rint(scaled), grid.format.qmin, grid.format.qmax)
    if grid.pair_limit is None:
        return codes
    even, odd = codes[..., 0 : scaled.shape[-1] - 1 : 2], codes[..., 1::2]
    same = even * odd > 0
    excess = np.where(same, np.maximum(np.abs(even + odd) - grid.pair_limit, 0), 0) * np.sign(even)
    even -= np.ceil(np.abs(excess) / 2) * np.sign(excess)
    odd -= np.floor(np.abs(excess) / 2) * np.sign(excess)
    return codes


def compensated(weight: Array, scale: Array, moments: Array, grid: Grid) -> Array:
    """Codes of `weight` (groups, rows, columns) for `scale` (groups, rows), given `moments` (groups, columns, columns).

    `moments` are E[x x'] of the inputs. Columns of large moments are rounded first.
    """
    groups, _, columns = weight.shape
    order = np.argsort(-np.einsum("gkk->k", moments), kind="stable") if groups == 1 else np.arange(columns)
    upper = _inverse_root(moments[:, order][:, :, order])
    rest = (weight / scale[..., None])[:, :, order]
    codes = np.zeros_like(rest)
    place = np.argsort(order)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.zeros_like(rest[:, :, start:stop])
        for k in range(start, stop):
            low, high = _bounds(rest, codes, order, place, k, grid)
            codes[:, :, k] = np.clip(np.rint(rest[:, :, k]), low, high)
            errors[:, :, k - start] = (rest[:, :, k] - codes[:, :, k]) / upper[:, None, k, k]
            rest[:, :, k:stop] -= errors[:, :, k - start, None] * upper[:, None, k, k:stop]
        rest[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return codes[:, :, place]


def _bounds(rest: Array, codes: Array, order: Array, place: Array, k: int, grid: Grid) -> tuple[Array | int, Array | int]:
    """The lowest and highest code column k of `rest` may take, its partner's in mind."""
    low, high = grid.format.qmin, grid.format.qmax
    partner = order[k] ^ 1
    if grid.pair_limit is None or partner >= order.size:
        return low, high
    p = place[partner]
    if p < k:
        other = codes[:, :, p]
        return np.where(other < 0, np.maximum(low, -grid.pair_limit - other), low), np.where(
            other > 0, np.minimum(high, grid.pair_limit - other), high
        )
    # The first of a pair gives way by half of what the two together are too large.
    mine, other = rest[:, :, k], rest[:, :, p]
    room = np.rint(np.clip((grid.pair_limit + np.abs(mine - other)) / 2, 0, grid.pair_limit))
    crowded = (mine * other > 0) & (np.abs(mine + other) > grid.pair_limit)
    share = np.where(np.abs(mine) >= np.abs(other), room, grid.pair_limit - room)
    bound = np.where(crowded, share, high)
    return np.maximum(low, -bound), np.minimum(high, bound)


def _inverse_root(moments: Array) -> Array:
    """Upper triangular U with U' U = inverse of the damped moments; a column without input gets a moment of one."""
    diagonal = np.einsum("gkk->gk", moments)
    damping = DAMPING * diagonal.mean(axis=1, keepdims=True)
    damped = moments + np.where(diagonal + damping > 0, damping, 1.0)[:, :, None] * np.eye(moments.shape[1])
    return np.linalg.cholesky(np.linalg.inv(damped)).swapaxes(1, 2)
