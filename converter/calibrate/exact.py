"""Products that some processors or runtimes compute wrongly, and models that all compute alike.

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
from converter.emit.wide_products import is_rounded, keep_wide
from converter.graph.edit import (
    Names,
    constant,
    graph_of,
    input_at,
    nodes_of,
    not_none,
    operand,
    set_input,
)
from converter.graph.files import serialized
from converter.graph.qdq import is_dequantize, quantizes
from converter.plan.matrices import breaks_bound
from converter.plan.ops import (
    Operand,
    Product,
    cast_to,
    constant_behind_turn,
    integer_rule,
    rule,
    rule_of,
    view_of,
)
from converter.plan.targets import PAIR_LIMIT

# What makes bytes unsigned.
MIDDLE = 128


@dataclass(frozen=True)
class Saturating:
    """Signed bytes that the product `node` multiplies by unsigned ones, and that let it saturate.

    Input `codes` of `reader`, the product or a DequantizeLinear before it, with their zero point.
    """

    node: ir.Node
    reader: ir.Node
    codes: int
    zero_point: int


def saturating(model: ir.Model) -> Iterator[str]:
    """Names of the nodes that kernels which add products in 16 bits can compute wrongly."""
    yield from dict.fromkeys(operands.node.name or "" for operands in _operands(model))


def exact(model: ir.Model) -> ir.Model:
    """`model` or, where its products can saturate, a copy that gives the same without."""
    if next(_operands(model), None) is None:
        return model
    copy = model.clone()
    names = Names(copy)
    unsigned = [(x.reader, index) for x in _operands(copy) for index in (x.codes, x.zero_point)]
    for reader, index in dict.fromkeys(unsigned):
        _make_unsigned(reader, index, names)
    return copy


def exact_here(model: ir.Model) -> ir.Model:
    """What computes here what `model` does on exact kernels: itself, if this processor has such."""
    model = unrounded(model)
    return exact(model) if saturates_here() else model


def unrounded(model: ir.Model) -> ir.Model:
    """`model` or, where the runtime would round 16-bit activations of products, a copy without."""
    if not any(map(is_rounded, nodes_of(model))):
        return model
    copy = model.clone()
    keep_wide(copy)
    return copy


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
        for name, array, kind in (
            ("x", x, ir.DataType.UINT8),
            ("w", w, ir.DataType.INT8),
        )
    ]
    node = ir.node("MatMulInteger", inputs)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph(
        inputs,
        node.outputs,
        nodes=[node],
        opset_imports={"": 13},
        name="probe",
    )
    session = open_session(serialized(ir.Model(graph, ir_version=8)))
    return run(session, ["y"], {"x": x, "w": w})["y"]


# --- finding them


def _operands(model: ir.Model) -> Iterator[Saturating]:
    for node in nodes_of(model):
        if rule_of(node).pairs:
            yield from _between_pairs(node)
        for product in integer_rule(node).products:
            yield from _of_integers(node, product)


def _between_pairs(node: ir.Node) -> Iterator[Saturating]:
    """The constant weight of a product of what DequantizeLinear restores."""
    data, weight = _restoring(node.inputs[0]), _restoring(node.inputs[1])
    codes = constant(weight.inputs[0]) if weight else None
    if data is None or weight is None or codes is None or codes.dtype != np.int8:
        return
    if _kind_at(data, (0, 1, 2)) not in {ir.DataType.UINT8, ir.DataType.INT8}:
        return
    like = node.op_type if weight.outputs[0] is node.inputs[1] else ""
    if _can_saturate(node, like, codes, _limit(data.inputs[0])):
        yield Saturating(node, weight, 0, 2)


def _of_integers(node: ir.Node, product: Product) -> Iterator[Saturating]:
    reads, limit = integer_rule(node).reads, PAIR_LIMIT
    signed = reads[product.signed]
    if _kind_at(node, signed) != ir.DataType.INT8:
        return
    if product.unsigned is not None:
        unsigned = reads[product.unsigned]
        if _kind_at(node, unsigned) != ir.DataType.UINT8:
            return
        limit = _limit(input_at(node, unsigned[0]))
    codes = constant_behind_turn(input_at(node, signed[0]))
    if codes is None or _can_saturate(node, product.like, codes, limit):
        yield Saturating(node, node, signed[0], signed[2])


def _kind_at(node: ir.Node, read: Operand) -> ir.DataType | None:
    codes, _, zero_point = read
    return _kind(input_at(node, codes), input_at(node, zero_point))


def _restoring(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that `value` comes from, but for moves."""
    maker = value.producer() if value is not None else None
    if maker is None or is_dequantize(maker):
        return maker
    return _restoring(maker.inputs[0]) if rule_of(maker).moves else None


def _kind(codes: ir.Value | None, zero_point: ir.Value | None) -> ir.DataType | None:
    """The type of codes, also where the file does not say it."""
    stated = next((v.dtype for v in (zero_point, codes) if v is not None and v.dtype), None)
    maker = codes.producer() if codes is not None else None
    if stated or maker is None:
        return stated
    if quantizes(maker):
        zero_point = input_at(maker, 2)
        return zero_point.dtype if zero_point is not None else ir.DataType.UINT8
    return _kind(maker.inputs[0], None) if rule_of(maker).moves else cast_to(maker)


def _limit(data: ir.Value | None) -> int:
    """What two weights of one sign may sum up to: more where a Clip leaves the data fewer codes."""
    clip = data.producer() if data is not None else None
    high = operand(clip, 2) if clip is not None and rule_of(clip).bounds else None
    unsigned = high is not None and high.dtype == np.uint8
    return PAIR_LIMIT * 255 // int(high) if unsigned and high else PAIR_LIMIT


def _can_saturate(node: ir.Node, like: str, codes: Array, limit: int) -> bool:
    """Whether two weights that are added in one go break the limit, any two if it is not known."""
    product = ir.Node("", like, [], list(node.attributes.values())) if like else None
    pairs = rule(like).pairs
    if product and pairs and not pairs(product, codes.shape):
        return False
    view = view_of(product, codes.shape, 1) if product else None
    if view is None:
        return bool(2 * np.abs(codes, dtype=np.int32).max(initial=0) > limit)
    return bool(breaks_bound(view.matrix(codes), limit).any())


# --- going round them


def _make_unsigned(reader: ir.Node, index: int, names: Names) -> None:
    """Lets `reader` read bytes that are 128 more at `index`; a zero point that is not there is
    0.
    """
    set_input(reader, index, _unsigned(input_at(reader, index), reader, names))


def _unsigned(value: ir.Value | None, reader: ir.Node, names: Names) -> ir.Value:
    if value is None:
        scale = reader.inputs[1] if is_dequantize(reader) else None
        shape = not_none(scale.shape).numpy() if scale is not None else ()
        return names.constant("middle", np.full(shape, MIDDLE, np.uint8))
    array = constant(value)
    if array is not None:
        return names.constant(f"{value.name}_unsigned", array.view(np.uint8) ^ np.uint8(MIDDLE))
    middle = names.constant("middle", np.array(MIDDLE, np.int32))
    wish = value.name or ""
    for operator, others, attributes in (
        ("Cast", [], {"to": ir.DataType.INT32}),
        ("Add", [middle], {}),
        ("Cast", [], {"to": ir.DataType.UINT8}),
    ):
        node = names.node(operator, [value, *others], wish, attributes=attributes)
        graph_of(reader).insert_before(reader, node)
        value = node.outputs[0]
    return value
