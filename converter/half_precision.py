"""FLOAT16, for --fp16=on alone: the model computes in floats as before, its constants are stored in half the bytes."""

from __future__ import annotations

import onnx_ir as ir

from calib.samples import Dataset
from converter.data import open_data
from converter.emit.half import store_constants_as_half
from converter.job import Job, Watch
from converter.plan import NodePlan, QuantPlan
from converter.quantized import Quantized


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """All nodes, float."""
    reason = "--fp16=on without a quant_type"
    return QuantPlan({n.name or "": NodePlan(n.name or "", n.op_type, False, reason) for n in model.graph}, {})


def quantize(model: ir.Model, job: Job, watch: Watch) -> Quantized:
    """The model beside itself with float16 constants."""
    data = open_data(model, job, watch) if job.config.preprocess.calibrate_path else Dataset((), (), ())
    half = model.clone()
    store_constants_as_half(half)
    return Quantized(model, half, make_plan(model, job), data)
