"""Types and shapes of all tensors: as ONNX infers them and, where that knows no better, as the
runtime does.
"""

from __future__ import annotations

import contextlib

import onnx
import onnx_ir as ir

from calib import CalibError
from calib.session import open_session
from converter.graph.edit import values_by_name
from converter.graph.files import saved
from converter.prepare.opset import without_weights

# What ONNX Runtime calls the types of tensors.
NAMES = {f"tensor({kind.name.lower()})": kind for kind in ir.DataType}


def infer_types(model: ir.Model) -> None:
    """Completes types and shapes in place, by ONNX's own inference as far as it comes: a node that
    it cannot follow does not keep it from the others.
    """
    copy = model.clone()
    without_weights(copy)
    with contextlib.suppress(onnx.shape_inference.InferenceError):
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(copy), data_prop=True)
        for graph, typed in zip(model.graphs(), ir.from_proto(proto).graphs(), strict=True):
            inferred = values_by_name(typed)
            for name, value in values_by_name(graph).items():
                value.type = inferred[name].type or value.type
                if inferred[name].shape is not None:
                    value.shape = inferred[name].shape


def complete_types(model: ir.Model) -> None:
    """Gives tensors of the main graph that have no type, in place, the one that ONNX Runtime finds,
    and the shape.

    Operators of other domains are unknown to ONNX, and so is all that depends on them. Where the
    runtime does not take the model they stay untyped, and float.
    """
    values = (value for node in model.graph for value in node.outputs)
    untyped = {value.name: value for value in values if value.name and value.type is None}
    if not untyped:
        return
    with contextlib.suppress(CalibError), saved(model, untyped) as path:
        for output in open_session(path, optimize=False, pack=False).get_outputs():
            value, dtype = untyped.get(output.name), NAMES.get(output.type)
            if value is not None and dtype is not None:
                value.type = ir.TensorType(dtype)
                value.shape = value.shape or _shape(output.shape)


def _shape(sizes: list[int | str | None]) -> ir.Shape | None:
    """A shape as ONNX Runtime gives it: its names are no better than none, and for an unknown
    number of dimensions it says the same as for none.
    """
    return ir.Shape([size if isinstance(size, int) else None for size in sizes]) if sizes else None
