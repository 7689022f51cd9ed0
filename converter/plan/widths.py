"""Which few units get 16-bit activations: those whose tensors cost the outputs most in 8 bits.

A unit reads and makes integers of one width, so a tensor is worth 16 bits only if all units around
it have them. Units are added in the order of what they save for each tensor that becomes wide.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from converter.plan.plan import NodePlan, QuantPlan

# The most tensors, as a share of all, that have 16 bits where nothing else bounds them.
MOST_WIDE = 0.15
NARROW = 8


def wide_share(plan: QuantPlan) -> float:
    """The share of a plan's activation tensors that are held in more than 8 bits."""
    wide = {
        tensor.name
        for tensor in (*plan.tensors.values(), *plan.converted.values())
        if tensor.format.bits > NARROW
    }
    return len(wide) / max(len(plan.tensors), 1)


@dataclass(frozen=True)
class Widening:
    """An order in which to widen the units of a plan of 8 bits; `costs` is what rounding costs by
    group of tensors, `able` the operators that there are wide kernels for, and `kept` the units
    that are to stay as they are.
    """

    plan: QuantPlan
    costs: Mapping[str, float]
    able: Collection[str]
    kept: Collection[str] = ()

    def order(self) -> Iterator[frozenset[str]]:
        """The names of the wide units, more at every step."""
        wide = self._start
        left = {group for group, cost in self.costs.items() if cost > 0 and self._possible(group)}
        while left := {group for group in left if not self._around[group] <= wide}:
            wide |= self._around[max(sorted(left), key=lambda group: self._worth(group, wide))]
            yield wide

    def within(self, share: float) -> frozenset[str]:
        """As many wide units as leave at most a `share` of the tensors wide."""
        most, wide = int(share * len(self.plan.tensors)), self._start
        left = {group for group, cost in self.costs.items() if cost > 0 and self._possible(group)}
        while True:
            more = [group for group in sorted(left) if not self._around[group] <= wide]
            fits = [g for g in more if len(self._tensors(wide | self._around[g])) <= most]
            if not fits:
                return wide
            wide |= self._around[max(fits, key=lambda group: self._worth(group, wide))]

    @cached_property
    def _units(self) -> dict[str, NodePlan]:
        return {unit.name: unit for unit in self.plan.units()}

    @cached_property
    def _start(self) -> frozenset[str]:
        """The units that are wide already."""
        bits = {name: unit.activation.bits for name, unit in self._units.items() if unit.activation}
        return frozenset(name for name, width in bits.items() if width > NARROW)

    @cached_property
    def _around(self) -> dict[str, frozenset[str]]:
        """The units that read or make a tensor, by group."""
        around: dict[str, set[str]] = {group: set() for group in self.plan.groups()}
        for unit in self._units.values():
            for group in self._groups(unit):
                around[group].add(unit.name)
        return {group: frozenset(names) for group, names in around.items()}

    def _groups(self, unit: NodePlan) -> set[str]:
        tensors = self.plan.tensors
        return {tensors[name].group for name in (*unit.inputs, *unit.outputs) if name in tensors}

    def _possible(self, group: str) -> bool:
        movable = self._around[group] - self._start
        units = [self._units[name] for name in movable]
        return all(unit.op_type in self.able and unit.name not in self.kept for unit in units)

    def _tensors(self, wide: Collection[str]) -> set[str]:
        """The tensors that have 16 bits somewhere."""
        units = [self._units[name] for name in wide]
        names = {name for unit in units for name in (*unit.inputs, *unit.outputs)}
        return names & self.plan.tensors.keys()

    def _worth(self, group: str, wide: frozenset[str]) -> float:
        """What the units around a group save for each tensor that they make wide."""
        more = self._around[group] - wide
        after = wide | more
        near = {each for name in more for each in self._groups(self._units[name])}
        saved = sum(self.costs.get(each, 0.0) for each in near if self._around[each] <= after)
        added = len(self._tensors(after)) - len(self._tensors(wide))
        return saved / max(added, 0.5)
