"""Cross-layer equalization: evens out the ranges of a weight's channels where one scale must serve
them all.

Between two convolutions with nothing or a Relu between them, channel i may be divided by s_i in the
first and multiplied by s_i in the second: relu(x / s) s = relu(x) for s > 0. With s_i = sqrt(r1_i /
r2_i), r1 and r2 being the largest magnitudes of the channel in the two weights, both become
sqrt(r1_i r2_i). Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (2019), section 4.1; chains converge over a few rounds. A Clip with an upper bound does
not commute with s, so pairs around one are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from calib.affine import Array, along
from converter.graph.edit import (
    Names,
    not_none,
    only_consumer,
    operand,
    replace_constant,
)
from converter.plan.ops import OPS

ROUNDS = 10


def equalize(model: ir.Model) -> None:
    """Equalizes every pair of convolutions of the main graph, in place."""
    names, pairs = Names(model), list(_pairs(model.graph))
    for _ in range(ROUNDS):
        for first, second in pairs:
            _equalize(first, second, names)


def _pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    for node in graph:
        follower = only_consumer(node.outputs[0])
        if follower and follower.op_type == "Relu":
            follower = only_consumer(follower.outputs[0])
        if (
            _is_convolution(node)
            and follower
            and _is_convolution(follower)
            and _reads_channels(follower)
        ):
            yield node, follower


def _is_convolution(node: ir.Node) -> bool:
    return node.op_type == "Conv" and not node.domain and OPS["Conv"].obstacle(node) is None


def _reads_channels(node: ir.Node) -> bool:
    """Whether an input channel meets the weight in one place: no groups, or one for every
    channel.
    """
    return node.attributes.get_int("group", 1) == 1 or not_none(operand(node, 1)).shape[1] == 1


def _equalize(first: ir.Node, second: ir.Node, names: Names) -> None:
    left = not_none(operand(first, 1))
    right = not_none(operand(second, 1)).copy()
    bias = operand(first, 2)
    by_input = _by_input(second, right)
    out_range, in_range = (
        np.abs(w).reshape(len(w), -1).max(axis=1).astype(np.float64) for w in (left, by_input)
    )
    usable = (out_range > 0) & (in_range > 0)
    scale = np.sqrt(np.divide(out_range, in_range, out=np.ones_like(out_range), where=usable))
    by_input *= along(scale, 0, by_input.shape)
    replace_constant(
        first,
        1,
        (left / along(scale, 0, left.shape)).astype(left.dtype),
        names,
    )
    if bias is not None:
        replace_constant(first, 2, (bias / scale).astype(bias.dtype), names)
    replace_constant(second, 1, right, names)


def _by_input(node: ir.Node, weight: Array) -> Array:
    """A view of the weight with its input channels first: a depthwise one holds them along its
    outputs.
    """
    groups = node.attributes.get_int("group", 1)
    return weight.swapaxes(0, 1) if groups == 1 else weight.reshape(groups, -1, *weight.shape[2:])
