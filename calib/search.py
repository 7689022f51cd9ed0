"""Search by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def fewest(most: int, attempt: Callable[[int], T | None]) -> T:
    """attempt(n) for the least n of 1..most for which it is not None, found by bisection;
    attempt(most) must not be.
    """
    low, high = 0, most
    best = attempt(high)
    assert best is not None
    while high - low > 1:
        middle = (low + high) // 2
        result = attempt(middle)
        low, high, best = (middle, high, best) if result is None else (low, middle, result)
    return best
