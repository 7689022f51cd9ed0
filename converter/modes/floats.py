"""FLOAT32: the quantization that a model was trained with is taken away again."""

from __future__ import annotations

import onnx_ir as ir

from converter.calibrate.data import open_data
from converter.job import Job, Watch
from converter.plan.plan import NodePlan, QuantPlan
from converter.plan.result import Quantized
from converter.prepare.fake_quant import Prepared


def make_plan(prepared: Prepared, job: Job) -> QuantPlan:
    """All nodes that are left, float."""
    return float_plan(prepared.floats, "export_precision_mode = FLOAT32")


def float_plan(model: ir.Model, reason: str) -> QuantPlan:
    """All nodes, float."""
    return QuantPlan(
        {n.name or "": NodePlan(n.name or "", n.op_type, False, reason) for n in model.graph},
        {},
    )


def quantize(prepared: Prepared, job: Job, watch: Watch) -> Quantized:
    """The model without its quantization, beside itself as it was trained."""
    data = open_data(prepared.floats, job, watch)
    plan = make_plan(prepared, job)
    return Quantized(prepared.model, prepared.floats.clone(), plan, data, trained=True)
