"""THE table of costs: nanoseconds that operators take on one thread, in floats and in integers.

Measured with ONNX Runtime on x86 by benchmarks/costs.py; only ratios count. A convolution's costs
follow from its shape: integers multiply fast, but a first layer of three channels is gathered value
by value, and few kernels know depthwise convolutions as well as the float ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from converter.graph.edit import input_at

# A node that does next to nothing.
NODE = 2500.0
# A conversion, with the change of layout that integers ask for, and a change of the layout of
# floats, a value.
QUANTIZE, DEQUANTIZE, REORDER = 0.53, 0.46, 0.33
# A byte under a pool's window where no integer convolution comes before: no kernel but the plainest
# knows that layout.
PLAIN_POOL = 6.0
# Float operators that may compute in the layout of float convolutions, blocks of channels.
BLOCK = 16
IN_BLOCKS = {
    *("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "HardSigmoid"),
    *("LeakyRelu", "MaxPool", "Mul", "Relu", "Sigmoid", "Tanh"),
}
# Products a nanosecond, of floats and of bytes.
FLOATS, BYTES = 60.0, 110.0


@dataclass(frozen=True)
class Cost:
    """Nanoseconds in floats and in integers, of a node or of a value."""

    floats: float
    integers: float

    def times(self, count: float, node: Cost | None = None) -> Cost:
        """The cost of a node, itself of the cost `node`, that does it so often."""
        start = node or Cost(NODE, NODE)
        return Cost(start.floats + count * self.floats, start.integers + count * self.integers)


# By operator, a value of the largest tensor that it reads or makes.
VALUES = {
    "Add": Cost(0.36, 0.25),
    "Clip": Cost(0.3, 0.0),
    "Concat": Cost(0.31, 0.39),
    "GlobalAveragePool": Cost(0.39, 0.21),
    "HardSigmoid": Cost(0.39, 0.17),
    "LeakyRelu": Cost(0.4, 0.57),
    "MaxPool": Cost(0.63, 0.25),
    "Mul": Cost(0.48, 0.53),
    # Behind a convolution; other activation functions take a pass of their own even there.
    "Relu": Cost(0.0, 0.0),
    "Reshape": Cost(0.05, 0.04),
    "Sigmoid": Cost(0.67, 0.61),
    "Split": Cost(0.33, 0.07),
    "Transpose": Cost(0.41, 0.18),
}
# Resize, by its mode.
RESIZED = {"linear": Cost(3.3, 0.9), "nearest": Cost(0.45, 2.5)}
OTHERS = Cost(0.2, 0.1)
# A convolution that computes nothing.
CONVOLUTION = Cost(4500.0, 8500.0)
# A value under the window of an average.
AVERAGED = Cost(0.2, 1.9)
# A row of a matrix product: for each output, and for each weight, which is read at least once.
ROW, WEIGHT = Cost(0.0, 0.5), Cost(0.1, 0.07)


def cost(node: ir.Node, made: tuple[int, ...], most: int) -> Cost:
    """The cost of a node whose output has the shape `made`, and whose largest tensor `most`
    values.
    """
    if own := _OWN.get(node.op_type):
        return own(node, made)
    return VALUES.get(node.op_type, OTHERS).times(most)


def in_blocks(node: ir.Node, channels: int) -> bool:
    """Whether the float operator computes in the layout of float convolutions."""
    return convolves(node) or (node.op_type in IN_BLOCKS and channels % BLOCK == 0)


def convolves(node: ir.Node) -> bool:
    """Whether floats stand in blocks of channels before and behind it."""
    return node.op_type in _CONVOLUTIONS


def pooled(node: ir.Node) -> int:
    """The values under the window of a maximum that floats and integers pool alike; 0 elsewhere."""
    return _window(node) if node.op_type in _POOLS else 0


# --- operators whose costs follow from their shapes


def _convolution(node: ir.Node, made: tuple[int, ...]) -> Cost:
    shape, groups = _weight(node), max(1, node.attributes.get_int("group", 1))
    if len(shape) < 3 or not made:
        return Cost(NODE, NODE)
    return _position(shape, groups).times(
        made[0] * prod(made[2:]),
        CONVOLUTION,
    )


def _position(shape: tuple[int, ...], groups: int) -> Cost:
    """Of one position of the output."""
    rows, inputs, taps = shape[0], shape[1], prod(shape[2:])
    if groups == rows and inputs == 1:
        return _depthwise(rows, taps)
    each, columns = rows // groups, inputs * taps
    floats = 5 + columns * _rounded_up(each, BLOCK) / FLOATS
    integers = 10 + 0.17 * each + columns * each / BYTES
    if each % 4:
        integers += 0.8 * each
    if taps > 1:
        # Every tap is gathered by itself; three channels byte by byte.
        integers += (5.0 if inputs == 3 else 2.5) * taps + 0.05 * columns
    return Cost(groups * floats, groups * integers)


def _depthwise(channels: int, taps: int) -> Cost:
    nine = taps / 9
    floats = (
        (5 + 0.5 * channels) * (0.5 + 0.5 * nine) if channels % 4 == 0 else 4.6 * channels * nine
    )
    integers = 23 + 0.56 * channels if channels % 16 == 0 else 20 + 2.2 * channels
    return Cost(floats, integers * (0.3 + 0.7 * nine))


def _product(node: ir.Node, made: tuple[int, ...]) -> Cost:
    size, values = prod(_weight(node)), prod(made)
    multiplied = values / max(1, made[-1] if made else 1) * size
    return Cost(
        NODE + max(multiplied / FLOATS, size * WEIGHT.floats),
        NODE + max(multiplied / BYTES, size * WEIGHT.integers) + values * ROW.integers,
    )


def _averaged(node: ir.Node, made: tuple[int, ...]) -> Cost:
    return AVERAGED.times(prod(made) * _window(node))


def _resized(node: ir.Node, made: tuple[int, ...]) -> Cost:
    return RESIZED.get(node.attributes.get_string("mode", "nearest"), OTHERS).times(prod(made))


def _weight(node: ir.Node) -> tuple[int, ...]:
    """The shape of its constant weight; of none, that of nothing."""
    value = input_at(node, 1)
    array = None if value is None else value.const_value
    return (0,) if array is None else tuple(d for d in array.shape if isinstance(d, int))


def _window(node: ir.Node) -> int:
    return prod(node.attributes.get_ints("kernel_shape", ()))


def _rounded_up(number: int, to: int) -> int:
    return -(-number // to) * to


_CONVOLUTIONS, _POOLS = {"Conv"}, {"MaxPool"}
_OWN: dict[str, Callable[[ir.Node, tuple[int, ...]], Cost]] = {
    "AveragePool": _averaged,
    "Conv": _convolution,
    "Gemm": _product,
    "MatMul": _product,
    "Resize": _resized,
}
