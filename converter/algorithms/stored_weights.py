"""Decides the weights that are stored as codes and are floats again before use.

Where data is at hand, layer by layer: a layer is fitted to what the float model computes from its own activations,
but on the inputs that the quantized layers before it hand on, so that it makes up for their errors where it can. What
is left of the mean error goes into the bias. Without data, or where a weight is no matrix product's, the weights
themselves are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, dequantize
from calib.samples import Dataset
from converter.algorithms.matrices import View, view_of
from converter.algorithms.row_fit import Rows, fit
from converter.emit.stored import as_floats, emit_stored, planned
from converter.job import Resources, Watch
from converter.layerwise import Walk
from converter.model import constant
from converter.ops import OPS
from converter.plan import NodePlan, QuantizedWeight, QuantPlan, WeightPlan

# Inputs drawn for a layer's second moments, over all samples.
COLUMNS_PER_WEIGHT = 16
LEAST_COLUMNS, MOST_COLUMNS = 8192, 16384
# Share of the mean second moment that holds a layer's target near its float weights.
RIDGE = 0.1


@dataclass(frozen=True)
class _ChannelView:
    """A weight whose channels stand along `axis`, all along one row where None."""

    shape: tuple[int, ...]
    axis: int | None

    def matrix(self, weight: Array) -> Array:
        return (
            weight.reshape(1, 1, -1)
            if self.axis is None
            else np.moveaxis(weight, self.axis, 0).reshape(1, weight.shape[self.axis], -1)
        )

    def weight(self, matrix: Array) -> Array:
        if self.axis is None:
            return matrix.reshape(self.shape)
        moved = [self.shape[self.axis], *np.delete(self.shape, self.axis)]
        return np.moveaxis(matrix.reshape(moved), 0, self.axis)


def store_by_weights(model: ir.Model, plan: QuantPlan, watch: Watch) -> QuantPlan:
    """The plan with every weight fitted by itself; one that several nodes share is fitted once."""
    found: dict[ir.Value, QuantizedWeight] = {}
    stored = {}
    pairs = list(planned(model, plan))
    for node, unit in watch.track(pairs, "Rounding weights", len(pairs)):
        for wanted in unit.weights:
            value = node.inputs[wanted.index]
            assert value is not None
            if value not in found:
                array = constant(value)
                view = _ChannelView(array.shape, wanted.axis)
                rows = fit(view.matrix(array), None, wanted.format, wanted.axis is not None)
                found[value] = _packed(rows, view.weight(rows.codes), wanted)
            stored[unit.name, wanted.index] = found[value]
    return replace(plan, stored=stored)


def store_by_outputs(model: ir.Model, plan: QuantPlan, data: Dataset, resources: Resources, watch: Watch) -> QuantPlan:
    """The plan with every layer's weights fitted to its outputs, and biases that keep their means."""
    plan = store_by_weights(model, plan, watch)
    walk = Walk(model, plan, data, resources, partial(emit_stored, write=as_floats))
    float_walk = Walk(model, plan, data, resources, lambda model, plan: None)
    nodes = {node.name: node for node in model.graph}
    done: set[str] = set()
    for position, step in enumerate(watch.track(walk.steps, "Rounding weights", len(walk.steps))):
        unit = step.unit
        if unit and unit.weight:
            node = nodes[unit.name]
            array = constant(node.inputs[unit.weight.index])
            view = view_of(node, array.shape, unit.weight.index)
            if view and unit.weight.name not in done:
                plan = _layer(plan, unit, node, array, view, walk, float_walk)
        walk.advance(position, plan)
        float_walk.advance(position, plan)
    return plan


def _layer(plan, unit, node, array, view, walk, float_walk) -> QuantPlan:
    wanted = unit.weight
    matrix = view.matrix(array.astype(np.float64))
    count = int(np.clip(COLUMNS_PER_WEIGHT * matrix.shape[2], LEAST_COLUMNS, MOST_COLUMNS))
    moments, cross = _joint(*(w.draw(unit, view, count, plan)[0] for w in (walk, float_walk)), _has_bias(unit))
    target = _target(matrix, moments, cross)
    rows = fit(target, moments, wanted.format, wanted.axis is not None)
    weight = _packed(rows, view.weight(rows.codes), wanted)
    plan = replace(plan, stored={**plan.stored, (unit.name, wanted.index): weight})
    if not _has_bias(unit):
        return plan
    index = OPS[unit.op_type].bias
    bias = _bias_of(node, unit)
    shift = float_walk.mean_product(unit, array, plan) - walk.mean_product(
        unit, dequantize(weight.codes, weight.qparams), plan
    )
    return plan.with_weights({}, {unit.name: bias + shift})


def _bias_of(node, unit):
    if unit.absorbed:
        add = next(use.node for use in node.outputs[0].uses())
        return next(a for v in add.inputs if (a := constant(v)) is not None).reshape(-1)
    a = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return 0.0 if a is None else a


def _has_bias(unit: NodePlan) -> bool:
    return OPS[unit.op_type].bias is not None or bool(unit.absorbed)


def _joint(x: Array, reference: Array, centered: bool) -> tuple[Array, Array]:
    """E[x x'] and E[reference x'] over drawn inputs (groups, drawn, columns), about their means where `centered`."""
    both = np.concatenate([x, reference], axis=2)
    if centered:
        both -= both.mean(axis=1, keepdims=True)
    # One product of an array with itself: BLAS has a fast way for it, for many small groups above all.
    sums = np.matmul(both.transpose(0, 2, 1), both) / np.float32(x.shape[1])
    size = x.shape[2]
    return sums[:, :size, :size].astype(np.float64), sums[:, size:, :size].astype(np.float64)


def _target(weight: Array, moments: Array, cross: Array) -> Array:
    """The weights that on inputs x come nearest to `weight` on the reference: weight E[ref x'] E[x x']^-1, with a ridge."""
    size = moments.shape[1]
    ridge = RIDGE * np.einsum("gkk->g", moments)[:, None, None] / size * np.eye(size) + 1e-30 * np.eye(size)
    change = np.matmul(weight, cross - moments)
    return weight + np.linalg.solve(moments + ridge, change.swapaxes(1, 2)).swapaxes(1, 2)


def _packed(rows: Rows, codes: Array, wanted: WeightPlan) -> QuantizedWeight:
    scale, zero = ((x.reshape(-1) if wanted.axis is not None else x.flat[0]) for x in (rows.scale, rows.zero))
    q = QParams(np.asarray(scale, np.float32), np.asarray(zero, np.float32), wanted.format, wanted.axis)
    return QuantizedWeight(np.ascontiguousarray(codes).astype(wanted.format.dtype), q)
