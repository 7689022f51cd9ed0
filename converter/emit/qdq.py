"""Writes a plan into a graph as QuantizeLinear/DequantizeLinear pairs with integer weights and int32 biases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from calib.affine import INT32, Array, QParams, quantize
from converter.emit.planes import PlaneWriter
from converter.emit.stored import emit_stored
from converter.model import Names, add_constant, constant, values_by_name
from converter.plan import NodePlan, QuantizedWeight, QuantPlan


def emit(model: ir.Model, plan: QuantPlan) -> dict[str, str]:
    """Changes `model`, the prepared float model the plan was made for, into the quantized one.

    Weights that the plan stores are restored when a runtime loads the model.
    Returns under which name each planned tensor's dequantized values stand now.
    """
    kept = {name: unit for name, unit in plan.nodes.items() if (name, 0) in plan.stored}
    restored = _Emitter(model, replace(plan, nodes={n: u for n, u in plan.nodes.items() if n not in kept})).run()
    emit_stored(model, replace(plan, nodes=kept, biases={}), PlaneWriter(model))
    return restored


class _Emitter:
    def __init__(self, model: ir.Model, plan: QuantPlan) -> None:
        self.graph, self.plan, self.names = model.graph, plan, Names(model)
        self.values = values_by_name(model.graph)
        self.nodes = {node.name: node for node in model.graph}
        self.restored: dict[str, ir.Value] = {}
        self.constants: dict[tuple[str, str, bytes], ir.Value] = {}

    def run(self) -> dict[str, str]:
        units = self.plan.units()
        for unit in units:
            self._write_weight(unit)
            self._write_bias(unit)
            self._drop_implied_bound(unit)
        computed = {name for unit in units for name in unit.outputs}
        for name in self.plan.tensors:
            readers = [self.nodes[unit.name] for unit in units if name in unit.inputs]
            self._write_activation(self.values[name], self.plan.params(name), None if name in computed else readers)
        for unit in units:
            if unit.bare:
                self._bare(self.nodes[unit.name])
        self._drop_unread_constants()
        return {name: value.name or "" for name, value in self.restored.items()}

    # --- activations -------------------------------------------------------------------------------------------------

    def _write_activation(self, value: ir.Value, q: QParams, readers: list[ir.Node] | None) -> None:
        """Sends `readers`, or where None everything that reads `value`, through a Q/DQ pair."""
        uses = [use for use in value.uses() if readers is None or use.node in readers]
        array = constant(value)
        if array is not None:
            restored = self._dequantized(value.name or "", quantize(array, q), q)
        else:
            restored = self._pair(value, q)
        self.restored[value.name or ""] = restored
        for use in uses:
            use.node.replace_input_with(use.idx, restored)
        if readers is None and value.is_graph_output():
            self._hand_over_output(value, restored)

    def _drop_implied_bound(self, unit: NodePlan) -> None:
        """Takes the upper bound off a Clip that codes imply, though not the whole type's range: runtimes keep it."""
        clip = self.nodes[unit.absorbed[-1]] if unit.absorbed else None
        high = constant(clip.inputs[2]) if clip and clip.op_type == "Clip" and len(clip.inputs) > 2 else None
        tensor = self.plan.tensors.get(unit.outputs[0]) if unit.outputs else None
        if clip is None or high is None or tensor is None:
            return
        q = self.plan.params(tensor.name)
        beyond = (float(np.iinfo(q.format.dtype).max) - float(q.zero_point)) * float(q.scale) > float(high)
        if beyond and quantize(high, q) == q.format.qmax:
            clip.replace_input_with(2, None)

    def _pair(self, value: ir.Value, q: QParams) -> ir.Value:
        name, producer = value.name or "", value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear" and _restores(producer, q):
            return value
        parameters = self._parameters(name, q)
        nodes = [self._node("QuantizeLinear", [value, *parameters], name, "quantized", {})]
        if (q.format.qmin, q.format.qmax) != (np.iinfo(q.format.dtype).min, np.iinfo(q.format.dtype).max):
            bounds = [np.array(bound, q.format.dtype) for bound in (q.format.qmin, q.format.qmax)]
            limits = [self._constant(f"bound_{bound.dtype}_{bound}", bound) for bound in bounds]
            nodes.append(self._node("Clip", [nodes[0].outputs[0], *limits], name, "clipped", {}))
        nodes.append(self._node("DequantizeLinear", [nodes[-1].outputs[0], *parameters], name, "dequantized", {}))
        restored = nodes[-1].outputs[0]
        restored.shape, restored.type = value.shape, value.type
        if producer is not None:
            self.graph.insert_after(producer, nodes)
        else:
            self.graph.insert_before(self.graph[0], nodes)
        return restored

    def _hand_over_output(self, value: ir.Value, restored: ir.Value) -> None:
        """The graph output keeps its name, and the computed tensor gets another."""
        name = value.name
        value.name = self.names.fresh(f"{name}_float")
        restored.name = name
        self.graph.outputs[list(self.graph.outputs).index(value)] = restored

    def _bare(self, node: ir.Node) -> None:
        """Lets a node between two conversions of the same parameters run on the integers."""
        restore = node.inputs[0].producer() if node.inputs[0] else None
        quantize_again = next(use.node for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear")
        assert restore is not None
        zero_point = restore.inputs[2]
        assert zero_point is not None
        node.replace_input_with(0, restore.inputs[0])
        if node.op_type == "Pad":
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, zero_point)
        node.outputs[0].type = ir.TensorType(zero_point.dtype)  # type: ignore[arg-type]
        quantize_again.outputs[0].replace_all_uses_with(node.outputs[0])
        self.graph.remove(quantize_again, safe=True)
        self._drop_unread(restore)

    def _drop_unread(self, restore: ir.Node) -> None:
        """Removes a conversion that nothing reads; floats read beside it may yet have to come from its integers."""
        value, source = restore.outputs[0], restore.inputs[0].producer() if restore.inputs[0] else None
        beside = source is not None and source.inputs[0] is not None and len(source.inputs[0].uses()) > 1
        if not (beside or value.uses() or value.is_graph_output()):
            self.graph.remove(restore, safe=True)
            self.restored = {name: kept for name, kept in self.restored.items() if kept is not value}

    # --- weights and biases ------------------------------------------------------------------------------------------

    def _write_weight(self, unit: NodePlan) -> None:
        if unit.weight is None:
            return
        weight = self.plan.weights[unit.name]
        restored = self._dequantized(unit.weight.name, weight.codes, weight.qparams)
        self.nodes[unit.name].replace_input_with(unit.weight.index, restored)

    def _write_bias(self, unit: NodePlan) -> None:
        bias = self.plan.biases.get(unit.name)
        if bias is None:
            return
        name = unit.bias or f"{unit.name}.bias"
        adds = [node for inner in unit.absorbed if (node := self.nodes[inner]).op_type == "Add"]
        if unit.integer_bias and not adds and unit.inputs[0] in self.plan.tensors:
            q = bias_qparams(self.plan.params(unit.inputs[0]), self.plan.weights[unit.name], bias.size)
            written = self._dequantized(name, quantize(bias, q), q)
        else:
            written = self._constant(f"{name}_corrected", bias.astype(np.float32))
        if adds:
            adds[0].replace_input_with(int(adds[0].inputs[1].name == unit.bias), written)  # type: ignore[union-attr]
            return
        node = self.nodes[unit.name]
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, written)

    def _dequantized(self, name: str, codes: Array, q: QParams) -> ir.Value:
        """A constant stored as `codes` behind a DequantizeLinear."""
        attributes = {} if q.axis is None else {"axis": q.axis}
        inputs = [self._constant(f"{name}_quantized", codes), *self._parameters(name, q)]
        node = self._node("DequantizeLinear", inputs, name, "dequantized", attributes)
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    # --- parts -------------------------------------------------------------------------------------------------------

    def _parameters(self, name: str, q: QParams) -> list[ir.Value]:
        scale = self._constant(f"{name}_scale", q.scale.astype(np.float32))
        if q.format == INT32:
            return [scale]  # runtimes look for the absence of a bias's zero point
        zero_point = q.zero_point.astype(q.format.dtype)
        # ONNX Runtime's exact int8 mode rewrites the zero points of signed weights in place: each needs its own.
        name = f"{name}_zero_point" if q.format.signed else f"zero_point_{zero_point.dtype}_{zero_point}"
        return [scale, self._constant(name, zero_point)]

    def _constant(self, name: str, array: Array) -> ir.Value:
        """An initializer; equal ones of one name are stored once, as a tied weight's."""
        key = (name, array.dtype.str, array.tobytes())
        if key not in self.constants:
            self.constants[key] = add_constant(self.graph, self.names.fresh(name), array)
        return self.constants[key]

    def _node(
        self, op_type: str, inputs: list[ir.Value], name: str, suffix: str, attributes: dict[str, int]
    ) -> ir.Node:
        output = ir.Value(name=self.names.fresh(f"{name}_{suffix}"))
        return ir.node(op_type, inputs, attributes, name=self.names.fresh(f"{name}_{op_type}"), outputs=[output])

    def _drop_unread_constants(self) -> None:
        outputs = set(self.graph.outputs)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in outputs:
                del self.graph.initializers[name]


def _restores(node: ir.Node, q: QParams) -> bool:
    """Whether a DequantizeLinear makes floats of codes with just these parameters."""
    scale, zero_point = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    same_type = zero_point is not None and zero_point.dtype == q.format.dtype
    return same_type and scale is not None and bool(np.all(scale == q.scale) and np.all(zero_point == q.zero_point))


def bias_qparams(data: QParams, weight: QuantizedWeight, size: int) -> QParams:
    """int32 parameters of a bias: scale = data scale * weight scale, as integer kernels require."""
    scale = (data.scale * weight.qparams.scale).astype(np.float32)
    scale = np.broadcast_to(scale, (size,)).copy()
    return QParams(scale, np.zeros(size, np.int32), INT32, axis=0)
