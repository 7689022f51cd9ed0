"""FLOAT16, for --fp16=on alone: the model computes in floats as before, its constants are stored in
half the bytes.
"""

from __future__ import annotations

from converter.calibrate.data import open_data
from converter.job import Job, Watch
from converter.modes.floats import float_plan
from converter.plan.plan import QuantPlan
from converter.plan.result import Quantized
from converter.prepare.fake_quant import Prepared


def make_plan(prepared: Prepared, job: Job) -> QuantPlan:
    """All nodes, float."""
    return float_plan(prepared.model, "--fp16=on without a quant_type")


def quantize(prepared: Prepared, job: Job, watch: Watch) -> Quantized:
    """The model beside a copy, whose constants the pipeline stores as float16."""
    model = prepared.model
    plan, data = make_plan(prepared, job), open_data(model, job, watch)
    return Quantized(model, model.clone(), plan, data)
