"""Decides the weights that are stored as codes and are floats again before use.

Where data is at hand, layer by layer: a layer is fitted to what the float model computes from its
own activations, but on the inputs that the quantized layers before it hand on, so that it makes up
for their errors where it can. What is left of the mean error goes into the bias. Without data, or
where a weight is no matrix product's, the weights themselves are fitted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, dequantize
from calib.samples import Dataset
from converter.calibrate.walk import Emit, Walk, second_moments, usable
from converter.emit.stored import as_floats, emit_stored
from converter.graph.edit import constant
from converter.job import Resources, Watch
from converter.measure.sensitivity import fewest
from converter.plan.matrices import View, plain_matrix, plain_weight
from converter.plan.ops import OPS, is_normalized, view_of
from converter.plan.plan import NodePlan, QuantizedWeight, QuantPlan, WeightPlan
from converter.plan.units import bias_of, planned
from converter.weights.gptq import helps_everywhere, kept_weights
from converter.weights.grids import Grids, Rows, fit, with_variance

# Inputs drawn for a layer's second moments, over all samples.
COLUMNS_PER_WEIGHT = 16
LEAST_COLUMNS, MOST_COLUMNS = 2048, 8192
# Share of the inputs' mean second moment that holds a layer's target near its float weights.
RIDGE = 1.0
# The most that is added to second moments of few inputs, as a share of their mean.
MOST_SHRINKAGE = 4.0
# Bytes of activations that each of the two walks keeps, and samples: accuracy grows with those that
# take part.
STORE_BYTES, MOST_SAMPLES = 448 << 20, 128
# The most bits that a relative error is turned into.
WIDEST = 16
# A trellis may pay for codes of these widths, where most weights differ.
TRELLIS_BITS = range(2, 8)


@dataclass(frozen=True)
class Options:
    """How weights are fitted.

    `by_outputs` needs data; `correct` keeps means and, by weights, variances; `integer_zero` is for
    DequantizeLinear; `max_error` chooses the fewest bits with no more relative error a weight, None
    keeps the plan's.
    """

    by_outputs: bool = False
    correct: bool = True
    integer_zero: bool = False
    max_error: float | None = None


@dataclass(frozen=True)
class Fitter:
    """What every fit of one model's weights shares."""

    model: ir.Model
    data: Dataset
    resources: Resources
    options: Options
    watch: Watch

    def fitted(self, plan: QuantPlan, alone: bool = False) -> QuantPlan:
        """The plan with all weights and, by outputs, biases; `alone` fits a layer as if all others
        were float.
        """
        if not self.options.by_outputs:
            return self.by_weights(plan)
        layers = _Layers(self, plan, alone)
        plan = self._told_of_blind(plan, layers.seen)
        # What others read too, as a lookup does a tied table, may be needed before its product is
        # decided.
        return layers.decide(
            self.by_weights(plan, [value for value in layers.seen if len(value.uses()) == 1])
        )

    def _told_of_blind(self, plan: QuantPlan, seen: Collection[ir.Value]) -> QuantPlan:
        """The plan whose reasons say which weights are rounded without data, as no walk sees what
        they multiply.
        """
        blind = {
            unit.name: replace(unit, reason=f"{unit.reason}, rounded without data")
            for node, unit in planned(self.model, plan)
            if any(_operand(node, wanted)[0] not in seen for wanted in unit.weights)
        }
        if blind:
            self.watch.say(f"Rounded without data: the weights of {', '.join(blind)}.")
        return replace(plan, nodes={**plan.nodes, **blind})

    def by_weights(self, plan: QuantPlan, but: Collection[ir.Value] = ()) -> QuantPlan:
        """The plan with every weight fitted by itself, but for some."""
        return store_by_weights(self.model, plan, self.options, self.watch, but)


def store_by_weights(
    model: ir.Model, plan: QuantPlan, options: Options, watch: Watch, but: Collection[ir.Value] = ()
) -> QuantPlan:
    """The plan with every weight fitted by itself, but for some; one that several nodes share is
    fitted once.
    """
    found: dict[ir.Value, QuantizedWeight] = {}
    stored: dict[tuple[str, int], QuantizedWeight] = {}
    pairs = [
        (n, unit, w)
        for n, unit in planned(model, plan)
        for w in unit.weights
        if _operand(n, w)[0] not in but
    ]
    for node, unit, wanted in watch.track(pairs, "Fitting weights", len(pairs)):
        value, array = _operand(node, wanted)
        if value not in found:
            found[value] = _stored_alone(array, wanted, options)
        stored[unit.name, wanted.index] = found[value]
    return replace(plan, stored=stored)


