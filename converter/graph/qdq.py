"""What a QuantizeLinear/DequantizeLinear pair, or an operator on integers, says of its integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from calib.affine import INT32, IntFormat, QParams
from converter.graph.edit import constant

Operand = tuple[int, int, int]


Parameters = tuple[ir.Value, ir.Value | None, int]


_ONE, _TWO = ((0, 1, 2),), ((0, 1, 2), (3, 4, 5))


# Where operators say what integers stand for: (codes, scale, zero point) of inputs, (scale, zero
# point) of the output.
INTEGER_OPS: Mapping[str, tuple[tuple[Operand, ...], tuple[int, int] | None]] = {
    "QuantizeLinear": ((), (1, 2)),
    "DequantizeLinear": (_ONE, None),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul"), (_TWO, (6, 7))),
    **dict.fromkeys((f"QLinear{x}AveragePool" for x in ("", "Global")), (_ONE, (3, 4))),
    **dict.fromkeys((f"QLinear{x}" for x in ("LeakyRelu", "Sigmoid", "Softmax")), (_ONE, (3, 4))),
    "QLinearConcat": ((), (0, 1)),
    "QGemm": (_TWO, (7, 8)),
    "MatMulIntegerToFloat": (((0, 2, 4), (1, 3, 5)), None),
    "DynamicQuantizeMatMul": (((1, 2, 3),), None),
}


QUANTIZERS = {"QuantizeLinear", "DynamicQuantizeLinear"}


def parameters(node: ir.Node) -> Iterator[tuple[ir.Value, Parameters]]:
    """The integers that `node` reads or writes, with their scale, zero point and axis."""
    inputs, output = INTEGER_OPS.get(node.op_type, ((), None))
    axis = node.attributes.get_int("axis", 1) if node.op_type.endswith("antizeLinear") else 1
    values = [*node.inputs, *[None] * 9]
    for codes, scale, zero_point in inputs:
        if (found := values[codes]) is not None and (by := values[scale]) is not None:
            yield found, (by, values[zero_point], 0 if node.op_type == "QLinearConv" else axis)
    if output and (by := values[output[0]]) is not None:
        yield node.outputs[0], (by, values[output[1]], axis)
    if node.op_type == "DynamicQuantizeLinear":
        yield node.outputs[0], (node.outputs[1], node.outputs[2], axis)


def codes_behind(value: ir.Value | None) -> ir.Value | None:
    """The integers that a DequantizeLinear makes `value` of, None if none does."""
    maker = value.producer() if value is not None else None
    return maker.inputs[0] if maker is not None and maker.op_type == "DequantizeLinear" else None


def qparams_of(
    codes: ir.Value, scale: ir.Value, zero_point: ir.Value | None, axis: int
) -> QParams | None:
    """What is known of integers when the model is loaded; None if their scale is computed."""
    by, zero = constant(scale), constant(zero_point)
    kind = (zero_point if zero_point is not None else codes).dtype
    if by is None or kind is None:
        return None
    zero = np.zeros(by.shape, kind.numpy()) if zero is None else zero
    fmt = INT32 if kind == ir.DataType.INT32 else IntFormat(kind.bitwidth, kind.is_signed())
    return (
        QParams(by.squeeze(), zero.squeeze(), fmt) if by.size == 1 else QParams(by, zero, fmt, axis)
    )
