"""Weights layer by layer: for each layer, in the light of those before it, draw its inputs, decide
its weight and its bias, advance.

Weights that stay integers are decided on what the quantized layers before them hand on. Weights
that are floats again before use are fitted to what the float model computes from its own
activations, but on the inputs of the quantized one, so that they make up for errors before them.
What is left of the mean error goes into the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from calib.affine import Array, dequantize
from calib.samples import Dataset
from converter.calibrate.observe import Mean
from converter.calibrate.walk import Emit, Walk, product_of_mean
from converter.emit.stored import as_floats, emit_stored
from converter.graph.edit import constant, nodes_by_name, not_none, values_by_name
from converter.graph.mapped import release
from converter.job import Resources, Watch
from converter.plan.matrices import View, plain_matrix, plain_weight
from converter.plan.ops import OPS, is_normalized, view_of
from converter.plan.plan import NodePlan, PerBlock, QuantizedWeight, QuantPlan
from converter.plan.units import Weighted, bias_of, planned, weighted, weighted_of
from converter.weights import integer, stored
from converter.weights.gptq import helps_everywhere
from converter.weights.importance import importance_of
from converter.weights.integer import Rounding, least_scales
from converter.weights.moments import usable, usable_of
from converter.weights.stored import Storage, fitted_alone, fitted_to_outputs

# Inputs drawn for the second moments of an integer layer, a column and at the least and the most
# over all samples, and of a stored one. With four times as few for stored ones the divergence of
# unseen outputs is 1.48 instead of 1.36 for a mobilenet_v1 in 2 bits, .136 instead of .107 for a
# resnet20 (six and twelve draws of samples); with four times as many it is .113.
INTEGER_DRAWS = (8, 1024, 8192)
STORED_DRAWS = (64, 16384, 65536)
# The most numbers of inputs drawn for a stored layer, but for this many inputs.
STORED_NUMBERS, LEAST_STORED = 1 << 25, 8192
# How much of the shift that the errors of layers before cause is made up for: a shift of all
# positions is little like what they did to a few, and activation functions let through more of it
# than of the error. Of a PicoDet's boxes F1 is .24 with 1.0, .91 with 0.5, .79 with 0; of a
# NanoDet's .81, .89, .89; the output of a MobileNet has 26.2, 26.0 and 25.0 dB.
INHERITED = 0.5
# How much the inputs of a shared weight's other readers count, of which nothing is known: what is
# silent at the first of them may be loud there. A loop of six products has 28.5 dB with 0, 30.8
# with 0.5, 30.9 with 1.
UNSEEN = 0.5
# Inputs that judge a correction.
JUDGES = 1024
# Bytes of activations that each of the two walks of stored weights keeps, and samples: accuracy
# grows with those that take part.
STORE_BYTES = 512 << 20
MOST_SAMPLES = 1024

Decide = Callable[[NodePlan, QuantPlan], QuantPlan]


def in_turn(walks: Sequence[Walk], plan: QuantPlan, decide: Decide, watch: Watch) -> QuantPlan:
    """The plan with every layer decided in the light of those before it, which the walks, over the
    same steps, have taken.
    """
    steps = walks[0].steps
    for position, step in enumerate(watch.track(steps, "Rounding weights", len(steps))):
        if step.unit:
            plan = decide(step.unit, plan)
        for walk in walks:
            walk.advance(position, plan)
    return plan


def _count(draws: tuple[int, int, int], columns: int) -> int:
    each, least, most = draws
    return int(np.clip(each * columns, least, most))


def _shift_worth(
    layer: Weighted, weight: QuantizedWeight, shift: Array, *, plan: QuantPlan, walk: Walk
) -> Array | None:
    """What is added to the bias so that every channel keeps its mean; None where that is not to be
    trusted: before a normalisation quiet rows count as well.
    """
    shift = np.where(np.isfinite(shift), shift, 0.0)
    if layer.view is None or not is_normalized(layer.node.outputs[0]):
        return shift
    drawn, scale = walk.draw(layer.unit, layer.view, JUDGES, plan)
    x = drawn[:, usable(drawn)] * np.float32(scale)
    restored = dequantize(weight.codes, weight.qparams)
    before = layer.view.matrix(layer.weight.astype(np.float64))
    after = layer.view.matrix(restored.astype(np.float64))
    own = np.zeros(shift.shape) if layer.bias is None else layer.bias
    if x.size and not helps_everywhere(x, before, after, bias=own, shift=shift):
        return None
    return shift


# --- weights that stay integers


def decide_weights(
    model: ir.Model,
    plan: QuantPlan,
    walk: Walk,
    *,
    means: Mapping[Mean, Array],
    rounding: Rounding,
    watch: Watch,
) -> QuantPlan:
    """The plan with integer weights and biases; `means` are the float model's channel means of
    `products`.
    """
    values = values_by_name(model.graph)
    nodes = nodes_by_name(model.graph)
    shared = _shared_weights(model, plan)

    def layer_of(unit: NodePlan) -> Weighted:
        bias = constant(values[unit.bias]) if unit.bias else None
        return weighted_of(unit, nodes[unit.name], bias)

    def decide(unit: NodePlan, plan: QuantPlan) -> QuantPlan:
        if unit.name in plan.weights:
            return plan
        layer = layer_of(unit)
        twins = shared[unit.name]
        weight = plan.weights.get(twins[0].name)
        if weight is None:
            weight = _rounded([*map(layer_of, twins)], plan, walk, rounding)
        # Another unit may watch the same tensor for a bias that this one has no place for.
        mean = means.get(_source(unit, layer.node)) if _correctable(unit) else None
        own = layer.bias
        if mean is not None:
            own = _corrected(layer, weight, mean, plan=plan, walk=walk)
        biases = {} if own is None else {unit.name: own}
        return plan.with_weights({unit.name: weight}, biases)

    return in_turn([walk], plan, decide, watch)


def products(graph: ir.Graph, plan: QuantPlan) -> tuple[Mean, ...]:
    """The channel means that bias correction needs of the float model."""
    nodes = nodes_by_name(graph)
    correctable = [unit for unit in plan.units() if _correctable(unit)]
    return tuple(dict.fromkeys(_source(unit, nodes[unit.name]) for unit in correctable))


def _correctable(unit: NodePlan) -> bool:
    return unit.weight is not None and (OPS[unit.op_type].bias is not None or unit.bias is not None)


def _source(unit: NodePlan, node: ir.Node) -> Mean:
    """What the mean of the product follows from: its input, which is watched anyway, where
    possible, or the product.
    """
    view = weighted_of(unit, node, None).view
    if view and view.input_axis is not None:
        return unit.inputs[0], view.input_axis
    return node.outputs[0].name or "", OPS[unit.op_type].output_axis


def _shared_weights(model: ir.Model, plan: QuantPlan) -> dict[str, list[NodePlan]]:
    """The units, by the name of each, that multiply with the same matrix, in the order of the
    nodes: one weight does for all of them.
    """
    readers: dict[tuple[object, ...], list[Weighted]] = {}
    for layer in weighted(model, plan):
        value = layer.node.inputs[layer.wanted.index]
        readers.setdefault((value, layer.wanted), []).append(layer)
    return {
        layer.unit.name: [each.unit for each in group if _same_matrix(each, layer)]
        for group in readers.values()
        for layer in group
    }


def _same_matrix(layer: Weighted, other: Weighted) -> bool:
    return layer is other or np.array_equal(_matrix(layer), _matrix(other))


def _matrix(layer: Weighted) -> Array:
    view, weight = layer.view, layer.weight
    return view.matrix(weight) if view else plain_matrix(weight, layer.wanted.axis)


def _rounded(
    twins: Sequence[Weighted], plan: QuantPlan, walk: Walk, rounding: Rounding
) -> QuantizedWeight:
    """The weight of the first of units that share it, such that it serves all of them."""
    layer = twins[0]
    wanted, view = layer.wanted, layer.view
    matrix = _matrix(layer).astype(np.float64)
    least = np.max(
        [_least(each, plan, matrix.shape[:2]) for each in twins],
        axis=0,
    )
    if view is None:
        codes, scale = integer.rounded(matrix, None, wanted, least=least, rounding=rounding)
        codes = plain_weight(codes, layer.weight.shape, wanted.axis)
        return integer.packed(codes, scale, wanted)
    count = _count(INTEGER_DRAWS, matrix.shape[2])
    drawn, unit_scale = walk.draw(layer.unit, view, count, plan)
    (known,) = usable_of(drawn)
    squares = walk.mean_squares(layer.unit, view, plan)
    # Where nothing is heard, nothing is known.
    heard = squares.sum(axis=1, keepdims=True) > 0
    squares = np.where(heard, squares, 1.0)
    even = UNSEEN if len(twins) > 1 else 0.0
    inputs = integer.Inputs(known, squares, unit_scale, walk.threads, even)
    codes, scale = integer.rounded(matrix, inputs, wanted, least=least, rounding=rounding)
    return integer.packed(view.weight(codes), scale, wanted)


def _least(layer: Weighted, plan: QuantPlan, shape: tuple[int, ...]) -> Array:
    """The least scale of each row."""
    name = layer.unit.inputs[0]
    if layer.bias is None or name not in plan.tensors:
        return np.zeros(shape)
    per_channel = layer.wanted.axis is not None
    data = plan.read_params(layer.unit, name)
    return least_scales(layer.bias, data, shape, per_channel)


def _corrected(
    layer: Weighted, weight: QuantizedWeight, mean: Array, *, plan: QuantPlan, walk: Walk
) -> Array:
    """The bias that takes the weight's error out of the mean of every channel, and a part of what
    the layers before have left there.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019),
    section 4.2, with measured means.
    """
    own = 0.0 if layer.bias is None else layer.bias
    if layer.view and layer.view.input_axis is not None:
        target = product_of_mean(layer.view, layer.weight, mean)
    else:
        has_own = OPS[layer.unit.op_type].bias is not None
        target = mean - (own if has_own else 0.0)
    # Means are linear in the weight, so that both parts are one product's.
    restored = dequantize(weight.codes, weight.qparams)
    rest = restored - np.float32(1 - INHERITED) * layer.weight
    missing = INHERITED * target - walk.mean_product(layer.unit, rest, plan)
    shift = _shift_worth(layer, weight, missing, plan=plan, walk=walk)
    if shift is None:
        shift = np.zeros_like(missing)
    return np.asarray(own + shift)


# --- weights that are floats again before use


@dataclass(frozen=True)
class Fitter:
    """What every fit of one model's stored weights shares; at most `most` samples take part."""

    model: ir.Model
    data: Dataset
    resources: Resources
    storage: Storage
    watch: Watch
    most: int = MOST_SAMPLES

    def fitted(self, plan: QuantPlan, alone: bool = False) -> QuantPlan:
        """The plan with all weights and, by outputs, biases; `alone` fits a layer as if all others
        were float.
        """
        if not self.storage.by_outputs:
            return self._by_weights(plan)
        layers = _StoredLayers(self, plan, alone)
        plan = self._told_of_blind(plan, layers.seen)
        # What others read too, as a lookup does a tied table, may be needed before its product is
        # decided.
        but = [value for value in layers.seen if len(value.uses()) == 1]
        plan = self._by_weights(plan, but)
        return in_turn(layers.walks, plan, layers.decide, self.watch)

    def _by_weights(self, plan: QuantPlan, but: Collection[ir.Value] = ()) -> QuantPlan:
        counts: Mapping[ir.Value, Array] = {}
        if self.storage.integer_zero:
            threads = self.resources.threads
            counts = importance_of(
                self.model,
                plan,
                self.data,
                threads=threads,
                watch=self.watch,
            )
        return store_by_weights(
            self.model, plan, self.storage, watch=self.watch, but=but, counts=counts
        )

    def _told_of_blind(self, plan: QuantPlan, seen: Collection[ir.Value]) -> QuantPlan:
        """The plan whose reasons say which weights are rounded without data, as no walk sees what
        they multiply.
        """
        blind = {
            unit.name: replace(unit, reason=f"{unit.reason}, rounded without data")
            for node, unit in planned(self.model, plan)
            if any(node.inputs[wanted.index] not in seen for wanted in unit.weights)
        }
        if blind:
            self.watch.say(f"Rounded without data: the weights of {', '.join(blind)}.")
        return replace(plan, nodes={**plan.nodes, **blind})


