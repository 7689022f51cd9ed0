"""Cross-layer equalization: evens out the ranges of a weight's channels where one scale must serve them all.

Between two convolutions with nothing or a Relu between them, channel i may be divided by s_i in the first and
multiplied by s_i in the second: relu(x / s) s = relu(x) for s > 0. With s_i = sqrt(r1_i / r2_i), r1 and r2 being the
largest magnitudes of the channel in the two weights, both become sqrt(r1_i r2_i). Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction" (2019), section 4.1; chains converge over a few rounds. A Clip with an
upper bound does not commute with s, so pairs around one are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.model import Names, constant, only_consumer, replace_constant
from converter.ops import OPS

ROUNDS = 10


class EqualizePass(ir.passes.InPlacePass):
    """Equalizes every pair of convolutions of the main graph."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rescales weights in place."""
        names, pairs = Names(model), list(_pairs(model.graph))
        for _ in range(ROUNDS):
            for first, second in pairs:
                _equalize(first, second, names)
        return ir.passes.PassResult(model, bool(pairs))


def _pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    for node in graph:
        follower = only_consumer(node.outputs[0])
        if follower and follower.op_type == "Relu":
            follower = only_consumer(follower.outputs[0])
        if _is_convolution(node) and follower and _is_convolution(follower) and _reads_channels(follower):
            yield node, follower


def _is_convolution(node: ir.Node) -> bool:
    return node.op_type == "Conv" and not node.domain and OPS["Conv"].obstacle(node) is None


def _reads_channels(node: ir.Node) -> bool:
    """Whether an input channel meets the weight in one place: no groups, or one for every channel."""
    weight, groups = constant(node.inputs[1]), node.attributes.get_int("group", 1)
    return weight is not None and (groups == 1 or weight.shape[1] == 1)


def _equalize(first: ir.Node, second: ir.Node, names: Names) -> None:
    left, right = constant(first.inputs[1]), constant(second.inputs[1])
    bias = constant(first.inputs[2]) if len(first.inputs) > 2 else None
    assert left is not None
    assert right is not None
    shape = _input_shape(second, right)
    out_range = np.abs(left).reshape(left.shape[0], -1).max(axis=1).astype(np.float64)
    in_range = _input_range(second, right)
    usable = (out_range > 0) & (in_range > 0)
    scale = np.sqrt(np.divide(out_range, in_range, out=np.ones_like(out_range), where=usable))
    replace_constant(first, 1, (left / scale.reshape(-1, *(1,) * (left.ndim - 1))).astype(left.dtype), names)
    if bias is not None:
        replace_constant(first, 2, (bias / scale).astype(bias.dtype), names)
    per_weight = np.repeat(scale, right.shape[0] // scale.size) if shape[0] == -1 else scale
    replace_constant(second, 1, (right * per_weight.reshape(shape)).astype(right.dtype), names)


def _input_shape(node: ir.Node, weight: Array) -> tuple[int, ...]:
    """How one factor an input channel broadcasts over the weight: a depthwise one holds them along its outputs."""
    spatial = (1,) * (weight.ndim - 2)
    return (1, -1, *spatial) if node.attributes.get_int("group", 1) == 1 else (-1, 1, *spatial)


def _input_range(node: ir.Node, weight: Array) -> Array:
    groups = node.attributes.get_int("group", 1)
    by_channel = np.moveaxis(weight, 1, 0) if groups == 1 else weight
    by_channel = by_channel.reshape(weight.shape[1] if groups == 1 else groups, -1)
    return np.asarray(np.abs(by_channel).max(axis=1), np.float64)
