"""From a job's config to its calibration samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from calib import CalibError
from calib.affine import Array
from calib.images import ImageOptions
from calib.samples import Dataset, InputSpec, open_dataset, sources_of
from calib.scenes import scene
from calib.session import CPU_PROVIDERS
from calib.sources import layouts
from converter.calibrate.runs import opened
from converter.calibrate.states import Recurrent, first_states, growing_axes, states_of, streamed
from converter.config import DataPreprocessParam
from converter.errors import ConfigError, DataError, ModelError
from converter.graph.dimensions import contradicted, name_apart
from converter.graph.edit import constant
from converter.graph.files import default_inputs, fed_inputs
from converter.job import Job, Resources, Watch, processors
from converter.plan.ops import rule_of

# Dimensions of a batch of pictures, and the open sides of random ones.
IMAGE_AXES, SIDE = 4, 224
# State inputs that are named where all are spoken of.
NAMED = 4


def open_data(
    model: ir.Model,
    job: Job,
    watch: Watch,
    wanted: DataPreprocessParam | None = None,
    *,
    spread: int | None = None,
) -> Dataset:
    """The calibration samples as the config, or `wanted`, describes them, none without a path; of
    more than `spread` so many, at equal distances where they are no frames.

    Warns of unusable files, raises DataError.
    """
    wanted = wanted or job.config.preprocess
    if not wanted.calibrate_path:
        return Dataset((), (), ())
    folders, threads = dict(wanted.calibrate_path), resources_of(job).threads
    states, fixed, specs = _fed(model, job, wanted)
    size = wanted.calibrate_size or 1
    size = min(size, spread) if states and spread else size
    try:
        data = open_dataset(
            specs,
            folders,
            size,
            kind=wanted.input_type or "",
            image=image_options(wanted),
            workers=threads,
            fixed=fixed,
            spread=None if states else spread,
        )
        if states:
            frames, memory = len(data), resources_of(job).memory
            source = Recurrent(opened(model), states, memory)
            data = streamed(data, source, first_states(model, states))
            _tell_of_states(states, len(data), frames, watch)
    except CalibError as error:
        raise _at_fault(job, error) from error
    for warning in data.warnings:
        watch.warn(warning)
    unsaid = wanted.input_type == "IMAGE" and not wanted.image_to_format
    if unsaid and any(3 in spec.shape[1:] for spec in specs):
        watch.tell("image_to_format is not set: the channels are red, green and blue, RGB.")
    if names := contradicted(model, data):
        name_apart(model, names)
        watch.warn(
            f"A sample has several sizes for the dimension '{min(names)}' of the model's inputs: "
            "each of them gets a name of its own."
        )
    return data


def check_data(model: ir.Model, job: Job) -> None:
    """Raises DataError for names of inputs and folders that cannot be used; reads no file."""
    wanted = job.config.preprocess
    if not wanted.calibrate_path:
        return
    *_, specs = _fed(model, job, wanted)
    folders, kind = dict(wanted.calibrate_path), wanted.input_type or ""
    try:
        sources_of(specs, folders, kind, image_options(wanted))
    except CalibError as error:
        raise _at_fault(job, error) from error


def _fed(
    model: ir.Model, job: Job, wanted: DataPreprocessParam
) -> tuple[Mapping[str, str], dict[str, Array], list[InputSpec]]:
    """State inputs with their outputs, inputs that keep their own value, and what needs data."""
    folders, where = (
        dict(wanted.calibrate_path),
        job.config.at("data_preprocess_param", "state_inputs"),
    )
    states = states_of(model, wanted.state_inputs, folders, where)
    own = default_inputs(model)
    fixed = {name: x for name, x in own.items() if name not in (*folders, *states)}
    fed = [value for value in model.graph.inputs if value.name not in (*fixed, *states)]
    return states, fixed, [spec_of(value, job.input_format) for value in fed]


def _at_fault(job: Job, error: CalibError) -> DataError:
    return DataError(f"{job.config.path}: [data_preprocess_param] {error}")


def image_options(wanted: DataPreprocessParam) -> ImageOptions:
    """What the config wants of a picture."""
    return ImageOptions(
        **{option.name: getattr(wanted, option.name) for option in fields(ImageOptions)}
    )


def _tell_of_states(states: Mapping[str, str], kept: int, frames: int, watch: Watch) -> None:
    pairs = [f"{output} to {name}" for name, output in states.items()]
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    watch.tell(
        "Samples are consecutive frames, and states are fed on from each to the next: "
        f"{', '.join(pairs[:NAMED])}{more}."
    )
    if kept < frames:
        watch.warn(
            f"The states of {kept} of {frames} frames fill calibration_memory: those behind are "
            "left out."
        )


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


def token_data(model: ir.Model, count: int, length: int) -> Dataset:
    """`count` samples of `length` random tokens, caches empty; none for a model that takes more
    than integers and caches.
    """
    fed = fed_inputs(model)
    integers = all(v.dtype is not None and v.dtype.is_integer() for v in fed if not growing_axes(v))
    return synthetic_data(model, count, length) if fed and integers else Dataset((), (), ())


class RandomSamples(Dataset):
    """What stands in where there is no data."""

    random = True

    def part(self, start: int, end: int) -> Dataset:
        """Samples number `start` to `end`, random as well."""
        return RandomSamples((), self._chosen[start:end], ())


def synthetic_data(model: ir.Model, count: int = 8, length: int = 1) -> Dataset:
    """Random samples: numbers from -1 to 1, those of pictures like photographs, or 0 and 1 where
    integers are wanted, or rows of the table they index; masks are 1 and positions count up.

    A dynamic dimension becomes `length`, those of a picture SIDE where that is more than 1, the
    first one 1; caches are empty.
    """
    rng, fixed = np.random.default_rng(0), default_inputs(model)
    inputs = [(spec_of(value), value) for value in fed_inputs(model)]

    def sample() -> dict[str, Array]:
        found = dict(fixed)
        for spec, value in inputs:
            shape = _shape(spec, growing_axes(value), length)
            found[spec.name] = _random(spec, shape, _rows_indexed(value), rng).astype(spec.dtype)
        return found

    return RandomSamples(
        (),
        [(index, sample()) for index in range(count)],
        (),
    )


def _shape(spec: InputSpec, grows: Collection[int], length: int) -> list[int]:
    """The sizes of an input whose axes `grows` are empty."""
    open_size = SIDE if len(spec.shape) == IMAGE_AXES and length > 1 else length
    sizes = [size or (open_size if axis else 1) for axis, size in enumerate(spec.shape)]
    return [0 if axis in grows else size for axis, size in enumerate(sizes)]


def _random(
    spec: InputSpec, shape: Sequence[int], rows: int | None, rng: np.random.Generator
) -> Array:
    if spec.dtype.kind == "f":
        axes = _picture(spec)
        return _scenes(axes, shape, rng) if axes else rng.uniform(-1, 1, shape)
    if rows is None and "mask" in spec.name:
        return np.ones(shape)
    if rows is None and "position" in spec.name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape)
    return rng.integers(0, rows or 2, shape)


def _picture(spec: InputSpec) -> str | None:
    """The axes of an input that takes pictures of three colours."""
    fits = layouts(spec, (3,))
    return fits[0] if len(fits) == 1 else None


def _scenes(axes: str, shape: Sequence[int], rng: np.random.Generator) -> Array:
    """Pictures with pixels from -1 to 1."""
    count, height, width = (shape[axes.index(axis)] for axis in "NHW")
    pictures = np.stack([scene(rng, height, width) for _ in range(count)])
    return np.asarray(pictures.transpose(["NHWC".index(axis) for axis in axes]) / 127.5 - 1)


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
