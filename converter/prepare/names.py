"""Gives every node a name of its own, so that configs and reports can refer to it."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from converter.graph.edit import nodes_of


def name_nodes(model: ir.Model) -> None:
    """Names unnamed nodes after their first output and numbers repeated names, in place; given
    names stay.
    """
    nodes = nodes_of(model)
    first = {node.name: node for node in reversed(nodes) if node.name}
    taken = set(first)
    for node in (node for node in nodes if first.get(node.name or "") is not node):
        wish = node.name or node.outputs[0].name or node.op_type
        numbered = (f"{wish}_{number}" for number in itertools.count(2))
        node.name = next(name for name in itertools.chain([wish], numbered) if name not in taken)
        taken.add(node.name)
