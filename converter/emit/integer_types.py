"""Integer inputs and outputs of the finished model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calib.affine import QParams
from converter.emit.integer_edges import feed_integers, hand_out_integers
from converter.errors import UsageError
from converter.graph.edit import Names, not_none, operand, readers_of
from converter.graph.qdq import is_dequantize, is_quantize
from converter.prepare.pixels import Pixels

TYPES = {"UINT8": ir.DataType.UINT8, "INT8": ir.DataType.INT8}


def take_integers(model: ir.Model, name: str, kind: str, pixels: Pixels | None) -> None:
    """Graph input `name` becomes an integer input: pixels (INT8: less 128), or without `pixels` the
    plan's codes.
    """
    value = next(v for v in model.graph.inputs if v.name == name)
    pair = next(filter(is_quantize, readers_of(value)), None)
    # The plan's own int8 codes are no pixels.
    if _holds(kind, pair) and len(value.uses()) == 1 and not (pixels and kind == "INT8"):
        feed_integers(model.graph, name)
    elif pixels:
        _dequantize_input(model, value, kind, pixels.qparams)
    else:
        msg = f"--inputDataType={kind}: input '{name}' is not quantized to {kind}; leave it float."
        raise UsageError(msg)


def give_integers(model: ir.Model, name: str, kind: str, q: QParams) -> str:
    """Graph output `name` becomes integers; says what they stand for."""
    value = next(v for v in model.graph.outputs if v.name == name)
    restore = value.producer()
    direct = is_dequantize(restore) and _holds(kind, restore)
    conversion = restore if restore and direct else _quantize_output(model, value, kind, q)
    told = (
        f"Output '{name}' is {kind}: value = (code - {operand(conversion, 2)}) * "
        f"{operand(conversion, 1)}."
    )
    if direct:
        hand_out_integers(model.graph, name)
    return told


def _holds(kind: str, conversion: ir.Node | None) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear is one of integers of that kind."""
    zero_point = operand(conversion, 2) if conversion else None
    return zero_point is not None and ir.DataType.from_numpy(zero_point.dtype) == TYPES[kind]


def _dequantize_input(model: ir.Model, value: ir.Value, kind: str, q: QParams) -> None:
    """A new integer input in front of the float one."""
    names, name = Names(model), not_none(value.name)
    shift = 128 if kind == "INT8" else 0
    zero = (q.zero_point.astype(np.int64) - shift).astype(TYPES[kind].numpy())
    fed = ir.Value(
        name=name,
        shape=value.shape,
        type=ir.TensorType(TYPES[kind]),
    )
    value.name = names.fresh(f"{name}_float")
    parameters = (
        names.constant(f"{name}_pixel_scale", q.scale),
        names.constant(f"{name}_pixel_zero_point", zero),
    )
    restored = names.node("DequantizeLinear", [fed, *parameters], name, "values")
    value.replace_all_uses_with(restored.outputs[0])
    model.graph.inputs[list(model.graph.inputs).index(value)] = fed
    model.graph.insert_before(model.graph[0], restored)


def _quantize_output(model: ir.Model, value: ir.Value, kind: str, q: QParams) -> ir.Node:
    """A conversion behind a float output, under the output's name."""
    names, name = Names(model), not_none(value.name)
    value.name = names.fresh(f"{name}_float")
    parameters = (
        names.constant(f"{name}_scale", q.scale),
        names.constant(f"{name}_zero_point", q.zero_point),
    )
    quantize = names.node("QuantizeLinear", [value, *parameters], name, like=value)
    quantize.outputs[0].name = name
    quantize.outputs[0].type = ir.TensorType(TYPES[kind])
    model.graph.append(quantize)
    model.graph.outputs[list(model.graph.outputs).index(value)] = quantize.outputs[0]
    return quantize
