"""Writes a plan into a graph as QuantizeLinear/DequantizeLinear pairs with integer weights and
int32 biases.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from calib.affine import INT32, UINT8, Array, IntFormat, QParams, quantize
from converter.emit.planes import PlaneWriter
from converter.emit.stored import emit_stored
from converter.graph.edit import (
    Names,
    constant,
    nodes_by_name,
    not_none,
    operand,
    readers_of,
    set_input,
    values_by_name,
)
from converter.graph.qdq import is_dequantize, is_quantize
from converter.plan.ops import rule_of
from converter.plan.plan import NodePlan, QuantizedWeight, QuantPlan, TensorPlan
from converter.plan.units import bias_place


def emit(model: ir.Model, plan: QuantPlan) -> dict[str, str]:
    """Changes `model`, the prepared float model the plan was made for, into the quantized one.

    Weights that the plan stores are restored when a runtime loads the model.
    Returns under which name each planned tensor's dequantized values stand now.
    """
    stored = {name for name, _ in plan.stored}
    kept = {name: unit for name, unit in plan.nodes.items() if name in stored}
    others = {n: u for n, u in plan.nodes.items() if n not in kept}
    restored = _Emitter(model, replace(plan, nodes=others)).run()
    biases = {name: bias for name, bias in plan.biases.items() if name in kept}
    emit_stored(model, replace(plan, nodes=kept, biases=biases), PlaneWriter(model))
    return restored


class _Emitter:
    def __init__(self, model: ir.Model, plan: QuantPlan) -> None:
        self.graph, self.plan, self.names = model.graph, plan, Names(model)
        self.values = values_by_name(model.graph)
        self.nodes = nodes_by_name(model.graph)
        self.restored: dict[str, ir.Value] = {}

    def run(self) -> dict[str, str]:
        units = self.plan.units()
        for unit in units:
            self._write_weight(unit)
            self._write_bias(unit)
            self._drop_implied_bound(unit)
        computed = {name for unit in units for name in unit.outputs}
        for name in self.plan.tensors:
            readers = [self.nodes[unit.name] for unit in units if name in unit.inputs]
            self._write_activation(
                self.values[name],
                self.plan.params(name),
                None if name in computed else readers,
            )
        for name, other in self.plan.converted.items():
            readers = [self.nodes[unit.name] for unit in units if self._reads_as(unit, other)]
            self._write_conversion(name, self.plan.qparams[other.group], readers)
        for unit in units:
            if unit.bare:
                self._bare(self.nodes[unit.name])
            elif rule_of(self.nodes[unit.name]).line:
                self._as_sum(self.nodes[unit.name], unit.activation or UINT8)
        return {name: not_none(value.name) for name, value in self.restored.items()}

    # --- activations
    # ------------------------------------------------------------------------------------------

    def _write_activation(self, value: ir.Value, q: QParams, readers: list[ir.Node] | None) -> None:
        """Sends `readers`, or where None everything that reads `value`, through a Q/DQ pair."""
        uses = [use for use in value.uses() if readers is None or use.node in readers]
        array, name = constant(value), not_none(value.name)
        restored = (
            self._pair(value, q)
            if array is None
            else self._dequantized(name, quantize(array, q), q)
        )
        self.restored[name] = restored
        for use in uses:
            use.node.replace_input_with(use.idx, restored)
        if readers is None and value.is_graph_output():
            # The graph output keeps its name, and the computed tensor gets another.
            value.name = self.names.fresh(f"{name}_float")
            restored.name = name
            self.graph.outputs[list(self.graph.outputs).index(value)] = restored

    def _reads_as(self, unit: NodePlan, tensor: TensorPlan) -> bool:
        return tensor.name in unit.inputs and self.plan.as_read(unit, tensor.name) is tensor

    def _write_conversion(self, name: str, q: QParams, readers: list[ir.Node]) -> None:
        """Sends `readers` of a tensor that has become integers on to those of another format."""
        restored = self.restored[name]
        uses = [use for use in restored.uses() if use.node in readers]
        array = constant(self.values[name])
        again = (
            self._pair(restored, q)
            if array is None
            else self._dequantized(name, quantize(array, q), q)
        )
        for use in uses:
            use.node.replace_input_with(use.idx, again)

    def _drop_implied_bound(self, unit: NodePlan) -> None:
        """Takes the upper bound off a Clip that codes imply, though not the whole type's range:
        runtimes keep it.
        """
        clip = self.nodes[unit.absorbed[-1]] if unit.absorbed else None
        high = operand(clip, 2) if clip else None
        if clip is None or high is None or unit.outputs[0] not in self.plan.tensors:
            return
        q = self.plan.params(unit.outputs[0])
        beyond = (float(np.iinfo(q.format.dtype).max) - float(q.zero_point)) * float(
            q.scale
        ) > float(high.item())
        if beyond and quantize(high, q) == q.format.qmax:
            clip.replace_input_with(2, None)

    def _pair(self, value: ir.Value, q: QParams) -> ir.Value:
        name, producer = not_none(value.name), value.producer()
        if is_dequantize(producer) and _restores(producer, q):
            return value
        parameters, kind = self._parameters(name, q), np.iinfo(q.format.dtype)
        nodes = [self.names.node("QuantizeLinear", [value, *parameters], name, "quantized")]
        if (q.format.qmin, q.format.qmax) != (kind.min, kind.max):
            bounds = [np.array(bound, q.format.dtype) for bound in (q.format.qmin, q.format.qmax)]
            limits = [
                self.names.constant(f"bound_{bound.dtype}_{bound}", bound) for bound in bounds
            ]
            nodes.append(self.names.node("Clip", [nodes[0].outputs[0], *limits], name, "clipped"))
        codes = nodes[-1].outputs[0]
        nodes.append(
            self.names.node(
                "DequantizeLinear",
                [codes, *parameters],
                name,
                "dequantized",
                like=value,
            )
        )
        if producer is not None:
            self.graph.insert_after(producer, nodes)
        else:
            self.graph.insert_before(self.graph[0], nodes)
        return nodes[-1].outputs[0]

    def _bare(self, node: ir.Node) -> None:
        """Lets a node between two conversions of the same parameters run on the integers."""
        restore = not_none(not_none(node.inputs[0]).producer())
        quantize_again = next(filter(is_quantize, readers_of(node.outputs[0])))
        zero_point = not_none(restore.inputs[2])
        node.replace_input_with(0, restore.inputs[0])
        if (fill := rule_of(node).fill) is not None:
            set_input(node, fill, zero_point)
        node.outputs[0].type = zero_point.type
        quantize_again.outputs[0].replace_all_uses_with(node.outputs[0])
        self.graph.remove(quantize_again, safe=True)
        self._drop_unread(restore)

    def _as_sum(self, gate: ir.Node, fmt: IntFormat) -> None:
        """Writes clip(slope x + offset, 0, 1) of integers as an Add, for which there are kernels:
        the integers it reads stand for slope * x when their scale does, and what it makes ends at
        the bounds.
        """
        name, line_of = not_none(gate.name), not_none(rule_of(gate).line)
        slope, offset = line_of(gate)
        restore = not_none(not_none(gate.inputs[0]).producer())
        codes, scale, zero_point = restore.inputs
        scaled = self.names.constant(f"{name}_scale", not_none(constant(scale)) * np.float32(slope))
        line = self.names.node(
            "DequantizeLinear",
            [codes, scaled, zero_point],
            f"{name}_line",
            like=gate.outputs[0],
        )
        zero = np.array(0 if offset > 0 else fmt.qmax)
        whole = QParams(
            np.array(abs(offset) / fmt.qmax, np.float32),
            zero,
            fmt,
        )
        code = quantize(np.array(offset, np.float32), whole)
        added = self._dequantized(f"{name}_offset", code, whole)
        total = ir.node(
            "Add",
            [line.outputs[0], added],
            name=name,
            outputs=[ir.Value()],
        )
        total.outputs[0].shape = gate.outputs[0].shape
        total.outputs[0].type = gate.outputs[0].type
        ir.convenience.replace_nodes_and_values(
            self.graph, gate, [gate], [line, total], gate.outputs, total.outputs
        )
        self._drop_unread(restore)

    def _drop_unread(self, restore: ir.Node) -> None:
        """Removes a conversion that nothing reads; floats read beside it may yet have to come from
        its integers.
        """
        value, source = restore.outputs[0], not_none(restore.inputs[0]).producer()
        beside = (
            source is not None and source.inputs[0] is not None and len(source.inputs[0].uses()) > 1
        )
        if not (beside or value.uses() or value.is_graph_output()):
            self.graph.remove(restore, safe=True)
            self.restored = {
                name: kept for name, kept in self.restored.items() if kept is not value
            }

    # --- weights and biases
    # ------------------------------------------------------------------------------------------

    def _write_weight(self, unit: NodePlan) -> None:
        if unit.weight is not None:
            weight = self.plan.weights[unit.name]
            restored = self._dequantized(unit.weight.name, weight.codes, weight.qparams)
            self.nodes[unit.name].replace_input_with(unit.weight.index, restored)

    def _write_bias(self, unit: NodePlan) -> None:
        bias = self.plan.biases.get(unit.name)
        if bias is None:
            return
        node, name = self.nodes[unit.name], unit.bias or f"{unit.name}.bias"
        owner, index = bias_place(node, unit)
        if unit.integer_bias and owner is node and unit.inputs[0] in self.plan.tensors:
            data = self.plan.read_params(unit, unit.inputs[0])
            q = bias_qparams(data, self.plan.weights[unit.name], bias.size)
            written = self._dequantized(name, quantize(bias, q), q)
        else:
            written = self.names.constant(f"{name}_corrected", bias.astype(np.float32))
        set_input(owner, index, written)

    def _dequantized(self, name: str, codes: Array, q: QParams) -> ir.Value:
        """A constant stored as `codes` behind a DequantizeLinear."""
        attributes = {} if q.axis is None else {"axis": q.axis}
        inputs = [
            self.names.constant(f"{name}_quantized", codes),
            *self._parameters(name, q),
        ]
        node = self.names.node(
            "DequantizeLinear", inputs, name, "dequantized", attributes=attributes
        )
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def _parameters(self, name: str, q: QParams) -> list[ir.Value]:
        scale = self.names.constant(f"{name}_scale", q.scale.astype(np.float32))
        if q.format == INT32:
            return [scale]  # runtimes look for the absence of a bias's zero point
        zero_point = q.zero_point.astype(q.format.dtype)
        # ONNX Runtime's exact int8 mode rewrites the zero points of signed weights in place: each
        # needs its own.
        name = (
            f"{name}_zero_point"
            if q.format.signed
            else f"zero_point_{zero_point.dtype}_{zero_point}"
        )
        return [scale, self.names.constant(name, zero_point)]


def _restores(node: ir.Node, q: QParams) -> bool:
    """Whether a DequantizeLinear makes floats of codes with just these parameters."""
    scale, zero_point = operand(node, 1), operand(node, 2)
    same_type = zero_point is not None and zero_point.dtype == q.format.dtype
    return (
        same_type
        and scale is not None
        and bool(np.all(scale == q.scale) and np.all(zero_point == q.zero_point))
    )


def bias_qparams(data: QParams, weight: QuantizedWeight, size: int) -> QParams:
    """int32 parameters of a bias: scale = data scale * weight scale, as integer kernels require."""
    scale = (data.scale * weight.qparams.scale).astype(np.float32)
    return QParams(
        np.broadcast_to(scale, (size,)).copy(),
        np.zeros(size, np.int32),
        INT32,
        axis=0,
    )
