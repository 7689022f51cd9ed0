"""Products of bytes that some processors compute wrongly, and models that all compute alike.

x86 processors with AVX2 or AVX-512 but without VNNI multiply unsigned by signed bytes and add two
products in 16 bits, which saturates. Two unsigned bytes they multiply exactly. So a model whose
signed operands and their zero points are 128 more, and unsigned, stands for the same numbers and
gives the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.session import open_session, run
from converter.graph.edit import Names, constant, graph_of, known
from converter.graph.files import serialized
from converter.plan.matrices import breaks_bound, view_of
from converter.plan.ops import OPS

# Two codes of one sign may sum up to this: 128 * 255 fits into 16 bits.
PAIR_LIMIT = 128
# What makes bytes unsigned.
MIDDLE = 128


@dataclass(frozen=True)
class Product:
    """An operator that multiplies bytes: (codes, zero point) among its inputs.

    `unsigned` is None where the operator quantizes floats itself, to unsigned bytes. `like` is the
    float operator whose weights are added in the same order, empty if there is none.
    """

    signed: tuple[int, int]
    unsigned: tuple[int, int] | None = None
    like: str = ""


PRODUCTS = {
    "QLinearConv": (Product((3, 5), (0, 2), "Conv"),),
    "QLinearMatMul": (Product((3, 5), (0, 2), "MatMul"),),
    "QGemm": (Product((3, 5), (0, 2), "Gemm"),),
    "MatMulInteger": (Product((1, 3), (0, 2), "MatMul"),),
    "MatMulIntegerToFloat": (Product((1, 5), (0, 4), "MatMul"),),
    "DynamicQuantizeMatMul": (Product((1, 3), None, "MatMul"),),
    "QAttention": (Product((1, 7), (0, 6), "MatMul"),),
    "DynamicQuantizeLSTM": (Product((1, 9)), Product((2, 11))),
    # The kernel has weights on the left.
    "ConvInteger": (Product((0, 2), (1, 3)),),
}
# Float operators that become integer products between conversions, where signed activations turn
# unsigned first.
BETWEEN_PAIRS = {"Conv", "MatMul", "Gemm"}


@dataclass(frozen=True)
class Operand:
    """Signed bytes that the product `node` multiplies by unsigned ones, and that let it saturate.

    Input `codes` of `reader`, the product or a DequantizeLinear before it, with their zero point.
    """

    node: ir.Node
    reader: ir.Node
    codes: int
    zero_point: int


def saturating(model: ir.Model) -> Iterator[str]:
    """Names of the nodes that kernels which add products in 16 bits can compute wrongly."""
    yield from dict.fromkeys(operand.node.name or "" for operand in _operands(model))


def exact(model: ir.Model) -> ir.Model:
    """`model` or, where its products can saturate, a copy that gives the same without."""
    if next(_operands(model), None) is None:
        return model
    copy = model.clone()
    names = Names(copy)
    found = [(x.reader, index) for x in _operands(copy) for index in (x.codes, x.zero_point)]
    for reader, index in dict.fromkeys(found):
        _make_unsigned(reader, index, names)
    return copy


def exact_here(model: ir.Model) -> ir.Model:
    """What computes here what `model` does on exact kernels: itself, if this processor has such."""
    return exact(model) if saturates_here() else model


@cache
def saturates_here() -> bool:
    """Whether this processor's kernels saturate."""
    return saturates(_multiplied)


def saturates(multiply: Callable[[Array, Array], Array]) -> bool:
    """Whether `multiply` of an unsigned by a signed matrix loses what does not fit into 16 bits."""
    x, w = np.full((4, 64), 255, np.uint8), np.full((64, 8), 127, np.int8)
    return not np.array_equal(multiply(x, w), x.astype(np.int64) @ w.astype(np.int64))


def _multiplied(x: Array, w: Array) -> Array:
    """The product as ONNX Runtime computes it here (int32)."""
    inputs = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(kind))
        for name, array, kind in (("x", x, ir.DataType.UINT8), ("w", w, ir.DataType.INT8))
    ]
    node = ir.node("MatMulInteger", inputs)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 13}, name="probe")
    session = open_session(serialized(ir.Model(graph, ir_version=8)))
    return run(session, ["y"], {"x": x, "w": w})["y"]


# --- finding them


def _operands(model: ir.Model) -> Iterator[Operand]:
    for node in (node for graph in model.graphs() for node in graph):
        if node.op_type in BETWEEN_PAIRS and not node.domain:
            yield from _between_pairs(node)
        for product in PRODUCTS.get(node.op_type, ()):
            yield from _of_integers(node, product)


