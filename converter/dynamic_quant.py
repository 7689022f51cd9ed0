"""DYNAMIC_QUANT: matrix products compute in integers, with activation ranges measured when the model runs.

Tables and the weights of all other operators are stored in 8 bits and are floats again before use. Channels of
activations that stand out are moved into the weights: found with calibration data or, for a model that looks tokens
up, with random tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.affine import INT8_NARROW, UINT8, Array
from calib.samples import Dataset
from converter import weight_quant
from converter.algorithms.matrices import view_of
from converter.algorithms.rounding import Grid, nearest, search_scales
from converter.algorithms.smoothing import factors_of, observe_channels
from converter.algorithms.stored_weights import Options as StoredOptions
from converter.algorithms.stored_weights import store_by_weights
from converter.algorithms.weights import Options, decide_weights, packed, products
from converter.calibrate import Wanted, observe
from converter.compare import TensorError, compare
from converter.config.keys import WeightQuantParam
from converter.data import open_data, resources_of, synthetic_data
from converter.emit.dynamic import emit_dynamic
from converter.emit.stored import planned
from converter.job import Job, Resources, Watch
from converter.layerwise import Walk
from converter.model import constant, saved
from converter.ops import OPS
from converter.plan import NodePlan, QuantizedWeight, QuantPlan, TensorPlan, WeightPlan
from converter.prepare.smooth import SmoothPass
from converter.targets import CPU

# Random samples that show which channels stand out, and the tokens in each.
RANDOM_SAMPLES, RANDOM_LENGTH = 32, 32
# Samples on which the tensors of both models are compared for the summary.
COMPARED_SAMPLES = 4


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """The plan without numbers."""
    common = replace(job.config.common, min_quant_weight_size=0, min_quant_weight_channel=0)
    config = replace(job.config, common=common, weight_quant=WeightQuantParam())
    plan = weight_quant.make_plan(model, replace(job, config=config))
    nodes, tensors = dict(plan.nodes), dict[str, TensorPlan]()
    values = {node.name: node for graph in model.graphs() for node in graph}
    for node, unit in planned(model, plan):
        if _is_product(node, unit):
            last = values[unit.absorbed[0]] if unit.absorbed else node
            nodes[unit.name] = _product_plan(node, unit, last, job.config.dynamic_quant.quant_strategy == "ALWC")
            x, why = unit.inputs[0], f"read by {unit.name}; its range is found at run time"
            tensors.setdefault(x, TensorPlan(x, UINT8, False, x, why))
    return QuantPlan(nodes, tensors)


def quantize(model: ir.Model, job: Job, watch: Watch) -> tuple[ir.Model, QuantPlan, list[TensorError]]:
    """The quantized copy of a prepared float model, the decisions, and what they cost each tensor, worst first."""
    resources = resources_of(job)
    data = open_data(model, job, watch) if job.config.preprocess.calibrate_path else None
    by_row = job.config.dynamic_quant.quant_strategy == "ACWL"
    quantized = model.clone()
    if not by_row:  # a row's own scale and a weight's only one leave nothing to gain
        _smooth(quantized, make_plan(quantized, job), data, resources, watch)
    plan = _with_weights(quantized, make_plan(quantized, job), watch)
    if data is not None:
        plan = _with_data(quantized, plan, data, resources, watch)
    emit_dynamic(quantized, plan, by_row)
    return quantized, plan, _errors(model, quantized, data, resources) if data else []


def _is_product(node: ir.Node, unit: NodePlan) -> bool:
    """Whether `node` multiplies rows with a constant matrix, so that runtimes have an integer kernel for it."""
    weight, rule = unit.weight, OPS.get(node.op_type)
    view = view_of(node, node.inputs[1].shape, 1) if node.op_type in {"MatMul", "Gemm"} and node.inputs[1].shape else None
    return bool(weight and weight.index == 1 and view and rule and rule.obstacle(node) is None)


def _product_plan(node: ir.Node, unit: NodePlan, last: ir.Node, per_channel: bool) -> NodePlan:
    """`unit` as an integer product; `last` is the Add behind it, or itself."""
    assert unit.weight is not None
    operands = last.inputs if last is not node else node.inputs[2:]
    return replace(
        unit,
        reason="integer product, activations quantized at run time",
        outputs=(last.outputs[0].name or "",),
        weight=WeightPlan(
            unit.weight.name, 1, INT8_NARROW, unit.weight.axis if per_channel else None, CPU.pair_limit
        ),
        bias=next((value.name for value in operands if constant(value) is not None), None),
    )


# --- outlier channels ------------------------------------------------------------------------------------------------


def _smooth(model: ir.Model, plan: QuantPlan, data: Dataset | None, resources: Resources, watch: Watch) -> None:
    readers = _readers(model.graph, plan)
    data = data or _random_tokens(model)
    if not readers or data is None:
        return
    try:
        channels = observe_channels(model, list(readers), data, resources.threads)
    except CalibError as error:
        watch.warn(f"Channels that stand out stay as they are, give calibrate_path: {error}")
        return
    factors = factors_of(channels, {name: _weights_behind(nodes) for name, nodes in readers.items()})
    watch.say(f"Channels that stand out in {len(factors)} of {len(readers)} tensors are moved into the weights.")
    SmoothPass(factors, readers)(model)


def _readers(graph: ir.Graph, plan: QuantPlan) -> dict[str, list[ir.Node]]:
    """By tensor the products that read it, where their weights are theirs alone."""
    readers: dict[str, list[ir.Node]] = {}
    for node in graph:
        unit = plan.nodes[node.name or ""]
        if unit.quantized and unit.weight and unit.weight.pair_limit:
            readers.setdefault(unit.inputs[0], []).append(node)
    return {name: nodes for name, nodes in readers.items() if all(len(n.inputs[1].uses()) == 1 for n in nodes)}


def _weights_behind(nodes: Sequence[ir.Node]) -> Array:
    """The weights of products that read one tensor, side by side: (channels, columns)."""
    matrices = [view_of(node, node.inputs[1].shape, 1).matrix(constant(node.inputs[1]))[0] for node in nodes]
    return np.concatenate(matrices).T.astype(np.float64)


def _random_tokens(model: ir.Model) -> Dataset | None:
    """Random samples for a model all of whose inputs are integers, None for another."""
    if all(value.dtype is not None and value.dtype.is_integer() for value in model.graph.inputs):
        return synthetic_data(model, RANDOM_SAMPLES, RANDOM_LENGTH)
    return None


# --- weights ---------------------------------------------------------------------------------------------------------


def _with_weights(model: ir.Model, plan: QuantPlan, watch: Watch) -> QuantPlan:
    """The plan with every weight fitted by itself."""
    integer = {name: unit for name, unit in plan.nodes.items() if unit.weight and unit.weight.pair_limit}
    others = {name: unit for name, unit in plan.nodes.items() if name not in integer}
    stored = store_by_weights(model, replace(plan, nodes=others), StoredOptions(), watch).stored
    fitted = {unit.name: _fitted(node, unit) for node, unit in planned(model, replace(plan, nodes=integer))}
    return replace(plan, stored=stored, weights=fitted)


def _fitted(node: ir.Node, unit: NodePlan) -> QuantizedWeight:
    wanted, weight = unit.weight, constant(node.inputs[1])
    view, grid = view_of(node, weight.shape, 1), Grid(wanted.format, wanted.pair_limit)
    matrix = view.matrix(weight.astype(np.float64))
    scale = search_scales(matrix, np.ones(matrix.shape[::2]), grid, wanted.axis is not None).astype(np.float32)
    return packed(view.weight(nearest(matrix / scale[..., None].astype(np.float64), grid)), scale, wanted)


def _with_data(model: ir.Model, plan: QuantPlan, data: Dataset, resources: Resources, watch: Watch) -> QuantPlan:
    """The plan with the main graph's products decided on what the layers before them hand on, and biases corrected."""
    main = {
        node.name or "": unit if unit.weight and unit.weight.pair_limit else replace(unit, quantized=False)
        for node in model.graph
        if (unit := plan.nodes[node.name or ""])
    }
    part = replace(plan, nodes=main, tensors={})
    wanted = Wanted((), products(model.graph, part), histogram=False, samples=False)
    means = observe(model, wanted, data, resources, watch).means
    decided = decide_weights(model, part, Walk(model, part, data, resources), means, Options(), watch)
    return plan.with_weights(decided.weights, decided.biases)


def _errors(model: ir.Model, quantized: ir.Model, data: Dataset, resources: Resources) -> list[TensorError]:
    pairs = {value.name or "": value.name or "" for value in model.graph.outputs}
    with saved(model, pairs) as reference, saved(quantized, pairs) as other:
        return compare(reference, other, pairs, data, COMPARED_SAMPLES, resources.threads)
