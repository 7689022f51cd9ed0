"""What every quantized model goes through before it is a file."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from converter.emit.half import store_constants_as_half
from converter.graph.edit import nodes_of


def finish(model: ir.Model, origin: Mapping[str, str], *, half: bool) -> list[str]:
    """Gives a model the form that its file has, in place: it says its `origin`, but nothing that
    runtimes infer, and where `half` says so, its float32 constants are float16; returns those that
    stay float32.
    """
    forget_inferred(model)
    model.metadata_props.update(origin)
    return store_constants_as_half(model) if half else []


def forget_inferred(model: ir.Model) -> None:
    """Drops the types and shapes of what standard operators compute, but for the outputs of graphs.

    They are a tenth of a small file. And where shapes are declared, ONNX Runtime merges Add and
    LayerNormalization into a kernel that is slower than the two.
    """
    for node in (node for node in nodes_of(model) if not node.domain):
        for value in (value for value in node.outputs if not value.is_graph_output()):
            value.shape = value.type = None
