"""Lets what exporters write several times be read from one place."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import onnx_ir as ir

from converter.graph.edit import Names, graph_of, initializers_of, not_none
from converter.graph.mapped import release

# Smaller constants are not worth the search, and equal biases belong to operators that may want
# different ones later.
LEAST_SIZE = 1 << 12
# Numbers of a constant that are looked at before all are.
LOOKED_AT = 64


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
                node.replace_input_with(
                    0,
                    first.setdefault(tuple(map(str, x.shape)), x),
                )


def share_constants(model: ir.Model) -> None:
    """Lets all readers of equal large constants read one; in the main graph, where they stand in
    different graphs.

    Exporters write tied weights, and folding what branches share, several times.
    """
    alike: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    for value in initializers_of(model):
        tensor = value.const_value
        if tensor is not None and tensor.size >= LEAST_SIZE and not value.is_graph_output():
            alike[tensor.dtype, tuple(tensor.shape), _some(tensor)].append(value)
            release([value])
    equal: dict[bytes, list[ir.Value]] = defaultdict(list)
    for value in (value for values in alike.values() if len(values) > 1 for value in values):
        equal[_content(not_none(value.const_value))].append(value)
        release([value])
    names = Names(model)
    for first, *others in equal.values():
        if first.graph is not model.graph and any(
            value.graph is not first.graph for value in others
        ):
            others.append(first)
            first = names.constant(
                not_none(first.name),
                not_none(first.const_value).numpy(),
            )
        for value in others:
            value.replace_all_uses_with(first)
            del graph_of(value).initializers[not_none(value.name)]


def _some(tensor: ir.TensorProtocol) -> bytes:
    """Its first numbers, which tell most tensors apart."""
    return bytes(tensor.numpy().reshape(-1)[:LOOKED_AT].tobytes())


def _content(tensor: ir.TensorProtocol) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.tobytes())
    return digest.digest()
