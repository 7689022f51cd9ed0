"""Types of what ONNX's own inference does not know: as the runtime infers them."""

from __future__ import annotations

import onnx_ir as ir

from calib import CalibError
from calib.session import open_session
from converter.model import saved

# How ONNX Runtime names the types that matter here.
NAMES = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(int64)": ir.DataType.INT64,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(uint8)": ir.DataType.UINT8,
    "tensor(int8)": ir.DataType.INT8,
    "tensor(bool)": ir.DataType.BOOL,
}


def complete_types(model: ir.Model) -> None:
    """Gives tensors of the main graph that have no type, in place, the one that ONNX Runtime finds.

    Operators of other domains are unknown to ONNX, and so is all that depends on them. Where the
    runtime does not take the model they stay untyped, and float.
    """
    untyped = {
        value.name: value
        for node in model.graph
        for value in node.outputs
        if value.name and value.type is None
    }
    if not untyped:
        return
    try:
        with saved(model, untyped) as path:
            found = {
                output.name: output.type
                for output in open_session(path, optimize=False).get_outputs()
            }
    except CalibError:
        return
    for name, value in untyped.items():
        if dtype := NAMES.get(found.get(name, "")):
            value.type = ir.TensorType(dtype)
