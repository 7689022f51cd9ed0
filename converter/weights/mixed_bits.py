"""Mixed bits: every weight in the width it is worth.

By error: the fewest bits that keep each layer's relative error, `init_scale`, below a bound. By
sensitivity: what each weight alone costs the outputs is measured at one width; every bit more
leaves a quarter of it, and bits go where they buy the most for their bytes. Fits make up for a part
of what layers before them lost, which no layer alone shows, so that allocations between this one
and equal bits for all are tried out as well: fitted on a part of the samples, judged on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from converter.plan.result import Tradeoff

# Widths that a search by sensitivity may choose.
WIDTHS = range(2, 11)

# The bytes that a weight, by its name, takes in a width.
Cost = Callable[[str, int], int]


@dataclass(frozen=True)
class Step:
    """One weight gets `bits`: the path of allocations from the smallest file on."""

    name: str
    bits: int


def path(worth: Mapping[str, float], sizes: Mapping[str, int]) -> list[Step]:
    """The steps from the fewest bits to the most, those first that buy the most.

    `worth` is a weight's error at 0 bits, of which every bit leaves a quarter; `sizes` are the
    numbers of elements.
    """
    steps = [Step(name, bits) for name in worth for bits in WIDTHS[1:]]
    return sorted(
        steps,
        key=lambda step: (
            -worth[step.name] * 4.0**-step.bits / sizes[step.name],
            step.name,
        ),
    )


def allocation(
    steps: Iterable[Step], names: Iterable[str], cost: Cost, most: float
) -> dict[str, int]:
    """The widths after as many of the steps as take no more than `most` bytes in all."""
    widths = dict.fromkeys(names, WIDTHS[0])
    room = most - sum(cost(*pair) for pair in widths.items())
    for step in steps:
        more = cost(step.name, step.bits) - cost(step.name, widths[step.name])
        if more <= room:
            widths[step.name], room = step.bits, room - more
    return widths


@dataclass(frozen=True)
class Budget:
    """Bytes of a model's file: `before`, of each weight, and of all the `rest`; `worth` and `sizes`
    as in `path`.
    """

    worth: Mapping[str, float]
    sizes: Mapping[str, int]
    cost: Cost
    before: int
    rest: int

    def ratio(self, widths: Mapping[str, int]) -> float:
        """How many times smaller the file becomes."""
        return self.before / (self.rest + sum(self.cost(*pair) for pair in widths.items()))

    def within(self, ratio: float, blend: float = 1.0) -> dict[str, int]:
        """The widths for a file this many times smaller, by sensitivity as far as `blend` goes."""
        blended = {
            name: self.worth[name] ** blend * size ** (1 - blend)
            for name, size in self.sizes.items()
        }
        most = self.before / ratio - self.rest
        return allocation(path(blended, self.sizes), self.sizes, self.cost, most)

    def uniform(self) -> list[dict[str, int]]:
        """Equal bits for all."""
        return [dict.fromkeys(self.sizes, bits) for bits in WIDTHS[1:7]]

    def tradeoff(self, widths: Mapping[str, int], measured: float | None = None) -> Tradeoff:
        """A row of the table of what can be had."""
        expected = sum(self.worth[name] * 4.0**-width for name, width in widths.items())
        bits = sum(self.sizes[name] * width for name, width in widths.items())
        return Tradeoff(self.ratio(widths), bits / sum(self.sizes.values()), expected, measured)
