"""Raises a model to the opset that quantized graphs need, by ONNX's own converter."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from converter.errors import ModelError
from converter.model import first_line

# Per-channel QuantizeLinear/DequantizeLinear, the youngest operators that are written, came with
# opset 13.
LEAST_OPSET = 13
# The file formats that go with opsets; from version 4 on, initializers need not be inputs.
IR_VERSIONS = {LEAST_OPSET: 7, 21: 10, 25: 13}


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators the model is written in."""
    return model.graph.opset_imports.get("") or LEAST_OPSET


def raise_opset(model: ir.Model, least: int = LEAST_OPSET) -> ir.Model:
    """The model, converted where its opset is below `least`; raises ModelError where that is
    impossible.
    """
    model.ir_version = max(
        [model.ir_version, *(version for opset, version in IR_VERSIONS.items() if opset <= least)]
    )
    if opset_of(model) > (newest := onnx.defs.onnx_opset_version()):
        msg = (
            f"The model's opset {opset_of(model)} is newer than any known; export it again with "
            f"opset {newest}."
        )
        raise ModelError(msg)
    if opset_of(model) >= least:
        return model
    try:
        raised: ir.Model = ir.from_proto(
            onnx.version_converter.convert_version(ir.to_proto(model), least)
        )
        raised.ir_version = max(raised.ir_version, model.ir_version)
        return raised
    except Exception as error:
        msg = (
            f"The model's opset {opset_of(model)} cannot be converted to {least} "
            f"({first_line(error)}); "
            f"export it again with opset {least} or newer."
        )
        raise ModelError(msg) from error
