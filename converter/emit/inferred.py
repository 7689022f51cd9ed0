"""Drops from a finished model what every runtime infers by itself."""

from __future__ import annotations

import onnx_ir as ir

from converter.graph.edit import nodes_of


def forget_inferred(model: ir.Model) -> None:
    """Drops the types and shapes of what standard operators compute, but for the outputs of graphs.

    They are a tenth of a small file. And where shapes are declared, ONNX Runtime merges Add and
    LayerNormalization into a kernel that is slower than the two.
    """
    for node in (node for node in nodes_of(model) if not node.domain):
        for value in (value for value in node.outputs if not value.is_graph_output()):
            value.shape = value.type = None
