"""Decides the integer weights and biases of a plan, layer by layer, each in the light of all layers before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, dequantize
from converter.algorithms.matrices import View, view_of
from converter.algorithms.rounding import Grid, compensated, nearest, search_scales
from converter.job import Watch
from converter.layerwise import Walk
from converter.model import constant, values_by_name
from converter.ops import OPS
from converter.plan import NodePlan, QuantizedWeight, QuantPlan, WeightPlan

# |bias| / scale stays below this, half of int32, leaving room for what the products add.
BIAS_LIMIT = 2.0**30
# Inputs drawn for a layer's second moments, over all samples: enough for a stable estimate of its columns.
COLUMNS_PER_WEIGHT = 8
LEAST_COLUMNS, MOST_COLUMNS = 1024, 8192


@dataclass(frozen=True)
class Options:
    """How weights are rounded: with error compensation or each to its nearest code; on scales that are powers of two."""

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
    model: ir.Model, plan: QuantPlan, walk: Walk, means: Mapping[str, Array], options: Options, watch: Watch
) -> QuantPlan:
    """The plan with integer weights and biases; `means` are the float model's channel means of products, by tensor."""
    values = values_by_name(model.graph)
    nodes = {node.name: node for node in model.graph}
    for position, step in enumerate(watch.track(walk.steps, "Rounding weights", len(walk.steps))):
        if step.unit:
            layer = _layer(step.unit, nodes[step.unit.name], values)
            weight = _rounded(layer, plan, walk, options)
            mean = means.get(layer.node.outputs[0].name or "")
            bias = _corrected(layer, weight, mean, plan, walk) if mean is not None else layer.bias
            plan = plan.with_weights({layer.unit.name: weight}, {} if bias is None else {layer.unit.name: bias})
        walk.advance(position, plan)
    return plan


def products(graph: ir.Graph, plan: QuantPlan) -> dict[str, int]:
    """The tensors whose channel means bias correction compares, with their channel axes."""
    nodes = {node.name: node for node in graph}
    correctable = [unit for unit in plan.units() if unit.weight and (OPS[unit.op_type].bias is not None or unit.bias)]
    return {nodes[unit.name].outputs[0].name or "": OPS[unit.op_type].output_axis for unit in correctable}


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
    view = view_of(layer.node, layer.weight.shape, wanted.index)
    matrix = view.matrix(layer.weight.astype(np.float64))
    moments = _moments(layer, view, matrix.shape[2], plan, walk)
    importance = np.einsum("gkk->gk", moments)
    scale = search_scales(matrix, importance, grid, wanted.axis is not None)
    scale = np.maximum(scale, _scale_floor(layer, plan, scale)).astype(np.float32).astype(np.float64)
    if options.power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    codes = (
        compensated(matrix, scale, moments, grid) if options.compensate else nearest(matrix / scale[..., None], grid)
    )
    return _packed(view.weight(codes), scale, wanted)


def _moments(layer: _Layer, view: View, columns: int, plan: QuantPlan, walk: Walk) -> Array:
    count = int(np.clip(COLUMNS_PER_WEIGHT * columns, LEAST_COLUMNS, MOST_COLUMNS))
    return walk.moments(layer.unit, view, count, plan)


def _scale_floor(layer: _Layer, plan: QuantPlan, scale: Array) -> Array:
    """The least scale of each row for which the int32 bias, of scale data scale * weight scale, cannot overflow."""
    name = layer.unit.inputs[0]
    if layer.bias is None or name not in plan.tensors:
        return np.zeros_like(scale)
    floor = np.abs(layer.bias) / (float(plan.params(name).scale) * BIAS_LIMIT)
    per_channel = layer.unit.weight is not None and layer.unit.weight.axis is not None
    return floor.reshape(scale.shape) if per_channel else np.full_like(scale, floor.max())


def _packed(codes: Array, scale: Array, wanted: WeightPlan) -> QuantizedWeight:
    scales = np.asarray(scale.reshape(-1) if wanted.axis is not None else scale.flat[0], np.float32)
    q = QParams(scales, np.zeros(scales.shape, wanted.format.dtype), wanted.format, wanted.axis)
    return QuantizedWeight(np.ascontiguousarray(codes).astype(wanted.format.dtype), q)


def _corrected(layer: _Layer, weight: QuantizedWeight, mean: Array, plan: QuantPlan, walk: Walk) -> Array:
    """The bias that gives the quantized product the float product's mean in every channel.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.2, with
    measured means.
    """
    inside = layer.bias if OPS[layer.unit.op_type].bias is not None and layer.bias is not None else 0.0
    shift = (mean - inside) - walk.mean_product(layer.unit, dequantize(weight.codes, weight.qparams), plan)
    return shift if layer.bias is None else np.asarray(layer.bias + shift)
