"""Convolutions on blocked channels: for them ONNX Runtime has its fastest kernels, but takes them
by itself only where weights are constants, which what is learned is not.

The operators are ONNX Runtime's own (com.microsoft.nchwc); a model that has them runs on the
processor that they were written for and is never handed out. How many channels make a block is
found by trying. Kernels of 1 x 1 are left alone, as they are matrix products and as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.affine import Array
from calib.session import open_session, run
from converter.graph.edit import Names, constant, graph_of, not_none, only_consumer, operand
from converter.graph.files import serialized
from converter.learn.terms import NoGradientError, Shape, shape_of

DOMAIN = "com.microsoft.nchwc"
# Blocks of processors with and without vectors of 512 bits.
BLOCKS = (16, 8)
# How far outputs of the two ways may be apart, of normal numbers.
CLOSE = 1e-3
_KEPT = {"strides", "dilations", "pads", "group", "auto_pad"}


def block_convolutions(model: ir.Model) -> ir.Model:
    """The same model with blocked convolutions, in place, where this runtime has them."""
    size = block_size()
    return model if size is None else _blocked(model, size)


@cache
def block_size() -> int | None:
    """How many channels make a block here; None where there are no such kernels."""
    return next((size for size in BLOCKS if _is_right(size)), None)


def _is_right(size: int) -> bool:
    x = np.random.default_rng(0).standard_normal((1, 16, 5, 5)).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((16, 16, 3, 3)).astype(np.float32)
    try:
        plain, other = (_tried(model, x, w) for model in (_one(), _blocked(_one(), size)))
    except CalibError:
        return False
    return bool(np.abs(plain - other).max() < CLOSE)


def _tried(model: ir.Model, x: Array, w: Array) -> Array:
    session = open_session(serialized(model))
    return run(session, ["y"], {"x": x, "w": w})["y"]


def _one() -> ir.Model:
    """One convolution whose weight is an input."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    shapes = {
        "x": (1, 16, 5, 5),
        "w": (16, 16, 3, 3),
        "y": (1, 16, 3, 3),
    }
    x, w, y = (ir.Value(name=k, shape=ir.Shape(s), type=kind) for k, s in shapes.items())
    node = ir.node(
        "Conv",
        [x, w],
        name="conv",
        outputs=[y],
    )
    graph = ir.Graph(
        [x, w],
        [y],
        nodes=[node],
        opset_imports={"": 16},
        name="one",
    )
    return ir.Model(graph, ir_version=8)


def _blocked(model: ir.Model, size: int) -> ir.Model:
    names = Names(model)
    for node in list(model.graph):
        if node.op_type == "Conv" and not node.domain and _fits(node, size):
            _block(node, size, names)
            model.graph.opset_imports[DOMAIN] = 1
    return model


def _fits(node: ir.Node, size: int) -> bool:
    """Whether a convolution of learned weights is of whole blocks."""
    try:
        x, weight = (shape_of(not_none(value)) for value in node.inputs[:2])
    except NoGradientError:
        return False
    group = node.attributes.get_int("group", 1)
    if constant(node.inputs[1]) is not None or len(weight) != 4 or weight[2:] == (1, 1):
        return False
    whole = weight[0] % size == 0 and x[1] % size == 0
    return whole and (group == 1 or group == weight[0] == x[1])


def _block(node: ir.Node, size: int, names: Names) -> None:
    """Writes the blocked convolution, with what is computed inside it, in place of `node`."""
    x, weight, *bias = node.inputs
    shape, last = shape_of(not_none(weight)), _activation(node)
    end, chain = last or node, _Chain(names, node.name or "")
    blocks = _weight_blocks(chain, not_none(weight), shape, size)
    attributes: dict[str, Any] = {k: v for k, v in node.attributes.items() if k in _KEPT}
    attributes |= {"kernel_shape": list(shape[2:]), **_activation_attributes(last)}
    operands = [chain.own("ReorderInput", [x]), blocks, *bias]
    made = chain.own(
        "ReorderOutput", [chain.own("Conv", operands, **attributes)], channels=shape[0]
    )
    old = end.outputs[0]
    made.shape, made.type = old.shape, old.type
    graph, gone = graph_of(node), [node] if last is None else [node, last]
    graph.insert_after(end, chain.nodes)
    ir.convenience.replace_nodes_and_values(graph, end, gone, [], [old], [made])


class _Chain:
    """Nodes of no graph yet, named after one."""

    def __init__(self, names: Names, wish: str) -> None:
        self.nodes = list[ir.Node]()
        self._names, self._wish = names, wish

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        name = self._names.fresh(f"{self._wish}_{op_type}")
        out = ir.Value(name=name)
        node = ir.node(
            op_type,
            inputs,
            attributes,
            domain=domain,
            name=name,
            outputs=[out],
        )
        self.nodes.append(node)
        return out

    def own(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        return self.op(op_type, inputs, DOMAIN, **attributes)

    def moved(self, value: ir.Value, shape: Shape) -> ir.Value:
        """A value in a shape whose second axis then goes behind the third."""
        order = [0, 2, 1, *range(3, len(shape))]
        return self.op("Transpose", [self.reshaped(value, shape)], perm=order)

    def reshaped(self, value: ir.Value, shape: Shape) -> ir.Value:
        to = self._names.constant("blocked", np.array(shape, np.int64))
        return self.op("Reshape", [value, to])


def _weight_blocks(chain: _Chain, weight: ir.Value, shape: Shape, size: int) -> ir.Value:
    """A weight as (blocks of outputs, blocks of inputs, places, inputs, outputs), in its own shape.

    Axis by axis, as the runtime moves one axis fast and two at once one number at a time.
    """
    out, inner, *kernel = shape
    moved = chain.moved(
        weight,
        (out // size, size, inner * math.prod(kernel)),
    )
    if inner > 1:
        blocks = out // size * inner // size
        moved = chain.moved(moved, (blocks, size, math.prod(kernel), size))
    return chain.reshaped(moved, shape)


def _activation(node: ir.Node) -> ir.Node | None:
    """The Relu or Clip that alone reads a convolution, whose kernel computes it as well."""
    reader = only_consumer(node.outputs[0])
    if reader is None or reader.domain or reader.op_type not in {"Relu", "Clip"}:
        return None
    bounds = [operand(reader, i) for i in (1, 2)]
    return reader if reader.op_type == "Relu" or None not in bounds else None


def _activation_attributes(node: ir.Node | None) -> dict[str, Any]:
    if node is None:
        return {}
    if node.op_type == "Relu":
        return {"activation": "Relu"}
    bounds = [float(not_none(operand(node, i)).reshape(())) for i in (1, 2)]
    return {"activation": "Clip", "activation_params": bounds}
