"""Writes the weights of a plan that are stored as codes and are floats again before use, and its
float biases.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from calib.affine import dequantize
from converter.graph.edit import (
    Names,
    add_constant,
    drop_unread,
    graph_of,
    not_none,
    replace_constant,
)
from converter.plan.plan import NodePlan, QuantizedWeight, QuantPlan
from converter.plan.units import bias_of, bias_place, planned

# (graph, name, weight) -> the value of the restored floats
Writer = Callable[[ir.Graph, str, QuantizedWeight], ir.Value]


def emit_stored(model: ir.Model, plan: QuantPlan, write: Writer) -> None:
    """Lets the planned nodes of `model` read what `write` makes of their weights; a shared weight
    is written once.
    """
    names, written = Names(model), dict[ir.Value, ir.Value]()
    for node, unit in planned(model, plan):
        for weight in unit.weights:
            old = not_none(node.inputs[weight.index])
            if old not in written:
                written[old] = write(
                    graph_of(old), weight.name, plan.stored[unit.name, weight.index]
                )
                written[old].shape, written[old].type = old.shape, old.type
            node.replace_input_with(weight.index, written[old])
        if unit.name in plan.biases:
            write_bias(node, unit, plan, names)
    drop_unread(model)


def as_floats(graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
    """A Writer of plain constants, to compute with what a stored weight is worth."""
    return add_constant(graph, f"{name}_restored", dequantize(weight.codes, weight.qparams))


def write_bias(node: ir.Node, unit: NodePlan, plan: QuantPlan, names: Names) -> None:
    """Gives the unit the plan's bias."""
    old, bias = bias_of(node, unit), plan.biases[unit.name].astype(np.float32)
    owner, index = bias_place(node, unit)
    replace_constant(owner, index, bias if old is None else bias.reshape(old.shape), names)
