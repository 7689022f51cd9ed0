"""Two models that are there already, whoever made them, looked at as after a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import onnx_ir as ir

from calib import CalibError
from converter.calibrate.data import open_data, resources_of
from converter.errors import ModelError, QConvertError
from converter.graph import files as models
from converter.job import Job, Watch
from converter.measure.both import Both, paired
from converter.measure.results import Findings
from converter.measure.verify import verify
from converter.pipeline.behind import Behind
from converter.plan.plan import QuantPlan
from converter.plan.result import Quantized
from converter.prepare import make_plain, prepare
from converter.prepare.inputs import set_input_shapes
from converter.report.collect import check_folder, findings, write_reports

UNSEEN = "There is no look inside"


def compare(job: Job, watch: Watch) -> Findings:
    """What `job.output` is beside the float `job.model`; writes the reports where the config asks
    for them.

    Raises ModelError where the two do not take and give the same tensors.
    """
    resources, folder = resources_of(job), job.config.common.debug_info_save_path
    if folder:
        check_folder(folder, "--report")
    try:
        result = _opened(job, watch)
        sizes = models.file_bytes(job.model), models.file_bytes(job.output)
        samples = f"{len(result.data)} samples" if len(result.data) else "random samples"
        facts = {
            "Float model": job.model.name,
            "Quantized model": job.output.name,
            "Compared on": samples,
        }
        behind = Behind(watch, not len(result.data))
        inside = behind.attempt(UNSEEN, lambda: paired(result, inside=True))
        both = Both(result, inside or paired(result, inside=False), resources, watch)
        known = Findings(facts, sizes, verify(both, job.config.preprocess.label_file))
        look = partial(write_reports, folder, job.output.name) if folder else findings
        return (inside and behind.attempt(UNSEEN, lambda: look(both, known))) or known
    except CalibError as error:
        raise QConvertError(str(error)) from error


def _opened(job: Job, watch: Watch) -> Quantized:
    reference, other = (models.load(path) for path in (job.model, job.output))
    fed = [[v for v in m.graph.inputs if not v.is_initializer()] for m in (reference, other)]
    _check_same("inputs", job, *fed)
    _check_same("outputs", job, reference.graph.outputs, other.graph.outputs)
    for model in (reference, other):
        set_input_shapes(model, job.input_shapes)
        make_plain(model)
    data = open_data(reference, job, watch)
    plan = QuantPlan({}, {})
    like, settings = _like(reference, other), job.config
    return Quantized(
        like,
        other,
        plan,
        data,
        settings=settings,
        source=job.model,
        fitted=False,
    )


def _check_same(what: str, job: Job, before: Sequence[ir.Value], after: Sequence[ir.Value]) -> None:
    left, right = ({_described(v) for v in values} for values in (before, after))
    if left != right:
        ours, theirs = (", ".join(sorted(names)) for names in (left, right))
        msg = (
            f"{job.output} has the {what} {theirs} but {job.model} {ours}; compare models that "
            "take and give the same."
        )
        raise ModelError(msg)


def _described(value: ir.Value) -> str:
    return f"'{value.name}' ({value.dtype.numpy() if value.dtype else 'untyped'})"


def _like(reference: ir.Model, other: ir.Model) -> ir.Model:
    """The float model in normal form where the other was made from it: where it lacks the nodes
    that were folded.
    """
    names = {node.name for node in other.graph}
    before, folded = {node.name for node in reference.graph}, prepare(reference.clone())
    gone = before - {node.name for node in folded.graph}
    return reference if gone & names else folded
