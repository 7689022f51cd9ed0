"""Recognises fake quantization written out as arithmetic around a rounding: (clip(round(x / s + z),
l, h) - z) * s.

Zero points may be added before or behind the rounding or not at all, bounds stand before or behind
it, and scales are multiplied with or divided by. Where the codes themselves are multiplied with
weights, the last product is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from calib.affine import IntFormat, QParams
from converter.graph.edit import constant, only_consumer

# Factors and shifts of scales and zero points in float32 cancel out to within this.
CLOSE = 1e-4


@dataclass(frozen=True)
class Chain:
    """`output` is `source` on the grid of `qparams`, or, where `codes`, divided by their scale."""

    source: ir.Value
    output: ir.Value
    qparams: QParams
    codes: bool


@dataclass(frozen=True)
class _Line:
    """The function clip(factor * x + shift, low, high)."""

    factor: float = 1.0
    shift: float = 0.0
    low: float = -np.inf
    high: float = np.inf

    def then(self, other: _Line) -> _Line:
        """`other` of this; factors are positive."""
        low, high = (other.factor * bound + other.shift for bound in (self.low, self.high))
        shift = other.factor * self.shift + other.shift
        return _Line(
            other.factor * self.factor,
            shift,
            max(low, other.low),
            min(high, other.high),
        )


# By operator, what a constant operand makes of it.
_LINES: dict[str, Callable[..., _Line]] = {
    "Add": lambda c: _Line(shift=c),
    "Sub": lambda c: _Line(shift=-c),
    "Mul": lambda c: _Line(c),
    "Div": lambda c: _Line(1 / c if c else 0.0),
    "Max": lambda c: _Line(low=c),
    "Min": lambda c: _Line(high=c),
    "Clip": lambda low=-np.inf, high=np.inf: _Line(low=low, high=high),
}
# A value on the way, and what leads from it to the rounding or from there to it.
_Stages = list[tuple[ir.Value, _Line]]


def chain_from(node: ir.Node) -> Chain | None:
    """The fake quantization around `node`, a Round, or a Floor behind + 0.5; None for anything
    else.
    """
    if node.op_type not in {"Round", "Floor"} or node.domain:
        return None
    before, behind = _before(node), _behind(node)
    for (source, first), (output, last) in product(before, behind):
        restores = (
            abs(first.factor * last.factor - 1) < CLOSE
            and abs(first.shift + last.shift / last.factor) < CLOSE
        )
        if restores and (first.factor != 1 or len(before) == 1) and (q := _grid(first, last)):
            return Chain(source, output, q, codes=False)
    source, first = before[0]
    output, last = next(stage for stage in behind if stage[1].factor == 1)
    q = _grid(first, last) if abs(first.shift) < CLOSE and last.shift == 0 else None
    return (
        Chain(source, output, q, codes=True) if q and q.format.narrow and not q.zero_point else None
    )


def format_of(low: int, high: int) -> IntFormat | None:
    """The format whose codes are exactly those from `low` to `high`; None if there is none."""
    bits = (high - low + 1).bit_length()
    formats = (IntFormat(bits - 1, low < 0), IntFormat(bits, low < 0, narrow=True))
    return next((f for f in formats if f.bits > 0 and (f.qmin, f.qmax) == (low, high)), None)


def _grid(first: _Line, last: _Line) -> QParams | None:
    """The parameters of `first`, a rounding and `last`; None where the codes are not those of a
    format.
    """
    low = max(first.low, (last.low - last.shift) / last.factor)
    high = min(first.high, (last.high - last.shift) / last.factor)
    if not np.isfinite([low, high]).all():
        return None
    low, high, zero = round(low), round(high), round(first.shift)
    # A symmetric range in signed codes, any other from 0 on.
    shift = 0 if low < 0 and format_of(low, high) else -low
    fmt = format_of(low + shift, high + shift)
    scale = np.array(last.factor if last.factor != 1 else 1 / first.factor, np.float32)
    return QParams(scale, np.array(zero + shift), fmt) if fmt else None


def _before(node: ir.Node) -> _Stages:
    """The stages from the rounding upwards, farthest first."""
    value = node.inputs[0]
    assert value is not None
    stages: _Stages = [(value, _Line(shift=0.0 if node.op_type == "Round" else -0.5))]
    while (maker := value.producer()) and only_consumer(value) is node and (step := _step(maker)):
        bounded = [np.isfinite([line.low, line.high]).any() for line in (stages[0][1], step[1])]
        if all(bounded):
            break  # an activation function of its own
        value, node = step[0], maker
        stages.insert(0, (value, step[1].then(stages[0][1])))
    return stages


def _behind(node: ir.Node) -> _Stages:
    """The stages from the rounding downwards, farthest first."""
    stages: _Stages = [(node.outputs[0], _Line())]
    while (
        (reader := only_consumer(stages[0][0]))
        and (step := _step(reader))
        and step[0] is stages[0][0]
    ):
        stages.insert(0, (reader.outputs[0], stages[0][1].then(step[1])))
    return stages


def _step(node: ir.Node) -> tuple[ir.Value, _Line] | None:
    """The one value that `node` reads and what it makes of it; None if it is something else."""
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
    return (value, line) if line.factor > 0 else None
