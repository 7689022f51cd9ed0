"""Trellis codes: k bits a number, and the error of up to three quarters of a bit more.

Levels are parted into four subsets in turn; a number's subset follows from the lowest bit of its
own code and of a few codes before it, the memory, and the other bits choose a level of the subset.
So each number has k bits and 2^(k+1) levels to come near it: Marcellin and Fischer, "Trellis Coded
Quantization of Memoryless and Gauss-Markov Sources" (1990), with Ungerboeck's codes of four and
eight states. Numbers stand in rings, where the first follow from the last: with the SHORT memory
groups of GROUP, with the LONG one whole rows. The best codes of a ring are found exactly: STEP
numbers make a matrix of costs from state to state, and neighbours are joined until one is left.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Numbers whose bits make whole bytes.
GROUP = 8
SHORT, LONG = 2, 3
# The codes whose lowest bits make those of a subset: 0 is a number's own, i the i-th before it.
# Ungerboeck, "Channel Coding with Multilevel/Phase Signals" (1982): parity checks 5, 2 and 13, 4.
TAPS = {SHORT: ((1,), (0, 2)), LONG: ((2,), (0, 1, 3))}
SUBSETS = 4
# The outermost level, where 1 is half the width of a uniform grid of as many bits.
REACH = 1.2
# Bits of a level about the middle.
LEVEL_BITS = 11
# Numbers that make one matrix, no fewer than the memory, and numbers whose paths are sought at a
# time.
STEP = 4
CHUNK = 1 << 13


@cache
def levels(bits: int) -> Array:
    """The 2^(bits+1) levels, in units and with the middle of uniform codes; float64 that float16
    holds with the middle and without, where they are integers of LEVEL_BITS times a power of two.

    They are as dense as is best for normal numbers, as a normal of sqrt(3) times the deviation:
    Panter and Dite (1951).
    """
    count = 2 << bits
    shares = [(i + 0.5) / count for i in range(count)]
    normal = np.array([NormalDist().inv_cdf(share) for share in shares])
    exact = REACH * middle(bits) * normal / normal.max()
    step = 2.0 ** (bits - LEVEL_BITS)
    held = middle(bits) + np.rint(exact / step) * step
    result: Array = held.astype(np.float16).astype(np.float64)
    return result


def middle(bits: int) -> float:
    """Of uniform codes, and of the levels."""
    return ((1 << bits) - 1) / 2


def _subset(lowest: Array, memory: int) -> Array:
    """The subset of a number by the lowest bits (memory + 1, ...) of its code and those before."""
    low, high = (np.bitwise_xor.reduce(lowest[list(taps)]) for taps in TAPS[memory])
    return np.asarray(2 * high + low)


@cache
def table(bits: int, memory: int) -> Array:
    """The level of every window: a code, and above it the lowest bits of the codes before it."""
    window = np.arange(1 << (bits + memory))
    code = window % (1 << bits)
    places = np.array([0, *range(bits, bits + memory)])
    subset = _subset(window >> places[:, None] & 1, memory)
    result: Array = levels(bits)[SUBSETS * (code >> 1) + subset]
    return result


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


def points(codes: Array, bits: int, memory: int) -> Array:
    """The levels of `codes` (..., numbers); zeros make up the last group."""
    rings = _rings(codes.astype(np.int64), memory)
    window = rings.copy()
    for i in range(memory):
        window += (np.roll(rings, i + 1, axis=-1) & 1) << (bits + i)
    result: Array = table(bits, memory)[window].reshape(*codes.shape[:-1], -1)
    return result[..., : codes.shape[-1]]


def nearest(aims: Array, weights: Array, bits: int, memory: int) -> Array:
    """The codes whose levels are nearest to `aims` (..., numbers), squared errors counting as
    `weights` (numbers,).
    """
    rows = aims.reshape(-1, aims.shape[-1])
    count = min(len(rows), -(-rows.size // CHUNK)) or 1
    relative = (weights / weights.max()).astype(np.float32)
    parts = [_nearest(part, relative, bits, memory) for part in np.array_split(rows, count)]
    return np.concatenate(parts).reshape(aims.shape)


def _nearest(aims: Array, weights: Array, bits: int, memory: int) -> Array:
    """Of all paths p around each ring the one with the least sum over k of w_k (x_k - q_k)^2, q_k
    the nearest to x_k of the subset that p passes at k.
    """
    _, which, near = _cells(bits)
    rings = _rings(aims, memory)
    flat = rings.reshape(-1, 1)
    cell = _cell(flat[:, 0], bits)
    errors = np.square(near.take(cell, axis=0) - flat, dtype=np.float32, casting="same_kind")
    errors = errors.reshape(*rings.shape, SUBSETS)
    errors *= _rings(weights, memory)[..., None]
    costs = _costs(errors.reshape(-1, STEP, SUBSETS), memory)
    _end_with_zeros(costs, aims.shape[1])
    state, path = _cheapest(costs, rings.shape[-1] // STEP)
    low, subset = (numbers[state, path].reshape(-1) for numbers in _steps(memory))
    codes = 2 * which[cell, subset] + low
    codes = codes.astype(np.uint8).reshape(len(aims), -1)
    return codes[:, : aims.shape[1]]


@cache
def _steps(memory: int) -> tuple[Array, Array]:
    """The lowest bits of STEP numbers and their subsets, both (states, paths, STEP).

    Bit i of a path is that of number i, bit i of the state before it that of number i - memory.
    """
    state, path = np.arange(1 << memory)[:, None], np.arange(1 << STEP)
    lowest = (state + (path << memory)) >> np.arange(memory + STEP)[:, None, None] & 1
    subsets = [_subset(lowest[i : i + memory + 1][::-1], memory) for i in range(STEP)]
    return np.stack(list(lowest[memory:]), axis=-1), np.stack(subsets, axis=-1)


def _costs(errors: Array, memory: int) -> Array:
    """What each path costs: `errors` (steps, STEP, SUBSETS) as (states, paths, steps)."""
    _, subsets = _steps(memory)
    by_number = np.ascontiguousarray(errors.transpose(1, 2, 0))
    costs: Array = by_number[0].take(subsets[..., 0], axis=0)
    for i in range(1, STEP):
        costs += by_number[i].take(subsets[..., i], axis=0)
    return costs


def _end_with_zeros(costs: Array, count: int) -> None:
    """Leaves codes behind the `count` numbers of a row no choice but 0."""
    steps = -(-count // GROUP) * GROUP // STEP
    by_row = costs.reshape(*costs.shape[:2], -1, steps)
    for step in range(count // STEP, steps):
        inside = max(0, count - step * STEP)
        by_row[:, 1 << inside :, :, step] = np.inf


def _cheapest(costs: Array, steps: int) -> tuple[Array, Array]:
    """The state before every step, and the path through it, that cost the least around rings of
    `steps`.
    """
    states = len(costs)
    # The state behind a path is its last bits.
    by_end = costs.reshape(states, states, -1, costs.shape[-1])
    joined = [by_end.min(axis=2).reshape(states, states, -1, steps)]
    while joined[-1].shape[-1] > 1:
        joined.append(_joined(joined[-1]))
    around = np.einsum("iirk->irk", joined[-1])
    start = end = around.argmin(axis=0)
    for matrices in joined[-2::-1]:
        start, end = _parted(matrices, start, end)
    start, end = start.reshape(-1), end.reshape(-1)
    first = by_end[start, end, :, np.arange(len(start))].argmin(axis=1)
    return start, end * by_end.shape[2] + first


def _pairs(matrices: Array) -> tuple[Array, Array]:
    even = matrices.shape[-1] // 2 * 2
    return matrices[..., 0:even:2], matrices[..., 1:even:2]


def _joined(matrices: Array) -> Array:
    """The costs (from, to, rings, steps) of two steps each; a last one without a partner stays."""
    left, right = _pairs(matrices)
    pairs = (left[:, :, None] + right).min(axis=1)
    return np.concatenate([pairs, matrices[..., 2 * pairs.shape[-1] :]], axis=-1)


def _parted(matrices: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """The states before and behind every step, from those (rings, pairs) of pairs of steps."""
    left, right = _pairs(matrices)
    rings, pairs = np.ogrid[: left.shape[2], : left.shape[3]]
    first, last = start[:, : left.shape[3]], end[:, : left.shape[3]]
    through = left[first, :, rings, pairs] + np.moveaxis(right[:, last, rings, pairs], 0, -1)
    middle = through.argmin(axis=-1)
    starts, ends = (np.empty((len(start), matrices.shape[-1]), int) for _ in "ab")
    even = 2 * left.shape[3]
    starts[:, 0:even:2], starts[:, 1:even:2] = first, middle
    ends[:, 0:even:2], ends[:, 1:even:2] = middle, last
    starts[:, even:], ends[:, even:] = start[:, left.shape[3] :], end[:, left.shape[3] :]
    return starts, ends


def _rings(numbers: Array, memory: int) -> Array:
    """`numbers` (..., n) as (..., rings, numbers of a ring), filled up with zeros."""
    leading = numbers.shape[:-1]
    if spare := -numbers.shape[-1] % GROUP:
        numbers = np.pad(numbers, [(0, 0)] * len(leading) + [(0, spare)])
    size = GROUP if memory == SHORT else numbers.shape[-1]
    return numbers.reshape(*leading, -1, size)
