"""Trellis codes: k bits a number, and the error of up to three quarters of a bit more.

Numbers go in groups of GROUP. Their levels are parted into four subsets in turn; a number's subset
follows from the lowest bit of its own code and of the MEMORY codes before it in the group, which is
seen as a ring, and the other bits choose a level of the subset. So each number has k bits and
2^(k+1) levels to come near it: Marcellin and Fischer, "Trellis Coded Quantization of Memoryless and
Gauss-Markov Sources" (1990), with Ungerboeck's code of four states. As a group is short, all paths
through its halves are tried, and how they fit together.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

GROUP = 8
MEMORY = 2
SUBSETS = 4
# The outermost level, where 1 is half the width of a uniform grid of as many bits.
REACH = 1.2
# Numbers whose paths are tried at a time.
CHUNK = 1 << 15


@cache
def levels(bits: int) -> Array:
    """The 2^(bits+1) levels, in units and with the middle of uniform codes; float64 that float16
    holds.

    They are as dense as is best for normal numbers, as a normal of sqrt(3) times the deviation:
    Panter and Dite (1951).
    """
    count = 2 << bits
    middle = ((1 << bits) - 1) / 2
    shares = [(i + 0.5) / count for i in range(count)]
    normal = np.array([NormalDist().inv_cdf(share) for share in shares])
    exact = middle * (1 + REACH * normal / normal.max())
    result: Array = exact.astype(np.float16).astype(np.float64)
    return result


def _subset(u: Array, before: Array, second: Array) -> Array:
    """The subset of a number by its own lowest bit and those of the two codes before."""
    return 2 * (u ^ second) + before


@cache
def table(bits: int) -> Array:
    """The level of every window: a code plus what `window_weights` adds for the codes before."""
    window = np.arange(1 << (bits + MEMORY))
    code = window % (1 << bits)
    before = window >> bits & 1
    second = window >> (bits + 1)
    subset = _subset(code & 1, before, second)
    result: Array = levels(bits)[SUBSETS * (code >> 1) + subset]
    return result


def window_weights(bits: int) -> Array:
    """What the lowest bit of every number (rows) of a group adds to the window of every number
    (columns).
    """
    added = np.zeros((GROUP, GROUP))
    for i in range(MEMORY):
        follower = np.roll(np.eye(GROUP), i + 1, axis=1)
        added += 2.0 ** (bits + i) * follower
    return added


@cache
def _cells(bits: int) -> tuple[Array, Array, Array]:
    """The edges between aims that differ in what is nearest, and for each cell and subset: which
    level, and its value.

    Shapes (edges,), (edges + 1, SUBSETS) and the same.
    """
    parted = levels(bits).reshape(-1, SUBSETS).T
    middles = (parted[:, 1:] + parted[:, :-1]) / 2
    edges = np.sort(middles, axis=None)
    inside = np.concatenate([[-np.inf], edges])
    by_subset = [np.searchsorted(row, inside, side="right") for row in middles]
    best = np.stack(by_subset, axis=1)
    return edges, best, parted[np.arange(SUBSETS), best]


@cache
def _buckets(bits: int) -> tuple[float, float, Array, Array]:
    """Where the buckets start that find an aim's cell without a search, and their width: none has
    two edges.

    Of every bucket the number of edges before it, and its own or infinity.
    """
    edges, _, _ = _cells(bits)
    width = 0.99 * np.diff(edges).min()
    holder = ((edges - edges[0]) / width).astype(int)
    edge = np.full(holder[-1] + 1, np.inf)
    edge[holder] = edges
    before = np.searchsorted(holder, np.arange(len(edge)))
    return edges[0], width, before, edge


def _cell(aims: Array, bits: int) -> Array:
    """The cell of each aim."""
    start, width, before, edge = _buckets(bits)
    bucket = np.clip((aims - start) / width, 0, len(edge) - 1).astype(np.intp)
    cell: Array = before.take(bucket) + (aims > edge.take(bucket))
    return cell


@cache
def _paths() -> tuple[Array, Array]:
    """The lowest bits of every path through a group, and its subsets; both (paths, GROUP)."""
    low = np.arange(1 << GROUP)[:, None] >> np.arange(GROUP) & 1
    before = np.roll(low, 1, axis=1)
    second = np.roll(low, 2, axis=1)
    return low, _subset(low, before, second)


@cache
def _halves() -> tuple[Array, Array]:
    """Which numbers and subsets the halves of paths meet (2, halves, GROUP / 2 * SUBSETS), and
    which path they are of.

    The first four numbers follow from all lowest bits but 4 and 5, the others from all but 0 and 1.
    """
    path = np.arange(1 << GROUP)
    number = np.stack([path[path & 0b110000 == 0], path[path & 0b11 == 0]])
    _, subsets = _paths()
    half = GROUP // 2
    subset = np.stack([subsets[number[0], :half], subsets[number[1], half:]])
    met = subset[..., None] == np.arange(SUBSETS)
    return met.reshape(*number.shape, -1).astype(np.float32), number


def points(codes: Array, bits: int) -> Array:
    """The levels of `codes` (..., numbers); zeros make up the last group."""
    count = codes.shape[-1]
    grouped = _grouped(codes.astype(np.int64))
    lowest = (grouped & 1).astype(np.float32)
    added = lowest @ window_weights(bits).astype(np.float32)
    window = grouped + added.astype(np.int64)
    result: Array = table(bits)[window].reshape(
        *codes.shape[:-1],
        -1,
    )
    return result[..., :count]


def nearest(aims: Array, weights: Array, bits: int) -> Array:
    """The codes whose levels are nearest to `aims` (..., numbers), squared errors counting as
    `weights` (numbers,).
    """
    rows = aims.reshape(-1, aims.shape[-1])
    count = min(len(rows), -(-rows.size // CHUNK)) or 1
    relative = (weights / weights.max()).astype(np.float32)
    parts = [_nearest(part, relative, bits) for part in np.array_split(rows, count)]
    return np.concatenate(parts).reshape(aims.shape)


def _nearest(aims: Array, weights: Array, bits: int) -> Array:
    """Of all paths p through each group the one with the least sum over k of w_k (x_k - q_k)^2, q_k
    the nearest to x_k of the subset that p passes at k: the best halves that agree in the two pairs
    of bits they share.
    """
    _, which, near = _cells(bits)
    grouped = _grouped(aims)
    cell = _cell(grouped.reshape(-1), bits)
    errors = near.take(cell, axis=0) - grouped.reshape(-1, 1)
    errors = np.square(errors, dtype=np.float32, casting="same_kind")
    errors = errors.reshape(*grouped.shape, SUBSETS)
    errors *= _grouped(weights)[..., None]
    met, halves = _halves()
    by_half = errors.reshape(-1, 2, met.shape[2])
    costs = np.matmul(met, by_half.transpose(1, 2, 0))
    if spare := -aims.shape[1] % GROUP:
        last = costs.reshape(*halves.shape, *grouped.shape[:2])[..., -1]
        last[halves >> (GROUP - spare) > 0] = np.inf
    path = _best_path(costs)
    low, subset = _paths()
    level = which[cell, subset[path].reshape(-1)]
    codes = 2 * level + low[path].reshape(-1)
    codes = codes.astype(np.uint8).reshape(len(aims), -1)
    return codes[:, : aims.shape[1]]


def _best_path(costs: Array) -> Array:
    """The cheapest path of each group, for the costs (2, halves, groups) of its halves."""
    # Pairs of bits, the highest first: 67, 23, 01 of the one half and 67, 45, 23 of the other.
    first, second = costs.reshape(2, 4, 4, 4, -1)
    joined = first.min(axis=2) + second.min(axis=1)
    joint = joined.reshape(16, -1).argmin(axis=0)
    high = joint >> 2
    low = joint & 3
    group = np.arange(len(joint))
    lowest = first[high, low, :, group].argmin(axis=1)
    middle = second[high, :, low, group].argmin(axis=1)
    return np.asarray(lowest + (low << 2) + (middle << 4) + (high << 6))


def _grouped(numbers: Array) -> Array:
    """`numbers` (..., n) as (..., groups, GROUP), filled up with zeros."""
    leading = numbers.shape[:-1]
    spare = -numbers.shape[-1] % GROUP
    if spare:
        numbers = np.pad(
            numbers,
            [(0, 0)] * len(leading) + [(0, spare)],
        )
    return numbers.reshape(*leading, -1, GROUP)