def _between_pairs(node: ir.Node) -> Iterator[Operand]:
    """The constant weight of a product of what DequantizeLinear restores."""
    data, weight = _restoring(node.inputs[0]), _restoring(node.inputs[1])
    codes = constant(weight.inputs[0]) if weight else None
    if data is None or weight is None or codes is None or codes.dtype != np.int8:
        return
    if _kind(data.inputs[0], _input(data, 2)) not in {ir.DataType.UINT8, ir.DataType.INT8}:
        return
    like = node.op_type if weight.outputs[0] is node.inputs[1] else ""
    if _can_saturate(node, like, codes, _limit(data.inputs[0])):
        yield Operand(node, weight, 0, 2)


def _of_integers(node: ir.Node, product: Product) -> Iterator[Operand]:
    signed, unsigned = (
        tuple(_input(node, index) for index in pair) if pair else None
        for pair in (product.signed, product.unsigned)
    )
    assert signed is not None
    if _kind(*signed) != ir.DataType.INT8:
        return
    if unsigned is not None and _kind(*unsigned) != ir.DataType.UINT8:
        return
    codes = constant(signed[0])
    limit = _limit(unsigned[0]) if unsigned else PAIR_LIMIT
    if codes is None or _can_saturate(node, product.like, codes, limit):
        yield Operand(node, node, *product.signed)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _restoring(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that `value` comes from, but for moves."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.op_type == "DequantizeLinear":
        return maker
    moves = maker.op_type in OPS and OPS[maker.op_type].moves
    return _restoring(maker.inputs[0]) if moves else None


def _kind(codes: ir.Value | None, zero_point: ir.Value | None) -> ir.DataType | None:
    """The type of codes, also where the file does not say it."""
    stated = next((v.dtype for v in (zero_point, codes) if v is not None and v.dtype), None)
    maker = codes.producer() if codes is not None else None
    if stated or maker is None:
        return stated
    if maker.op_type in {"QuantizeLinear", "DynamicQuantizeLinear"}:
        zero_point = _input(maker, 2) if maker.op_type == "QuantizeLinear" else None
        return zero_point.dtype if zero_point is not None else ir.DataType.UINT8
    if maker.op_type == "Cast":
        return ir.DataType(maker.attributes.get_int("to", 0))
    moves = maker.op_type in OPS and OPS[maker.op_type].moves
    return _kind(maker.inputs[0], None) if moves else None


def _limit(data: ir.Value | None) -> int:
    """What two weights of one sign may sum up to: more where a Clip leaves the data fewer codes."""
    clip = data.producer() if data is not None else None
    high = constant(_input(clip, 2)) if clip is not None and clip.op_type == "Clip" else None
    unsigned = high is not None and high.dtype == np.uint8
    return PAIR_LIMIT * 255 // int(high) if unsigned and high else PAIR_LIMIT


def _can_saturate(node: ir.Node, like: str, codes: Array, limit: int) -> bool:
    """Whether two weights that are added in one go break the limit, any two if it is not known."""
    depthwise = codes.ndim > 1 and codes.shape[:2] == (node.attributes.get_int("group", 1), 1)
    if like == "Conv" and depthwise:
        return False  # its kernels add in 32 bits
    product = ir.Node("", like, [], list(node.attributes.values())) if like else None
    view = view_of(product, codes.shape, 1) if product else None
    if view is None:
        return bool(2 * np.abs(codes, dtype=np.int32).max(initial=0) > limit)
    return bool(breaks_bound(view.matrix(codes), limit).any())


# --- going round them


def _make_unsigned(reader: ir.Node, index: int, names: Names) -> None:
    """Lets `reader` read bytes that are 128 more at `index`; a zero point that is not there is
    0.
    """
    old = _input(reader, index)
    reader.resize_inputs(max(index + 1, len(reader.inputs)))
    reader.replace_input_with(index, _unsigned(old, reader, names))


def _unsigned(value: ir.Value | None, reader: ir.Node, names: Names) -> ir.Value:
    if value is None:
        scale = reader.inputs[1] if reader.op_type == "DequantizeLinear" else None
        shape = known(scale.shape).numpy() if scale is not None else ()
        return names.constant("middle", np.full(shape, MIDDLE, np.uint8))
    array = constant(value)
    if array is not None:
        return names.constant(f"{value.name}_unsigned", array.view(np.uint8) ^ np.uint8(MIDDLE))
    middle, wish = names.constant("middle", np.array(MIDDLE, np.int32)), value.name or ""
    for operator, others, attributes in (
        ("Cast", [], {"to": ir.DataType.INT32}),
        ("Add", [middle], {}),
        ("Cast", [], {"to": ir.DataType.UINT8}),
    ):
        node = names.node(operator, [value, *others], wish, attributes=attributes)
        graph_of(reader).insert_before(reader, node)
        value = node.outputs[0]
    return value
