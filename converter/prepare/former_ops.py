"""Experimental operators of old exporters, which no runtime knows any more beyond opset 9, in
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import Names, graph_of, not_none

# An operator, and the constant that it takes beside what the one before it makes.
Step = tuple[str, Array | None]


def _number(node: ir.Node, name: str, default: float = 1.0) -> Array:
    return np.asarray(node.attributes.get_float(name, default), np.float32)


def _image_scaler(node: ir.Node) -> list[Step]:
    bias = np.array(node.attributes.get_floats("bias", ()), np.float32).reshape(
        -1,
        1,
        1,
    )
    return [("Mul", _number(node, "scale")), ("Add", bias)]


def _affine(node: ir.Node) -> list[Step]:
    return [("Mul", _number(node, "alpha")), ("Add", _number(node, "beta", 0.0))]


def _bent(op_type: str) -> Callable[[ir.Node], list[Step]]:
    """alpha * f(beta * x)"""
    return lambda node: [
        ("Mul", _number(node, "beta")),
        (op_type, None),
        ("Mul", _number(node, "alpha")),
    ]


FORMER: dict[str, Callable[[ir.Node], list[Step]]] = {
    "ImageScaler": _image_scaler,
    "Affine": _affine,
    "Scale": lambda node: [("Mul", _number(node, "scale"))],
    "ScaledTanh": _bent("Tanh"),
    "ParametricSoftplus": _bent("Softplus"),
}


def write_out_former_operators(model: ir.Model) -> None:
    """Puts arithmetic in the place of FORMER operators; the last step keeps node and output."""
    names = Names(model)
    for node in [n for n in model.graph.all_nodes() if not n.domain and n.op_type in FORMER]:
        steps, x = FORMER[node.op_type](node), not_none(node.inputs[0])
        for op_type, operand in steps[:-1]:
            made = names.node(
                op_type,
                _operands(x, operand, names),
                node.name or "",
                like=x,
            )
            graph_of(node).insert_before(node, made)
            x = made.outputs[0]
        node.op_type, operand = steps[-1]
        node.attributes.clear()
        inputs = _operands(x, operand, names)
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)


def _operands(x: ir.Value, operand: Array | None, names: Names) -> list[ir.Value]:
    return [x] if operand is None else [x, names.constant(f"{x.name}_operand", operand)]
