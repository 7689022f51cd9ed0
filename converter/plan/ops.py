"""THE operator table: what each ONNX operator's inputs are, which axis holds the channels, what its
output range is.

Everything that must know an operator reads this table: the plan, the emitter, the algorithms and
the docs. A new operator is one row here and one row in tests/test_ops.py, which checks every row
against the ONNX schema. Operators on integers have a table of their own below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import (
    constant,
    input_at,
    nodes_of,
    not_none,
    only_consumer,
    operand,
    readers_of,
)
from converter.graph.qdq import is_conversion
from converter.plan.matrices import View, conv_view, no_view, product_view

Obstacle = Callable[[ir.Node], str | None]
Axis = Callable[[ir.Node], int | None]
Span = tuple[float, float]
Row = TypeVar("Row")

# How many times as high as wide a table of words is at the least.
WORDS = 2


@dataclass(frozen=True)
class OpRule:
    """One operator.

    What it reads. `data`: indices of the inputs that carry activations, None for all of them.
    `weight`, `bias`: indices of the operands that may be a constant weight and a bias; a weight
    among the data may be an activation too, as in attention. `picks`: what else may be a constant
    weight, by the axis of its channels.

    How it multiplies. `channel_axis`: axis of the weight's output channels; None where one scale
    must serve the whole weight. `output_axis`: axis of the output that holds the weight's output
    channels. `view`: the matrix product that node and weight of a shape are, by whose rows and
    columns a weight is rounded; `no_view` where each number is rounded by itself. `pairs`: whether
    integer kernels add its products in pairs; None where none do.

    What its output range is. `moves`: values are only moved or chosen, so that input and output
    share one range. `joins`: the same for several inputs. `within`: no output lies beyond the
    inputs and zero. `floor`: what it cuts values off at from below, and it does nothing else to
    them than cut off. `probabilities`: outputs from 0 to 1 that vanish for small inputs.

    `makes`: bounds of its output, from those of all it reads, None for what is not known. `needs`:
    bounds of its first input, outside of which its output changes no more or leaves the bounds that
    are given.

    `knees`: where it has levelled off, so that inputs beyond count as if they were there. `line`:
    slope and offset where it is clip(slope x + offset, 0, 1), which integers compute as a sum.

    How its numbers meet. `adds`, `multiplies`: it is the sum, the product of two inputs. `merges`:
    inputs share the codes of one range. `fill`: index of the number that it fills up with.
    `remembers`: it keeps mean and variance of what it read in training, by channel.

    `obstacle`: why this very node cannot be computed on integers, None if it can;
    `obstacle_spreads`: nodes behind such a one stay float with it.
    """

    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    picks: Mapping[int, Axis] = field(default_factory=dict)
    channel_axis: Axis = lambda node: None
    output_axis: int = 1
    view: Callable[[ir.Node, Sequence[int]], View | None] | None = None
    pairs: Callable[[ir.Node, Sequence[int]], bool] | None = None
    moves: bool = False
    joins: bool = False
    within: bool = False
    floor: Callable[[ir.Node], float | None] | None = None
    probabilities: bool = False
    makes: Callable[[ir.Node, Sequence[Span | None]], Span | None] = lambda node, read: None
    needs: Callable[[ir.Node, Span], Span | None] = lambda node, made: None
    adds: bool = False
    multiplies: bool = False
    merges: bool = False
    fill: int | None = None
    remembers: bool = False
    obstacle: Obstacle = lambda node: None
    obstacle_spreads: bool = False
    knees: Callable[[ir.Node], tuple[float, float]] = lambda node: (-math.inf, math.inf)
    line: Callable[[ir.Node], tuple[float, float]] | None = None

    @property
    def product(self) -> bool:
        """Whether it multiplies rows with a matrix."""
        return self.view is product_view

    @property
    def looks_up(self) -> bool:
        """Whether it picks from its first input."""
        return 0 in self.picks

    @property
    def of_activations(self) -> bool:
        """Whether it may multiply two activations."""
        return self.weight in (self.data or ())

    @property
    def bounds(self) -> bool:
        """Whether it only cuts values off."""
        return self.floor is not None


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


def _row_unusable(node: ir.Node) -> str | None:
    array = operand(node, 1)
    reason = (
        "is not one constant a channel" if array is None or array.ndim != 1 else unusable(array)
    )
    return reason and f"its scale {reason}"


def _more_outputs(node: ir.Node) -> str | None:
    return "it hands out statistics too" if len(node.outputs) > 1 else None


def _bias_unusable(node: ir.Node) -> str | None:
    if input_at(node, 2) is None:
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
    weight, bias = not_none(operand(node, 1)), operand(node, 2)
    fits = bias is None or bias.size == weight.shape[_gemm_axis(node)]
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


def is_transposed(node: ir.Node) -> bool:
    """Whether a product multiplies with the transposed of its weight."""
    return bool(node.attributes.get_int("transB", 0))


def _gemm_axis(node: ir.Node) -> int:
    return 0 if is_transposed(node) else 1


def _matmul_weight(node: ir.Node) -> str | None:
    weight = operand(node, 1)
    if weight is None:
        return None
    return _weight_unusable(node) if weight.ndim == 2 else "its weight is not one matrix"


def _matmul_axis(node: ir.Node) -> int | None:
    weight = node.inputs[1]
    rank = weight.shape.rank() if weight and weight.shape else 0
    return rank - 1 if rank > 1 else None


def _not_depthwise(node: ir.Node, shape: Sequence[int]) -> bool:
    # A depthwise convolution's kernels add in 32 bits.
    return tuple(shape[:2]) != (node.attributes.get_int("group", 1), 1)


def _any_shape(node: ir.Node, shape: Sequence[int]) -> bool:
    return True


def _clip_floor(node: ir.Node) -> float | None:
    low = operand(node, 1)
    return float(low.item()) if low is not None and low.size == 1 else None


def _pad_mode(node: ir.Node) -> str | None:
    value = operand(node, 2) if input_at(node, 2) else np.zeros(1)
    constant_mode = node.attributes.get_string("mode", "constant") == "constant"
    other = constant_mode and (value is None or value.any())
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


def _sum_of(signs: Span) -> Callable[[ir.Node, Sequence[Span | None]], Span | None]:
    def makes(node: ir.Node, read: Sequence[Span | None]) -> Span | None:
        known = [np.multiply(span, sign) for span, sign in zip(read, signs, strict=False) if span]
        if len(known) < len(read):
            return None
        return float(sum(map(min, known))), float(sum(map(max, known)))

    return makes


def _product_of(node: ir.Node, read: Sequence[Span | None]) -> Span | None:
    known = [span for span in read if span]
    if len(known) < 2:
        return None
    corners = [one * other for one in known[0] for other in known[1]]
    return min(corners), max(corners)


def _always(low: float, high: float) -> Callable[[ir.Node, Sequence[Span | None]], Span | None]:
    return lambda node, read: (low, high)


def _clip_bounds(node: ir.Node, read: Sequence[Span | None]) -> Span | None:
    low, high = operand(node, 1), operand(node, 2)
    return None if low is None or high is None else (float(low.item()), float(high.item()))


def _level(node: ir.Node, made: Span) -> Span | None:
    return rule_of(node).knees(node)


def _leaky_needs(node: ir.Node, made: Span) -> Span | None:
    slope = node.attributes.get_float("alpha", 0.01)
    return (made[0] / slope, made[1]) if slope > 0 else None


_BOUNDED = OpRule(within=True)
_MOVED = OpRule(moves=True)


def _rows(text: str, rule: Row) -> dict[str, Row]:
    return dict.fromkeys(text.split(), rule)


OPS: dict[str, OpRule] = {
    "Conv": OpRule(
        weight=1,
        bias=2,
        channel_axis=lambda node: 0,
        view=conv_view,
        pairs=_not_depthwise,
        obstacle=_CHECKED,
    ),
    "ConvTranspose": OpRule(
        weight=1,
        bias=2,
        channel_axis=_conv_transpose_axis,
        view=no_view,
        obstacle=_CHECKED,
    ),
    "Gemm": OpRule(
        weight=1,
        bias=2,
        channel_axis=_gemm_axis,
        view=product_view,
        pairs=_any_shape,
        obstacle=_all_of(_gemm_attributes, _CHECKED, _gemm_bias),
    ),
    "MatMul": OpRule(
        data=(0, 1),
        weight=1,
        channel_axis=_matmul_axis,
        output_axis=-1,
        view=product_view,
        pairs=_any_shape,
        obstacle=_matmul_weight,
    ),
    "Add": OpRule(data=None, adds=True, merges=True, makes=_sum_of((1, 1))),
    "Sub": OpRule(data=None, merges=True, makes=_sum_of((1, -1))),
    "Concat": OpRule(data=None, joins=True, within=True, merges=True),
    "LayerNormalization": OpRule(
        weight=1,
        bias=2,
        channel_axis=lambda node: 0,
        output_axis=-1,
        view=no_view,
        obstacle=_all_of(_row_unusable, _bias_unusable, _more_outputs),
    ),
    **_rows("Max Min", OpRule(data=None, within=True, merges=True)),
    "Mul": OpRule(data=None, multiplies=True, makes=_product_of),
    **_rows("Div PRelu Pow", OpRule(data=None)),
    "Relu": OpRule(floor=lambda node: 0.0, within=True),
    "Clip": OpRule(floor=_clip_floor, within=True, makes=_clip_bounds),
    "AveragePool": OpRule(within=True, obstacle=_dilations, obstacle_spreads=True),
    **_rows("GlobalAveragePool ReduceMax ReduceMean ReduceMin", _BOUNDED),
    "Softmax": OpRule(probabilities=True, makes=_always(0, 1)),
    "Tanh": OpRule(within=True, makes=_always(-1, 1)),
    # Below -3 it is 0, from 3 on what it reads.
    "HardSwish": OpRule(within=True, needs=lambda node, made: (-3.0, max(made[1], 3.0))),
    "LeakyRelu": OpRule(needs=_leaky_needs),
    "Gelu": OpRule(within=True),
    **_rows("ReduceSum Abs Ceil Exp Floor Neg Round Sqrt Elu Log", OpRule()),
    "BatchNormalization": OpRule(remembers=True),
    "InstanceNormalization": OpRule(),
    **_rows("MaxPool Reshape Flatten Squeeze Unsqueeze Transpose Slice Split", _MOVED),
    **_rows("DepthToSpace SpaceToDepth Tile", _MOVED),
    # A byte between 0 and 1 has no code for what is left beyond 8: 0.0003.
    "Sigmoid": OpRule(knees=lambda node: (-8.0, 8.0), makes=_always(0, 1), needs=_level),
    # Emitted as a sum, the bounds being those of the integers: 0.2 ns a value, in floats 0.4.
    "HardSigmoid": OpRule(
        obstacle=_rises,
        knees=_hard_sigmoid_knees,
        line=hard_sigmoid_line,
        makes=_always(0, 1),
        needs=_level,
    ),
    "Gather": OpRule(moves=True, picks={0: lambda node: node.attributes.get_int("axis", 0)}),
    "Pad": OpRule(moves=True, fill=2, obstacle=_pad_mode),
    "Resize": OpRule(moves=True, obstacle=_resize_mode),
}
# What no target computes on integers, and still has weights.
_OTHERS = _rows(
    "LSTM GRU RNN",
    OpRule(picks={1: lambda node: 1, 2: lambda node: 1}),
)
_NO_ROW = OpRule()


def rule(op_type: str) -> OpRule:
    """The row of a standard operator, or one that says nothing."""
    return OPS.get(op_type) or _OTHERS.get(op_type, _NO_ROW)


def rule_of(node: ir.Node) -> OpRule:
    """The row of the node's operator, or one that says nothing."""
    return _NO_ROW if node.domain else rule(node.op_type)


