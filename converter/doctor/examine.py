"""From a job to what its checks find."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from calib import CalibError
from calib.sources import channels_of
from converter.calibrate.data import image_options, open_data, resources_of, spec_of
from converter.doctor.checks import CHECKS, Check, Finding
from converter.doctor.evidence import Evidence, Pictures
from converter.doctor.preprocessing import given_way
from converter.graph import files as models
from converter.job import Job, Watch
from converter.prepare import make_plain
from converter.prepare.inputs import set_input_shapes

# Samples that the checks look at, those in a conversion, and those with labels to count there.
LOOKED_AT, IN_PASSING, COUNTED = 128, 32, 64


def examine(job: Job, watch: Watch, cheap: bool) -> list[tuple[Check, list[Finding]]]:
    """What each check finds in the job's model and data, or, `cheap`, each of a conversion's.

    Raises ModelError or DataError where they cannot be read.
    """
    labelled = job.config.preprocess.label_file is not None
    passing = COUNTED if labelled else IN_PASSING
    evidence = _gathered(job, watch, passing if cheap else LOOKED_AT)
    checks = [check for check in CHECKS if (check.in_conversion if cheap else check.in_doctor)]
    return [(check, _found(check, evidence)) for check in checks]


def _found(check: Check, evidence: Evidence) -> list[Finding]:
    try:
        return list(check.look(evidence))
    except CalibError as error:
        return [Finding(f"This cannot be checked: {error}")]


def findings(examined: Sequence[tuple[Check, list[Finding]]]) -> list[Finding]:
    """Everything that was found."""
    return [finding for _, found in examined for finding in found]


def _gathered(job: Job, watch: Watch, most: int) -> Evidence:
    model = models.load(job.model)
    set_input_shapes(model, job.input_shapes)
    make_plain(model)
    wanted = job.config.preprocess
    data = open_data(model, job, watch, spread=most)
    pictures = tuple(_pictures(model, job)) if wanted.input_type == "IMAGE" else ()
    return Evidence(job, model, data, pictures, resources_of(job).threads)


def _pictures(model: ir.Model, job: Job) -> list[Pictures]:
    wanted = job.config.preprocess
    options = image_options(wanted)
    folders, found = dict(wanted.calibrate_path), []
    for value in (v for v in model.graph.inputs if v.name in folders):
        spec = spec_of(value, job.input_format)
        axis, channels = channels_of(spec)
        found.append(Pictures(spec.name, axis, given_way(options, channels), spec.dtype))
    return found
