"""Removes Identity and, as models here only run for inference, Dropout nodes."""

from __future__ import annotations

import onnx_ir as ir

from converter.graph.edit import graph_of, nodes_of, not_none
from converter.plan.ops import draws


def drop_identities(model: ir.Model) -> None:
    """Lets readers of y = Identity(x) read x, in place.

    A node stays where its output is a graph output (the name must survive), where it copies a value
    of an outer graph, or where the mask of a Dropout is read.
    """
    for node in [node for node in nodes_of(model) if _removable(node)]:
        node.outputs[0].replace_all_uses_with(not_none(node.inputs[0]))
        graph_of(node).remove(node, safe=True)


def _removable(node: ir.Node) -> bool:
    if node.op_type not in {"Identity", "Dropout"} or node.domain or draws(node):
        return False
    source = node.inputs[0]
    unread = not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    return (
        source is not None
        and source.graph is node.graph
        and unread
        and not node.outputs[0].is_graph_output()
    )
