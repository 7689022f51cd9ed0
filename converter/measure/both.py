"""A quantized model beside its float one, open for all who look inside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from converter.calibrate.runs import Opened, is_big, opened
from converter.job import Resources, Watch
from converter.measure.pairing import Pairing, pair
from converter.plan.result import Quantized


@dataclass(frozen=True)
class Both:
    """What a conversion made, and the models as they are without optimizations, each opened once:
    exact on this processor, and with every tensor that anybody asks for.

    `pairing` has all that can be compared, or no place where nobody wants more than the outputs and
    `result.tensors`.
    """

    result: Quantized
    pairing: Pairing
    resources: Resources
    watch: Watch

    @property
    def big(self) -> bool:
        """Whether it has so many weights that only what is needed should be found out."""
        return is_big(self.result.reference)

    @property
    def tensors(self) -> dict[str, str]:
        """The outputs, and tensors inside of both models, by their float names; none without
        data.
        """
        if not len(self.result.data):
            return {}
        outputs = {name: name for name in self.reference.outputs}
        return {**self.result.tensors, **outputs}

    @cached_property
    def reference(self) -> Opened:
        """The float model that outputs, and `result.tensors`, are held against."""
        if self.result.reference is self.pairing.reference:
            return self.floats
        return opened(self.result.reference, self.result.tensors)

    @cached_property
    def floats(self) -> Opened:
        """The float model whose tensors `pairing` has."""
        return opened(
            self.pairing.reference,
            [*self.result.tensors, *self.pairing.tensors],
        )

    @cached_property
    def quantized(self) -> Opened:
        """The quantized model, with floats for all its integers."""
        others = [place.counterpart for place in self.pairing.places if place.counterpart]
        return opened(
            self.pairing.model,
            [*self.result.tensors.values(), *others],
        )


def paired(result: Quantized, *, inside: bool) -> Pairing:
    """What can be compared `inside` both models, or nothing."""
    reference, other = result.compared or result.reference, result.model
    return pair(reference, other, result.plan) if inside else Pairing(reference, other, ())
