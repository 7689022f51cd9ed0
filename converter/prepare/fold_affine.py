"""Folds a per-channel scale and shift into the Conv, ConvTranspose or Gemm before it.

Foldable, where the operator's output is read by nothing else:
1. BatchNormalization in inference mode with constant parameters: scale = gamma / sqrt(var + epsilon),
   shift = beta - mean * scale.
2. Add, Sub, Mul or Div by a constant that is one value a channel or one value for all.

For y = W x + b the result is W' = scale W along the channel axis, b' = scale b + shift, computed in float64. Operators
that share a weight each get a copy of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.model import Names, constant, only_consumer, replace_constant
from converter.ops import OPS

Affine = tuple[Array, Array]


class FoldAffinePass(ir.passes.InPlacePass):
    """Shell around `fold`, over the nodes of every graph of the model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in place."""
        names = Names(model)
        folded = [fold(node, names) for graph in model.graphs() for node in list(graph) if _foldable(node)]
        return ir.passes.PassResult(model, any(folded))


def _foldable(node: ir.Node) -> bool:
    if node.op_type not in {"Conv", "ConvTranspose", "Gemm"} or node.domain:
        return False
    # A Gemm scaled by alpha or beta computes something else than W x + b.
    return OPS[node.op_type].obstacle(node) is None


def fold(node: ir.Node, names: Names) -> bool:
    """Folds all foldable followers of `node` into it; returns whether there was one."""
    folded = False
    while (follower := only_consumer(node.outputs[0])) and (affine := _affine_of(follower, node)) and _usable(affine):
        _rescale(node, *affine, names)
        follower.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        _take_name(node.outputs[0], follower.outputs[0])
        follower.graph.remove(follower, safe=True)  # type: ignore[union-attr]
        folded = True
    return folded


def _usable(affine: Affine) -> bool:
    return all(np.isfinite(part.astype(np.float32)).all() for part in affine)


def _take_name(kept: ir.Value, gone: ir.Value) -> None:
    """The surviving tensor bears the last name, which graph outputs and users know."""
    name = gone.name
    gone.name = None
    kept.name, kept.shape = name, gone.shape or kept.shape


def _affine_of(node: ir.Node, producer: ir.Node) -> Affine | None:
    """Scale and shift a channel that `node` applies to the output of `producer`, None if it does not."""
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
    if value is None or value.dtype != np.float32 or (index == 0 and node.op_type in {"Sub", "Div"}):
        return None
    per_channel = _per_channel(value, producer, channels)
    if per_channel is None or (node.op_type == "Div" and not per_channel.all()):
        return None
    return _ARITHMETIC[node.op_type](per_channel)


def _per_channel(value: Array, producer: ir.Node, channels: int) -> Array | None:
    """`value` as one float64 a channel; None if it varies along another axis or would widen the output's shape."""
    weight = constant(producer.inputs[1])
    rank = weight.ndim if weight is not None else 0
    shape = (1,) * (rank - value.ndim) + value.shape
    channel_shape = tuple(channels if axis == 1 else 1 for axis in range(rank))
    if value.size == 1 and value.ndim <= rank:
        return np.full(channels, float(value.reshape(())))
    return value.astype(np.float64).reshape(-1) if shape == channel_shape else None


def _channels(node: ir.Node) -> int:
    weight = constant(node.inputs[1])
    assert weight is not None
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1] * node.attributes.get_int("group", 1))
    return int(weight.shape[OPS[node.op_type].channel_axis(node) or 0])


def _rescale(node: ir.Node, scale: Array, shift: Array, names: Names) -> None:
    weight, bias = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None
    new_weight = (weight.astype(np.float64) * _weight_factor(node, weight, scale)).astype(weight.dtype)
    new_bias = ((0.0 if bias is None else bias.astype(np.float64)) * scale + shift).astype(weight.dtype)
    replace_constant(node, 1, new_weight, names)
    replace_constant(node, 2, new_bias, names)


def _weight_factor(node: ir.Node, weight: Array, scale: Array) -> Array:
    """`scale` shaped to multiply the weight along its output channels."""
    if node.op_type == "ConvTranspose":
        group = node.attributes.get_int("group", 1)
        per_input = np.repeat(scale.reshape(group, -1), weight.shape[0] // group, axis=0)
        return per_input.reshape(per_input.shape + (1,) * (weight.ndim - 2))
    axis = OPS[node.op_type].channel_axis(node) or 0
    return scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
