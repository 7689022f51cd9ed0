"""Lets dimensions be read from one tensor only: exporters read the same ones anew in every layer."""

from __future__ import annotations

import onnx_ir as ir


class ShareShapesPass(ir.passes.InPlacePass):
    """Lets a Shape read what an earlier one of its graph reads, where all dimensions have the same size or name.

    As ONNX has it, equal names are equal sizes. What is computed from equal shapes are common subexpressions then.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewires in place."""
        modified = False
        for graph in model.graphs():
            first: dict[tuple[str, ...], ir.Value] = {}
            for node in (node for node in graph if node.op_type == "Shape" and not node.domain):
                x = node.inputs[0]
                assert x is not None
                if x.shape is not None and not x.shape.has_unknown_dim():
                    earlier = first.setdefault(tuple(map(str, x.shape)), x)
                    node.replace_input_with(0, earlier)
                    modified |= earlier is not x
        return ir.passes.PassResult(model, modified)
