"""Recognises fake quantization written out as arithmetic around a rounding: (clip(round(x / s + z),
l, h) - z) * s.

Zero points may be added before or behind the rounding or not at all, bounds stand before or behind
it, and scales are multiplied with or divided by. Where the codes themselves are multiplied with
weights, the last product is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from calib.affine import IntFormat, QParams
from converter.graph.edit import only_consumer
from converter.prepare.lines import Line, step

# Factors and shifts of scales and zero points in float32 cancel out to within this.
CLOSE = 1e-4


@dataclass(frozen=True)
class Chain:
    """`output` is `source` on the grid of `qparams`, or, where `codes`, divided by their scale."""

    source: ir.Value
    output: ir.Value
    qparams: QParams
    codes: bool


# A value on the way, and what leads from it to the rounding or from there to it.
_Stages = list[tuple[ir.Value, Line]]


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


def _grid(first: Line, last: Line) -> QParams | None:
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
    scale = np.array(
        last.factor if last.factor != 1 else 1 / first.factor,
        np.float32,
    )
    return QParams(scale, np.array(zero + shift), fmt) if fmt else None


def _before(node: ir.Node) -> _Stages:
    """The stages from the rounding upwards, farthest first."""
    value = node.inputs[0]
    assert value is not None
    stages: _Stages = [(value, Line(shift=0.0 if node.op_type == "Round" else -0.5))]
    while (maker := value.producer()) and only_consumer(value) is node and (before := _step(maker)):
        bounded = [np.isfinite([line.low, line.high]).any() for line in (stages[0][1], before[1])]
        if all(bounded):
            break  # an activation function of its own
        value, node = before[0], maker
        stages.insert(
            0,
            (value, before[1].then(stages[0][1])),
        )
    return stages


def _behind(node: ir.Node) -> _Stages:
    """The stages from the rounding downwards, farthest first."""
    stages: _Stages = [(node.outputs[0], Line())]
    while (
        (reader := only_consumer(stages[0][0]))
        and (after := _step(reader))
        and after[0] is stages[0][0]
    ):
        stages.insert(
            0,
            (reader.outputs[0], stages[0][1].then(after[1])),
        )
    return stages


def _step(node: ir.Node) -> tuple[ir.Value, Line] | None:
    """The one value that `node` reads and the rising line that it makes of it."""
    read = step(node)
    return read if read and read[1].factor > 0 else None
