"""What a mode makes of a prepared float model: the same from every mode, for whoever verifies, reports or saves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from calib.samples import Dataset
from converter.plan import QuantPlan


@dataclass(frozen=True)
class Quantized:
    """A quantized model beside the float one that it was made from.

    `data` are the calibration samples, none where the config names none. `tensors` maps float tensors inside
    `reference` to those of `model` that stand for them. `finish` gives `model` the input and output types of the job,
    after which the two no longer take the same samples.
    """

    reference: ir.Model
    model: ir.Model
    plan: QuantPlan
    data: Dataset
    tensors: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[], None] = lambda: None
