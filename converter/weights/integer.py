"""Decides the integer weights and biases of a plan, layer by layer, each in the light of all layers
before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, dequantize
from converter.calibrate.observe import Mean
from converter.calibrate.walk import Walk, product_of_mean, second_moments, usable
from converter.graph.edit import constant, values_by_name
from converter.job import Watch
from converter.plan.matrices import View, plain_matrix, plain_weight
from converter.plan.ops import OPS, is_normalized, view_of
from converter.plan.plan import NodePlan, QuantizedWeight, QuantPlan, WeightPlan
from converter.weights.gptq import (
    Grid,
    compensated,
    helps_everywhere,
    kept_weights,
    nearest,
    search_scales,
)

# |bias| / scale stays below this, half of int32, leaving room for what the products add.
BIAS_LIMIT = 2.0**30
# Inputs drawn for a layer's second moments, over all samples: enough for a stable estimate of its
# columns.
COLUMNS_PER_WEIGHT = 8
LEAST_COLUMNS, MOST_COLUMNS = 1024, 8192
# Longer rows are rounded to the nearest code: the second moments of more columns take gigabytes and
# minutes.
MOST_COMPENSATED = 8192


@dataclass(frozen=True)
class Options:
    """How weights are rounded: with error compensation or to nearest codes; whether scales are
    powers of two.
    """

    compensate: bool = True
    power_of_two: bool = False


@dataclass(frozen=True)
class _Layer:
    """A weighted unit with its constants; `bias` is float64 of shape (channels,) or None."""

    unit: NodePlan
    node: ir.Node
    weight: Array
    bias: Array | None


def decide_weights(
    model: ir.Model,
    plan: QuantPlan,
    walk: Walk,
    means: Mapping[Mean, Array],
    options: Options,
    watch: Watch,
) -> QuantPlan:
    """The plan with integer weights and biases; `means` are the float model's channel means of
    `products`.
    """
    values = values_by_name(model.graph)
    nodes = {node.name: node for node in model.graph}
    for position, step in enumerate(watch.track(walk.steps, "Rounding weights", len(walk.steps))):
        if step.unit and step.unit.name not in plan.weights:
            layer = _layer(step.unit, nodes[step.unit.name], values)
            weight = _rounded(layer, plan, walk, options)
            # Another unit may watch the same tensor for a bias that this one has no place for.
            mean = means.get(_source(layer.unit, layer.node)) if _correctable(layer.unit) else None
            bias = _corrected(layer, weight, mean, plan, walk) if mean is not None else layer.bias
            plan = plan.with_weights(
                {layer.unit.name: weight}, {} if bias is None else {layer.unit.name: bias}
            )
        walk.advance(position, plan)
    return plan


def products(graph: ir.Graph, plan: QuantPlan) -> tuple[Mean, ...]:
    """The channel means that bias correction needs of the float model."""
    nodes = {node.name: node for node in graph}
    correctable = [unit for unit in plan.units() if _correctable(unit)]
    return tuple(dict.fromkeys(_source(unit, nodes[unit.name]) for unit in correctable))


def _correctable(unit: NodePlan) -> bool:
    return unit.weight is not None and (OPS[unit.op_type].bias is not None or unit.bias is not None)


def _source(unit: NodePlan, node: ir.Node) -> Mean:
    """What the mean of the product follows from: its input, which is watched anyway, where
    possible, or the product.
    """
    view = _view(unit, node)
    if view and view.input_axis is not None:
        return unit.inputs[0], view.input_axis
    return node.outputs[0].name or "", OPS[unit.op_type].output_axis


def _view(unit: NodePlan, node: ir.Node) -> View | None:
    assert unit.weight is not None
    weight = constant(node.inputs[unit.weight.index])
    assert weight is not None
    return view_of(node, weight.shape, unit.weight.index)


def _layer(unit: NodePlan, node: ir.Node, values: Mapping[str, ir.Value]) -> _Layer:
    assert unit.weight is not None
    weight = constant(values[unit.weight.name])
    bias = constant(values[unit.bias]) if unit.bias else None
    assert weight is not None
    return _Layer(unit, node, weight, None if bias is None else bias.reshape(-1).astype(np.float64))


def _rounded(layer: _Layer, plan: QuantPlan, walk: Walk, options: Options) -> QuantizedWeight:
    wanted = layer.unit.weight
    assert wanted is not None
    grid = Grid(wanted.format, wanted.pair_limit)
    view = _view(layer.unit, layer.node)
    if view is None:
        # Not known as a matrix product of its inputs: least squares in the weights themselves.
        matrix = plain_matrix(layer.weight.astype(np.float64), wanted.axis)
        scale = _scales(layer, plan, matrix, np.ones(matrix.shape[::2]), grid, options)
        codes = nearest(matrix / scale[..., None], grid)
        return packed(plain_weight(codes, layer.weight.shape, wanted.axis), scale, wanted)
    matrix = view.matrix(layer.weight.astype(np.float64))
    columns = matrix.shape[2]
    drawn, unit_scale = walk.draw(layer.unit, view, _columns_to_draw(columns), plan)
    drawn = drawn[:, usable(drawn)]
    if not drawn.shape[1]:
        drawn = np.ones((len(drawn), 1, columns), np.float32)  # nothing is known of its inputs
    importance = np.square(drawn).mean(axis=1, dtype=np.float64) * unit_scale**2
    scale = _scales(layer, plan, matrix, importance, grid, options)
    if options.compensate and columns <= MOST_COMPENSATED:
        moments, kept = second_moments(drawn, walk.threads) * unit_scale**2, kept_weights(matrix)
        codes = compensated(
            matrix, scale, moments, grid, None if kept is None else np.where(kept, np.nan, 0.0)
        )
    else:
        codes = nearest(matrix / scale[..., None], grid)
    return packed(view.weight(codes), scale, wanted)


def _columns_to_draw(columns: int) -> int:
    return int(np.clip(COLUMNS_PER_WEIGHT * columns, LEAST_COLUMNS, MOST_COLUMNS))


def _scales(
    layer: _Layer, plan: QuantPlan, matrix: Array, importance: Array, grid: Grid, options: Options
) -> Array:
    """The scale of each row, as float32 stores it."""
    assert layer.unit.weight is not None
    scale = search_scales(matrix, importance, grid, layer.unit.weight.axis is not None)
    scale = (
        np.maximum(scale, _scale_floor(layer, plan, scale)).astype(np.float32).astype(np.float64)
    )
    return np.exp2(np.ceil(np.log2(scale))) if options.power_of_two else scale


def _scale_floor(layer: _Layer, plan: QuantPlan, scale: Array) -> Array:
    name = layer.unit.inputs[0]
    if layer.bias is None or name not in plan.tensors:
        return np.zeros_like(scale)
    per_channel = layer.unit.weight is not None and layer.unit.weight.axis is not None
    return least_scales(layer.bias, plan.params(name), scale.shape, per_channel)


def least_scales(bias: Array, data: QParams, shape: tuple[int, ...], per_channel: bool) -> Array:
    """The least scale of each row for which the int32 `bias`, of scale data scale * weight scale,
    cannot overflow.
    """
    floor = np.abs(bias) / (float(data.scale) * BIAS_LIMIT)
    return floor.reshape(shape) if per_channel else np.full(shape, floor.max())


def packed(codes: Array, scale: Array, wanted: WeightPlan) -> QuantizedWeight:
    """Whole-number `codes` in the weight's shape with the scales (groups, rows) of the rows they
    are columns of.
    """
    scales = np.asarray(scale.reshape(-1) if wanted.axis is not None else scale.flat[0], np.float32)
    q = QParams(scales, np.zeros(scales.shape, wanted.format.dtype), wanted.format, wanted.axis)
    return QuantizedWeight(np.ascontiguousarray(codes).astype(wanted.format.dtype), q)


def _corrected(
    layer: _Layer, weight: QuantizedWeight, mean: Array, plan: QuantPlan, walk: Walk
) -> Array:
    """The bias that gives the quantized product the float product's mean in every channel.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019),
    section 4.2, with measured means.
    """
    view = _view(layer.unit, layer.node)
    if view and view.input_axis is not None:
        target = product_of_mean(view, layer.weight, mean)
    else:
        target = mean - (
            layer.bias
            if OPS[layer.unit.op_type].bias is not None and layer.bias is not None
            else 0.0
        )
    shift = target - walk.mean_product(layer.unit, dequantize(weight.codes, weight.qparams), plan)
    shift = np.where(np.isfinite(shift), shift, 0.0)
    if view and not _is_trusted(layer, view, weight, shift, plan, walk):
        shift = np.zeros_like(shift)
    return np.asarray(shift if layer.bias is None else layer.bias + shift)


def _is_trusted(
    layer: _Layer,
    view: View,
    weight: QuantizedWeight,
    shift: Array,
    plan: QuantPlan,
    walk: Walk,
) -> bool:
    """Whether a correction may be applied: before a normalisation quiet rows count as well."""
    if not is_normalized(layer.node.outputs[0]):
        return True
    drawn, unit_scale = walk.draw(layer.unit, view, LEAST_COLUMNS, plan)
    x = drawn[:, usable(drawn)] * np.float32(unit_scale)
    rounded = dequantize(weight.codes, weight.qparams)
    before, after = (view.matrix(each.astype(np.float64)) for each in (layer.weight, rounded))
    own = np.zeros(shift.shape) if layer.bias is None else layer.bias
    return not x.size or helps_everywhere(x, before, after, own, shift)
