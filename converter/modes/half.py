"""FLOAT16, for --fp16=on alone: the model computes in floats as before, its constants are stored in
half the bytes.
"""

from __future__ import annotations

import onnx_ir as ir

from converter.calibrate.data import open_data
from converter.job import Job, Watch
from converter.modes.floats import float_plan
from converter.plan.plan import QuantPlan
from converter.plan.result import Quantized


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """All nodes, float."""
    return float_plan(model, "--fp16=on without a quant_type")


def quantize(model: ir.Model, job: Job, watch: Watch) -> Quantized:
    """The model beside a copy, whose constants the pipeline stores as float16."""
    return Quantized(model, model.clone(), make_plan(model, job), open_data(model, job, watch))
