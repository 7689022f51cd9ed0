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
# The same for codes with the zero in their middle, which stand as signed ones with the zero 0.
SIGNED_TYPES = (
    (4, ir.DataType.INT4, 21),
    (8, ir.DataType.INT8, 13),
)
# Parameters a block came with the same opset as the 4-bit types.
BLOCK_OPSET = 21
NEWEST_OPSET = max(opset for _, _, opset in TYPES)


def type_for(
    bits: int, blocks: bool, newest: int, signed: bool = False
) -> tuple[ir.DataType, int] | None:
    """The narrowest type for codes of so many bits, and the opset it needs, `newest` at most; None
    if there is no such type.
    """
    least = BLOCK_OPSET if blocks else 0
    types = SIGNED_TYPES if signed else TYPES
    wide_enough = [(kind, max(opset, least)) for wide, kind, opset in types if bits <= wide]
    known = (pair for pair in wide_enough if pair[1] <= newest)
    return next(known, None)


def opset_for(weight: QuantizedWeight, newest: int = NEWEST_OPSET, signed: bool = False) -> int:
    """The opset that the codes of `weight` need, where there is one."""
    _, opset = _type_of(weight, newest, signed)
    return opset


def _type_of(weight: QuantizedWeight, newest: int, signed: bool = False) -> tuple[ir.DataType, int]:
    q = weight.qparams
    blocks = q.scale.ndim > 1
    return not_none(type_for(q.format.bits, blocks, newest, signed))


def emit_dequantized(model: ir.Model, plan: QuantPlan, newest: int = NEWEST_OPSET) -> None:
    """Lets the planned nodes of `model` read the codes of their weights, which have integer zero
    points.
    """
    writer = DequantizeWriter(model, newest)
    left = dict(plan.nodes)
    for node, unit in list(planned(model, plan)):
        if len(unit.weights) == 1:
            (wanted,) = unit.weights
            if writer.direct(node, plan.stored[unit.name, wanted.index]):
                left[unit.name] = replace(unit, weight=None)
    emit_stored(model, replace(plan, nodes=left), writer)
    for node, unit in list(planned(model, plan)):
        bound = _bound(node, unit) if rule_of(node).product else None
        if bound is not None:
            writer.set_apart(bound)


def _bound(product: ir.Node, unit: NodePlan) -> ir.Node | None:
    """The Relu or Clip that alone reads a product, or its sum with a bias."""
    last, _ = bias_place(product, unit)
    reader = only_consumer(last.outputs[0])
    return reader if reader is not None and rule_of(reader).bounds else None


def emit_signed(model: ir.Model, plan: QuantPlan, newest: int = NEWEST_OPSET) -> None:
    """Lets the planned nodes of `model` read the codes of their weights, whose zeros are in their
    middle, as signed ones with the zero 0.
    """
    emit_stored(model, plan, DequantizeWriter(model, newest, signed=True))


