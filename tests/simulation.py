"""What a plan says a quantized model computes, written as a float graph of its own: no emitter has
a hand in it.

Quantized values are floats that Round, Clip and Mul put on the plan's grid; weights are restored in
float64. A second graph has evenly distributed noise of one step in place of every rounding: how
large its error is, the plan predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from calib.affine import QParams, dequantize
from converter.plan.plan import QuantizedWeight, QuantPlan

FAKE, NOISE, BY_ROW = "fake", "noise", "by row"


def restored(weight: QuantizedWeight) -> np.ndarray:
    """scale (code - zero point), whose parameters are one, one a channel or one a block; a trellis
    has levels.
    """
    if weight.qparams.format.trellis:
        return dequantize(weight.codes, weight.qparams)
    scale, zero = (
        _spread(part, weight) for part in (weight.qparams.scale, weight.qparams.zero_point)
    )
    return ((weight.codes.astype(np.float64) - zero) * scale).astype(np.float32)


def _spread(part: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
    part, shape, axis = np.asarray(part, np.float64), weight.codes.shape, weight.qparams.axis
    if part.ndim == 1 and axis is not None:
        return part.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    for i in range(part.ndim):
        part = np.repeat(part, shape[i] // part.shape[i], axis=i)
    return part


def simulation(reference: ir.Model, plan: QuantPlan, kind: str = FAKE, seed: int = 0) -> bytes:
    """The model that computes what `plan` makes of `reference`, both as a conversion hands them
    out.

    `kind` is FAKE or NOISE or, for a plan with dynamic ranges, BY_ROW where every row has a scale
    of its own. `seed` draws other noise.
    """
    writer = _Writer(ir.to_proto(reference), plan, kind)
    writer.count = 10_000 * seed
    for unit in plan.units():
        writer.weights(unit.name)
        writer.bias(unit.name)
    computed = {name for unit in plan.units() for name in unit.outputs}
    for name in plan.tensors:
        writer.activation(name, name in computed)
    return bytes(writer.model.SerializeToString())


class _Writer:
    def __init__(self, model: onnx.ModelProto, plan: QuantPlan, kind: str) -> None:
        self.model, self.plan, self.kind, self.count = model, plan, kind, 0
        self.nodes = {node.name: node for node in all_nodes(model.graph)}
        self.arrays = {t.name: t for t in model.graph.initializer}

    def constant(self, array: np.ndarray, what: str) -> str:
        self.count += 1
        name = f"{what}/simulated_{self.count}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weights(self, unit: str) -> None:
        node, wanted = self.nodes[unit], self.plan.nodes[unit].weights
        codes = {
            w.index: self.plan.stored.get((unit, w.index)) or self.plan.weights.get(unit)
            for w in wanted
        }
        for index, weight in codes.items():
            assert weight is not None
            node.input[index] = self.constant(restored(weight), unit)

    def bias(self, unit: str) -> None:
        bias, plan = self.plan.biases.get(unit), self.plan.nodes[unit]
        if bias is None:
            return
        node, adds = (
            self.nodes[unit],
            [self.nodes[n] for n in plan.absorbed if self.nodes[n].op_type == "Add"],
        )
        if adds:
            index = next(i for i, name in enumerate(adds[0].input) if name not in node.output)
            adds[0].input[index] = self.constant(bias.astype(np.float32), unit)
            return
        if (
            plan.integer_bias
            and plan.inputs[0] in self.plan.tensors
            and self.plan.qparams
            and self.kind == FAKE
        ):
            data = self.plan.read_params(plan, plan.inputs[0])
            scale = np.float32(data.scale) * self.plan.weights[unit].qparams.scale
            bias = np.rint(bias / scale.astype(np.float64)) * scale
        node.input.extend([""] * (3 - len(node.input)))
        old = self.arrays.get(node.input[2])
        shape = old.dims if old is not None else bias.shape
        node.input[2] = self.constant(bias.astype(np.float32).reshape(shape), unit)

    def activation(self, name: str, computed: bool) -> None:
        if self.plan.tensors[name].group not in self.plan.qparams:
            self._dynamic(name)
            return
        q = self.plan.params(name)
        if computed:  # whoever reads the tensor reads what is on the grid
            producer = next(node for node in self.model.graph.node if name in node.output)
            raw = f"{name}/raw"
            producer.output[list(producer.output).index(name)] = raw
            self._insert(self._on_grid(raw, name, q), producer)
            self._convert(name, name)
            return
        grid = f"{name}/grid"
        self._insert(self._on_grid(name, grid, q), self._producer(name))
        self._redirect(name, grid)
        self._convert(name, grid)

    def _convert(self, name: str, grid: str) -> None:
        """Lets those that read another format read what is on its grid."""
        other = self.plan.converted.get(name)
        if other is None:
            return
        again = f"{name}/again"
        q = self.plan.qparams[other.group]
        self._insert(self._on_grid(grid, again, q), self._producer(grid))
        for unit in self.plan.units():
            if (
                unit.activation == other.format
                and unit.activation != self.plan.tensors[name].format
            ):
                inputs = self.nodes[unit.name].input
                for index, read in enumerate(inputs):
                    if read == grid:
                        inputs[index] = again

    def _dynamic(self, name: str) -> None:
        """Range and step found at run time, as DynamicQuantizeLinear defines them."""
        codes, scale, zero, grid = (f"{name}/{part}" for part in ("codes", "scale", "zero", "grid"))
        nodes = [
            helper.make_node("DynamicQuantizeLinear", [name], [codes, scale, zero]),
            helper.make_node("DequantizeLinear", [codes, scale, zero], [grid]),
        ]
        if self.kind == BY_ROW:  # 127 steps on each side of zero
            top, most, floor, most_kept = (
                f"{name}/{part}" for part in ("magnitude", "most", "floor", "most_kept")
            )
            nodes = [
                helper.make_node("Abs", [name], [top]),
                helper.make_node("ReduceMax", [top], [most], axes=[-1]),
                helper.make_node(
                    "Max", [most, self.constant(np.float32(1e-30), name)], [most_kept]
                ),
                helper.make_node(
                    "Mul", [most_kept, self.constant(np.float32(1 / 127), name)], [scale]
                ),
                helper.make_node("Div", [name, scale], [floor]),
                helper.make_node("Round", [floor], [codes]),
                helper.make_node("Mul", [codes, scale], [grid]),
            ]
        self._insert(nodes, self._producer(name))
        self._redirect(name, grid)

    def _redirect(self, name: str, grid: str) -> None:
        for unit in (
            unit for unit in self.plan.units() if name in unit.inputs and unit.name in self.nodes
        ):
            if not self.plan.qparams and unit.name not in self.plan.weights:
                continue  # of a plan with dynamic ranges only the products read codes
            node = self.nodes[unit.name]
            for index, read in enumerate(node.input):
                if read == name:
                    node.input[index] = grid

    def _producer(self, name: str) -> onnx.NodeProto | None:
        return next((node for node in self.model.graph.node if name in node.output), None)

    def _insert(self, nodes: list[onnx.NodeProto], after: onnx.NodeProto | None) -> None:
        graph = list(self.model.graph.node)
        place = (
            0
            if after is None
            else 1 + next(i for i, node in enumerate(graph) if node is after or node == after)
        )
        for node in reversed(nodes):
            self.model.graph.node.insert(place, node)
        self.nodes = {node.name: node for node in all_nodes(self.model.graph)}

    def _on_grid(self, source: str, result: str, q: QParams) -> list[onnx.NodeProto]:
        scale = self.constant(np.float32(q.scale), result)
        zero, low, high = (
            self.constant(np.float32(x), result)
            for x in (q.zero_point, q.format.qmin, q.format.qmax)
        )
        steps = [f"{result}/{i}" for i in range(5)]
        if self.kind == NOISE:
            return [
                helper.make_node(
                    "RandomUniformLike",
                    [source],
                    [steps[0]],
                    low=-0.5,
                    high=0.5,
                    seed=float(self.count),
                ),
                helper.make_node("Mul", [steps[0], scale], [steps[1]]),
                helper.make_node("Add", [source, steps[1]], [result]),
            ]
        return [
            helper.make_node("Div", [source, scale], [steps[0]]),
            helper.make_node("Round", [steps[0]], [steps[1]]),
            helper.make_node("Add", [steps[1], zero], [steps[2]]),
            helper.make_node("Clip", [steps[2], low, high], [steps[3]]),
            helper.make_node("Sub", [steps[3], zero], [steps[4]]),
            helper.make_node("Mul", [steps[4], scale], [result]),
        ]


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of those inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def noise_to_signal(
    wanted: Iterable[Mapping[str, np.ndarray]], found: Iterable[Mapping[str, np.ndarray]]
) -> float:
    """The largest root of noise over signal power of any output, over all samples."""
    wanted, found = list(wanted), list(found)

    def ratio(name: str) -> float:
        x, y = (
            np.concatenate([run[name].ravel() for run in runs]).astype(np.float64)
            for runs in (wanted, found)
        )
        assert np.isfinite(y).all()
        signal = float((x**2).sum())
        return (
            float(np.sqrt(((x - y) ** 2).sum() / signal))
            if signal > 0
            else float(np.abs(y).max(initial=0))
        )

    return max(ratio(name) for name in wanted[0])


def pairs_of(codes):
    """The sums of what a kernel multiplies and adds together: kernel positions first, then
    channels.
    """
    if codes.ndim == 2:
        rows = codes.astype(np.int64)
    else:
        rows = np.moveaxis(codes.astype(np.int64), 1, -1).reshape(len(codes), -1)
    return rows[:, : rows.shape[1] - 1 : 2] + rows[:, 1::2]
