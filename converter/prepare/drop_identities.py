"""Removes Identity and, as models here only run for inference, Dropout nodes."""

from __future__ import annotations

import onnx_ir as ir

from converter.model import constant


class DropIdentitiesPass(ir.passes.InPlacePass):
    """Lets readers of y = Identity(x) read x.

    A node stays where its output is a graph output (the name must survive), where it copies a value of an outer graph,
    or where the mask of a Dropout is read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Removes in place."""
        removable = [node for graph in model.graphs() for node in graph if _removable(node)]
        for node in removable:
            _drop(node)
        return ir.passes.PassResult(model, bool(removable))


def _removable(node: ir.Node) -> bool:
    if node.op_type not in {"Identity", "Dropout"} or node.domain:
        return False
    source = node.inputs[0]
    unread = not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    local = source is not None and source.graph is node.graph
    return local and unread and not _training(node) and not node.outputs[0].is_graph_output()


def _training(node: ir.Node) -> bool:
    """Whether a Dropout has a training_mode that is true or computed at run time."""
    if node.op_type != "Dropout" or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    mode = constant(node.inputs[2])
    return mode is None or bool(mode)


def _drop(node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    assert isinstance(node.graph, ir.Graph)
    node.outputs[0].replace_all_uses_with(source)
    node.graph.remove(node, safe=True)
