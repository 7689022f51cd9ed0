"""Writes the weights of a plan that are stored as codes and are floats again before use, and its float biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from calib.affine import dequantize
from converter.model import Names, add_constant, constant, replace_constant
from converter.plan import NodePlan, QuantizedWeight, QuantPlan

# (graph, name, weight) -> the value of the restored floats
Writer = Callable[[ir.Graph, str, QuantizedWeight], ir.Value]


def emit_stored(model: ir.Model, plan: QuantPlan, write: Writer) -> None:
    """Lets the planned nodes of `model` read what `write` makes of their weights; a shared weight is written once."""
    names, written = Names(model), dict[ir.Value, ir.Value]()
    for node, unit in planned(model, plan):
        for weight in unit.weights:
            old = node.inputs[weight.index]
            assert old is not None
            assert isinstance(old.graph, ir.Graph)
            if old not in written:
                written[old] = write(old.graph, weight.name, plan.stored[unit.name, weight.index])
                written[old].shape, written[old].type = old.shape, old.type
            node.replace_input_with(weight.index, written[old])
        if unit.name in plan.biases:
            _write_bias(node, unit, plan, names)
    for value in written:
        if not value.uses() and isinstance(value.graph, ir.Graph):
            del value.graph.initializers[value.name or ""]


def as_floats(graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
    """A Writer of plain constants, to compute with what a stored weight is worth."""
    return add_constant(graph, f"{name}_restored", dequantize(weight.codes, weight.qparams))


def planned(model: ir.Model, plan: QuantPlan) -> Iterator[tuple[ir.Node, NodePlan]]:
    """The quantized nodes of all graphs of `model` with their plans."""
    for graph in model.graphs():
        for node in graph:
            unit = plan.nodes.get(node.name or "")
            if unit and unit.quantized:
                yield node, unit


def _write_bias(node: ir.Node, unit: NodePlan, plan: QuantPlan, names: Names) -> None:
    bias, index = plan.biases[unit.name], 2
    if unit.absorbed:
        product, node = node.outputs[0], next(use.node for use in node.outputs[0].uses())
        index = int(node.inputs[0] is product)
    old = constant(node.inputs[index]) if index < len(node.inputs) else None
    replace_constant(node, index, bias.reshape(-1 if old is None else old.shape).astype("float32"), names)
