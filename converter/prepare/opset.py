"""Raises a model to the opset that quantized graphs need, by ONNX's own converter, and checks the numbers."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from converter.errors import ModelError
from converter.model import first_line

# Per-channel QuantizeLinear/DequantizeLinear, the youngest operators that are written, came with opset 13.
LEAST_OPSET = 13


def needs_conversion(model: ir.Model) -> bool:
    """Whether the model's opset is older than what the quantized graph is written in."""
    return (model.graph.opset_imports.get("") or LEAST_OPSET) < LEAST_OPSET


def convert_opset(model: ir.Model) -> ir.Model:
    """The same model at LEAST_OPSET; raises ModelError where an operator cannot be converted."""
    try:
        return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), LEAST_OPSET))
    except Exception as error:
        old = model.graph.opset_imports.get("")
        msg = (
            f"The model's opset {old} cannot be converted to {LEAST_OPSET} ({first_line(error)}); "
            f"export it again with opset {LEAST_OPSET} or newer."
        )
        raise ModelError(msg) from error