def _stored_alone(array: Array, wanted: WeightPlan, options: Options) -> QuantizedWeight:
    matrix = plain_matrix(array, wanted.axis)
    if wanted.axis is not None and wanted.block:
        matrix = matrix.reshape(1, -1, wanted.block)  # blocks have grids of their own
    kept = kept_weights(matrix)
    rows = _fewest_bits(matrix, None, wanted, options, kept)
    if options.correct and not options.integer_zero and kept is None:
        rows = with_variance(matrix, rows, Grids(rows.format))
    return _packed(rows, plain_weight(rows.codes(), array.shape, wanted.axis), wanted)


def _fewest_bits(
    weight: Array,
    moments: Array | None,
    wanted: WeightPlan,
    options: Options,
    kept: Array | None,
    judged: Array | None = None,
) -> Rows:
    """The fit of a matrix in the planned bits or in the fewest that keep an error, which `judged`
    moments measure.
    """
    bound, integer_zero = options.max_error, options.integer_zero or kept is not None
    grids = Grids(wanted.format, wanted.axis is not None, integer_zero)
    varied = grids.per_row and not integer_zero and _varied(weight)

    def fitted(bits: int) -> Rows:
        fmt = replace(wanted.format, bits=bits, trellis=varied and bits in TRELLIS_BITS)
        return fit(weight, moments, replace(grids, format=fmt), kept)

    def within(bits: int) -> Rows | None:
        rows = fitted(bits)
        return (
            rows if bits == WIDEST or rows.relative_error(weight, judged) <= (bound or 0) else None
        )

    return fitted(wanted.format.bits) if bound is None else fewest(WIDEST, within)


