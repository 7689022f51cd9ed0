"""Where the units of a plan stand in a graph, and the constants they multiply with and add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import nodes_of, not_none, operand, readers_of
from converter.plan.matrices import View
from converter.plan.ops import rule_of, view_of
from converter.plan.plan import NodePlan, QuantPlan, WeightPlan


@dataclass(frozen=True)
class Weighted:
    """A unit that multiplies with `weight`, and adds a `bias`, float64 of shape (channels,); `view`
    is the weight as a matrix of products, None if it is none.
    """

    unit: NodePlan
    node: ir.Node
    wanted: WeightPlan
    weight: Array
    bias: Array | None
    view: View | None


def weighted(model: ir.Model, plan: QuantPlan) -> Iterator[Weighted]:
    """The quantized units of all graphs that multiply with a weight."""
    for node, unit in planned(model, plan):
        if unit.weight is not None:
            yield weighted_of(unit, node, bias_of(node, unit))


def weighted_of(unit: NodePlan, node: ir.Node, bias: Array | None) -> Weighted:
    """A weighted unit with its constants."""
    wanted = not_none(unit.weight)
    weight = not_none(operand(node, wanted.index))
    row = None if bias is None else bias.reshape(-1).astype(np.float64)
    return Weighted(
        unit,
        node,
        wanted,
        weight,
        row,
        view_of(node, weight.shape, wanted.index),
    )


def planned(model: ir.Model, plan: QuantPlan) -> Iterator[tuple[ir.Node, NodePlan]]:
    """The quantized nodes of all graphs of `model` with their plans."""
    for node in nodes_of(model):
        unit = plan.nodes.get(node.name or "")
        if unit and unit.quantized:
            yield node, unit


def bias_of(node: ir.Node, unit: NodePlan) -> Array | None:
    """The unit's constant bias."""
    owner, index = bias_place(node, unit)
    return None if owner is node and rule_of(node).bias is None else operand(owner, index)


def bias_place(node: ir.Node, unit: NodePlan) -> tuple[ir.Node, int]:
    """The node that adds the bias, and at which input."""
    product = node.outputs[0]
    absorbed = [node for node in readers_of(product) if node.name in unit.absorbed]
    readers = [node for node in absorbed if rule_of(node).adds]
    return (readers[0], int(readers[0].inputs[0] is product)) if readers else (node, 2)