def view_of(node: ir.Node, shape: Sequence[int], index: int) -> View | None:
    """How `node` with a constant weight of `shape` at input `index` is a matrix product; None if it
    is not known as one.
    """
    own = rule_of(node)
    return own.view(node, shape) if own.view and own.weight == index else None


def own_bias(node: ir.Node) -> ir.Value | None:
    """What the operator itself adds as a bias."""
    index = rule_of(node).bias
    return None if index is None else input_at(node, index)


def bias_add(node: ir.Node) -> ir.Node | None:
    """The Add that gives a product without a bias of its own, and with a constant matrix, one
    constant bias a channel.
    """
    own, product = rule_of(node), node.outputs[0]
    weight = None if own.weight is None or own.bias is not None else operand(node, own.weight)
    add = only_consumer(product)
    if weight is None or weight.ndim != 2 or add is None or not rule_of(add).adds:
        return None
    bias = constant(next(v for v in add.inputs if v is not product))
    shape = product.shape
    # A bias of more dimensions than the product would add them to it.
    if bias is None or not 1 <= bias.ndim <= (shape.rank() if shape else 1):
        return None
    return add if bias.size == bias.shape[-1] == weight.shape[1] else None


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What hands every number on as it is, once.
ONE_FOR_ONE = _names("Cast CastLike Identity Transpose Reshape Flatten Squeeze Unsqueeze")
# What computes from the bits of numbers.
OF_BITS = {"BitCast"}
# What divides by the size of what it reads, so that even small values count.
NORMALIZES = _names(
    "Div GroupNormalization InstanceNormalization LayerNormalization LpNormalization "
    "MeanVarianceNormalization RMSNormalization ReduceL2 ReduceMean ReduceSumSquare "
    "SimplifiedLayerNormalization"
)


