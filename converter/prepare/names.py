"""Gives every node a name of its own, so that configs and reports can refer to it."""

from __future__ import annotations

import onnx_ir as ir


class NameNodesPass(ir.passes.InPlacePass):
    """Names unnamed nodes after their first output and numbers repeated names; given names stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames in place."""
        taken: set[str] = set()
        modified = False
        for node in (node for graph in model.graphs() for node in graph):
            name = _free(node.name or node.outputs[0].name or node.op_type, taken)
            taken.add(name)
            modified |= name != node.name
            node.name = name
        return ir.passes.PassResult(model, modified)


def _free(wish: str, taken: set[str]) -> str:
    name, number = wish, 1
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    return name
