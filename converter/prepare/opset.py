"""Raises a model to the opset that quantized graphs need, by ONNX's own converter."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from converter.errors import ModelError
from converter.model import first_line

# Per-channel QuantizeLinear/DequantizeLinear, the youngest operators that are written, came with opset 13.
LEAST_OPSET = 13
# The file format that goes with it; from version 4 on, initializers need not be inputs.
LEAST_IR_VERSION = 7


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators the model is written in."""
    return model.graph.opset_imports.get("") or LEAST_OPSET


def raise_opset(model: ir.Model) -> ir.Model:
    """The model, converted where it is older than LEAST_OPSET; raises ModelError where that is impossible."""
    model.ir_version = max(model.ir_version, LEAST_IR_VERSION)
    if opset_of(model) >= LEAST_OPSET:
        return model
    try:
        raised: ir.Model = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), LEAST_OPSET))
        return raised
    except Exception as error:
        msg = (
            f"The model's opset {opset_of(model)} cannot be converted to {LEAST_OPSET} ({first_line(error)}); "
            f"export it again with opset {LEAST_OPSET} or newer."
        )
        raise ModelError(msg) from error
