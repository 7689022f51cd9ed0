"""One story a mode."""

from __future__ import annotations

from typing import Protocol

from converter.job import Job, Watch
from converter.modes import dynamic_quant, floats, full_quant, half, weight_quant
from converter.plan.plan import QuantPlan
from converter.plan.result import Quantized
from converter.prepare.fake_quant import Prepared


class Mode(Protocol):
    """What a quant_type makes of a prepared float model, which stays as it is; each is a module."""

    def make_plan(self, prepared: Prepared, job: Job) -> QuantPlan:
        """The plan without the numbers that data gives."""

    def quantize(self, prepared: Prepared, job: Job, watch: Watch) -> Quantized:
        """The quantized copy of the model, which itself does not change."""


MODES: dict[str, Mode] = {
    "FULL_QUANT": full_quant,
    "WEIGHT_QUANT": weight_quant,
    "DYNAMIC_QUANT": dynamic_quant,
    "FLOAT32": floats,
    "FLOAT16": half,
}