def is_normalized(value: ir.Value) -> bool:
    """Whether a normalisation reads `value`, also behind sums and moves."""
    for node in readers_of(value):
        if node.op_type in NORMALIZES:
            return True
        passes_on = rule_of(node).adds or rule_of(node).moves
        if passes_on and any(is_normalized(output) for output in node.outputs):
            return True
    return False


# What draws random numbers, anew at every run.
RANDOM = _names(
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
)


def draws(node: ir.Node) -> bool:
    """Whether `node` draws random numbers: also a Dropout whose training_mode is true, or computed
    at run time.
    """
    if node.domain or node.op_type != "Dropout":
        return not node.domain and node.op_type in RANDOM
    mode = operand(node, 2)
    return input_at(node, 2) is not None and (mode is None or bool(mode))


def cast_to(node: ir.Node) -> ir.DataType | None:
    """The type that a Cast makes."""
    if node.op_type != "Cast" or node.domain:
        return None
    return ir.DataType(node.attributes.get_int("to", 0))


def constant_behind_turn(value: ir.Value | None) -> Array | None:
    """The array of a constant, also of one that is transposed when the model is loaded."""
    array, maker = constant(value), value.producer() if value is not None else None
    if array is not None or maker is None or maker.domain or maker.op_type != "Transpose":
        return array
    turned = operand(maker, 0)
    order = maker.attributes.get_ints("perm") if "perm" in maker.attributes else None
    return None if turned is None else turned.transpose(order)


