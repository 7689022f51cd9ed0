"""Work over samples, spread over threads: loading, inference and what is done with its results
overlap on all cores, and no result depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Result = TypeVar("Result")
# Samples a worker takes at a time: enough to make handing them out cheap.
SLICE = 16


def over_samples(
    count: int, step: Callable[[int], Result], threads: int, *, most: int = SLICE
) -> Iterator[Result]:
    """step(0), step(1), … step(count - 1), computed on `threads` workers, `most` of them at a time,
    and handed out in this order.

    `step` must not call over_samples itself.
    """
    width = max(1, min(most, count // threads))
    slices = [range(start, min(start + width, count)) for start in range(0, count, width)]
    # A wave bounds how many results wait for a slow one before them.
    for start in range(0, len(slices), 2 * threads):
        wave = slices[start : start + 2 * threads]
        for results in _pool(threads).map(lambda part: [step(i) for i in part], wave):
            yield from results


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="samples")
