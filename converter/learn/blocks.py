"""A model in blocks that follow one another: what each hands on is all that those behind need of
what is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from converter.graph.edit import is_float, not_none, reached, submodel, values_read
from converter.plan.plan import QuantPlan
from converter.plan.units import planned

# Units of a block: as many as an inverted residual has, whose reconstruction Li et al. found best
# of layers, blocks and stages ("BRECQ", arXiv 2102.05426).
UNITS = 3


@dataclass(frozen=True)
class Block:
    """A part of the model from the tensor `start`, or the model's inputs where it is empty, to the
    tensors `ends`; `beside` are what else it reads that no quantized unit makes.
    """

    model: ir.Model
    start: str
    ends: tuple[str, ...]
    beside: tuple[str, ...]


def blocks_of(model: ir.Model, plan: QuantPlan, told: Sequence[str]) -> list[Block]:
    """The blocks with UNITS quantized units or more; the last one ends at the tensors `told`."""
    units = {node for node, _ in planned(model, plan) if node.graph is model.graph}
    moved = reached(model.graph, (value for node in units for value in node.outputs))
    nodes = list(model.graph)
    cuts = dict(_cuts(nodes, moved, told))
    found, part, start = list[Block](), list[ir.Node](), ""
    behind = len(units)
    for node in nodes:
        part.append(node)
        inside = len(units.intersection(part))
        if node in cuts and inside >= UNITS and behind - inside >= UNITS:
            end = cuts[node].name or ""
            found.append(_block(model, part, start, (end,)))
            part, start, behind = [], end, behind - inside
    return [*found, _block(model, part, start, tuple(told))]


def _cuts(
    nodes: list[ir.Node], moved: set[ir.Value], told: Sequence[str]
) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Nodes behind which one moved tensor, a float one, is all that is still to be read."""
    last = {value: i for i, node in enumerate(nodes) for value in values_read(node)}
    open_ends = dict[ir.Value, int]()
    for i, node in enumerate(nodes):
        for value in moved.intersection(node.outputs):
            open_ends[value] = len(nodes) if value.name in told else last.get(value, i)
        open_ends = {value: end for value, end in open_ends.items() if end > i}
        if len(open_ends) == 1:
            (value,) = open_ends
            if is_float(value) and value.name not in told:
                yield node, value


def _block(model: ir.Model, part: list[ir.Node], start: str, ends: tuple[str, ...]) -> Block:
    made = {value for node in part for value in node.outputs}
    read = {value for node in part for value in values_read(node)} - made
    names = {not_none(v.name) for v in read if v.const_value is None} - {start}
    beside = tuple(sorted(names))
    inputs = [start, *beside] if start else beside
    return Block(submodel(model, inputs, ends), start, ends, beside)
