"""Types of what ONNX's own inference does not know, or onnx_ir does not take from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
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


@contextmanager
def sequences_untyped(model: ir.Model) -> Iterator[None]:
    """While it lasts, types are inferred; sequences and optionals that have none stay without.

    onnx_ir takes them for tensors of their elements, which the runtime refuses.
    """
    found: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        for index, value in enumerate(node.outputs):
            if value.type is None and _is_no_tensor(node, index, found):
                found.add(value)
    yield
    for value in found:
        value.type = value.shape = None


def _is_no_tensor(node: ir.Node, index: int, found: set[ir.Value]) -> bool:
    """Whether an output is a sequence or an optional, as `found` are before it."""
    if node.domain or not onnx.defs.has(node.op_type):
        return False
    if (passed := _passed_on(node, index)) is not None:
        declared = passed.type is not None and not isinstance(passed.type, ir.TensorType)
        return declared or passed in found
    outputs = onnx.defs.get_schema(node.op_type).outputs
    kinds = outputs[min(index, len(outputs) - 1)].types
    return not any(kind.startswith("tensor") for kind in kinds)


def _passed_on(node: ir.Node, index: int) -> ir.Value | None:
    """The value that an output is of the type of, for operators that hand on any type."""
    if node.op_type == "Identity":
        return node.inputs[0]
    if node.op_type == "If":
        return node.attributes["then_branch"].as_graph().outputs[index]
    return node.attributes["body"].as_graph().outputs[index + 1] if node.op_type == "Loop" else None


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
