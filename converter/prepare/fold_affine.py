"""Folds a per-channel scale and shift into the Conv, ConvTranspose or Gemm before it.

Foldable, where the operator's output is read by nothing else: 1. BatchNormalization in inference
mode with constant parameters: scale = gamma / sqrt(var + epsilon),
   shift = beta - mean * scale.
2. Add, Sub, Mul or Div by a constant that is one value a channel or one value for all.

For y = W x + b the result is W' = scale W along the channel axis, b' = scale b + shift, computed in
float64. Operators that share a weight each get a copy of their own.

What a BatchNormalization knows of the data that its model was trained with, mean and variance of
its input, is handed out as that of its output, as the input is gone with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import (
    Names,
    constant,
    graph_of,
    nodes_of,
    not_none,
    only_consumer,
    operand,
    replace_constant,
)
from converter.plan.ops import rule_of

Affine = tuple[Array, Array]


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of every channel of a tensor, on the data of training."""

    mean: Array
    deviation: Array

    def behind(self, affine: Affine) -> Moments:
        """Those of the tensor scaled and shifted."""
        scale, shift = affine
        return Moments(self.mean * scale + shift, self.deviation * np.abs(scale))


def fold_affine(model: ir.Model) -> Mapping[str, Moments]:
    """Folds into the nodes of every graph, in place; what is known of tensors that are left, by
    name.
    """
    names, known = Names(model), dict[str, Moments]()
    for node in nodes_of(model):
        moments = _fold(node, names) if _foldable(node) else _of_norm(node)
        if moments is not None:
            known[node.outputs[0].name or ""] = moments
    return known


def _foldable(node: ir.Node) -> bool:
    # A Gemm scaled by alpha or beta computes something else than W x + b.
    return rule_of(node).bias is not None and rule_of(node).obstacle(node) is None


def _fold(node: ir.Node, names: Names) -> Moments | None:
    """Folds all foldable followers of `node` into it; what they know of its output."""
    known = None
    while (
        (follower := only_consumer(node.outputs[0]))
        and (affine := _affine_of(follower, node))
        and _usable(affine)
    ):
        known = _moments(follower, affine, known)
        _rescale(node, *affine, names)
        # The surviving tensor bears the last name, which graph outputs and users know.
        graph, outputs = graph_of(follower), follower.outputs
        ir.convenience.replace_nodes_and_values(
            graph, follower, [follower], [], outputs, node.outputs
        )
    return known


def _of_norm(node: ir.Node) -> Moments | None:
    """What a BatchNormalization that stays knows of its output."""
    stays = node.op_type == "BatchNormalization" and not node.domain and node.graph is not None
    affine = _batch_norm(node) if stays else None
    return _moments(node, affine, None) if affine else None


def _moments(node: ir.Node, affine: Affine, before: Moments | None) -> Moments | None:
    """What is known behind a node that scales and shifts what is known `before` it."""
    if node.op_type == "BatchNormalization":
        mean, variance = (not_none(operand(node, i)).astype(np.float64) for i in (3, 4))
        before = Moments(mean, np.sqrt(variance))
    return before and before.behind(affine)


def _usable(affine: Affine) -> bool:
    return all(np.isfinite(part.astype(np.float32)).all() for part in affine)


def _affine_of(node: ir.Node, producer: ir.Node) -> Affine | None:
    """Scale and shift a channel that `node` applies to the output of `producer`, None if it does
    not.
    """
    if node.domain:
        return None
    if node.op_type == "BatchNormalization" and node.inputs[0] is producer.outputs[0]:
        return _batch_norm(node)
    return _arithmetic(node, producer, _channels(producer)) if node.op_type in _ARITHMETIC else None


def _batch_norm(node: ir.Node) -> Affine | None:
    parameters = [constant(value) for value in node.inputs[1:5]]
    # Before opset 14 it is the number of outputs that says training.
    training = node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1
    if training or any(p is None for p in parameters):
        return None
    gamma, beta, mean, variance = (p.astype(np.float64) for p in parameters if p is not None)
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return scale, beta - mean * scale


_ARITHMETIC: dict[str, Callable[[Array], Affine]] = {
    "Add": lambda c: (np.ones_like(c), c),
    "Sub": lambda c: (np.ones_like(c), -c),
    "Mul": lambda c: (c, np.zeros_like(c)),
    "Div": lambda c: (1 / c, np.zeros_like(c)),
}


def _arithmetic(node: ir.Node, producer: ir.Node, channels: int) -> Affine | None:
    index = 1 if node.inputs[0] is producer.outputs[0] else 0
    value = constant(node.inputs[index])
    # The constant must stand on the right of - and /.
    if (
        value is None
        or value.dtype != np.float32
        or (index == 0 and node.op_type in {"Sub", "Div"})
    ):
        return None
    per_channel = _per_channel(value, producer, channels)
    if per_channel is None or (node.op_type == "Div" and not per_channel.all()):
        return None
    return _ARITHMETIC[node.op_type](per_channel)


def _per_channel(value: Array, producer: ir.Node, channels: int) -> Array | None:
    """`value` as one float64 a channel; None if it varies along another axis or would widen the
    output's shape.
    """
    rank = not_none(operand(producer, 1)).ndim
    shape = (1,) * (rank - value.ndim) + value.shape
    channel_shape = tuple(channels if axis == 1 else 1 for axis in range(rank))
    if value.size == 1 and value.ndim <= rank:
        return np.full(channels, float(value.reshape(())))
    return value.astype(np.float64).reshape(-1) if shape == channel_shape else None


def _channels(node: ir.Node) -> int:
    return math.prod(_by_channel(node, not_none(operand(node, 1))).shape[:2])


def _rescale(node: ir.Node, scale: Array, shift: Array, names: Names) -> None:
    weight, bias = not_none(operand(node, 1)), operand(node, 2)
    scaled = weight.astype(np.float64, order="C")
    by_channel = _by_channel(node, scaled)
    by_channel *= scale.reshape(*by_channel.shape[:2], *(1,) * (by_channel.ndim - 2))
    new_bias = ((0.0 if bias is None else bias.astype(np.float64)) * scale + shift).astype(
        weight.dtype
    )
    replace_constant(node, 1, scaled.astype(weight.dtype), names)
    replace_constant(node, 2, new_bias, names)


def _by_channel(node: ir.Node, weight: Array) -> Array:
    """A view of the weight with the axes (groups, output channels of a group, …)."""
    if node.op_type == "ConvTranspose":
        groups = node.attributes.get_int("group", 1)
        return weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(
            1,
            2,
        )
    return np.moveaxis(weight, rule_of(node).channel_axis(node) or 0, 0)[None]
