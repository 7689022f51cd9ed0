"""DYNAMIC_QUANT: matrix products compute in integers, with activation ranges measured when the
model runs.

Rows of large tables are looked up as integers, those of a tied embedding in the codes of the
product that it shares its table with. The weights of all other operators are stored in 8 bits and
are floats again before use. Channels of activations that stand out are moved into the weights:
found with calibration data or, for a model that looks tokens up, with random tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.affine import INT8_NARROW, UINT8
from calib.samples import Dataset
from converter.calibrate.data import open_data, resources_of, token_data
from converter.calibrate.observe import Wanted, observe
from converter.calibrate.runs import is_big
from converter.calibrate.walk import Walk
from converter.emit.dynamic import emit_dynamic
from converter.graph.edit import not_none, operand
from converter.graph.mapped import release
from converter.job import Job, Resources, Watch
from converter.learn.own_data import with_distilled
from converter.modes import weight_quant
from converter.plan.matrices import ProductView
from converter.plan.ops import is_transposed, rule_of
from converter.plan.plan import (
    NodePlan,
    PerAxis,
    PerTensor,
    QuantizedWeight,
    QuantPlan,
    TensorPlan,
    WeightPlan,
)
from converter.plan.result import Quantized
from converter.plan.targets import PAIR_LIMIT
from converter.plan.units import bias_place, planned
from converter.prepare.fake_quant import Prepared
from converter.weights.gptq import Grid
from converter.weights.integer import Rounding, packed, rounded
from converter.weights.layers import decide_weights, products, store_by_weights
from converter.weights.long_rows import LEAST_COLUMNS, rounded_to_nearest
from converter.weights.smoothing import smooth
from converter.weights.stored import Storage

# Random samples that show which channels stand out, those of a big model, and the tokens in each.
RANDOM_SAMPLES, FEW_SAMPLES, RANDOM_LENGTH = 32, 4, 32
# A table of up to this many numbers is restored when the model is loaded: looking integers up saves
# memory, not time.
SMALL_TABLE = 1 << 18


def make_plan(prepared: Prepared, job: Job) -> QuantPlan:
    """The plan without numbers: integer products have a pair limit, weights that are only stored
    have none.
    """
    return _plan_of(prepared.model, job)


def _plan_of(model: ir.Model, job: Job) -> QuantPlan:
    plan = weight_quant.storage_plan(model, job)
    nodes, tensors = dict(plan.nodes), dict[str, TensorPlan]()
    for node, unit in planned(model, plan):
        if _multiplies(node):
            nodes[unit.name] = _product_plan(node, unit, per_channel=not _by_row(job))
            x = unit.inputs[0]
            why = f"read by {unit.name}; its range is found at run time"
            tensors.setdefault(x, TensorPlan(x, UINT8, False, x, why))
        elif unit.weight and _looks_up(node):
            nodes[unit.name] = replace(
                unit,
                weight=replace(unit.weight, format=INT8_NARROW, granularity=PerAxis(0)),
            )
    return QuantPlan(nodes, tensors)


def quantize(prepared: Prepared, job: Job, watch: Watch) -> Quantized:
    """The quantized copy of a prepared float model."""
    model = prepared.model
    resources = resources_of(job)
    data = open_data(model, job, watch)
    data = with_distilled(data, model, prepared.moments, job, watch=watch)
    quantized = model.clone()
    # Rows with scales of their own, before weights with one for all, gain little.
    if not _by_row(job):
        _smooth(quantized, _plan_of(quantized, job), data, resources=resources, watch=watch)
    plan = _by_themselves(quantized, _plan_of(quantized, job), watch)
    if len(data):
        plan = _by_outputs(quantized, plan, data, resources=resources, watch=watch)
    if not any(map(_is_integer, plan.units())):
        watch.warn(
            "Nothing of this model computes in integers: DYNAMIC_QUANT multiplies matrices, and it "
            "has none with constant weights; its weights are stored in 8 bits and it runs at float "
            "speed. FULL_QUANT computes convolutions in integers: write quant_type = FULL_QUANT."
        )
    smoothed = quantized.clone()
    emit_dynamic(quantized, _tied(quantized, plan), _by_row(job))
    return Quantized(model, quantized, plan, data, compared=smoothed)


def _by_row(job: Job) -> bool:
    return job.config.dynamic_quant.quant_strategy == "ACWL"


def _multiplies(node: ir.Node) -> bool:
    """Whether `node` multiplies rows with a constant matrix, so that runtimes have an integer
    kernel for it.
    """
    if not rule_of(node).product or rule_of(node).obstacle(node):
        return False
    weight = operand(node, 1)
    return weight is not None and weight.ndim == 2


def _looks_up(node: ir.Node) -> bool:
    """Whether `node` picks rows of a table that is large or read by others too."""
    by_row = rule_of(node).looks_up and node.attributes.get_int("axis", 0) == 0
    table = operand(node, 0) if by_row else None
    if table is None or table.ndim != 2:
        return False
    return table.size > SMALL_TABLE or len(not_none(node.inputs[0]).uses()) > 1


def _product_plan(node: ir.Node, unit: NodePlan, per_channel: bool) -> NodePlan:
    weight, (last, index) = not_none(unit.weight), bias_place(node, unit)
    bias = last.inputs[index] if operand(last, index) is not None else None
    granularity = weight.granularity if per_channel else PerTensor()
    return replace(
        unit,
        reason="integer product, activations quantized at run time",
        outputs=(last.outputs[0].name or "",),
        weight=WeightPlan(weight.name, 1, INT8_NARROW, granularity, PAIR_LIMIT),
        bias=bias.name if bias else None,
    )


def _is_integer(unit: NodePlan) -> bool:
    """Whether it multiplies integers."""
    return unit.weight is not None and unit.weight.pair_limit is not None


def _keeps_codes(unit: NodePlan) -> bool:
    """Whether it reads its weight as integers, which are signed then."""
    return unit.weight is not None and unit.weight.format.signed


# --- outlier channels


def _smooth(
    model: ir.Model, plan: QuantPlan, data: Dataset, *, resources: Resources, watch: Watch
) -> None:
    """Moves the channels that stand out in the main graph's activations into the weights, in
    place.
    """
    hint = "" if len(data) else "; give calibrate_path"
    count = FEW_SAMPLES if is_big(model) else RANDOM_SAMPLES
    data = data if len(data) else token_data(model, count, RANDOM_LENGTH)
    products = [unit for node in model.graph if _is_integer(unit := plan.nodes[node.name or ""])]
    try:
        smooth(
            model,
            products if len(data) else (),
            data,
            threads=resources.threads,
            watch=watch,
        )
    except CalibError as error:
        watch.warn(f"Channels that stand out stay, as the model cannot be probed{hint}: {error}")


# --- weights


def _by_themselves(model: ir.Model, plan: QuantPlan, watch: Watch) -> QuantPlan:
    """The plan with every weight fitted by itself."""
    others = {name: unit for name, unit in plan.nodes.items() if not _keeps_codes(unit)}
    stored = store_by_weights(model, replace(plan, nodes=others), Storage(), watch=watch).stored
    fitted = {
        unit.name: _fitted(node, not_none(unit.weight))
        for node, unit in planned(model, plan)
        if _keeps_codes(unit)
    }
    return replace(plan, stored=stored, weights=fitted)


def _fitted(node: ir.Node, wanted: WeightPlan) -> QuantizedWeight:
    view = ProductView(rule_of(node).looks_up or is_transposed(node))
    matrix = view.matrix(not_none(operand(node, wanted.index)))
    release([not_none(node.inputs[wanted.index])])
    if wanted.axis is not None and matrix.shape[2] >= LEAST_COLUMNS:
        codes, scale = rounded_to_nearest(matrix, Grid(wanted.format, wanted.pair_limit))
        return packed(view.weight(codes), scale, wanted)
    matrix = matrix.astype(np.float64)
    codes, scale = rounded(
        matrix, None, wanted, least=np.zeros(matrix.shape[:2]), rounding=Rounding()
    )
    return packed(view.weight(codes), scale, wanted)


def _by_outputs(
    model: ir.Model, plan: QuantPlan, data: Dataset, *, resources: Resources, watch: Watch
) -> QuantPlan:
    """The plan with the main graph's products decided on what the layers before them hand on, and
    biases corrected.
    """
    units = [plan.nodes[node.name or ""] for node in model.graph]
    nodes = {
        unit.name: unit if _is_integer(unit) else replace(unit, quantized=False) for unit in units
    }
    part = replace(plan, nodes=nodes, tensors={}, weights={})
    # A sentence has few rows: all samples take part.
    walk = Walk(model, part, data, resources, most=len(data))
    wanted = Wanted(
        (),
        products(model.graph, part),
        histogram=False,
        samples=False,
        first=walk.count,
    )
    means = observe(model, wanted, data, resources=resources, watch=watch).means
    decided = decide_weights(
        model,
        part,
        walk,
        means=means,
        rounding=Rounding(),
        watch=watch,
    )
    return plan.with_weights(decided.weights, decided.biases)


def _tied(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """The plan with tables that a product multiplies with as well in that product's codes."""
    pairs = [(node, unit) for node, unit in planned(model, plan) if unit.weight]
    shared = {node.inputs[1]: plan.weights[unit.name] for node, unit in pairs if _is_integer(unit)}
    tables = {
        unit.name: node.inputs[0]
        for node, unit in pairs
        if unit.name in plan.weights and not _is_integer(unit)
    }
    return plan.with_weights(
        {name: shared[table] for name, table in tables.items() if table in shared}, {}
    )