def store_by_weights(
    model: ir.Model,
    plan: QuantPlan,
    storage: Storage,
    *,
    watch: Watch,
    but: Collection[ir.Value] = (),
    counts: Mapping[ir.Value, Array] | None = None,
) -> QuantPlan:
    """The plan with every weight fitted by itself, but for some; one that several nodes share is
    fitted once. `counts` is of some what each column counts.
    """
    known = counts or {}
    fitted: dict[ir.Value, QuantizedWeight] = {}
    weights: dict[tuple[str, int], QuantizedWeight] = {}
    wanted = [
        (unit.name, weight, not_none(node.inputs[weight.index]))
        for node, unit in planned(model, plan)
        for weight in unit.weights
        if node.inputs[weight.index] not in but
    ]
    for name, weight, value in watch.track(wanted, "Fitting weights", len(wanted)):
        if value not in fitted:
            array = not_none(constant(value))
            fitted[value] = fitted_alone(array, weight, storage, known.get(value))
            del array
            release([value])
        weights[name, weight.index] = fitted[value]
    return replace(plan, stored=weights)


class _StoredLayers:
    """A walk with stored weights beside one of the float model."""

    def __init__(self, fitter: Fitter, plan: QuantPlan, alone: bool) -> None:
        def walk(write: Emit) -> Walk:
            return Walk(
                fitter.model,
                plan,
                fitter.data,
                fitter.resources,
                write=write,
                store_bytes=STORE_BYTES,
                most=fitter.most,
            )

        self.storage = fitter.storage
        self.nodes = nodes_by_name(fitter.model.graph)
        self.float_walk = walk(lambda model, plan: None)
        self.walk = self.float_walk if alone else walk(partial(emit_stored, write=as_floats))
        self.walks = [self.walk] if alone else [self.walk, self.float_walk]
        self.decided: set[ir.Value] = set()
        units = (step.unit for step in self.walk.steps if step.unit)
        self.seen = {v for unit in units if (v := self._seen(unit)) is not None}

    def decide(self, unit: NodePlan, plan: QuantPlan) -> QuantPlan:
        """The plan with the unit's product decided anew; a weight that several share suits the
        first.
        """
        node = self.nodes[unit.name]
        layer = weighted_of(unit, node, bias_of(node, unit))
        value = not_none(node.inputs[layer.wanted.index])
        if layer.view is None or value not in self.seen:
            return plan
        if value not in self.decided:
            self.decided.add(value)
            plan = _shared(value, self._fitted(layer, layer.view, plan), plan)
        if not self._corrects(unit):
            return plan
        weight = plan.stored[unit.name, layer.wanted.index]
        restored = dequantize(weight.codes, weight.qparams)
        reached = self.walk.mean_product(unit, restored, plan)
        target = self.float_walk.mean_product(unit, layer.weight, plan)
        worth = _shift_worth(layer, weight, target - reached, plan=plan, walk=self.walk)
        if worth is None:
            return plan
        bias = worth if layer.bias is None else layer.bias + worth
        return plan.with_weights({}, {unit.name: bias})

    def _seen(self, unit: NodePlan) -> ir.Value | None:
        """The weight of a unit whose inputs tell how it is best rounded."""
        node = self.nodes[unit.name]
        wanted = unit.weights[0]
        value = not_none(node.inputs[wanted.index])
        shape = not_none(constant(value)).shape
        view = view_of(node, shape, wanted.index)
        if view is None or OPS[unit.op_type].obstacle(node):
            return None
        return None if wanted.blind or isinstance(wanted.granularity, PerBlock) else value

    def _fitted(self, layer: Weighted, view: View, plan: QuantPlan) -> QuantizedWeight:
        matrix = view.matrix(layer.weight.astype(np.float64))
        columns = matrix.shape[2]
        room = max(LEAST_STORED, STORED_NUMBERS // columns)
        count = min(_count(STORED_DRAWS, columns), room)
        drawn = self._drawn(layer.unit, view, count, plan)
        x, reference = usable_of(*drawn)
        pair = stored.Inputs(x, reference, self._corrects(layer.unit))
        rows = fitted_to_outputs(
            matrix,
            pair,
            layer.wanted,
            self.storage,
            sides=view.sides(layer.weight),
            threads=self.walk.threads,
        )
        codes = view.weight(rows.codes())
        return stored.packed(rows, codes, layer.wanted)

    def _drawn(
        self, unit: NodePlan, view: View, count: int, plan: QuantPlan
    ) -> tuple[Array, Array]:
        """Inputs as the layers before hand them on, and the float model's, which they stand for.

        Where the number of rows depends on the data, samples take part in which it is the same; if
        there are none, the inputs stand for themselves.
        """
        name = unit.inputs[0]
        shapes = zip(
            self.walk.shapes(name),
            self.float_walk.shapes(name),
            strict=True,
        )
        alike = [i for i, (own, other) in enumerate(shapes) if own == other]
        x, _ = self.walk.draw(unit, view, count, plan, samples=alike)
        if not alike:
            return x, x
        reference, _ = self.float_walk.draw(unit, view, count, plan, samples=alike)
        return x, reference

    def _corrects(self, unit: NodePlan) -> bool:
        has_place = OPS[unit.op_type].bias is not None or bool(unit.absorbed)
        return self.storage.correct and has_place


def _shared(value: ir.Value, weight: QuantizedWeight, plan: QuantPlan) -> QuantPlan:
    """The plan with the weight of all units that read `value`."""
    names = {unit.name for unit in plan.units()}
    uses = [(use.node.name or "", use.idx) for use in value.uses()]
    shared = {(name, index): weight for name, index in uses if name in names}
    return replace(plan, stored={**plan.stored, **shared})
