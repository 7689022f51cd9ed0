"""The whole story of a conversion on one screen."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from calib import CalibError
from converter import dynamic_quant, full_quant, weight_quant
from converter import model as models
from converter.compare import TensorError, largest_difference
from converter.config import Config
from converter.data import resources_of
from converter.emit.half import store_constants_as_half
from converter.errors import ConfigError, ModelError, QConvertError, UsageError
from converter.job import Job, Silent, Watch
from converter.placement import check_skips
from converter.plan import QuantPlan
from converter.prepare import prepare
from converter.prepare.inputs import set_input_shapes
from converter.prepare.opset import opset_of, raise_opset
from converter.verify import verify

MODES = {"FULL_QUANT": full_quant, "WEIGHT_QUANT": weight_quant, "DYNAMIC_QUANT": dynamic_quant}
# Float32 outputs may differ in their last bits after an opset conversion.
RAISED_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outcome:
    """What a conversion did: the decisions, the sizes in bytes and the tensors' errors, worst first."""

    plan: QuantPlan
    size_before: int
    size_after: int
    errors: tuple[TensorError, ...]


def convert(job: Job, watch: Watch | None = None) -> Outcome:
    """Runs one job; raises QConvertError for anything that is the input's fault."""
    watch = watch or Silent()
    model = read(job, watch)
    try:
        result = MODES[job.config.common.quant_type].quantize(model, job, watch)
        errors = verify(result, resources_of(job), watch)
        result.finish()
    except CalibError as error:
        raise QConvertError(str(error)) from error
    if job.fp16:
        store_constants_as_half(result.model)
    models.save(result.model, job.output)
    return Outcome(result.plan, models.file_bytes(job.model), models.file_bytes(job.output), errors)


def make_plan(job: Job, watch: Watch) -> QuantPlan:
    """The decisions a conversion would make before it looks at any data; runs nothing."""
    plan: QuantPlan = MODES[job.config.common.quant_type].make_plan(read(job, watch), job)
    return plan


def read(job: Job, watch: Watch) -> ir.Model:
    """The job's model in normal form."""
    _check_built(job.config)
    if job.output.resolve() == job.model.resolve():
        msg = f"--outputFile {job.output} is the float model itself; give another name."
        raise UsageError(msg)
    for warning in job.config.warnings:
        watch.warn(warning)
    model = models.load(job.model)
    set_input_shapes(model, job.input_shapes)
    raised = raise_opset(model)
    if raised is not model:
        _check_raised(model, raised, watch)
    nodes = _nodes(model)
    prepared = prepare(raised)
    check_skips(job.config, nodes | _nodes(prepared))
    return prepared


def _nodes(model: ir.Model) -> set[tuple[str, str]]:
    """Name and operator type of every node, subgraphs included."""
    return {(node.name or "", node.op_type) for graph in model.graphs() for node in graph}


def _check_raised(model: ir.Model, raised: ir.Model, watch: Watch) -> None:
    """Raises ModelError where a conversion to a newer opset changed what the model computes."""
    change = f"Opset {opset_of(model)} converted to {opset_of(raised)}"
    try:
        difference = largest_difference(model, raised)
    except CalibError as error:
        watch.warn(f"{change}, unchecked: {error}")
        return
    if not difference <= RAISED_TOLERANCE:
        msg = f"{change}, which changes the outputs by {difference:.2g} of their largest value; export the model anew."
        raise ModelError(msg)
    watch.say(f"{change}; the outputs differ by {difference:.1e} of their largest value.")


def _check_built(config: Config) -> None:
    """Raises ConfigError for what a config may ask for but the program cannot do yet."""
    if config.common.debug_info_save_path:
        where = config.at("common_quant_param", "debug_info_save_path")
        msg = f"{where}: the debug reports are not built yet; remove the line."
        raise ConfigError(msg)
