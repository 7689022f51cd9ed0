"""Weights that stay integers in memory, behind a DequantizeLinear.

ONNX Runtime turns the one before a MatMul, or a Gemm that does not transpose, into MatMulNBits,
which is faster than float for few rows, if nothing else reads its codes and no Relu or Clip stands
directly behind; elsewhere it is computed anew at every run. So codes are stored as their product
multiplies with them, and rows of a table are looked up as codes. A product that shares its table
with a lookup reads it behind a Transpose, which runtimes do when they load the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams
from converter.emit.stored import emit_stored
from converter.graph.edit import (
    Names,
    add_constant,
    graph_of,
    input_at,
    nodes_of,
    not_none,
    only_consumer,
)
from converter.plan.ops import is_transposed, picks_rows, rule_of
from converter.plan.plan import NodePlan, QuantizedWeight, QuantPlan
from converter.plan.units import bias_place, planned

# Bits up to which a type serves, the type, and the opset that DequantizeLinear takes it from.
TYPES = (
    (2, ir.DataType.UINT2, 25),
    (4, ir.DataType.UINT4, 21),
    (8, ir.DataType.UINT8, 13),
    (16, ir.DataType.UINT16, 21),
)
# Parameters a block came with the same opset as the 4-bit types.
BLOCK_OPSET = 21
NEWEST_OPSET = max(opset for _, _, opset in TYPES)


def type_for(bits: int, blocks: bool, newest: int) -> tuple[ir.DataType, int] | None:
    """The narrowest type for codes of so many bits, and the opset it needs, `newest` at most; None
    if there is no such type.
    """
    least = BLOCK_OPSET if blocks else 0
    fitting = ((kind, max(opset, least)) for wide, kind, opset in TYPES if bits <= wide)
    return next((pair for pair in fitting if pair[1] <= newest), None)


def opset_for(weight: QuantizedWeight, newest: int = NEWEST_OPSET) -> int:
    """The opset that the codes of `weight` need, where there is one."""
    return _type_of(weight, newest)[1]


def _type_of(weight: QuantizedWeight, newest: int) -> tuple[ir.DataType, int]:
    q = weight.qparams
    return not_none(type_for(q.format.bits, q.scale.ndim > 1, newest))


def emit_dequantized(model: ir.Model, plan: QuantPlan, newest: int = NEWEST_OPSET) -> None:
    """Lets the planned nodes of `model` read the codes of their weights, which have integer zero
    points.
    """
    writer, left = DequantizeWriter(model, newest), dict(plan.nodes)
    for node, unit in list(planned(model, plan)):
        if len(unit.weights) == 1:
            (wanted,) = unit.weights
            if writer.direct(node, plan.stored[unit.name, wanted.index]):
                left[unit.name] = replace(unit, weight=None)
    emit_stored(model, replace(plan, nodes=left), writer)
    for node, unit in list(planned(model, plan)):
        if rule_of(node).product and (bound := _bound(node, unit)):
            writer.set_apart(bound)


def _bound(product: ir.Node, unit: NodePlan) -> ir.Node | None:
    """The Relu or Clip that alone reads a product, or its sum with a bias."""
    last, _ = bias_place(product, unit)
    reader = only_consumer(last.outputs[0])
    return reader if reader is not None and rule_of(reader).bounds else None


class DequantizeWriter:
    """Writes weights with integer zero points into the graphs of one model."""

    def __init__(self, model: ir.Model, newest: int = NEWEST_OPSET) -> None:
        self.names, self.newest = Names(model), newest
        self._tables = {node.inputs[0] for node in nodes_of(model) if picks_rows(node)}
        self._turned = dict[ir.Value, ir.Value]()

    def __call__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
        """The value of the weight `name` as floats, restored from its codes by a node at the start
        of `graph`.
        """
        q, (kind, _) = weight.qparams, _type_of(weight, self.newest)
        arrays = (weight.codes, q.scale, q.zero_point.astype(weight.codes.dtype))
        inputs = [
            add_constant(
                graph,
                self.names.fresh(f"{name}_{what}"),
                array,
                None if what == "scale" else kind,
            )
            for what, array in zip(("codes", "scale", "zero"), arrays, strict=True)
        ]
        node = self._node("DequantizeLinear", inputs, name, **_attributes(weight.codes, q))
        graph.insert_before(graph[0], node)
        return node.outputs[0]

    def direct(self, node: ir.Node, weight: QuantizedWeight) -> bool:
        """Lets `node` read its weight in a better way than as restored floats, if there is one."""
        if picks_rows(node):
            self._look_up(node, weight)
        elif rule_of(node).product and is_transposed(node):
            self._multiply(node, weight)
        else:
            return False
        return True

    def set_apart(self, bound: ir.Node) -> None:
        """Writes a Relu or Clip as Max and Min: ONNX Runtime would not make MatMulNBits of what is
        directly before.
        """
        name, y, floor = not_none(bound.name), not_none(bound.inputs[0]), rule_of(bound).floor
        low, high = (input_at(bound, index) for index in (1, 2))
        if low is None and floor is not None and (least := floor(bound)) is not None:
            low = self.names.constant("floor", np.float32(least))
        nodes = list[ir.Node]()
        for op_type, limit in (("Max", low), ("Min", high)):
            if limit is not None:
                nodes.append(self._node(op_type, [y, limit], name))
                y = nodes[-1].outputs[0]
        if nodes:
            graph = graph_of(bound)
            ir.convenience.replace_nodes_and_values(
                graph, bound, [bound], nodes, bound.outputs, [y]
            )

    def _look_up(self, node: ir.Node, weight: QuantizedWeight) -> None:
        """Picks codes, scales and zero points, which become floats behind."""
        name, table = not_none(node.name), self._table(not_none(node.inputs[0]), weight)
        picks = [self._node("Gather", [value, node.inputs[1]], name) for value in table]
        codes, scale, zero = (pick.outputs[0] for pick in picks)
        if weight.qparams.scale.ndim == weight.codes.ndim:
            size = weight.codes.shape[1] // weight.qparams.scale.shape[1]
            behind = [
                self._node("DequantizeLinear", [codes, scale, zero], name, axis=-1, block_size=size)
            ]
        else:
            casts = [self._node("Cast", [x], name, to=ir.DataType.FLOAT) for x in (codes, zero)]
            steps = self._node("Sub", [cast.outputs[0] for cast in casts], name)
            behind = [*casts, steps, self._node("Mul", [steps.outputs[0], scale], name)]
        ir.convenience.replace_nodes_and_values(
            graph_of(node), node, [node], [*picks, *behind], node.outputs, behind[-1].outputs
        )

    def _table(self, table: ir.Value, weight: QuantizedWeight) -> Sequence[ir.Value]:
        """Codes (rows, columns), scales and zero points (rows, blocks) that rows are picked of, in
        bytes: no runtime picks narrower integers.
        """
        q, rows = weight.qparams, len(weight.codes)
        scale, zero = (
            x if x.ndim > 1 else np.broadcast_to(x.reshape(-1, 1), (rows, 1))
            for x in (q.scale, q.zero_point.astype(weight.codes.dtype))
        )
        return [
            self.names.constant(f"{table.name}_{what}", array)
            for what, array in (("codes", weight.codes), ("scales", scale), ("zeros", zero))
        ]

    def _multiply(self, node: ir.Node, weight: QuantizedWeight) -> None:
        """Multiplies with the codes the other way round, which runtimes know."""
        table = not_none(node.inputs[1])
        if table not in self._turned:
            turn = self._transposed if table in self._tables else self._stored_turned
            self._turned[table] = turn(table, weight)
        node.replace_input_with(1, self._turned[table])
        node.attributes.pop("transB", None)

    def _stored_turned(self, table: ir.Value, weight: QuantizedWeight) -> ir.Value:
        return self(graph_of(table), not_none(table.name), _turned(weight))

    def _transposed(self, table: ir.Value, weight: QuantizedWeight) -> ir.Value:
        """Of what rows are picked of as well; each of both has scales of its own, or the runtime
        sees them shared.
        """
        graph, name, turned = graph_of(table), not_none(table.name), _turned(weight)
        values = list(self._table(table, weight))
        if weight.qparams.scale.ndim < weight.codes.ndim:
            arrays = turned.qparams.scale, turned.qparams.zero_point.astype(weight.codes.dtype)
            values[1:] = [self.names.constant(f"{name}_of_all", array) for array in arrays]
        turns = [self._node("Transpose", [x], name, perm=[1, 0]) for x in values if _is_matrix(x)]
        values[: len(turns)] = [node.outputs[0] for node in turns]
        node = self._node(
            "DequantizeLinear", values, name, **_attributes(turned.codes, turned.qparams)
        )
        graph.insert_before(graph[0], [*turns, node])
        return node.outputs[0]

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value | None], wish: str, **attributes: Any
    ) -> ir.Node:
        return self.names.node(op_type, inputs, wish, attributes=attributes)


def _is_matrix(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.rank() > 1


def _turned(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight transposed."""
    q = weight.qparams
    scale, zero = (np.ascontiguousarray(x.T) for x in (q.scale, q.zero_point))
    axis = None if q.axis is None else 1 - q.axis
    codes = np.ascontiguousarray(weight.codes.T)
    return QuantizedWeight(codes, replace(q, scale=scale, zero_point=zero, axis=axis))


def _attributes(codes: Array, q: QParams) -> dict[str, int]:
    if q.axis is None:
        return {}
    if q.scale.ndim == 1:
        return {"axis": q.axis}
    ratios = np.floor_divide(codes.shape, q.scale.shape)
    return {"axis": int(ratios.argmax()), "block_size": int(ratios.max())}
