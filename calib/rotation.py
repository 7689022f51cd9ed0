"""Rotations of a weight's columns that make any weight look like normal numbers.

A fixed width holds normal numbers well and numbers of which a few are large badly; sums of many,
each taken with another sign, are close to normal whatever the numbers were. So the codes are those
of W T, and W is what T makes of them again: Chee et al., "QuIP: 2-Bit Quantization of Large
Language Models With Guarantees" (arXiv 2307.13304), section 4, with Hadamard matrices as Tseng et
al., "QuIP#" (arXiv 2402.04396).

T is a Kronecker product of matrices p I - 2 J, J all ones, over factors p of every side of the
weight but its channels. All are symmetric, of small integers, have no constant row, which would
make one large number of a mean, and are their own inverse but for a factor, which the power of two
in front brings near 1. As sums of so many integers are exact in float32, every runtime restores the
same weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Larger factors mix too little: p I - 2 J comes near a multiple of I.
FACTORS = (4, 2, 3, 5, 7)
# How many times as large as its largest number a sum may be: float32 holds integers of 24 bits, and
# levels of a trellis have 11.
GROWTH = 1 << 13
# The most rows of one matrix, so that it is small and products with it are fast.
LARGEST = 32


@dataclass(frozen=True)
class Rotation:
    """T over columns as the symmetric matrices that mix some of their axes, each with how many
    positions the axes before it have; T T is `square` times I.
    """

    steps: tuple[tuple[int, Array], ...]
    square: float

    @property
    def mixed(self) -> int:
        """How many numbers take part in every sum."""
        return math.prod(len(matrix) for _, matrix in self.steps)

    def __call__(self, rows: Array) -> Array:
        """`rows` (..., columns) times T: float64."""
        shape = rows.shape
        for before, matrix in self.steps:
            behind = shape[-1] // (before * len(matrix))
            rows = np.matmul(matrix, rows.reshape(-1, len(matrix), behind))
        return rows.reshape(shape)

    def inverse(self, rows: Array) -> Array:
        """What `__call__` makes `rows` of."""
        return self(rows) / self.square

    def moments(self, moments: Array) -> Array:
        """T H T of second moments H (..., columns, columns): those of inputs times T."""
        return self(self(moments).swapaxes(-1, -2))


@cache
def rotation(sides: tuple[int, ...]) -> Rotation:
    """Of columns that run along `sides`, whose order does not matter but among equal ones."""
    factors: list[list[int]] = [[] for _ in sides]
    growth = 1
    for i in sorted(range(len(sides)), key=lambda i: -sides[i]):
        for factor in _factors(sides[i]):
            more = growth * int(np.abs(_mixing(factor)[0]).sum())
            if more <= GROWTH:
                factors[i].append(factor)
                growth = more
    steps = [(before, reduce(np.kron, map(_mixing, own))) for before, own in _parts(sides, factors)]
    square = math.prod(float(np.square(matrix[0]).sum()) for _, matrix in steps)
    # All but the smallest have one form wherever they stand: a file holds them once.
    exponent = round(math.log2(square) / 2)
    steps.sort(key=lambda step: len(step[1]))
    scaled = [(before, matrix * 2.0**-exponent) for before, matrix in steps[:1]]
    return Rotation((*scaled, *steps[1:]), square / 4.0**exponent)


def _factors(number: int) -> list[int]:
    found = []
    for factor in FACTORS:
        while number % factor == 0:
            found.append(factor)
            number //= factor
    return found


def _mixing(factor: int) -> Array:
    """The integer matrix of a factor: float64."""
    match factor:
        case 2:
            return np.array([[1.0, 1.0], [1.0, -1.0]])
        case 4:
            return 2 * np.eye(4) - 1.0
        case _:
            return factor * np.eye(factor) - 2.0


def _parts(sides: Sequence[int], factors: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """The factors that are to be one matrix, next to one another, and the positions before them."""
    parts: list[tuple[int, list[int]]] = []
    before = 1
    for side, own in zip(sides, factors, strict=True):
        alone = side // math.prod(own)
        before *= alone
        for i, factor in enumerate(own):
            apart = not parts or (alone > 1 and i == 0)
            if apart or math.prod(parts[-1][1]) * factor > LARGEST:
                parts.append((before, []))
            parts[-1][1].append(factor)
            before *= factor
    return parts