def computes_on_integers(node: ir.Node) -> bool:
    """Whether `node` is part of a model that is quantized already."""
    return re.fullmatch(r"QLinear\w+|\w*[Qq]uantizeLinear|\w+Integer", node.op_type) is not None


def may_have_weight(op_type: str) -> bool:
    """Whether the operator multiplies with, or picks from, what may be a constant."""
    return rule(op_type).weight is not None or bool(rule(op_type).picks)


def takes_weight(node: ir.Node, index: int) -> bool:
    """Whether the operator has a weight at the input, if that is a constant."""
    return rule_of(node).weight == index or index in rule_of(node).picks


def weights_of(node: ir.Node) -> dict[int, int | None]:
    """The constant float32 weights of `node`, whatever it computes on: input index → axis of the
    channels.
    """
    own = rule_of(node)
    axes = dict(own.picks)
    if own.weight is not None:
        axes[own.weight] = own.channel_axis
        others = own.data or () if own.of_activations else ()
        axes.update((index, lambda node: None) for index in others if index != own.weight)
    arrays = {index: operand(node, index) for index in axes}
    return {
        index: axes[index](node)
        for index, array in arrays.items()
        if array is not None and array.dtype == np.float32 and array.ndim > 1
    }


def picks_rows(node: ir.Node) -> bool:
    """Whether `node` picks rows of a constant matrix."""
    own = rule_of(node)
    table = operand(node, 0) if own.looks_up and own.picks[0](node) == 0 else None
    return table is not None and table.ndim == 2


def words_of(model: ir.Model) -> set[ir.Value]:
    """Tables of words: matrices that rows are picked of, and those of products that score every
    row of one, with the table itself or another matrix of its sizes.
    """
    nodes = nodes_of(model)
    tables = {not_none(node.inputs[0]) for node in nodes if picks_rows(node)}
    sizes = {not_none(constant(table)).shape for table in tables}
    products = [node for node in nodes if rule_of(node).product]
    return tables | {not_none(node.inputs[1]) for node in products if _scores(node, sizes)}


