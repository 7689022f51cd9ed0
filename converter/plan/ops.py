"""THE operator table: what each ONNX operator's inputs are, which axis holds the channels, what its
output range is.

Everything that must know an operator reads this table: the plan, the emitter, the algorithms and
the docs. A new operator is one row here and one row in tests/test_ops.py, which checks every row
against the ONNX schema.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import operand

Obstacle = Callable[[ir.Node], str | None]


@dataclass(frozen=True)
class OpRule:
    """One operator.

    `data`: indices of the inputs that carry activations, None for all of them. `weight`, `bias`:
    indices of the operands that may be a constant weight and a bias. `channel_axis`: axis of the
    weight's output channels; None where one scale must serve the whole weight. `output_axis`: axis
    of the output that holds the weight's output channels. `pairs`: whether integer kernels add
    products in pairs (a depthwise convolution's do not). `moves`: values are only moved or chosen,
    so that input and output share one range. `obstacle`: why this very node cannot be computed on
    integers, None if it can. `knees`: where it has levelled off, so that inputs beyond count as if
    they were there. `line`: slope and offset where it is clip(slope x + offset, 0, 1), which
    integers compute as a sum.
    """

    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    channel_axis: Callable[[ir.Node], int | None] = lambda node: None
    output_axis: int = 1
    pairs: Callable[[ir.Node], bool] = lambda node: True
    moves: bool = False
    obstacle: Obstacle = lambda node: None
    knees: Callable[[ir.Node], tuple[float, float]] = lambda node: (-math.inf, math.inf)
    line: Callable[[ir.Node], tuple[float, float]] | None = None


def _all_of(*obstacles: Obstacle) -> Obstacle:
    return lambda node: next((reason for find in obstacles if (reason := find(node))), None)


def unusable(array: Array) -> str | None:
    """Why codes cannot stand for a constant of any size, None if they can."""
    if array.dtype != np.float32:
        return f"holds {array.dtype} values, not float32"
    if not array.size:
        return "is empty"
    return None if np.isfinite([array.min(), array.max()]).all() else "holds NaN or infinite values"


def _weight_unusable(node: ir.Node) -> str | None:
    array = operand(node, 1)
    if array is None:
        return "its weight is computed at run time"
    reason = "is no matrix" if array.ndim < 2 else unusable(array)
    return reason and f"its weight {reason}"


def _bias_unusable(node: ir.Node) -> str | None:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    array = operand(node, 2)
    reason = (
        "is not one constant a channel" if array is None or array.ndim != 1 else unusable(array)
    )
    return reason and f"its bias {reason}"


def _gemm_attributes(node: ir.Node) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "transA is set"
    scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return "alpha or beta is not 1" if scaled else None


def _gemm_bias(node: ir.Node) -> str | None:
    # A Gemm's bias may be of any shape that broadcasts; a Conv's may not.
    weight, bias = operand(node, 1), operand(node, 2)
    fits = weight is None or bias is None or bias.shape == (weight.shape[_gemm_axis(node)],)
    return None if fits else "its bias is not one constant a channel"


def _resize_mode(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "nearest")
    if mode != "nearest":
        return f"mode {mode} computes new values"
    crops = (
        node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        == "tf_crop_and_resize"
    )
    return "tf_crop_and_resize puts new values around the image" if crops else None


def _conv_transpose_axis(node: ir.Node) -> int | None:
    # With groups, axis 1 repeats in every group: a scale there would span unrelated channels.
    return 1 if node.attributes.get_int("group", 1) == 1 else None


def _gemm_axis(node: ir.Node) -> int:
    return 0 if node.attributes.get_int("transB", 0) else 1


def _matmul_weight(node: ir.Node) -> str | None:
    weight = operand(node, 1)
    if weight is None:
        return None
    return _weight_unusable(node) if weight.ndim == 2 else "its weight is not one matrix"


def _matmul_axis(node: ir.Node) -> int | None:
    weight = node.inputs[1]
    rank = weight.shape.rank() if weight and weight.shape else 0
    return rank - 1 if rank > 1 else None


def _not_depthwise(node: ir.Node) -> bool:
    weight, group = operand(node, 1), node.attributes.get_int("group", 1)
    return weight is None or not (weight.shape[1] == 1 and weight.shape[0] == group)


def _pad_mode(node: ir.Node) -> str | None:
    value = operand(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    other = node.attributes.get_string("mode", "constant") == "constant" and (
        value is None or value.any()
    )
    return "it pads with something else than zero" if other else None


def _dilations(node: ir.Node) -> str | None:
    wide = any(size != 1 for size in node.attributes.get_ints("dilations", ()))
    return "no integer kernel knows its dilations" if wide else None


def hard_sigmoid_line(node: ir.Node) -> tuple[float, float]:
    """Slope and offset of a HardSigmoid, clip(slope x + offset, 0, 1)."""
    get = node.attributes.get_float
    return get("alpha", 0.2), get("beta", 0.5)


def _rises(node: ir.Node) -> str | None:
    slope, offset = hard_sigmoid_line(node)
    return None if slope > 0 and offset else "its line falls or has no offset"


def _hard_sigmoid_knees(node: ir.Node) -> tuple[float, float]:
    slope, offset = hard_sigmoid_line(node)
    return -offset / slope, (1 - offset) / slope


_CHECKED = _all_of(_weight_unusable, _bias_unusable)

OPS: dict[str, OpRule] = {
    "Conv": OpRule(
        weight=1, bias=2, channel_axis=lambda node: 0, pairs=_not_depthwise, obstacle=_CHECKED
    ),
    "ConvTranspose": OpRule(weight=1, bias=2, channel_axis=_conv_transpose_axis, obstacle=_CHECKED),
    "Gemm": OpRule(
        weight=1,
        bias=2,
        channel_axis=_gemm_axis,
        obstacle=_all_of(_gemm_attributes, _CHECKED, _gemm_bias),
    ),
    "MatMul": OpRule(
        data=(0, 1), weight=1, channel_axis=_matmul_axis, output_axis=-1, obstacle=_matmul_weight
    ),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "PRelu"), OpRule(data=None)
    ),
    **dict.fromkeys(
        (
            *(
                "GlobalAveragePool",
                "ReduceMax",
                "ReduceMean",
                "ReduceMin",
                "ReduceSum",
            ),
            *(
                "Tanh",
                "LeakyRelu",
                "Relu",
                "Clip",
                "Softmax",
                "Abs",
                "Ceil",
                "Exp",
                "Floor",
                "Neg",
                "Round",
            ),
            *("Sqrt", "BatchNormalization", "InstanceNormalization"),
        ),
        OpRule(),
    ),
    **dict.fromkeys(
        (
            *(
                "MaxPool",
                "Reshape",
                "Flatten",
                "Squeeze",
                "Unsqueeze",
                "Transpose",
                "Slice",
                "Split",
            ),
            *("DepthToSpace", "SpaceToDepth", "Gather", "Tile"),
        ),
        OpRule(moves=True),
    ),
    # A byte between 0 and 1 has no code for what is left beyond 8: 0.0003.
    "Sigmoid": OpRule(knees=lambda node: (-8.0, 8.0)),
    # Emitted as a sum, the bounds being those of the integers: 0.2 ns a value, in floats 0.4.
    "HardSigmoid": OpRule(obstacle=_rises, knees=_hard_sigmoid_knees, line=hard_sigmoid_line),
    "AveragePool": OpRule(obstacle=_dilations),
    "Pad": OpRule(moves=True, obstacle=_pad_mode),
    "Resize": OpRule(moves=True, obstacle=_resize_mode),
}


# What divides by the size of what it reads, so that even small values count.
NORMALIZES = {
    "Div",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LpNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
    "ReduceL2",
    "ReduceMean",
    "ReduceSumSquare",
    "SimplifiedLayerNormalization",
}


def is_normalized(value: ir.Value) -> bool:
    """Whether a normalisation reads `value`, also behind sums and moves."""
    for node in (use.node for use in value.uses()):
        if node.op_type in NORMALIZES:
            return True
        passes_on = node.op_type == "Add" or (node.op_type in OPS and OPS[node.op_type].moves)
        if passes_on and any(is_normalized(output) for output in node.outputs):
            return True
    return False


# What draws random numbers, anew at every run.
RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


def draws(node: ir.Node) -> bool:
    """Whether `node` draws random numbers: also a Dropout whose training_mode is true, or computed
    at run time.
    """
    if node.domain or node.op_type != "Dropout":
        return not node.domain and node.op_type in RANDOM
    mode = operand(node, 2)
    return len(node.inputs) > 2 and node.inputs[2] is not None and (mode is None or bool(mode))


def computes_on_integers(node: ir.Node) -> bool:
    """Whether `node` is part of a model that is quantized already."""
    return re.fullmatch(r"QLinear\w+|\w*[Qq]uantizeLinear|\w+Integer", node.op_type) is not None


# Operators without a row above that multiply with, or pick from, constants: input index → axis of
# the channels.
_RECURRENT: dict[int, Callable[[ir.Node], int | None]] = {1: lambda node: 1, 2: lambda node: 1}
_TABLES: dict[str, dict[int, Callable[[ir.Node], int | None]]] = {
    "Gather": {0: lambda node: node.attributes.get_int("axis", 0)},
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _RECURRENT),
}


def may_have_weight(op_type: str) -> bool:
    """Whether the operator multiplies with, or picks from, what may be a constant."""
    return op_type in _TABLES or (op_type in OPS and OPS[op_type].weight is not None)


def takes_weight(node: ir.Node, index: int) -> bool:
    """Whether the operator has a weight at the input, if that is a constant."""
    rule = OPS.get(node.op_type)
    at = rule.weight if rule else None
    return not node.domain and (at == index or index in _TABLES.get(node.op_type, {}))


def weights_of(node: ir.Node) -> dict[int, int | None]:
    """The constant float32 weights of `node`, whatever it computes on: input index → axis of the
    channels.
    """
    rule = OPS.get(node.op_type)
    axes = _TABLES.get(node.op_type, {})
    if rule and rule.weight is not None:
        others = {
            i: lambda node: None
            for i in rule.data or ()
            if i != rule.weight and node.op_type == "MatMul"
        }
        axes = {rule.weight: rule.channel_axis, **others}
    arrays = {i: operand(node, i) for i in axes if not node.domain}
    found = {
        i: a for i, a in arrays.items() if a is not None and a.dtype == np.float32 and a.ndim > 1
    }
    return {i: axes[i](node) for i in found}
