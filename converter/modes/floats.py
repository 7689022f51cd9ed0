"""FLOAT32: the quantization that a model was trained with is taken away again."""

from __future__ import annotations

import onnx_ir as ir

from converter.calibrate.data import open_data
from converter.job import Job, Watch
from converter.plan.plan import NodePlan, QuantPlan
from converter.plan.result import Quantized
from converter.prepare.fake_quant import without_training


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """All nodes that are left, float; raises ModelError for a model without quantization."""
    return _untaught(model, job)[1]


def _untaught(model: ir.Model, job: Job) -> tuple[ir.Model, QuantPlan]:
    floats, _ = without_training(model, job, "convert a model that was, or keep this one")
    return floats, float_plan(floats, "export_precision_mode = FLOAT32")


def float_plan(model: ir.Model, reason: str) -> QuantPlan:
    """All nodes, float."""
    return QuantPlan(
        {n.name or "": NodePlan(n.name or "", n.op_type, False, reason) for n in model.graph}, {}
    )


def quantize(model: ir.Model, job: Job, watch: Watch) -> Quantized:
    """The model without its quantization, beside itself as it was trained."""
    floats, plan = _untaught(model, job)
    return Quantized(model, floats, plan, open_data(floats, job, watch), trained=True)
