"""What a QuantizeLinear/DequantizeLinear pair says of its integers."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from calib.affine import INT32, IntFormat, QParams
from converter.graph.edit import constant

CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}


def is_quantize(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether the node makes integers of floats with given parameters."""
    return node is not None and node.op_type == "QuantizeLinear"


def is_dequantize(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether the node makes floats of integers."""
    return node is not None and node.op_type == "DequantizeLinear"


def is_conversion(node: ir.Node) -> bool:
    """Whether the node is one half of a pair."""
    return node.op_type in CONVERSIONS


def quantizes(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether the node makes integers of floats, be it with parameters that it finds itself."""
    return is_quantize(node) or (node is not None and node.op_type == "DynamicQuantizeLinear")


def codes_behind(value: ir.Value | None) -> ir.Value | None:
    """The integers that a DequantizeLinear makes `value` of, None if none does."""
    maker = value.producer() if value is not None else None
    return maker.inputs[0] if is_dequantize(maker) else None


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
