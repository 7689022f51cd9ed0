"""WEIGHT_QUANT: weights are stored in 1 to 16 bits each and are floats again when the model runs."""

from __future__ import annotations

import onnx_ir as ir

from calib.affine import IntFormat
from converter.algorithms.stored_weights import store_by_outputs, store_by_weights
from converter.compare import TensorError
from converter.data import open_data, resources_of
from converter.emit.planes import PlaneWriter, stored_bytes
from converter.emit.stored import emit_stored
from converter.job import Job, Watch
from converter.model import bias_add, constant
from converter.ops import OPS, weights_of
from converter.placement import Wishes, skipped
from converter.plan import NodePlan, QuantPlan, WeightPlan


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """The plan without numbers."""
    common = job.config.common
    nodes: dict[str, NodePlan] = {}
    for node in (node for graph in model.graphs() for node in graph):
        name = node.name or ""
        nodes.setdefault(name, _node_plan(node, job))
        for inner in nodes[name].absorbed:
            nodes[inner] = NodePlan(inner, "Add", False, f"computed inside {name}", inside=name)
    return QuantPlan(nodes, {})


def quantize(model: ir.Model, job: Job, watch: Watch) -> tuple[ir.Model, QuantPlan, list[TensorError]]:
    """The quantized copy of a prepared float model, the decisions, and what they cost each tensor, worst first."""
    plan = make_plan(model, job)
    if job.config.preprocess.calibrate_path:
        data = open_data(model, job, watch)
        plan = store_by_outputs(model, plan, data, resources_of(job), watch)
    else:
        plan = store_by_weights(model, plan, watch)
    quantized = model.clone()
    emit_stored(quantized, plan, PlaneWriter(quantized))
    return quantized, plan, []


def _node_plan(node: ir.Node, job: Job) -> NodePlan:
    common, name = job.config.common, node.name or ""
    wishes = Wishes(common.skip_quant_node, common.skip_quant_type)
    axes = weights_of(node)
    weights = {
        i: WeightPlan(node.inputs[i].name or "", i, IntFormat(common.bit_num or 8, False), axis)
        for i, axis in axes.items()
    }
    reason = skipped(node, wishes) or _obstacle(node, weights, job)
    if reason:
        return NodePlan(name, node.op_type, False, reason)
    add = bias_add(node)
    first, *further = weights.values()
    data = next((v.name or "" for i, v in enumerate(node.inputs) if v is not None and i not in weights), "")
    return NodePlan(
        name,
        node.op_type,
        True,
        f"weights in {common.bit_num} bits",
        inputs=(data,),
        absorbed=(add.name or "",) if add else (),
        weight=first,
        further=tuple(further),
    )


def _obstacle(node: ir.Node, weights, job: Job) -> str | None:
    common = job.config.common
    if not weights:
        return "no constant weight"
    for w in weights.values():
        array = constant(node.inputs[w.index])
        channels = array.shape[w.axis] if w.axis is not None else 1
        if array.size <= common.min_quant_weight_size:
            return f"not more than min_quant_weight_size = {common.min_quant_weight_size} weights"
        if node.op_type.startswith("Conv") and channels <= common.min_quant_weight_channel:
            return f"not more than min_quant_weight_channel = {common.min_quant_weight_channel} channels"
        if stored_bytes(array.size, channels, w.format.bits) >= array.nbytes:
            return f"in {w.format.bits} bits it would take no less space"
    return None
