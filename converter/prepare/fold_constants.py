"""Computes what depends on constants only, by onnxscript's folding pass."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from converter.model import operand

# Scales and reshapes of weights are folded whatever their size; generated tables (a position grid)
# up to 4 MB.
INPUT_LIMIT = 1 << 30
OUTPUT_LIMIT = 1 << 20
CONVERSIONS = {"DequantizeLinear", "QuantizeLinear"}


def fold_constants(model: ir.Model) -> None:
    """Computes in place; quantization nodes are never folded."""
    FoldConstantsPass(
        shape_inference=True,
        input_size_limit=INPUT_LIMIT,
        output_size_limit=OUTPUT_LIMIT,
        should_fold=_worth_folding,
    )(model)


def _worth_folding(node: ir.Node) -> bool | None:
    if _is_float_cast(node):
        return None
    # A weight stored as integers must stay as small as it is; its scales and zero points may be
    # cast.
    parameter = all(
        use.idx > 0 and use.node.op_type in CONVERSIONS for use in node.outputs[0].uses()
    )
    return (
        False if node.op_type in CONVERSIONS or (node.op_type == "Cast" and not parameter) else None
    )


def _is_float_cast(node: ir.Node) -> bool:
    """Whether a Cast makes float32 of a constant in another float type, as a weight in float64."""
    array = operand(node, 0) if node.op_type == "Cast" else None
    to_float = node.attributes.get_int("to", 0) == ir.DataType.FLOAT
    return array is not None and to_float and array.dtype.kind == "f"
