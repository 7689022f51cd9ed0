"""Lets what exporters write several times be read from one place."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import onnx_ir as ir

from converter.graph.edit import Names, graph_of, initializers_of, not_none

# Smaller constants are not worth the search, and equal biases belong to operators that may want
# different ones later.
LEAST_SIZE = 1 << 12


def share_shapes(model: ir.Model) -> None:
    """Lets a Shape read what an earlier one of its graph reads, where all dimensions have the same
    size or name.

    As ONNX has it, equal names are equal sizes. What is computed from equal shapes are common
    subexpressions then. Works in place.
    """
    for graph in model.graphs():
        first: dict[tuple[str, ...], ir.Value] = {}
        for node in (node for node in graph if node.op_type == "Shape" and not node.domain):
            x = not_none(node.inputs[0])
            if x.shape is not None and not x.shape.has_unknown_dim():
                node.replace_input_with(0, first.setdefault(tuple(map(str, x.shape)), x))


def share_constants(model: ir.Model) -> None:
    """Lets all readers of equal large constants read one; in the main graph, where they stand in
    different graphs.

    Exporters write tied weights, and folding what branches share, several times.
    """
    equal: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    for value in initializers_of(model):
        tensor = value.const_value
        if tensor is not None and tensor.size >= LEAST_SIZE and not value.is_graph_output():
            content = hashlib.sha256(tensor.tobytes()).digest()
            equal[tensor.dtype, tuple(tensor.shape), content].append(value)
    names = Names(model)
    for first, *others in equal.values():
        if first.graph is not model.graph and any(
            value.graph is not first.graph for value in others
        ):
            others.append(first)
            first = names.constant(not_none(first.name), not_none(first.const_value).numpy())
        for value in others:
            value.replace_all_uses_with(first)
            del graph_of(value).initializers[not_none(value.name)]
