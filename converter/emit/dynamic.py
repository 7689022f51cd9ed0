"""Writes integer products whose activations are quantized when the model runs, as runtimes fuse
them.

    x -> DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(scale of x * scales of the weight)
    [-> Add(bias)]

All products that read x share its DynamicQuantizeLinear. Large tables are looked up as integers;
what a lookup finds becomes floats. Every other weight of the plan is restored when the model is
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from calib.affine import INT8_NARROW, SMALLEST_SCALE, UINT8, Array
from converter.emit.planes import PlaneWriter
from converter.emit.stored import emit_stored, write_bias
from converter.graph.edit import Names, graph_of, not_none
from converter.plan.ops import is_transposed, own_bias, rule_of
from converter.plan.plan import NodePlan, QuantPlan
from converter.plan.units import planned

# ReduceMax takes its axes as an input from this opset on.
AXES_AS_INPUT = 18


def emit_dynamic(model: ir.Model, plan: QuantPlan, by_row: bool) -> None:
    """Changes `model` into the quantized one; with `by_row` every row of an activation gets a scale
    of its own.
    """
    emitter = _Emitter(model, plan, by_row)
    for node, unit in list(planned(model, plan)):
        if unit.name in plan.weights:
            write = emitter.lookup if rule_of(node).looks_up else emitter.product
            write(node, unit)
    emit_stored(model, plan, PlaneWriter(model))


class _Emitter:
    def __init__(self, model: ir.Model, plan: QuantPlan, by_row: bool) -> None:
        self.model = model
        self.plan = plan
        self.by_row = by_row
        self.names = Names(model)
        self.activations: dict[tuple[ir.Graph, ir.Value], Sequence[ir.Value]] = {}
        self.at: ir.Node  # new nodes stand before this one

    def product(self, node: ir.Node, unit: NodePlan) -> None:
        self.at = node
        weight = self.plan.weights[unit.name]
        if unit.name in self.plan.biases:
            write_bias(node, unit, self.plan, self.names)
        codes = self._of_weight(1, "codes", weight.codes)
        w_scale = self._of_weight(1, "scale", weight.qparams.scale)
        # Stored as it was: a lookup may read the same codes. Runtimes transpose when they load the
        # model.
        codes = self._node("Transpose", codes) if is_transposed(node) else codes
        x, x_scale, zero = self._activation(node)
        products = self._node("MatMulInteger", x, codes, zero)
        products = self._node("Cast", products, to=ir.DataType.FLOAT)
        if self.by_row:
            # One by one: ONNX Runtime takes the scale in the product of scales for one of the
            # whole tensor.
            y = self._node("Mul", products, x_scale)
            y = self._node("Mul", y, w_scale)
        else:
            scale = self._node("Mul", x_scale, w_scale)
            y = self._node("Mul", products, scale)
        bias = own_bias(node)
        self._replace(y if bias is None else self._node("Add", y, bias))

    def lookup(self, node: ir.Node, unit: NodePlan) -> None:
        self.at = node
        weight = self.plan.weights[unit.name]
        rows = node.inputs[1]
        scales = weight.qparams.scale.reshape(-1, 1)
        scales = np.broadcast_to(scales, (len(weight.codes), 1))
        table = self._of_weight(0, "scale_of_row", scales)
        scale = self._node("Gather", table, rows)
        table = self._of_weight(0, "codes", weight.codes)
        codes = self._node("Gather", table, rows)
        floats = self._node("Cast", codes, to=ir.DataType.FLOAT)
        self._replace(self._node("Mul", floats, scale))

    def _activation(self, node: ir.Node) -> Sequence[ir.Value]:
        """Codes, scale and zero point of the product's input."""
        x = not_none(node.inputs[0])
        key = graph_of(node), x
        if key not in self.activations:
            self.activations[key] = self._rows(x) if self.by_row else self._tensor(x)
        return self.activations[key]

    def _tensor(self, x: ir.Value) -> Sequence[ir.Value]:
        node = self.names.node(
            "DynamicQuantizeLinear",
            [x],
            not_none(self.at.name),
            count=3,
        )
        graph_of(self.at).insert_before(self.at, node)
        return node.outputs

    def _rows(self, x: ir.Value) -> Sequence[ir.Value]:
        """x / scale + 128 in uint8, with scale = max |x| / 127 over a row."""
        middle = 1 << (UINT8.bits - 1)
        magnitude = self._node("Abs", x)
        if self.model.graph.opset_imports[""] >= AXES_AS_INPUT:
            last = self.names.constant("last_axis", np.array([-1]))
            largest = self._node("ReduceMax", magnitude, last)
        else:
            largest = self._node("ReduceMax", magnitude, axes=[-1])
        per_code = self.names.constant("per_code", np.float32(1 / INT8_NARROW.qmax))
        scale = self._node("Mul", largest, per_code)
        least = self.names.constant("least_scale", np.float32(SMALLEST_SCALE))
        scale = self._node("Max", scale, least)
        steps = self._node("Div", x, scale)
        steps = self._node("Round", steps)
        shift = self.names.constant("middle", np.float32(middle))
        codes = self._node("Add", steps, shift)
        codes = self._node("Cast", codes, to=ir.DataType.UINT8)
        return codes, scale, self.names.constant("zero_point", np.uint8(middle))

    def _of_weight(self, index: int, what: str, array: Array) -> ir.Value:
        weight = not_none(self.at.inputs[index])
        return self.names.constant(f"{weight.name}_{what}", array)

    def _node(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = self.names.node(
            op_type,
            inputs,
            not_none(self.at.name),
            attributes=attributes,
        )
        graph_of(self.at).insert_before(self.at, node)
        return node.outputs[0]

    def _replace(self, y: ir.Value) -> None:
        """Lets `y` stand for the node's output, under its name."""
        graph, node = graph_of(self.at), self.at
        ir.convenience.replace_nodes_and_values(
            graph,
            node,
            [node],
            [],
            node.outputs,
            [y],
        )