def _scores(product: ir.Node, tables: Collection[tuple[int, ...]]) -> bool:
    """Whether it has an output for every row of a table: tables of words are high, others, as of
    positions, may have the sizes of any weight.
    """
    array = operand(product, 1)
    if array is None or array.ndim != 2:
        return False
    rows, columns = array.shape if is_transposed(product) else array.shape[::-1]
    return (rows, columns) in tables and rows >= WORDS * columns


# --- operators on integers


# Indices of integers, of their scale where the table knows it, and of their zero point.
Operand = tuple[int, int | None, int]


@dataclass(frozen=True)
class Product:
    """A product of bytes: numbers of `reads` that x86 kernels take as the signed and as the
    unsigned one.

    `unsigned` is None where the operator quantizes floats itself, to unsigned bytes. `like` is the
    float operator whose weights are added in the same order, empty if there is none.
    """

    signed: int = 1
    unsigned: int | None = 0
    like: str = ""


@dataclass(frozen=True)
class IntegerRule:
    """An operator on integers: what it reads, indices of the scale and zero point of its output,
    and what it multiplies.

    `axis` is that of the channels of what it reads.
    """

    reads: tuple[Operand, ...] = ()
    writes: tuple[int, int] | None = None
    products: tuple[Product, ...] = ()
    axis: int = 1


_ONE, _TWO = ((0, 1, 2),), ((0, 1, 2), (3, 4, 5))
_LIKE_MATMUL = (Product(like="MatMul"),)

INTEGER_OPS: Mapping[str, IntegerRule] = {
    "QuantizeLinear": IntegerRule(writes=(1, 2)),
    "DequantizeLinear": IntegerRule(_ONE),
    "QLinearConv": IntegerRule(_TWO, (6, 7), (Product(like="Conv"),), axis=0),
    "QLinearMatMul": IntegerRule(_TWO, (6, 7), _LIKE_MATMUL),
    **_rows("QLinearAdd QLinearMul", IntegerRule(_TWO, (6, 7))),
    **_rows("QLinearAveragePool QLinearGlobalAveragePool", IntegerRule(_ONE, (3, 4))),
    **_rows("QLinearLeakyRelu QLinearSigmoid QLinearSoftmax", IntegerRule(_ONE, (3, 4))),
    "QLinearConcat": IntegerRule(writes=(0, 1)),
    "QGemm": IntegerRule(_TWO, (7, 8), (Product(like="Gemm"),)),
    "MatMulInteger": IntegerRule(((0, None, 2), (1, None, 3)), products=_LIKE_MATMUL),
    "MatMulIntegerToFloat": IntegerRule(((0, 2, 4), (1, 3, 5)), products=_LIKE_MATMUL),
    "DynamicQuantizeMatMul": IntegerRule(((1, 2, 3),), products=(Product(0, None, "MatMul"),)),
    "QAttention": IntegerRule(((0, None, 6), (1, None, 7)), products=_LIKE_MATMUL),
    "DynamicQuantizeLSTM": IntegerRule(
        ((1, None, 9), (2, None, 11)), products=(Product(0, None), Product(1, None))
    ),
    # The kernel has weights on the left.
    "ConvInteger": IntegerRule(((0, None, 2), (1, None, 3)), products=(Product(0, 1),)),
}
_NO_INTEGERS = IntegerRule()


def integer_rule(node: ir.Node) -> IntegerRule:
    """The row of an operator on integers, or one that says nothing; of any domain."""
    return INTEGER_OPS.get(node.op_type, _NO_INTEGERS)


Parameters = tuple[ir.Value, ir.Value | None, int]


def parameters(node: ir.Node) -> Iterator[tuple[ir.Value, Parameters]]:
    """The integers that `node` reads or writes, with their scale, zero point and axis."""
    own, values = integer_rule(node), [*node.inputs, *[None] * 9]
    axis = node.attributes.get_int("axis", 1) if is_conversion(node) else own.axis
    for read in own.reads:
        codes, scale = values[read[0]], None if read[1] is None else values[read[1]]
        if codes is not None and scale is not None:
            yield codes, (scale, values[read[2]], axis)
    if own.writes and (scale := values[own.writes[0]]) is not None:
        yield node.outputs[0], (scale, values[own.writes[1]], axis)
    if node.op_type == "DynamicQuantizeLinear":
        yield node.outputs[0], (node.outputs[1], node.outputs[2], axis)
