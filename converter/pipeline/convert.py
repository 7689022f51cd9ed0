"""The whole story of a conversion on one screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from calib import CalibError
from converter.calibrate.data import check_data, resources_of
from converter.config.keys import QUANT_TYPES
from converter.doctor.examine import examine, findings
from converter.emit.finish import finish
from converter.errors import ConfigError, ModelError, QConvertError
from converter.graph import files as models
from converter.graph.dimensions import name_apart
from converter.graph.edit import constant, initializers_of, nodes_of, values_by_name
from converter.graph.files import accepting
from converter.graph.mapped import release
from converter.graph.qdq import is_conversion
from converter.job import Job, Watch
from converter.measure.both import Both, paired
from converter.measure.errors import (
    TensorError,
    first_change,
    independent_names,
    largest_difference,
)
from converter.measure.labels import label_table
from converter.measure.results import Findings, Outcome
from converter.measure.verify import tensor_errors, verify
from converter.modes import MODES, full_quant
from converter.pipeline.behind import Behind
from converter.plan.ops import computes_on_integers, draws, may_have_weight
from converter.plan.payoff import stays_float
from converter.plan.placement import check_skips
from converter.plan.plan import QuantPlan
from converter.plan.recipes import check_recipes
from converter.plan.requests import check_target, wants_wide
from converter.plan.result import Quantized
from converter.plan.targets import WIDE_OPSET
from converter.prepare import make_plain, normal_form
from converter.prepare.fake_quant import Prepared, without_training
from converter.prepare.inputs import check_shapes, set_input_shapes
from converter.prepare.opset import (
    LEAST_OPSET,
    newest_opset,
    opset_of,
    raise_opset,
    runtime_knows,
)
from converter.report.advice import listed
from converter.report.collect import check_folder, write_reports
from converter.report.provenance import provenance
from converter.report.recipe import how_made, write_recipe
from converter.report.text import summary_lines

INTEGER_ACTIVATIONS = {"FULL_QUANT", "DYNAMIC_QUANT"}
UNREPORTED = "There are no reports"
# Float32 outputs may differ in their last bits after an opset conversion.
RAISED_TOLERANCE = 1e-4


def convert(job: Job, watch: Watch | None = None) -> Outcome:
    """Runs one job; raises QConvertError for anything that is the input's fault.

    What comes behind the finished file, measuring and reporting, never loses it.
    """
    with models.weights_written_once():
        outcome = _converted(job, watch or Watch())
    return replace(outcome, summary="\n".join(summary_lines(outcome, job.output)))


def _converted(job: Job, watch: Watch) -> Outcome:
    prepared = read(job, watch)
    before = models.file_bytes(job.model)
    if job.config.preprocess.calibrate_path:
        _tell_of_mistakes(job, watch)
    try:
        result = MODES[job.mode].quantize(prepared, job, watch)
        result = replace(result, settings=job.config, source=job.model)
        _tell_of_floats(finish(result.model, provenance(job, result.data), half=job.fp16), watch)
        unfinished = replace(result, model=result.model.clone())
        result.finish()
        _check_numbers(prepared.model, result.model)
        models.save(result.model, job.output, accepting(job.model, watch))
    except CalibError as error:
        raise QConvertError(str(error)) from error
    return _measured(job, unfinished, (before, models.file_bytes(job.output)), watch)


def _tell_of_mistakes(job: Job, watch: Watch) -> None:
    """Warns where the model is not fed as it was trained."""
    try:
        found = findings(examine(job, Watch(), cheap=True))
    except QConvertError:
        raise
    except Exception as error:  # checks must not stop a conversion that works
        watch.warn(f"Whether the model is fed as it was trained is not checked: {error!r}")
        return
    for finding in found:
        watch.warn(str(finding))


def _name_apart(model: ir.Model, watch: Watch) -> None:
    """Lets dimensions have names of their own where the model works whether they are equal or not,
    as the quantized one has to.
    """
    for name in sorted(independent_names(model)):
        name_apart(model, [name])
        watch.say(f"Dimension '{name}' of several inputs need not be one size: named apart.")


def _tell_of_floats(kept: Sequence[str], watch: Watch) -> None:
    if kept:
        watch.warn(
            f"{len(kept)} constant(s) stay float32, the first '{kept[0]}': float16 would lose "
            "numbers that large or small."
        )


def _check_numbers(before: ir.Model, after: ir.Model) -> None:
    """Raises ModelError for a constant that is no finite number where the float model has none."""
    spoilt = list(_not_finite(after))
    if spoilt and not list(_not_finite(before)):
        msg = (
            f"The converted model is not written: its constant '{spoilt[0]}' holds NaN or infinite "
            "values; look for such values in the calibration data."
        )
        raise ModelError(msg)


def _not_finite(model: ir.Model) -> Iterator[str]:
    for value in initializers_of(model):
        array = constant(value)
        if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
            yield value.name or ""


def _measured(job: Job, result: Quantized, sizes: tuple[int, int], watch: Watch) -> Outcome:
    """What is found out about a conversion whose file is written."""
    kept = f"Interrupted; {job.output} is written, but what comes behind it is not done."
    behind = Behind(watch, result.data.random or not len(result.data), kept)
    folder = job.config.common.debug_info_save_path
    behind.attempt("It is not said what was changed", lambda: _tell(job, result, sizes, watch))
    if recipe := job.config.common.export_recipe:
        behind.attempt("The recipe is not written", lambda: write_recipe(recipe, result))
    inside = behind.attempt(UNREPORTED, lambda: paired(result, inside=bool(folder)))
    both = Both(
        result,
        inside or paired(result, inside=False),
        resources_of(job),
        watch,
    )
    labels, verification = job.config.preprocess.label_file, None
    if job.verify:
        verification = behind.attempt("The result is not verified", lambda: verify(both, labels))
    why = behind.reason if job.verify else "--verify=off"
    errors: Sequence[TensorError] = ()
    if folder and inside:

        def report() -> Findings:
            facts = {**_facts(job, result), **provenance(job, result.data)}
            known = Findings(facts, sizes, verification, recipe=how_made(job, result))
            return write_reports(folder, job.output.name, both, known)

        reported = behind.attempt(UNREPORTED, report)
        errors = reported.errors if reported else ()
    if verification and not errors:
        compared = behind.attempt(
            "The tensors inside are not compared", lambda: tensor_errors(both)
        )
        errors = compared or ()
    # One output has one figure: that of the verification.
    outputs = {value.name for value in result.reference.graph.outputs}
    inside_errors = (e for e in errors if verification and e.name not in outputs)
    ranked = sorted(inside_errors, key=lambda error: error.sqnr_db)
    return Outcome(result.plan, *sizes, tuple(ranked), verification, why)


def _facts(job: Job, result: Quantized) -> dict[str, str]:
    """What was done, in words."""
    nodes = result.plan.outside
    return {
        "Float model": job.model.name,
        "Calibration": f"{len(result.data)} {result.data.kind}" if len(result.data) else "no data",
        "Quantized": f"{sum(not stays_float(node) for node in nodes)} of {len(nodes)} nodes",
    }


def _tell(job: Job, result: Quantized, sizes: tuple[int, int], watch: Watch) -> None:
    _tell_of_integers(result, watch)
    if job.mode != "FLOAT32":  # whose purpose is another
        _tell_of_nothing(job, result, sizes, watch)


def _tell_of_integers(result: Quantized, watch: Watch) -> None:
    """Warns of a model that was quantized before, but for conversions that were taken over."""
    nodes = filter(computes_on_integers, nodes_of(result.reference))
    if integer := [node for node in nodes if not (result.trained and is_conversion(node))]:
        watch.warn(
            f"The model is quantized already: {len(integer)} node(s) such as '{integer[0].name}' "
            f"({integer[0].op_type}) stay as they are; start from the float model for the least "
            "loss."
        )


def _tell_of_nothing(job: Job, result: Quantized, sizes: tuple[int, int], watch: Watch) -> None:
    """Warns of a conversion that changes nothing, or makes the file no smaller."""
    before, after = sizes
    nodes = result.plan.outside
    if job.mode in QUANT_TYPES and not any(node.quantized for node in nodes):
        heavy = [node for node in nodes if may_have_weight(node.op_type)] or nodes
        reasons = Counter(node.reason for node in heavy).most_common(1)
        why = "".join(f", as {reason} ({count} of {len(nodes)})" for reason, count in reasons)
        watch.warn(
            f"No node could be quantized{why}: the output is the float model in another form."
        )
        return
    if after >= before:
        watch.warn(
            f"The result is no smaller than the float model ({after} bytes, {before} before): "
            "weights in fewer bits save less here than their scales and names take."
        )


def calibrate(job: Job, watch: Watch) -> None:
    """Does `job.part` of a FULL_QUANT job's calibration, for several processes to share one."""
    try:
        full_quant.calibrate(read(job, watch), job, watch)
    except CalibError as error:
        raise QConvertError(str(error)) from error


