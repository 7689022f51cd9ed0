"""One form for hard sigmoids and hard swishes: HardSigmoid(x), and x * HardSigmoid(x).

Exporters write clip(a x + b, 0, 1), or clip(a x + b, 0, m) / m, where the division may also stand
behind a product with the clipped value or before it: x * clip(x + 3, 0, 6) / 6. Every one of these
operators goes over the whole tensor.

Where nothing else reads what a weighted operator makes, its hard sigmoid is written out again: the
slope and the offset fold into the operator, and the bounds cost nothing between integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converter.graph.edit import (
    Names,
    constant,
    graph_of,
    nodes_of,
    not_none,
    only_consumer,
    operand,
)
from converter.plan.ops import hard_sigmoid_line, rule_of
from converter.prepare.lines import Line, step

# Exporters round the sixth of a hard swish to float32.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class _Line:
    """slope * source + offset, computed by `nodes` that nothing else reads."""

    source: ir.Value
    slope: float
    offset: float
    nodes: tuple[ir.Node, ...] = ()


def name_hard_sigmoids(model: ir.Model) -> None:
    """Rewrites the nodes of every graph in place."""
    for node in _all(model, "HardSwish"):
        _spell_swish(node)
    for node in _all(model, "Clip"):
        _name(node)
    names = Names(model)
    for node in _all(model, "HardSigmoid"):
        _spell_behind_product(node, names)


def _all(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in nodes_of(model) if node.op_type == op_type and not node.domain]


def _spell_swish(node: ir.Node) -> None:
    """HardSwish, of which runtimes know no integer form, as the product it is."""
    x = not_none(node.inputs[0])
    y = node.outputs[0]
    gate = _hard_sigmoid(x, 1 / 6, 0.5, name=f"{node.name}_gate", like=y)
    product = ir.node(
        "Mul",
        [x, gate.outputs[0]],
        name=node.name,
        outputs=[_like(y)],
    )
    _replace(node, [node], [gate, product], product.outputs[0])


def _spell_behind_product(node: ir.Node, names: Names) -> None:
    """Writes a HardSigmoid as a Mul, an Add and a Clip where the first two will be folded."""
    x = not_none(node.inputs[0])
    y = node.outputs[0]
    maker = x.producer()
    while maker is not None and maker.op_type == "BatchNormalization":
        maker = not_none(maker.inputs[0]).producer()
    if maker is None or rule_of(maker).bias is None:
        return
    if only_consumer(x) is not node:
        return
    numbers = [np.float32(number) for number in (*hard_sigmoid_line(node), 0, 1)]
    a, b, low, high = (names.constant(f"{node.name}_number", number) for number in numbers)
    scaled = names.node(
        "Mul",
        [x, a],
        node.name or "",
        like=y,
    )
    moved = names.node(
        "Add",
        [scaled.outputs[0], b],
        node.name or "",
        like=y,
    )
    inputs = [moved.outputs[0], low, high]
    clip = ir.node(
        "Clip",
        inputs,
        name=node.name,
        outputs=[_like(y)],
    )
    _replace(node, [node], [scaled, moved, clip], clip.outputs[0])


def _name(clip: ir.Node) -> None:
    """Makes a HardSigmoid of `clip` and what belongs to it, where it is one."""
    low = operand(clip, 1)
    high = operand(clip, 2)
    if low is None or high is None or low.size != 1 or high.size != 1:
        return
    line = _line(not_none(clip.inputs[0]))
    top = float(high.item())
    if low.item() != 0 or not 0 < top < np.inf or not line.nodes:
        return
    scaled = _scaled(clip, top)
    if scaled is None:
        return
    nodes, name, x = scaled
    slope = line.slope / top
    offset = line.offset / top
    gate = _hard_sigmoid(
        line.source,
        slope,
        offset,
        name=clip.name or "",
        like=clip.outputs[0],
    )
    new = [gate]
    if x is not None:
        output = _like(nodes[0].outputs[0])
        new.append(ir.node("Mul", [x, gate.outputs[0]], name=name, outputs=[output]))
    _replace(
        nodes[0],
        [*nodes, *line.nodes],
        new,
        new[-1].outputs[0],
    )


_Scaled = tuple[list[ir.Node], str | None, ir.Value | None]


def _scaled(clip: ir.Node, top: float) -> _Scaled | None:
    """Where the upper bound `top` becomes 1: the nodes, last first, of clip(…), clip(…) / m,
    x clip(…) / m or (x / m) clip(…), the product's name and x.
    """
    if abs(top - 1) <= TOLERANCE:
        return [clip], None, None
    clipped = clip.outputs[0]
    follower = only_consumer(clipped)
    if follower is None or follower.domain:
        return None
    if _cancels(follower, clipped, top):
        return [follower, clip], None, None
    if follower.op_type != "Mul":
        return None
    index = 1 if follower.inputs[0] is clipped else 0
    x = not_none(follower.inputs[index])
    behind = only_consumer(follower.outputs[0])
    before = x.producer()
    if behind is not None and _cancels(behind, follower.outputs[0], top):
        return [behind, follower, clip], follower.name, x
    if before is None or only_consumer(x) is not follower:
        return None
    source = before.inputs[0]
    if source is None or not _cancels(before, source, top):
        return None
    return [follower, before, clip], follower.name, source


def _cancels(node: ir.Node, value: ir.Value, top: float) -> bool:
    """Whether `node` divides `value` by `top`, and does nothing else."""
    source, line = _step(node) or (None, Line())
    undone = abs(line.factor * top - 1) <= TOLERANCE
    return source is value and not line.shift and undone


def _line(value: ir.Value) -> _Line:
    """`value` as a line over what it is computed of by scalars."""
    node = value.producer()
    read = None if node is None or only_consumer(value) is None else _step(node)
    if node is None or read is None:
        return _Line(value, 1.0, 0.0)
    source, own = read
    inner = _line(source)
    slope = inner.slope * own.factor
    offset = inner.offset * own.factor + own.shift
    return _Line(inner.source, slope, offset, (node, *inner.nodes))


def _step(node: ir.Node) -> tuple[ir.Value, Line] | None:
    """The value that `node` reads and the endless line that it makes of it, by a finite float32
    that keeps its shape.
    """
    read = step(node)
    if read is None:
        return None
    source, line = read
    if line.factor == 0 or np.isfinite([line.low, line.high]).any():
        return None
    rank = source.shape.rank() if source.shape is not None else 0
    others = [value for value in node.inputs if value is not None and value is not source]
    numbers = [not_none(constant(value)) for value in others]
    plain = all(x.dtype == np.float32 and x.ndim <= rank and np.isfinite(x).all() for x in numbers)
    return read if numbers and plain else None


def _hard_sigmoid(
    x: ir.Value, slope: float, offset: float, *, name: str, like: ir.Value
) -> ir.Node:
    attributes = {"alpha": slope, "beta": offset}
    return ir.node(
        "HardSigmoid",
        [x],
        attributes,
        name=name,
        outputs=[_like(like)],
    )


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(shape=value.shape, type=value.type)


def _replace(last: ir.Node, old: list[ir.Node], new: list[ir.Node], output: ir.Value) -> None:
    """Puts `new` nodes in the place of `old` ones, of which `last` made the output."""
    ir.convenience.replace_nodes_and_values(
        graph_of(last),
        last,
        old,
        new,
        last.outputs,
        [output],
    )
