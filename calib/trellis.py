"""Trellis codes: k bits a number, and the error of up to three quarters of a bit more.

Numbers go in groups of GROUP. Their levels are parted into four subsets in turn; a number's subset follows from the
lowest bit of its own code and of the MEMORY codes before it in the group, which is seen as a ring, and the other bits
choose a level of the subset. So each number has k bits and 2^(k+1) levels to come near it: Marcellin and Fischer,
"Trellis Coded Quantization of Memoryless and Gauss-Markov Sources" (1990), with Ungerboeck's code of four states. As a
group is short, all of its paths are tried.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

GROUP, MEMORY, SUBSETS = 8, 2, 4
# The outermost level, where 1 is half the width of a uniform grid of as many bits.
REACH = 1.2
# Numbers whose paths are tried at a time.
CHUNK = 1 << 15


@cache
def levels(bits: int) -> Array:
    """The 2^(bits+1) levels, in units and with the middle of uniform codes; float64 that float16 holds.

    They are as dense as is best for normal numbers, as a normal of sqrt(3) times the deviation: Panter and Dite (1951).
    """
    count, middle = 2 << bits, ((1 << bits) - 1) / 2
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    found: Array = (middle * (1 + REACH * normal / normal.max())).astype(np.float16).astype(np.float64)
    return found


def _subset(u: Array, before: Array, second: Array) -> Array:
    """The subset of a number by its own lowest bit and those of the two codes before."""
    return 2 * (u ^ second) + before


@cache
def table(bits: int) -> Array:
    """The level of every window: a code plus what `window_weights` adds for the codes before."""
    window = np.arange(1 << (bits + MEMORY))
    code, before, second = window % (1 << bits), window >> bits & 1, window >> (bits + 1)
    found: Array = levels(bits)[SUBSETS * (code >> 1) + _subset(code & 1, before, second)]
    return found


def window_weights(bits: int) -> Array:
    """What the lowest bit of every number (rows) of a group adds to the window of every number (columns)."""
    added: Array = np.sum([2.0 ** (bits + i) * np.roll(np.eye(GROUP), i + 1, axis=1) for i in range(MEMORY)], axis=0)
    return added


@cache
def _paths() -> tuple[Array, Array, Array]:
    """Of every path through a group: its lowest bits, its subsets, and which of (SUBSETS, GROUP) they are."""
    low = np.arange(1 << GROUP)[:, None] >> np.arange(GROUP) & 1
    subset = _subset(low, np.roll(low, 1, axis=1), np.roll(low, 2, axis=1))
    met = subset[:, None] == np.arange(SUBSETS)[:, None]
    return low, subset, met.reshape(len(low), -1).T.astype(np.float32)


def points(codes: Array, bits: int) -> Array:
    """The levels of `codes` (..., numbers); zeros make up the last group."""
    count = codes.shape[-1]
    grouped = _grouped(codes.astype(np.int64))
    window = grouped + (grouped & 1) @ window_weights(bits).astype(np.int64)
    found: Array = table(bits)[window].reshape(*codes.shape[:-1], -1)[..., :count]
    return found


def nearest(aims: Array, weights: Array, bits: int) -> Array:
    """The codes whose levels are nearest to `aims` (..., numbers), squared errors counting as `weights` (numbers,)."""
    rows = aims.reshape(-1, aims.shape[-1])
    parts, relative = np.array_split(rows, -(-rows.size // CHUNK) or 1), (weights / weights.max()).astype(np.float32)
    return np.concatenate([_nearest(part, relative, bits) for part in parts]).reshape(aims.shape)


def _nearest(aims: Array, weights: Array, bits: int) -> Array:
    count, grouped = aims.shape[1], _grouped(aims)
    flat, parted = grouped.reshape(-1), levels(bits).reshape(-1, SUBSETS).T
    best = np.stack([np.searchsorted((row[1:] + row[:-1]) / 2, flat) for row in parted])
    errors = np.stack([row[i] for row, i in zip(parted, best, strict=True)]) - flat
    errors = (errors**2).astype(np.float32).reshape(SUBSETS, *grouped.shape) * _grouped(weights)
    low, subset, met = _paths()
    costs = np.matmul(np.moveaxis(errors, 0, 2).reshape(*grouped.shape[:2], -1), met)
    if count % GROUP:
        costs[:, -1, 1 << count % GROUP :] = np.inf
    path = costs.argmin(axis=2)
    codes: Array = 2 * best[subset[path].reshape(-1), np.arange(flat.size)] + low[path].reshape(-1)
    return codes.reshape(len(aims), -1)[:, :count]


def _grouped(numbers: Array) -> Array:
    """`numbers` (..., n) as (..., groups, GROUP), filled up with zeros."""
    spare = -numbers.shape[-1] % GROUP
    padded = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, spare)]) if spare else numbers
    return padded.reshape(*numbers.shape[:-1], -1, GROUP)