def _opset(job: Job, model: ir.Model) -> int:
    """The opset that the job asks for, or the oldest that has what it does; raises ConfigError
    where that goes beyond the one asked for.
    """
    least = WIDE_OPSET if wants_wide(job.config) else LEAST_OPSET
    asked, newest = job.config.common.opset, newest_opset()
    if asked is None:
        return least
    where = f"{job.config.at('common_quant_param', 'opset')} = {asked}"
    if asked < least:
        msg = f"{where}: activations of 16 bits need opset {least}; write opset = {least} or more."
        raise ConfigError(msg)
    if asked < (own := opset_of(model)):
        msg = f"{where}: the model itself has opset {own}; write opset = {own} or more, or none."
        raise ConfigError(msg)
    if asked > newest:
        msg = f"{where}: the newest opset known here is {newest}; write opset = {newest} or less."
        raise ConfigError(msg)
    if not runtime_knows(asked):
        what = f"the installed ONNX Runtime has no integers of opset {asked}"
        msg = f"{where}: {what}; write a lower one."
        raise ConfigError(msg)
    return asked


def make_plan(job: Job, watch: Watch) -> QuantPlan:
    """The decisions a conversion would make before it looks at any data; runs nothing."""
    prepared = read(job, watch)
    check_data(prepared.model, job)
    return MODES[job.mode].make_plan(prepared, job)


