"""Stores what is left of float32 constants as float16, behind a Cast that runtimes fold when they
load the model.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converter.model import Names, add_constant, constant, known

# Below this many elements the Cast costs more bytes than float16 saves.
LEAST_SIZE = 64


def store_constants_as_half(model: ir.Model) -> None:
    """Changes the model in place; constants that float16 cannot hold (beyond 65504) stay
    float32.
    """
    names = Names(model)
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if _worthwhile(value):
                _store(graph, value, names)


def _worthwhile(value: ir.Value) -> bool:
    array = constant(value)
    if (
        array is None
        or array.dtype != np.float32
        or array.size < LEAST_SIZE
        or value.is_graph_output()
    ):
        return False
    # A scale must stay a constant for runtimes to recognise the operator around it.
    scales = any(
        use.node.op_type in {"QuantizeLinear", "DequantizeLinear"} and use.idx == 1
        for use in value.uses()
    )
    return not scales and bool(np.abs(array).max() <= np.finfo(np.float16).max)


def _store(graph: ir.Graph, value: ir.Value, names: Names) -> None:
    array = known(constant(value))
    half = add_constant(graph, names.fresh(f"{value.name}_float16"), array.astype(np.float16))
    cast = names.node("Cast", [half], known(value.name), "float32", {"to": ir.DataType.FLOAT})
    graph.insert_before(graph[0], cast)
    value.replace_all_uses_with(cast.outputs[0])
    del graph.initializers[value.name or ""]
