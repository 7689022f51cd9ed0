"""A node at which a gradient arrives, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import operand
from converter.learn.terms import NoGradientError, Scribe, Term


@dataclass(frozen=True)
class Site:
    """The node, and the gradients of its outputs: None where nothing depends on one."""

    node: ir.Node
    scribe: Scribe
    gradients: tuple[Term | None, ...]

    @property
    def dy(self) -> Term:
        """The gradient of the first output."""
        gradient = self.gradients[0]
        if gradient is None:
            msg = "its first output has none"
            raise NoGradientError(msg)
        return gradient

    @property
    def y(self) -> Term:
        """The first output."""
        return self.scribe.read(self.node.outputs[0])

    def x(self, index: int = 0) -> Term:
        """An input."""
        value = self.node.inputs[index]
        if value is None:
            msg = f"its input {index} is left out"
            raise NoGradientError(msg)
        return self.scribe.read(value)

    def has(self, index: int) -> bool:
        """Whether an input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def array(self, index: int) -> Array:
        """A constant input; raises NoGradientError for a computed one."""
        array = operand(self.node, index)
        if array is None:
            msg = f"its input {index} is computed at run time"
            raise NoGradientError(msg)
        return array

    def whole(self, name: str, default: int) -> int:
        """An attribute."""
        return self.node.attributes.get_int(name, default)

    def real(self, name: str, default: float) -> float:
        """An attribute."""
        return self.node.attributes.get_float(name, default)

    def text(self, name: str, default: str) -> str:
        """An attribute."""
        return self.node.attributes.get_string(name, default)

    def ints(self, name: str) -> tuple[int, ...] | None:
        """An attribute, None where it is not given."""
        found = self.node.attributes.get_ints(name)
        return None if found is None else tuple(found)


Partial = Callable[[Site], Term]
# The gradient of the input of a number.
Rule = Callable[[Site, int], Term]


def by_input(*partials: Partial) -> Rule:
    """A rule of one function for each input, from the first on; further inputs have none."""

    def rule(site: Site, index: int) -> Term:
        if index >= len(partials):
            msg = f"its input {index} has none"
            raise NoGradientError(msg)
        return partials[index](site)

    return rule


def factor(derivative: Partial) -> Rule:
    """The rule of a function of single numbers by its derivative."""
    return by_input(lambda site: site.dy * derivative(site))
