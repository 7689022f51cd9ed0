"""From a job's config to its calibration samples."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from calib import CalibError
from calib.affine import Array
from calib.images import ImageOptions
from calib.samples import Dataset, InputSpec, open_dataset
from calib.session import CPU_PROVIDERS
from converter.config import DataPreprocessParam
from converter.errors import ConfigError, DataError, ModelError
from converter.graph.dimensions import contradicted, name_apart
from converter.graph.edit import constant
from converter.graph.files import default_inputs, fed_inputs
from converter.job import Job, Resources, Watch, processors
from converter.plan.ops import rule_of


def open_data(
    model: ir.Model, job: Job, watch: Watch, wanted: DataPreprocessParam | None = None
) -> Dataset:
    """The calibration samples as the config, or `wanted`, describes them, none without a path.

    Warns of unusable files, raises DataError.
    """
    wanted = wanted or job.config.preprocess
    if not wanted.calibrate_path:
        return Dataset((), (), ())
    image = ImageOptions(
        **{option.name: getattr(wanted, option.name) for option in fields(ImageOptions)}
    )
    folders, threads = dict(wanted.calibrate_path), resources_of(job).threads
    fixed = {name: x for name, x in default_inputs(model).items() if name not in folders}
    fed = [value for value in model.graph.inputs if value.name not in fixed]
    specs = [spec_of(value, job.input_format) for value in fed]
    try:
        data = open_dataset(
            specs,
            folders,
            wanted.calibrate_size or 1,
            kind=wanted.input_type or "",
            image=image,
            workers=threads,
            fixed=fixed,
        )
    except CalibError as error:
        msg = f"{job.config.path}: [data_preprocess_param] {error}"
        raise DataError(msg) from error
    for warning in data.warnings:
        watch.warn(warning)
    if names := contradicted(model, data):
        name_apart(model, names)
        watch.warn(
            f"A sample has several sizes for the dimension '{min(names)}' of the model's inputs: "
            "each of them gets a name of its own."
        )
    return data


def resources_of(job: Job) -> Resources:
    """What the job may use; raises ConfigError for an execution provider that ONNX Runtime does not
    have here.
    """
    common = job.config.common
    available = ort.get_available_providers()
    for name in common.providers:
        if name not in available:
            msg = (
                f"{job.config.at('common_quant_param', 'providers')} names {name}, which this "
                "ONNX Runtime does not "
                f"have; write one of {', '.join(available)}."
            )
            raise ConfigError(msg)
    threads = common.thread_num or processors()
    return Resources(threads, common.providers or CPU_PROVIDERS, common.calibration_memory << 20)


def synthetic_data(model: ir.Model, count: int = 8, length: int = 1) -> Dataset:
    """Random samples: numbers from -1 to 1, or 0 and 1 where integers are wanted, or rows of the
    table they index.

    A dynamic dimension becomes `length`, the first one 1.
    """
    rng, fixed = np.random.default_rng(0), default_inputs(model)
    specs = [(spec_of(value), _rows_indexed(value) or 2) for value in fed_inputs(model)]

    def sample() -> dict[str, Array]:
        fed = dict(fixed)
        for spec, rows in specs:
            shape = [size or (length if axis else 1) for axis, size in enumerate(spec.shape)]
            numbers = (
                rng.uniform(-1, 1, shape)
                if spec.dtype.kind == "f"
                else rng.integers(0, rows, shape)
            )
            fed[spec.name] = numbers.astype(spec.dtype)
        return fed

    return Dataset((), [(index, sample()) for index in range(count)], ())


def _rows_indexed(value: ir.Value) -> int | None:
    """The number of rows of the constant table in which `value` looks up."""
    tables = (
        constant(use.node.inputs[0])
        for use in value.uses()
        if rule_of(use.node).looks_up and use.idx == 1
    )
    return next((len(table) for table in tables if table is not None), None)


def spec_of(value: ir.Value, layout: str | None = None) -> InputSpec:
    """An input of a model as calibration sees it; raises ModelError where its shape is not
    known.
    """
    if value.dtype is None or value.shape is None:
        msg = (
            f"The model's input '{value.name}' has no type or number of dimensions; give "
            "--inputShape."
        )
        raise ModelError(msg)
    shape = tuple(d if isinstance(d, int) else None for d in value.shape)
    return InputSpec(
        value.name or "",
        value.dtype.numpy(),
        shape,
        layout if len(shape) == 4 else None,
    )
