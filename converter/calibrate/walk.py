"""Walks a model layer by layer with the activations of many samples, as the quantized model
computes them.

The graph is cut into steps: every weighted unit of the plan is one, and whatever lies between two
of them another. A step runs as a small model of its own, on integers where the plan has them, so
that weights can be decided in the light of all that was quantized before them without ever running
the whole model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnxruntime import InferenceSession

from calib.affine import Array, QParams, dequantize, quantize
from calib.samples import Dataset
from calib.session import open_session, run
from calib.workers import over_samples
from converter.calibrate.exact import exact_here
from converter.calibrate.observe import channel_mean, finite_mean
from converter.calibrate.runs import opened
from converter.emit.integer_edges import feed_integers, hand_out_integers
from converter.emit.qdq import emit
from converter.graph.edit import (
    constant,
    nodes_by_name,
    not_none,
    submodel,
    values_read,
)
from converter.graph.files import serialized
from converter.job import Resources
from converter.plan.matrices import View
from converter.plan.ops import OPS, view_of
from converter.plan.plan import NodePlan, QuantPlan

# Bytes of activations kept between steps; as many samples take part as fit.
STORE_BYTES = 192 << 20
# Samples that are enough, if they are this many bytes: short sentences need more of them than
# pictures.
ENOUGH_SAMPLES, ENOUGH_BYTES = 64, 48 << 20

# Nodes that run together, and the weighted unit that they are.
_Cut = tuple[list[ir.Node], NodePlan | None]
Emit = Callable[[ir.Model, QuantPlan], object]


@dataclass(frozen=True)
class Step:
    """Nodes that run together: what they read from and hand on to other steps; `unit` where a
    weight is decided.
    """

    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    unit: NodePlan | None


def steps_of(graph: ir.Graph, plan: QuantPlan) -> list[Step]:
    """The steps that weighted units depend on, in graph order."""
    cut = _needed(list(_cut(graph, plan)))
    steps = [_with_makers(nodes) for nodes, _ in cut]
    readers: dict[ir.Value, set[int]] = {}
    for position, nodes in enumerate(steps):
        for value in (value for node in nodes for value in values_read(node)):
            readers.setdefault(value, set()).add(position)
    finished = list[Step]()
    for position, (own, unit) in enumerate(cut):
        made = [value for node in own for value in node.outputs if can_be_fed(value)]
        writes = [value for value in made if readers.get(value, set()) - {position}]
        finished.append(
            Step(_names(steps[position]), _reads(steps[position]), _names(writes), unit)
        )
    return finished


def _with_makers(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes, and those before them that make what no step can hand on: they run again in every
    step that reads it.
    """
    needed = dict.fromkeys(nodes)
    waiting = list(nodes)
    while waiting:
        for value in values_read(waiting.pop()):
            maker = value.producer()
            if maker is not None and maker not in needed and not can_be_fed(value):
                needed[maker] = None
                waiting.append(maker)
    return list(needed)


def can_be_fed(value: ir.Value) -> bool:
    """Whether arrays of the value can be fed to ONNX Runtime: no sequences, optionals, tensors of
    unknown type or of one that NumPy does not have.
    """
    if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.UNDEFINED:
        return False
    dtype = not_none(value.dtype).numpy()
    return dtype.isbuiltin == 1 and dtype.kind in "biufO"


def _cut(graph: ir.Graph, plan: QuantPlan) -> Iterator[_Cut]:
    by_name = nodes_by_name(graph)
    between: list[ir.Node] = []
    for node in graph:
        unit = plan.nodes[node.name or ""]
        if unit.inside:
            continue
        nodes = [node, *(by_name[name] for name in unit.absorbed)]
        if not (unit.quantized and unit.weight):
            between += nodes
            continue
        if between:
            yield between, None
        between = []
        yield nodes, unit
    if between:
        yield between, None


def _needed(cut: Sequence[_Cut]) -> list[_Cut]:
    """The weighted units and, of what lies between them, the nodes that they depend on."""
    read: set[ir.Value] = set()
    kept = list[_Cut]()
    for nodes, unit in reversed(cut):
        needed = list[ir.Node]()
        for node in reversed(nodes):
            if unit or not read.isdisjoint(node.outputs):
                needed.insert(0, node)
                read.update(values_read(node))
        if needed:
            kept.insert(0, (needed, unit))
    return kept


