"""Divides the channels of tensors by factors and multiplies the weights behind them: x W = (x / s)
(s W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import (
    Names,
    graph_of,
    not_none,
    only_consumer,
    operand,
    readers_of,
    replace_constant,
)
from converter.plan.ops import is_transposed, rule_of

# From where the heads are joined back to where they are parted: the operators, and by which input
# each is reached.
_ATTENTION = (("Transpose", 0), ("MatMul", 0), ("Transpose", 1), ("Reshape", 0))

Place = tuple[ir.Node, int]


def divide_channels(
    model: ir.Model,
    factors: Mapping[str, Array],
    products: Mapping[str, Sequence[ir.Node]],
) -> None:
    """Divides each tensor of `factors` for the `products` that read it, and for nothing else that
    does, in place.

    The constants that the tensor is linear in take the division in, where there are such; elsewhere
    it is a Mul.
    """
    names = Names(model)
    for tensor, by in factors.items():
        nodes = products[tensor]
        if places := linear_in(nodes):
            for node, index in places:
                by_row = index == 1 and is_transposed(node)
                _multiply(node, index, 1 / by, by_row=by_row, names=names)
        else:
            _divide(nodes, by, names)
        for node in nodes:
            _multiply(node, 1, by, by_row=not is_transposed(node), names=names)


def _divide(nodes: Sequence[ir.Node], factors: Array, names: Names) -> None:
    x, graph = not_none(nodes[0].inputs[0]), graph_of(nodes[0])
    reciprocals = names.constant(f"{x.name}_smoothing", (1 / factors).astype(np.float32))
    divided = names.node("Mul", [x, reciprocals], f"{x.name}_smoothed", like=x)
    graph.insert_before(min(nodes, key=list(graph).index), divided)
    for node in nodes:
        node.replace_input_with(0, divided.outputs[0])


def linear_in(readers: Sequence[ir.Node]) -> list[Place]:
    """The constants, by node and input, that the tensor `readers` multiply is linear in, channel by
    channel; or none.

    Those of a LayerNormalization or a product and its bias, also where attention weighs the rows of
    the product.
    """
    size = not_none(operand(readers[0], 1)).shape[int(is_transposed(readers[0]))]
    return _constants_of(readers[0].inputs[0], set(readers), size)


def _constants_of(x: ir.Value | None, readers: set[ir.Node], size: int) -> list[Place]:
    node = x.producer() if x is not None else None
    if (
        x is None
        or node is None
        or node.domain
        or x.is_graph_output()
        or set(readers_of(x)) != readers
    ):
        return []
    operands = [index for index, value in enumerate(node.inputs) if value is not None]
    constants = [(node, index) for index in operands if operand(node, index) is not None]
    linear = rule_of(node).product or node.op_type == "LayerNormalization"
    if linear and node.attributes.get_int("axis", -1) == -1:
        return constants if operands[1:] == [index for _, index in constants] else []
    if rule_of(node).adds and len(constants) == 1:
        before = _constants_of(
            node.inputs[1 - constants[0][1]],
            {node},
            size,
        )
        return [*before, *constants] if before else []
    part = _parting(node, size) if node.op_type == "Reshape" else None
    return _constants_of(part.inputs[0], {part}, size) if part else []


def _parting(join: ir.Node, size: int) -> ir.Node | None:
    """The Reshape that parts `size` channels into the heads of an attention, which weighs rows;
    `join` undoes it.
    """
    chain = [join]
    for op_type, index in _ATTENTION:
        value = chain[-1].inputs[index]
        node = value.producer() if value is not None and only_consumer(value) else None
        if node is None or node.op_type != op_type or node.domain:
            return None
        chain.append(node)
    back, there, part = chain[1], chain[3], chain[4]
    turned = all(
        list(node.attributes.get_ints("perm", ())) == [0, 2, 1, 3] for node in (back, there)
    )
    whole = part.inputs[0].shape if part.inputs[0] else None
    parts = part.outputs[0].shape
    if not turned or whole is None or parts is None or whole.has_unknown_dim():
        return None
    return part if list(whole)[:-1] == list(parts)[:-2] and whole[-1] == size else None


def _multiply(node: ir.Node, index: int, factors: Array, *, by_row: bool, names: Names) -> None:
    old = not_none(operand(node, index))
    replace_constant(
        node,
        index,
        (old * (factors[:, None] if by_row else factors)).astype(np.float32),
        names,
    )
