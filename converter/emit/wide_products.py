"""Products of 16-bit activations in a form that ONNX Runtime computes as it stands.

On CPUs it makes MatMulNBits of a product with a weight behind a DequantizeLinear, and that rounds
what it multiplies to 8 bits; a float weight of a Gemm it quantizes to do so. It leaves a Gemm that
transposes codes alone, and a MatMul with what is floats as soon as the model is loaded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calib.affine import along
from converter.graph.edit import Names, constant, graph_of, input_at, nodes_of, not_none, operand
from converter.graph.qdq import is_dequantize
from converter.plan.ops import is_transposed, rule_of

_WIDE = {ir.DataType.UINT16, ir.DataType.INT16}


def is_rounded(node: ir.Node) -> bool:
    """Whether ONNX Runtime would round what the product reads from 16 bits to 8."""
    if not rule_of(node).product:
        return False
    data, weight = (_restoring(node.inputs[index]) for index in (0, 1))
    if data is None or weight is None or constant(weight.inputs[0]) is None:
        return False
    transposes = rule_of(node).bias is not None and is_transposed(node)
    return _type_of(data) in _WIDE and not transposes


def keep_wide(model: ir.Model) -> None:
    """Writes all such products of a model the other way, in place."""
    names = Names(model)
    for node in filter(is_rounded, nodes_of(model)):
        if rule_of(node).bias is not None:
            _transpose(node, names)
        else:
            _unpack(node, names)


def _restoring(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that `value` comes from, but for moves."""
    maker = value.producer() if value is not None else None
    if maker is None or is_dequantize(maker):
        return maker
    return _restoring(maker.inputs[0]) if rule_of(maker).moves else None


def _type_of(restore: ir.Node) -> ir.DataType | None:
    zero_point = input_at(restore, 2)
    return None if zero_point is None else zero_point.dtype


def _transpose(gemm: ir.Node, names: Names) -> None:
    """Lets a Gemm read the codes of its weight the other way round."""
    old = not_none(not_none(gemm.inputs[1]).producer())
    codes, *parameters = old.inputs
    turned = np.ascontiguousarray(not_none(constant(codes)).T)
    inputs = [names.constant(f"{not_none(codes).name}_turned", turned), *parameters]
    attributes = {"axis": 1 - old.attributes.get_int("axis", 1)}
    wish = not_none(gemm.name)
    node = names.node("DequantizeLinear", inputs, wish, "turned", attributes=attributes)
    graph_of(gemm).insert_before(gemm, node)
    gemm.replace_input_with(1, node.outputs[0])
    gemm.attributes["transB"] = ir.AttrInt64("transB", 1)
    _drop(old)


def _unpack(product: ir.Node, names: Names) -> None:
    """Lets a product read its weight as codes that are cast and scaled at loading."""
    old = not_none(not_none(product.inputs[1]).producer())
    codes, scale, axis = not_none(old.inputs[0]), operand(old, 1), old.attributes.get_int("axis", 1)
    shape, numbers = not_none(constant(codes)).shape, not_none(scale)
    by = numbers if numbers.ndim == 0 else along(numbers, axis, shape)
    wish = not_none(product.name)
    cast = names.node(
        "Cast",
        [codes],
        wish,
        attributes={"to": ir.DataType.FLOAT},
    )
    scales = names.constant(f"{codes.name}_by", by)
    floats = names.node("Mul", [cast.outputs[0], scales], wish)
    graph_of(product).insert_before(product, [cast, floats])
    product.replace_input_with(1, floats.outputs[0])
    _drop(old)


def _drop(restore: ir.Node) -> None:
    value = restore.outputs[0]
    if not value.uses() and not value.is_graph_output():
        graph_of(restore).remove(restore, safe=True)
