"""Stores equal constants once: exporters write tied weights, and folding what branches share, several times."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import onnx_ir as ir

from converter.model import Names, add_constant

# Smaller ones are not worth the search, and equal biases belong to operators that may want different ones later.
LEAST_SIZE = 1 << 12


class ShareConstantsPass(ir.passes.InPlacePass):
    """Lets all readers of equal large constants read one; in the main graph, where they stand in different graphs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewires in place."""
        found: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
        for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
            tensor = value.const_value
            if tensor is not None and tensor.size >= LEAST_SIZE and not value.is_graph_output():
                content = hashlib.sha256(tensor.tobytes()).digest()
                found[tensor.dtype, tuple(tensor.shape), content].append(value)
        equal, names = [values for values in found.values() if len(values) > 1], Names(model)
        for values in equal:
            _merge(values, model.graph, names)
        return ir.passes.PassResult(model, bool(equal))


def _merge(values: list[ir.Value], main: ir.Graph, names: Names) -> None:
    first, tensor = values[0], values[0].const_value
    assert tensor is not None
    apart = first.graph is not main and any(value.graph is not first.graph for value in values)
    kept = add_constant(main, names.fresh(first.name or ""), tensor.numpy()) if apart else first
    for value in (value for value in values if value is not kept):
        value.replace_all_uses_with(kept)
        assert isinstance(value.graph, ir.Graph)
        del value.graph.initializers[value.name or ""]
