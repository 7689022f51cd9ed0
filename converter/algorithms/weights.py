"""Decides the integer weights and biases of a plan, layer by layer, each in the light of all layers before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, Range, dequantize, qparams_of, quantize
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
    """What is done to weights: error-compensating rounding (else nearest) and bias correction."""

    compensate: bool = True
    correct_bias: bool = True


def decide_weights(
    model: ir.Model, plan: QuantPlan, walk: Walk, means: Mapping[str, Array], options: Options, watch: Watch
) -> QuantPlan:
    """The plan with integer weights and biases; `means` are the float model's channel means of products, by tensor."""
    values = values_by_name(model.graph)
    nodes = {node.name: node for node in model.graph}
    for position, step in enumerate(watch.track(walk.steps, "Rounding weights", len(walk.steps))):
        if (unit := step.unit) and unit.weight:
            weight, bias = constant(values[unit.weight.name]), constant(values[unit.bias]) if unit.bias else None
            assert weight is not None
            bias = None if bias is None else bias.reshape(-1).astype(np.float64)
            quantized = _rounded(plan, unit, unit.weight, weight, bias, walk, nodes[unit.name], options)
            mean = means.get(nodes[unit.name].outputs[0].name or "")
            if options.correct_bias and mean is not None:
                bias = _corrected(plan, unit, quantized, bias, mean, walk)
            plan = plan.with_weights({unit.name: quantized}, {} if bias is None else {unit.name: bias})
        walk.advance(position, plan)
    return plan


def products(graph: ir.Graph, plan: QuantPlan) -> dict[str, int]:
    """The tensors whose channel means bias correction compares, with their channel axes."""
    nodes = {node.name: node for node in graph}
    correctable = [unit for unit in plan.units() if unit.weight and (OPS[unit.op_type].bias is not None or unit.bias)]
    return {nodes[unit.name].outputs[0].name or "": OPS[unit.op_type].output_axis for unit in correctable}


def _rounded(
    plan: QuantPlan, unit: NodePlan, wanted: WeightPlan, weight: Array, bias: Array | None, walk: Walk, node: ir.Node, options: Options
) -> QuantizedWeight:
    grid = Grid(wanted.format, wanted.pair_limit)
    floor = 0.0 if bias is None else np.abs(bias) / (float(plan.params(unit.inputs[0]).scale) * BIAS_LIMIT)
    view = view_of(node, weight.shape, wanted.index)
    if view is None:
        return _plainly_rounded(weight, wanted, floor)
    matrix = view.matrix(weight.astype(np.float64))
    count = int(np.clip(COLUMNS_PER_WEIGHT * matrix.shape[2], LEAST_COLUMNS, MOST_COLUMNS))
    moments = walk.moments(unit, view, count, plan)
    importance = np.einsum("gkk->gk", moments) + 1e-12
    scale = search_scales(matrix, importance, grid, wanted.axis is not None)
    scale = np.maximum(scale, np.reshape(floor, scale.shape) if np.ndim(floor) else floor).astype(np.float32).astype(np.float64)
    codes = compensated(matrix, scale, moments, grid) if options.compensate else nearest(matrix / scale[..., None], grid)
    scales = (scale.reshape(-1) if wanted.axis is not None else scale.reshape(-1)[0]).astype(np.float32)
    q = QParams(scales, np.zeros(scales.shape, wanted.format.dtype), wanted.format, wanted.axis)
    return QuantizedWeight(np.ascontiguousarray(view.weight(codes)).astype(wanted.format.dtype), q)


def _plainly_rounded(weight, wanted, floor):
    raise NotImplementedError


def _corrected(plan: QuantPlan, unit: NodePlan, quantized: QuantizedWeight, bias: Array | None, mean: Array, walk: Walk) -> Array:
    """The bias that gives the quantized product the float product's mean in every channel."""
    inside = bias if OPS[unit.op_type].bias is not None and bias is not None else 0.0
    shift = (mean - inside) - walk.mean_product(unit, dequantize(quantized.codes, quantized.qparams), plan)
    return shift if bias is None else bias + shift
