"""Computes what depends on constants only, by onnxscript's folding pass."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnxscript import optimizer

from converter.graph.edit import nodes_of, operand
from converter.graph.qdq import is_conversion
from converter.plan.ops import ONE_FOR_ONE, cast_to, takes_weight

# Scales and reshapes of weights are folded whatever their size; generated tables (a position grid)
# up to 4 MB.
INPUT_LIMIT = 1 << 30
OUTPUT_LIMIT = 1 << 20
# Numbers that onnxscript leaves alone, as they could be many, though shapes are computed with them.
FEW = 64


def fold_constants(model: ir.Model) -> None:
    """Computes in place; quantization nodes are never folded.

    What becomes a weight is computed whatever its size, also where others read the constant too:
    in fewer bits two of them are smaller than one.
    """
    _fold(model, OUTPUT_LIMIT, _worth_folding)
    if any(map(_leads_to_weight, nodes_of(model))):
        _fold(model, INPUT_LIMIT, _becomes_weight)


def _fold(model: ir.Model, limit: int, worth: Callable[[ir.Node], bool | None]) -> None:
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=INPUT_LIMIT,
        output_size_limit=limit,
        should_fold=worth,
    )


def _becomes_weight(node: ir.Node) -> bool | None:
    return _worth_folding(node) if _leads_to_weight(node) else False


def _leads_to_weight(node: ir.Node) -> bool:
    """Whether `node` hands numbers on, one for one, to where a weight is read."""
    return node.op_type in ONE_FOR_ONE and any(
        takes_weight(use.node, use.idx) or _leads_to_weight(use.node)
        for use in node.outputs[0].uses()
    )


def _worth_folding(node: ir.Node) -> bool | None:
    if _is_float_cast(node):
        return None
    if node.op_type == "ConstantOfShape" and (shape := operand(node, 0)) is not None:
        return True if shape.prod() <= FEW else None
    # A weight stored as integers must stay as small as it is; its scales and zero points may be
    # cast.
    parameter = all(use.idx > 0 and is_conversion(use.node) for use in node.outputs[0].uses())
    return False if is_conversion(node) or (cast_to(node) and not parameter) else None


def _is_float_cast(node: ir.Node) -> bool:
    """Whether a Cast makes float32 of a constant in another float type, as a weight in float64, or
    float64 only on the way there.
    """
    to, array, uses = cast_to(node), operand(node, 0), node.outputs[0].uses()
    cast_again = bool(uses) and all(cast_to(use.node) for use in uses)
    there = to == ir.DataType.FLOAT or (to == ir.DataType.DOUBLE and cast_again)
    return array is not None and there and array.dtype.kind == "f"
