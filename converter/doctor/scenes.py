"""What a model's first BatchNorm says it was fed with, found without any data: with random pictures
that are like photographs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.samples import Dataset, InputSpec
from calib.scenes import scene
from calib.sources import channels_of, image_axes
from converter.config.keys import default_config
from converter.doctor.checks import fits
from converter.doctor.evidence import Evidence
from converter.doctor.preprocessing import CONVENTIONS, Change, Way
from converter.job import Job

SCENES, SIDE = 16, 224


def suited(model: ir.Model, spec: InputSpec) -> Way | None:
    """The one common way to scale pictures under which the first BatchNorms read what they did in
    training; None where none or several suit. What the order of channels is does not show.
    """
    try:
        axes, (axis, channels) = image_axes(spec), channels_of(spec)
    except CalibError:
        return None
    evidence = Evidence(
        _nothing_asked(),
        model,
        _scenes(spec, axes, channels),
        (),
        1,
    )
    if not evidence.norms or evidence.float_model is None:
        return None
    order = "RGB" if channels == 3 else "GRAY"
    raw, found = Way("", order, (0.0,) * channels, (1.0,) * channels), []
    for scaling in CONVENTIONS:
        if scaling.suits(channels):
            way = Way(
                scaling.title,
                order,
                scaling.mean[:channels],
                scaling.std[:channels],
            )
            fit = evidence.see({spec.name: Change(raw, way, axis)}, SCENES).fit
            found += [way] if fit is not None and fits(fit) else []
    return found[0] if len(found) == 1 else None


def _nothing_asked() -> Job:
    nowhere = Path()
    return Job(nowhere, nowhere, default_config())


def _scenes(spec: InputSpec, axes: str, channels: int) -> Dataset:
    """Pixels of 0..255 in the shape of an input."""
    rng, sides = np.random.default_rng(0), dict(zip(axes, spec.shape, strict=True))
    height, width = (sides[axis] or SIDE for axis in "HW")
    order = ["NHWC".index(axis) for axis in axes]
    samples = []
    for number in range(SCENES):
        picture = scene(rng, height, width)[:, :, :channels]
        batch = np.stack([picture] * spec.batch)
        shaped = batch.transpose(order) if "C" in axes else batch[..., 0]
        samples.append((number, {spec.name: np.ascontiguousarray(shaped, spec.dtype)}))
    return Dataset((), samples, ())
