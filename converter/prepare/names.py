"""Gives every node a name of its own, so that configs and reports can refer to it."""

from __future__ import annotations

import onnx_ir as ir


class NameNodesPass(ir.passes.InPlacePass):
    """Names unnamed nodes after their first output and numbers repeated names; given names stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Renames in place."""
        nodes = [node for graph in model.graphs() for node in graph]
        first = {node.name: node for node in reversed(nodes) if node.name}
        taken = set(first)
        renamed = [node for node in nodes if not node.name or first[node.name] is not node]
        for node in renamed:
            node.name = _free(node.name or node.outputs[0].name or node.op_type, taken)
            taken.add(node.name)
        return ir.passes.PassResult(model, bool(renamed))


def _free(wish: str, taken: set[str]) -> str:
    name, number = wish, 1
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    return name
