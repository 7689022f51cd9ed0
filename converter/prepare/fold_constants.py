"""Computes what depends on constants only, by onnxscript's folding pass."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer._constant_folding import FoldConstantsPass

# Scales and reshapes of weights are folded whatever their size; generated tables (a position grid) up to 4 MB.
INPUT_LIMIT = 1 << 30
OUTPUT_LIMIT = 1 << 20
CONVERSIONS = {"DequantizeLinear", "QuantizeLinear"}


def _worth_folding(node: ir.Node) -> bool | None:
    # A weight stored as integers must stay as small as it is; its scales and zero points may be cast.
    parameter = all(use.idx > 0 and use.node.op_type in CONVERSIONS for use in node.outputs[0].uses())
    return False if node.op_type in CONVERSIONS or (node.op_type == "Cast" and not parameter) else None


def fold_constants_pass() -> ir.passes.PassBase:
    """The configured pass; quantization nodes are never folded."""
    folding: ir.passes.PassBase = FoldConstantsPass(
        shape_inference=True, input_size_limit=INPUT_LIMIT, output_size_limit=OUTPUT_LIMIT, should_fold=_worth_folding
    )
    return folding


class DropUnreadPass(ir.passes.InPlacePass):
    """Drops the constants of all graphs that nothing reads, or only a branch that folding has cut off."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Drops in place."""
        alive = {node for graph in model.graphs() for node in graph}
        values = [value for graph in model.graphs() for value in graph.initializers.values()]
        for use in [use for value in values for use in value.uses() if use.node not in alive]:
            use.node.replace_input_with(use.idx, None)
        unread = [value for value in values if not value.uses() and not value.is_graph_output()]
        for value in unread:
            assert isinstance(value.graph, ir.Graph)
            del value.graph.initializers[value.name or ""]
        return ir.passes.PassResult(model, bool(unread))