class DequantizeWriter:
    """Writes weights with integer zero points into the graphs of one model."""

    def __init__(self, model: ir.Model, newest: int = NEWEST_OPSET, signed: bool = False) -> None:
        self.names = Names(model)
        self.newest = newest
        self.signed = signed
        self._tables = {node.inputs[0] for node in nodes_of(model) if picks_rows(node)}
        self._turned = dict[ir.Value, ir.Value]()

    def __call__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
        """The value of the weight `name` as floats, restored from its codes by a node at the start
        of `graph`.
        """
        kind, _ = _type_of(weight, self.newest, self.signed)
        weight = _as_signed(weight) if self.signed else weight
        q = weight.qparams
        operands = (
            ("codes", weight.codes, kind),
            ("scale", q.scale, None),
            ("zero", _zero(weight), kind),
        )
        inputs = [
            add_constant(graph, self.names.fresh(f"{name}_{what}"), array, stored_as)
            for what, array, stored_as in operands
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
        name = not_none(bound.name)
        y = not_none(bound.inputs[0])
        low = input_at(bound, 1)
        high = input_at(bound, 2)
        floor = rule_of(bound).floor
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
        name = not_none(node.name)
        table = self._table(not_none(node.inputs[0]), weight)
        picks = [self._node("Gather", [value, node.inputs[1]], name) for value in table]
        codes, scale, zero = (pick.outputs[0] for pick in picks)
        scales = weight.qparams.scale
        if scales.ndim == weight.codes.ndim:
            size = weight.codes.shape[1] // scales.shape[1]
            blocks = {"axis": -1, "block_size": size}
            behind = [self._node("DequantizeLinear", [codes, scale, zero], name, **blocks)]
        else:
            casts = [self._node("Cast", [x], name, to=ir.DataType.FLOAT) for x in (codes, zero)]
            steps = self._node("Sub", [cast.outputs[0] for cast in casts], name)
            floats = self._node("Mul", [steps.outputs[0], scale], name)
            behind = [*casts, steps, floats]
        ir.convenience.replace_nodes_and_values(
            graph_of(node), node, [node], [*picks, *behind], node.outputs, behind[-1].outputs
        )

    def _table(self, table: ir.Value, weight: QuantizedWeight) -> Sequence[ir.Value]:
        """Codes (rows, columns), scales and zero points (rows, blocks) that rows are picked of, in
        bytes: no runtime picks narrower integers.
        """
        rows = len(weight.codes)
        arrays = {
            "codes": weight.codes,
            "scales": _by_row(weight.qparams.scale, rows),
            "zeros": _by_row(_zero(weight), rows),
        }
        return [
            self.names.constant(f"{table.name}_{what}", array) for what, array in arrays.items()
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
        name = not_none(table.name)
        return self(graph_of(table), name, _turned(weight))

    def _transposed(self, table: ir.Value, weight: QuantizedWeight) -> ir.Value:
        """Of what rows are picked of as well; each of both has scales of its own, or the runtime
        sees them shared.
        """
        graph = graph_of(table)
        name = not_none(table.name)
        turned = _turned(weight)
        values = list(self._table(table, weight))
        if weight.qparams.scale.ndim < weight.codes.ndim:
            arrays = turned.qparams.scale, _zero(turned)
            values[1:] = [self.names.constant(f"{name}_of_all", array) for array in arrays]
        turns = [self._node("Transpose", [x], name, perm=[1, 0]) for x in values if _is_matrix(x)]
        values[: len(turns)] = [node.outputs[0] for node in turns]
        attributes = _attributes(turned.codes, turned.qparams)
        node = self._node("DequantizeLinear", values, name, **attributes)
        graph.insert_before(graph[0], [*turns, node])
        return node.outputs[0]

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value | None], wish: str, **attributes: Any
    ) -> ir.Node:
        return self.names.node(op_type, inputs, wish, attributes=attributes)


def _zero(weight: QuantizedWeight) -> Array:
    """The zero points in the type of the codes."""
    return weight.qparams.zero_point.astype(weight.codes.dtype)


def _as_signed(weight: QuantizedWeight) -> QuantizedWeight:
    q, fmt = weight.qparams, replace(weight.qparams.format, signed=True)
    middle = (q.format.qmax + 1) // 2
    codes = (weight.codes.astype(np.int16) - middle).astype(np.int8)
    return QuantizedWeight(
        codes,
        replace(q, zero_point=np.zeros_like(q.zero_point), format=fmt),
    )


def _by_row(numbers: Array, rows: int) -> Array:
    """(rows, blocks) of numbers a block, a row or of all."""
    if numbers.ndim > 1:
        return numbers
    return np.broadcast_to(numbers.reshape(-1, 1), (rows, 1))


def _is_matrix(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.rank() > 1


def _turned(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight transposed."""
    q = weight.qparams
    scale = np.ascontiguousarray(q.scale.T)
    zero = np.ascontiguousarray(q.zero_point.T)
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
