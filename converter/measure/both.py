"""A quantized model beside its float one, open for all who look inside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from converter.calibrate.runs import Opened, opened
from converter.graph.edit import weight_bytes
from converter.job import Resources, Watch
from converter.measure.pairing import Pairing, pair
from converter.plan.result import Quantized

# Models with more weights are compared on one sample and not timed, which would take longer than
# the conversion.
TIMED_BYTES = 500_000_000


@dataclass(frozen=True)
class Both:
    """What a conversion made, and the models as they are without optimizations, each opened once:
    exact on this processor, and with every tensor that anybody asks for.

    `inside` has all that can be compared, None where nobody wants more than the outputs and
    `result.tensors`.
    """

    result: Quantized
    inside: Pairing | None
    resources: Resources
    watch: Watch

    @property
    def pairing(self) -> Pairing:
        """`inside`, or one without places."""
        return self.inside or Pairing(_compared(self.result), self.result.model, ())

    @property
    def big(self) -> bool:
        """Whether it has so many weights that only what is needed should be found out."""
        return weight_bytes(self.result.reference) > TIMED_BYTES

    @cached_property
    def reference(self) -> Opened:
        """The float model that outputs, and `result.tensors`, are held against."""
        if self.result.reference is self.pairing.reference:
            return self.floats
        return opened(self.result.reference, self.result.tensors)

    @cached_property
    def floats(self) -> Opened:
        """The float model whose tensors `pairing` has."""
        return opened(self.pairing.reference, [*self.result.tensors, *self.pairing.tensors])

    @cached_property
    def quantized(self) -> Opened:
        """The quantized model, with floats for all its integers."""
        others = self.result.tensors.values()
        return opened(self.pairing.model, [*others, *self.pairing.counterparts])


def paired(result: Quantized) -> Pairing:
    """All places of both models."""
    return pair(_compared(result), result.model, result.plan)


def _compared(result: Quantized) -> ir.Model:
    return result.compared or result.reference
