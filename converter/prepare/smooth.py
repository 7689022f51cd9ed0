"""Divides the channels of tensors by factors and multiplies the weights behind them: x W = (x / s) (s W)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.model import Names, add_constant, constant, replace_constant

# Operators whose outputs scale with constants (by index) that hold one value for each of the last axis' channels.
_SCALABLE = {"LayerNormalization": (1, 2)}


class SmoothPass(ir.passes.InPlacePass):
    """Divides each tensor of `factors` for the products that read it, and for nothing else that does.

    A LayerNormalization that nothing else reads takes the division in; elsewhere it is a Mul.
    """

    def __init__(self, factors: Mapping[str, Array], products: Mapping[str, Sequence[ir.Node]]) -> None:
        self.factors, self.products = factors, products

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place."""
        names = Names(model)
        for tensor, factors in self.factors.items():
            nodes = self.products[tensor]
            _divide(nodes, factors, names)
            for node in nodes:
                _multiply(node, factors, names)
        return ir.passes.PassResult(model, bool(self.factors))


def _divide(nodes: Sequence[ir.Node], factors: Array, names: Names) -> None:
    x, graph = nodes[0].inputs[0], nodes[0].graph
    assert x is not None
    assert isinstance(graph, ir.Graph)
    producer = x.producer()
    if producer is not None and _takes_in(producer, nodes):
        for index in _SCALABLE[producer.op_type]:
            if (old := constant(producer.inputs[index]) if index < len(producer.inputs) else None) is not None:
                replace_constant(producer, index, (old / factors).astype(np.float32), names)
        return
    reciprocals = add_constant(graph, names.fresh(f"{x.name}_smoothing"), (1 / factors).astype(np.float32))
    name = names.fresh(f"{x.name}_smoothed")
    divided = ir.node("Mul", [x, reciprocals], name=name, outputs=[ir.Value(name=name, shape=x.shape, type=x.type)])
    graph.insert_before(min(nodes, key=list(graph).index), divided)
    for node in nodes:
        node.replace_input_with(0, divided.outputs[0])


def _takes_in(producer: ir.Node, nodes: Sequence[ir.Node]) -> bool:
    x = producer.outputs[0]
    scalable = producer.op_type in _SCALABLE and not producer.domain and constant(producer.inputs[1]) is not None
    last = producer.attributes.get_int("axis", -1) == -1
    return scalable and last and not x.is_graph_output() and {use.node for use in x.uses()} == set(nodes)


def _multiply(node: ir.Node, factors: Array, names: Names) -> None:
    weight = constant(node.inputs[1])
    assert weight is not None
    along = factors if node.attributes.get_int("transB", 0) else factors[:, None]
    replace_constant(node, 1, (weight * along).astype(np.float32), names)