def read(job: Job, watch: Watch) -> Prepared:
    """The job's model in normal form; nothing changes it from here on."""
    if folder := job.config.common.debug_info_save_path:
        check_folder(folder, job.config.at("common_quant_param", "debug_info_save_path"))
    if labels := job.config.preprocess.label_file:
        label_table(labels)  # what is wrong with it should not be told after the work
    for warning in job.config.warnings:
        watch.warn(warning)
    check_target(job.config)
    model = models.load(job.model, job.output)
    set_input_shapes(model, job.input_shapes)
    _tell_of_inputs(model, job, watch)
    nodes = _nodes(model)
    make_plain(model)  # first, as ONNX's converter forgets functions
    raised = raise_opset(model, _opset(job, model))
    if raised is not model:
        _check_raised(model, raised, watch)
    moments = normal_form(raised)
    release(initializers_of(raised))
    check_shapes(raised)
    nodes |= _nodes(raised)
    check_skips(job.config, nodes)
    check_recipes(job.config, nodes, values_by_name(raised.graph).keys())
    if job.mode in INTEGER_ACTIVATIONS:
        _name_apart(raised, watch)
    prepared = without_training(raised, job, moments)
    _require_training(prepared, job)
    return prepared


def _require_training(prepared: Prepared, job: Job) -> None:
    """Raises ModelError for a model without quantization where only that could be used."""
    advice = {"FLOAT32": "convert a model that was, or keep this one"}
    if not job.config.has_samples:
        advice["FULL_QUANT"] = "give it calibrate_path, or input_type = SYNTHETIC, to quantize it"
    if job.mode in advice and not prepared.trained:
        where = job.config.at("transform_quant_param", "export_precision_mode")
        msg = f"{where}: {job.model} was not trained with quantization; {advice[job.mode]}."
        raise ModelError(msg)


def _tell_of_inputs(model: ir.Model, job: Job, watch: Watch) -> None:
    """Says what becomes of inputs that have a value where none is fed."""
    constants = [value for value in model.graph.inputs if value.is_initializer()]
    if constants and model.ir_version >= models.INITIALIZERS_ALONE:
        watch.tell(
            f"Every initializer ({len(constants)}) is listed as an input, as old exporters do: "
            "they are taken as constants, and are no inputs of the result."
        )
    unfed = models.default_inputs(model).keys() - dict(job.config.preprocess.calibrate_path).keys()
    if unfed and job.mode == "FULL_QUANT":
        watch.tell(
            f"Inputs with a default value stay: {listed(sorted(unfed))}. Ranges are found with the "
            "default; name them in calibrate_path to calibrate with other values."
        )


def _nodes(model: ir.Model) -> set[tuple[str, str]]:
    """Name and operator type of every node, subgraphs included."""
    return {(node.name or "", node.op_type) for node in nodes_of(model)}


def _check_raised(model: ir.Model, raised: ir.Model, watch: Watch) -> None:
    """Raises ModelError where a conversion to a newer opset changed what the model computes."""
    change = f"Opset {opset_of(model)} converted to {opset_of(raised)}"
    if any(draws(node) for node in model.graph.all_nodes()):
        watch.say(f"{change}, unchecked, as the model draws random numbers.")
        return
    try:
        difference = largest_difference(model, raised)
    except (CalibError, ModelError) as error:
        watch.warn(f"{change}, unchecked: {error}")
        return
    if not difference <= RAISED_TOLERANCE:
        msg = (
            f"{change}, which changes the outputs by {difference:.2g} of their largest value"
            f"{_first_at(model, raised)}; export the model anew."
        )
        raise ModelError(msg)
    watch.say(f"{change}; the outputs differ by {difference:.1e} of their largest value.")


def _first_at(model: ir.Model, raised: ir.Model) -> str:
    """Where a conversion changed something first, in words."""
    try:
        node = first_change(model, raised, RAISED_TOLERANCE)
    except CalibError:  # not every tensor can be looked at
        return ""
    return f", first at '{node.name}' ({node.op_type})" if node else ""
