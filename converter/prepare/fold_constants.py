"""Computes what depends on constants only, by onnxscript's folding pass."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer._constant_folding import FoldConstantsPass

# Scales and reshapes of weights are folded whatever their size; generated tables (a position grid) up to 4 MB.
INPUT_LIMIT = 1 << 30
OUTPUT_LIMIT = 1 << 20


def _worth_folding(node: ir.Node) -> bool | None:
    # A weight stored as integers must stay as small as it is.
    return False if node.op_type in {"DequantizeLinear", "QuantizeLinear", "Cast"} else None


def fold_constants_pass() -> ir.passes.PassBase:
    """The configured pass; quantization nodes are never folded."""
    folding: ir.passes.PassBase = FoldConstantsPass(
        shape_inference=True, input_size_limit=INPUT_LIMIT, output_size_limit=OUTPUT_LIMIT, should_fold=_worth_folding
    )
    return folding
