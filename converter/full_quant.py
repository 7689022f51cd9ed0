"""FULL_QUANT: weights and activations become integers, with ranges from calibration data."""

from __future__ import annotations

import onnx_ir as ir

from calib.affine import UINT8
from calib.ranges import RANGE_METHODS, RangeSpec
from calib.samples import Dataset
from converter.algorithms.weights import Options, decide_weights, products
from converter.cache import observe_with_cache
from converter.calibrate import Wanted, activation_qparams
from converter.compare import TensorError, compare
from converter.data import open_data, resources_of
from converter.emit.qdq import emit
from converter.job import Job, Watch
from converter.layerwise import Walk
from converter.model import saved
from converter.placement import Wishes, build_plan
from converter.plan import QuantPlan
from converter.targets import TARGETS

# Samples on which the tensors of both models are compared for the summary.
COMPARED_SAMPLES = 4


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """The plan without numbers."""
    common, full = job.config.common, job.config.full_quant
    wishes = Wishes(common.skip_quant_node, common.skip_quant_type, full.per_channel)
    return build_plan(model.graph, TARGETS[full.target_device or "CPU"], wishes)


def quantize(model: ir.Model, job: Job, watch: Watch) -> tuple[ir.Model, QuantPlan, list[TensorError]]:
    """The quantized copy of a prepared float model, the decisions, and what they cost each tensor, worst first."""
    plan = make_plan(model, job)
    data, resources, full = open_data(model, job, watch), resources_of(job), job.config.full_quant
    method = RANGE_METHODS[full.activation_quant_method]
    means = products(model.graph, plan) if full.bias_correction else {}
    wanted = Wanted(tuple(plan.groups()), means, method.needs_histogram, method.needs_samples)
    evidence = observe_with_cache(model, wanted, data, resources, watch, job.config.common.calibration_cache)
    spec = RangeSpec(UINT8, symmetric=False, outlier_ratio=full.outlier_ratio)
    plan = plan.with_qparams(activation_qparams(plan, evidence.statistics, method, spec))
    walk = Walk(model, plan, data, resources)
    watch.say(f"Weights are decided on {walk.count} of {len(data)} samples.")
    plan = decide_weights(model, plan, walk, evidence.means, Options(), watch)
    quantized = model.clone()
    restored = emit(quantized, plan)
    return quantized, plan, _errors(model, quantized, plan, restored, data, resources.threads)


def _errors(
    model: ir.Model, quantized: ir.Model, plan: QuantPlan, restored: dict[str, str], data: Dataset, workers: int
) -> list[TensorError]:
    outputs = {value.name or "": value.name or "" for value in model.graph.outputs}
    computed = {name: restored[name] for unit in plan.units() for name in unit.outputs if name in restored}
    pairs = {**computed, **outputs}
    with saved(model, pairs) as reference, saved(quantized, pairs.values()) as other:
        found = compare(reference, other, pairs, data, COMPARED_SAMPLES, workers)
    return sorted(found, key=lambda error: error.sqnr_db)