def _varied(weight: Array) -> bool:
    """Whether weights are not repeated, which fewer bits would store as well."""
    some = weight.reshape(-1)[:: max(1, weight.size >> 16)]
    return len(np.unique(some)) > min(some.size // 2, 1024)


class _Layers:
    """A walk with stored weights beside one of the float model."""

    def __init__(self, fitter: Fitter, plan: QuantPlan, alone: bool) -> None:
        def walk(write: Emit) -> Walk:
            return Walk(
                fitter.model, plan, fitter.data, fitter.resources, write, STORE_BYTES, MOST_SAMPLES
            )

        self.fitter, self.nodes = fitter, {node.name: node for node in fitter.model.graph}
        self.float_walk = walk(lambda model, plan: None)
        self.walk = self.float_walk if alone else walk(partial(emit_stored, write=as_floats))
        self.decided: set[ir.Value] = set()
        units = (step.unit for step in self.walk.steps if step.unit)
        self.seen = {v for unit in units if (v := self._seen(unit)) is not None}

    def decide(self, plan: QuantPlan) -> QuantPlan:
        """The plan with every matrix product decided anew; a weight that several share suits the
        first.
        """
        steps = self.walk.steps
        for position, step in enumerate(
            self.fitter.watch.track(steps, "Rounding weights", len(steps))
        ):
            if step.unit and step.unit.weight:
                plan = self._decided(step.unit, step.unit.weight, plan)
            for walk in {self.walk, self.float_walk}:
                walk.advance(position, plan)
        return plan

    def _decided(self, unit: NodePlan, wanted: WeightPlan, plan: QuantPlan) -> QuantPlan:
        node = self.nodes[unit.name]
        value, array = _operand(node, wanted)
        view = view_of(node, array.shape, wanted.index)
        if view is None or value not in self.seen:
            return plan
        if value not in self.decided:
            self.decided.add(value)
            rows = self._rows(unit, wanted, view, view.matrix(array.astype(np.float64)), plan)
            weight = _packed(rows, view.weight(rows.codes()), wanted)
            names = {unit.name for unit in plan.units()}
            shared = {
                (name, use.idx): weight
                for use in value.uses()
                if (name := use.node.name or "") in names
            }
            plan = replace(plan, stored={**plan.stored, **shared})
        if not self._corrects(unit):
            return plan
        weight, bias = plan.stored[unit.name, wanted.index], bias_of(node, unit)
        reached = self.walk.mean_product(unit, dequantize(weight.codes, weight.qparams), plan)
        shift = self.float_walk.mean_product(unit, array, plan) - reached
        shift = np.where(np.isfinite(shift), shift, 0.0)
        if not self._keeps(unit, view, array, weight, bias, shift, plan):
            return plan
        return plan.with_weights(
            {}, {unit.name: shift if bias is None else bias.reshape(-1) + shift}
        )

    def _keeps(
        self,
        unit: NodePlan,
        view: View,
        array: Array,
        weight: QuantizedWeight,
        bias: Array | None,
        shift: Array,
        plan: QuantPlan,
    ) -> bool:
        """Whether a correction is to be trusted: before a normalisation quiet rows count, too."""
        if not is_normalized(self.nodes[unit.name].outputs[0]):
            return True
        x, _ = self.walk.draw(unit, view, LEAST_COLUMNS, plan)
        x = x[:, usable(x)]
        rounded = dequantize(weight.codes, weight.qparams)
        before, after = (view.matrix(each.astype(np.float64)) for each in (array, rounded))
        own = np.zeros(shift.shape) if bias is None else bias.reshape(-1)
        return not x.size or helps_everywhere(x, before, after, own, shift)

    def _seen(self, unit: NodePlan) -> ir.Value | None:
        """The weight of a unit whose inputs tell how it is best rounded."""
        node, wanted = self.nodes[unit.name], unit.weights[0]
        value, array = _operand(node, wanted)
        known = view_of(node, array.shape, wanted.index) and not OPS[unit.op_type].obstacle(node)
        return value if known and wanted.block is None else None

    def _rows(
        self, unit: NodePlan, wanted: WeightPlan, view: View, matrix: Array, plan: QuantPlan
    ) -> Rows:
        count = int(np.clip(COLUMNS_PER_WEIGHT * matrix.shape[2], LEAST_COLUMNS, MOST_COLUMNS))
        x, reference = self._drawn(unit, view, count, plan)
        both = usable(x) & usable(reference)
        x, reference = x[:, both], reference[:, both]
        if not x.shape[1]:
            x = reference = np.ones((len(x), 1, x.shape[2]), np.float32)  # nothing is known
        moments, cross = _joint(x, reference, self._corrects(unit), self.walk.threads)
        extra = _shrinkage(moments, x.shape[1])
        target = _target(matrix, moments + extra, cross + extra)
        return _fewest_bits(
            target, moments + extra, wanted, self.fitter.options, kept_weights(matrix), moments
        )

    def _drawn(
        self, unit: NodePlan, view: View, count: int, plan: QuantPlan
    ) -> tuple[Array, Array]:
        """Inputs as the layers before hand them on, and the float model's, which they stand for.

        Where the number of rows depends on the data, samples take part in which it is the same; if
        there are none, the inputs stand for themselves.
        """
        shapes = (walk.shapes(unit.inputs[0]) for walk in (self.walk, self.float_walk))
        alike = [i for i, (own, other) in enumerate(zip(*shapes, strict=True)) if own == other]
        x, _ = self.walk.draw(unit, view, count, plan, alike)
        return x, self.float_walk.draw(unit, view, count, plan, alike)[0] if alike else x

    def _corrects(self, unit: NodePlan) -> bool:
        return self.fitter.options.correct and (
            OPS[unit.op_type].bias is not None or bool(unit.absorbed)
        )


def _operand(node: ir.Node, wanted: WeightPlan) -> tuple[ir.Value, Array]:
    value = node.inputs[wanted.index]
    array = constant(value)
    assert value is not None
    assert array is not None
    return value, array


def _joint(x: Array, reference: Array, centered: bool, threads: int) -> tuple[Array, Array]:
    """E[x x'] and E[reference x'] over drawn inputs (groups, drawn, columns), about their means
    where `centered`.
    """
    both, size = np.concatenate([x, reference], axis=2), x.shape[2]
    if centered:
        both -= both.mean(axis=1, keepdims=True)
    # One product of an array with itself: BLAS has a fast way for it, for many small groups above
    # all.
    sums = second_moments(both, threads)
    return sums[:, :size, :size], sums[:, size:, :size]


def _shrinkage(moments: Array, drawn: int) -> Array:
    """What is added to second moments, as few inputs say little about how many columns go
    together.
    """
    size = moments.shape[1]
    share = min((size / drawn) ** 2, MOST_SHRINKAGE) * np.einsum("gkk->g", moments) / size
    return np.asarray(share[:, None, None] * np.eye(size))


def _target(weight: Array, moments: Array, cross: Array) -> Array:
    """The weights V that on inputs x come nearest to `weight` W on the reference r: V = W E[r x']
    E[x x']^-1.

    A ridge draws V to W: V = W + W (E[r x'] - E[x x']) (E[x x'] + ridge)^-1.
    """
    size = moments.shape[1]
    ridge = RIDGE * np.einsum("gkk->g", moments)[:, None, None] / size
    damped = moments + np.where(ridge > 0, ridge, 1.0) * np.eye(size)
    change = np.matmul(weight, cross - moments)
    target: Array = weight + np.linalg.solve(damped, change.swapaxes(1, 2)).swapaxes(1, 2)
    return target


def _packed(rows: Rows, codes: Array, wanted: WeightPlan) -> QuantizedWeight:
    scale, zero = (
        _as_stored(x.astype(np.float32), codes.shape, wanted) for x in (rows.scale, rows.zero)
    )
    q = QParams(scale, zero, rows.format, wanted.axis)
    return QuantizedWeight(np.ascontiguousarray(codes).astype(rows.format.dtype), q)


def _as_stored(numbers: Array, shape: tuple[int, ...], wanted: WeightPlan) -> Array:
    """A number a row as it stands along the weight: one, one a channel, or one a block with a
    weight's axes.
    """
    if wanted.axis is None:
        return numbers.reshape(())
    by_channel = numbers.reshape(shape[wanted.axis], -1)
    return by_channel[:, 0] if wanted.block is None else np.moveaxis(by_channel, 0, wanted.axis)
