"""Operators with scalars, as lines over what they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converter.graph.edit import constant


@dataclass(frozen=True)
class Line:
    """The function clip(factor * x + shift, low, high)."""

    factor: float = 1.0
    shift: float = 0.0
    low: float = -np.inf
    high: float = np.inf

    def then(self, other: Line) -> Line:
        """`other` of this; factors are positive."""
        low, high = (other.factor * bound + other.shift for bound in (self.low, self.high))
        shift = other.factor * self.shift + other.shift
        return Line(
            other.factor * self.factor,
            shift,
            max(low, other.low),
            min(high, other.high),
        )


# By operator, what a constant operand makes of it.
_LINES: dict[str, Callable[..., Line]] = {
    "Add": lambda c: Line(shift=c),
    "Sub": lambda c: Line(shift=-c),
    "Mul": lambda c: Line(c),
    "Div": lambda c: Line(1 / c if c else 0.0),
    "Max": lambda c: Line(low=c),
    "Min": lambda c: Line(high=c),
    "Clip": lambda low=-np.inf, high=np.inf: Line(low=low, high=high),
}


def step(node: ir.Node) -> tuple[ir.Value, Line] | None:
    """The one value that `node` reads and what it makes of it by scalars; None for anything
    else.
    """
    if node.domain or node.op_type not in _LINES:
        return None
    value, *others = node.inputs
    if node.op_type in {"Add", "Mul", "Max", "Min"} and constant(value) is not None:
        value, others = others[0], [value]
    bounds = (
        zip(("low", "high"), others, strict=False) if node.op_type == "Clip" else [("c", others[0])]
    )
    numbers = {name: constant(other) for name, other in bounds if other is not None}
    if value is None or any(number is None or number.size != 1 for number in numbers.values()):
        return None
    line = _LINES[node.op_type](
        **{name: float(n.reshape(())) for name, n in numbers.items() if n is not None}
    )
    return value, line
