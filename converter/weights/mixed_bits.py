"""Mixed bits: every weight in the width it is worth.

By error: the fewest bits that keep each layer's relative error, `init_scale`, below a bound. By
sensitivity: what each weight alone costs the outputs is measured at one width; every bit more
leaves a quarter of it, and bits go where they buy the most for their bytes. Fits make up for a part
of what layers before them lost, which no layer alone shows, so that allocations between this one
and equal bits for all are tried out as well: fitted on a part of the samples, judged on the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from converter.plan.result import Tradeoff

# Widths that a search by sensitivity may choose.
WIDTHS = range(2, 11)


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


def allocation(steps: Iterable[Step], sizes: Mapping[str, int], most: float) -> dict[str, int]:
    """The widths after as many of the steps as take no more than `most` bits in all."""
    widths = dict.fromkeys(sizes, WIDTHS[0])
    room = most - sum(sizes.values()) * WIDTHS[0]
    for step in steps:
        more = (step.bits - widths[step.name]) * sizes[step.name]
        if more <= room:
            widths[step.name], room = step.bits, room - more
    return widths


@dataclass(frozen=True)
class Budget:
    """Bytes of a model's weights: `before`, and what they take beside codes; `worth` and `sizes` as
    in `path`.
    """

    worth: Mapping[str, float]
    sizes: Mapping[str, int]
    before: int
    overhead: int

    def ratio(self, widths: Mapping[str, int]) -> float:
        """How many times smaller the weights become."""
        return self.before / (self._rest() + self._bits(widths) / 8)

    def within(self, ratio: float, blend: float = 1.0) -> dict[str, int]:
        """The widths for a file this many times smaller, by sensitivity as far as `blend` goes."""
        blended = {
            name: self.worth[name] ** blend * size ** (1 - blend)
            for name, size in self.sizes.items()
        }
        return allocation(
            path(blended, self.sizes),
            self.sizes,
            8 * (self.before / ratio - self._rest()),
        )

    def uniform(self) -> list[dict[str, int]]:
        """Equal bits for all."""
        return [dict.fromkeys(self.sizes, bits) for bits in WIDTHS[1:7]]

    def tradeoff(self, widths: Mapping[str, int], measured: float | None = None) -> Tradeoff:
        """A row of the table of what can be had."""
        expected = sum(self.worth[name] * 4.0**-width for name, width in widths.items())
        return Tradeoff(
            self.ratio(widths),
            self._bits(widths) / sum(self.sizes.values()),
            expected,
            measured,
        )

    def _rest(self) -> int:
        return self.before - 4 * sum(self.sizes.values()) + self.overhead

    def _bits(self, widths: Mapping[str, int]) -> int:
        return sum(self.sizes[name] * width for name, width in widths.items())