def _reads(nodes: Sequence[ir.Node]) -> tuple[str, ...]:
    made = {value for node in nodes for value in node.outputs}
    read = (value for node in nodes for value in values_read(node))
    return _names(value for value in read if value not in made and constant(value) is None)


def _names(parts: Iterable[ir.Value | ir.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.name or "" for part in parts))


class Walk:
    """The activations that later steps still read, sample by sample: integer codes where the plan
    computes them.

    The first `samples` of the data take part; None for as many as are enough, at the most `most`,
    and fit.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        data: Dataset,
        resources: Resources,
        *,
        write: Emit = emit,
        store_bytes: int = STORE_BYTES,
        most: int | None = None,
        samples: int | None = None,
    ) -> None:
        self.model, self.threads, self._write = model, resources.threads, write
        self._nodes = nodes_by_name(model.graph)
        self.steps = steps_of(model.graph, plan)
        made = [name for unit in plan.units() for name in unit.outputs if name in plan.tensors]
        self._codes = {name: plan.tensors[name].format.dtype.itemsize for name in made}
        self._last_reader = {name: i for i, step in enumerate(self.steps) for name in step.reads}
        self.count = samples or self._fitting(data, store_bytes, most)
        read = set(self._last_reader)
        self._store = [
            {k: x for k, x in data.sample(i).items() if k in read} for i in range(self.count)
        ]

    def _fitting(self, data: Dataset, store_bytes: int, most: int | None) -> int:
        """How many samples are enough and fit."""
        each = max(1, self._peak_bytes(data))
        return max(
            1,
            min(
                len(data),
                most or max(ENOUGH_SAMPLES, ENOUGH_BYTES // each),
                store_bytes // each,
            ),
        )

    def _peak_bytes(self, data: Dataset) -> int:
        """The most bytes that one sample keeps between two steps."""
        names = [
            *data.sample(0),
            *(name for step in self.steps for name in step.writes),
        ]
        size = opened(self.model, names).sizes(names, data.sample(0))
        floats = np.dtype(np.float32).itemsize
        for name in self._codes.keys() & size.keys():
            size[name] = size[name] // floats * self._codes[name]
        held: set[str] = set(data.sample(0))
        peak = sum(size[name] for name in held)
        for position, step in enumerate(self.steps):
            held.update(step.writes)
            peak = max(peak, sum(size[name] for name in held))
            held -= {name for name in step.reads if self._last_reader[name] == position}
        return peak

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shape of a tensor that the next step reads, in each sample."""
        return [sample[name].shape for sample in self._store]

    def draw(
        self,
        unit: NodePlan,
        view: View,
        count: int,
        plan: QuantPlan,
        *,
        samples: Sequence[int] = (),
    ) -> tuple[Array, float]:
        """About `count` inputs of the unit's product as it reads them (groups, drawn, columns), and
        their scale; of some of the samples only, if such are given.

        Two walks over the same data draw the same ones, where both have as many.
        """
        q = self._params(unit, plan)
        zero, scale = (int(q.zero_point), float(q.scale)) if q else (0, 1.0)

        def work(index: int) -> Array:
            x = self._input(index, unit, plan)
            # Drawn by the sample's own generator: the same for any number of workers.
            drawn = view.columns(
                x,
                -(-count // len(chosen)),
                zero,
                np.random.default_rng(index),
            )
            return drawn.astype(np.float32) - np.float32(zero)

        chosen = samples or range(self.count)
        drawn = over_samples(
            len(chosen),
            lambda number: work(chosen[number]),
            self.threads,
        )
        return np.concatenate(list(drawn), axis=1), scale

    def mean_squares(self, unit: NodePlan, view: View, plan: QuantPlan) -> Array:
        """Mean squares (groups, columns) of the inputs that `draw` draws some of: of all positions,
        so that none is missed, however rare what is loud there.
        """
        q = self._params(unit, plan)

        def work(index: int) -> Array:
            x = self._input(index, unit, plan)
            if q is not None:
                return view.means(np.square(x.astype(np.float32) - np.float32(q.zero_point)))
            with np.errstate(over="ignore", invalid="ignore"):
                squares = np.square(x.astype(np.float32))
            return view.means(np.where(np.isfinite(squares), squares, np.float32(0)))

        return np.asarray(np.mean(list(over_samples(self.count, work, self.threads)), axis=0))

    def _params(self, unit: NodePlan, plan: QuantPlan) -> QParams | None:
        """Those of the unit's input; None where that is float."""
        name = unit.inputs[0]
        return plan.read_params(unit, name) if name in plan.tensors else None

    def _input(self, index: int, unit: NodePlan, plan: QuantPlan) -> Array:
        """The unit's input in a sample, as its product reads it."""
        name = unit.inputs[0]
        x = self._store[index][name]
        if name not in plan.tensors:
            return x
        made, read = plan.params(name), plan.read_params(unit, name)
        codes = x if name in self._codes else quantize(x, made)
        return codes if read is made else quantize(dequantize(codes, made), read)

    def mean_product(self, unit: NodePlan, weight: Array, plan: QuantPlan) -> Array:
        """Mean a channel (float64) of the unit's product with float `weight`, before bias and
        activation.
        """
        assert unit.weight is not None
        name, axis = unit.inputs[0], OPS[unit.op_type].output_axis
        view = view_of(self._nodes[unit.name], weight.shape, unit.weight.index)
        if view and view.input_axis is not None and name in self._codes:
            q, along = plan.read_params(unit, name), view.input_axis
            mean = self._mean(lambda i: channel_mean(self._input(i, unit, plan), along))
            return product_of_mean(
                view,
                weight,
                (mean - float(q.zero_point)) * float(q.scale),
            )
        model = self._product(unit, weight, plan)
        output = model.graph.outputs[0].name or ""
        session = open_session(serialized(exact_here(model)), optimize=False)

        def work(index: int) -> Array:
            return channel_mean(
                run(session, [output], {name: self._store[index][name]})[output], axis
            )

        return self._mean(work)

    def _mean(self, work: Callable[[int], Array]) -> Array:
        """The mean a channel over the samples that have one; NaN where none has."""
        return finite_mean(
            np.stack(list(over_samples(self.count, work, self.threads))),
            0,
        )

    def _product(self, unit: NodePlan, weight: Array, plan: QuantPlan) -> ir.Model:
        """The unit's weighted node alone, without bias, on another weight and its quantized
        input.
        """
        assert unit.weight is not None
        name = unit.inputs[0]
        node = self._nodes[unit.name]
        part = submodel(
            self.model,
            [name],
            [node.outputs[0].name or ""],
        )
        bias, alone = OPS[unit.op_type].bias, part.graph[0]
        if bias is not None and bias < len(node.inputs):
            alone.replace_input_with(bias, None)
        operand = alone.inputs[unit.weight.index]
        assert operand is not None
        operand.const_value = ir.tensor(weight, name=operand.name)
        only_input = replace(
            unit,
            weight=None,
            bias=None,
            outputs=(),
            absorbed=(),
        )
        emit(part, replace(plan.part([only_input]), biases={}))
        if name in self._codes:
            feed_integers(part.graph, name)
        return part

    def advance(self, position: int, plan: QuantPlan) -> None:
        """Runs step number `position` as `plan` says and forgets what no later step reads."""
        step = self.steps[position]
        session = self._session(step, plan) if step.writes else None

        def work(index: int) -> None:
            stored = self._store[index]
            made = (
                run(session, step.writes, {name: stored[name] for name in step.reads})
                if session
                else {}
            )
            # Sample by sample, so that never all of them have what the step reads beside what it
            # writes.
            for name in step.reads:
                if self._last_reader[name] == position:
                    del stored[name]
            stored.update(made)

        for _ in over_samples(self.count, work, self.threads):
            pass

    def _session(self, step: Step, plan: QuantPlan) -> InferenceSession:
        model = submodel(self.model, step.reads, step.writes)
        self._write(
            model,
            plan.part([plan.nodes[name] for name in step.nodes], step.reads),
        )
        for name in sorted(self._codes.keys() & step.reads):
            feed_integers(model.graph, name)
        for name in sorted(self._codes.keys() & step.writes):
            hand_out_integers(model.graph, name)
        # Integers need the runtime's fused kernels; of floats those differ between processors.
        return open_session(serialized(exact_here(model)), optimize=bool(self._codes))


def product_of_mean(view: View, weight: Array, mean: Array) -> Array:
    """Mean a channel (float64) of the product whose inputs have this `mean` a channel; for views
    with an input_axis.
    """
    matrix = view.matrix(weight.astype(np.float64))
    return np.asarray(np.einsum("grk,gk->gr", matrix, mean.reshape(matrix.shape[0], -1))).reshape(
        -1
    )
