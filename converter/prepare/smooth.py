"""Divides the channels of tensors by factors and multiplies the weights behind them: x W = (x / s) (s W)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.model import Names, add_constant, constant, only_consumer, replace_constant

# Operators whose output is linear in the constants behind their first input, channel by channel of the last axis.
_LINEAR = {"LayerNormalization", "MatMul", "Gemm"}
# From where the heads are joined back to where they are parted: the operators, and by which input each is reached.
_ATTENTION = (("Transpose", 0), ("MatMul", 0), ("Transpose", 1), ("Reshape", 0))

Place = tuple[ir.Node, int]


class SmoothPass(ir.passes.InPlacePass):
    """Divides each tensor of `factors` for the products that read it, and for nothing else that does.

    The constants that the tensor is linear in take the division in, where there are such; elsewhere it is a Mul.
    """

    def __init__(self, factors: Mapping[str, Array], products: Mapping[str, Sequence[ir.Node]]) -> None:
        self.factors, self.products = factors, products

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place."""
        names = Names(model)
        for tensor, factors in self.factors.items():
            nodes = self.products[tensor]
            if places := linear_in(nodes):
                for node, index in places:
                    _multiply(node, index, 1 / factors, by_row=index == 1 and _transposed(node), names=names)
            else:
                _divide(nodes, factors, names)
            for node in nodes:
                _multiply(node, 1, factors, by_row=not _transposed(node), names=names)
        return ir.passes.PassResult(model, bool(self.factors))


def _divide(nodes: Sequence[ir.Node], factors: Array, names: Names) -> None:
    x, graph = nodes[0].inputs[0], nodes[0].graph
    assert x is not None
    assert isinstance(graph, ir.Graph)
    reciprocals = add_constant(graph, names.fresh(f"{x.name}_smoothing"), (1 / factors).astype(np.float32))
    name = names.fresh(f"{x.name}_smoothed")
    divided = ir.node("Mul", [x, reciprocals], name=name, outputs=[ir.Value(name=name, shape=x.shape, type=x.type)])
    graph.insert_before(min(nodes, key=list(graph).index), divided)
    for node in nodes:
        node.replace_input_with(0, divided.outputs[0])


def linear_in(readers: Sequence[ir.Node]) -> list[Place]:
    """The constants, by node and input, that the tensor `readers` multiply is linear in, channel by channel; or none.

    Those of a LayerNormalization or a product and its bias, also where attention weighs the rows of the product.
    """
    weight = constant(readers[0].inputs[1])
    assert weight is not None
    return _constants_of(readers[0].inputs[0], set(readers), weight.shape[int(_transposed(readers[0]))])


def _constants_of(x: ir.Value | None, readers: set[ir.Node], size: int) -> list[Place]:
    node = x.producer() if x is not None else None
    if x is None or node is None or node.domain or x.is_graph_output() or {use.node for use in x.uses()} != readers:
        return []
    operands = [index for index, value in enumerate(node.inputs) if value is not None]
    found = [(node, index) for index in operands if constant(node.inputs[index]) is not None]
    if node.op_type in _LINEAR and node.attributes.get_int("axis", -1) == -1:
        return found if operands[1:] == [index for _, index in found] else []
    if node.op_type == "Add" and len(found) == 1:
        before = _constants_of(node.inputs[1 - found[0][1]], {node}, size)
        return [*before, *found] if before else []
    part = _parting(node, size) if node.op_type == "Reshape" else None
    return _constants_of(part.inputs[0], {part}, size) if part else []


def _parting(join: ir.Node, size: int) -> ir.Node | None:
    """The Reshape that parts `size` channels into the heads of an attention, which weighs rows; `join` undoes it."""
    chain = [join]
    for op_type, index in _ATTENTION:
        value = chain[-1].inputs[index]
        node = value.producer() if value is not None and only_consumer(value) else None
        if node is None or node.op_type != op_type or node.domain:
            return None
        chain.append(node)
    back, there, part = chain[1], chain[3], chain[4]
    turned = all(list(node.attributes.get_ints("perm", ())) == [0, 2, 1, 3] for node in (back, there))
    whole, parts = part.inputs[0].shape if part.inputs[0] else None, part.outputs[0].shape
    if not turned or whole is None or parts is None or whole.has_unknown_dim():
        return None
    return part if list(whole)[:-1] == list(parts)[:-2] and whole[-1] == size else None


def _transposed(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("transB", 0))


def _multiply(node: ir.Node, index: int, factors: Array, by_row: bool, names: Names) -> None:
    old = constant(node.inputs[index])
    assert old is not None
    replace_constant(node, index, (old * (factors[:, None] if by_row else factors)).astype(np.float32), names)
