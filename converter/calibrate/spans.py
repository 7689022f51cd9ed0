"""What of an activation's range makes a difference to those that read it."""

from __future__ import annotations

import math
from collections import Counter

import onnx_ir as ir

from converter.graph.edit import readers_of, values_by_name
from converter.plan.ops import rule_of
from converter.plan.plan import QuantPlan

Span = tuple[float, float]
EVERYTHING: Span = (-math.inf, math.inf)


def seen_spans(graph: ir.Graph, plan: QuantPlan) -> dict[str, Span]:
    """By group, where nothing that reads it tells values beyond apart; only what ends somewhere.

    A hard swish, x * HardSigmoid(x), is 0 for all that lies below its knee: codes are worth more
    above.
    """
    values = values_by_name(graph)
    sizes = Counter(t.group for t in plan.tensors.values())
    alone = (name for name, size in sizes.items() if size == 1 and name in values)
    spans = {name: _seen(values[name]) for name in alone}
    return {name: span for name, span in spans.items() if span != EVERYTHING}


def _seen(value: ir.Value) -> Span:
    readers = readers_of(value)
    if value.is_graph_output() or not readers:
        return EVERYTHING
    gates = {node.outputs[0]: rule_of(node).knees(node) for node in readers}
    spans = [_seen_by(node, gates) for node in readers]
    return min(low for low, _ in spans), max(high for _, high in spans)


def _seen_by(node: ir.Node, gates: dict[ir.Value, Span]) -> Span:
    """`gates` are what the value's readers make of it, and where they level off."""
    factors = [gates[v] for v in node.inputs if v is not None and v in gates]
    if not rule_of(node).multiplies or not factors:
        return rule_of(node).knees(node)
    # Above, a product with a gate grows with the value itself.
    return factors[0][0], math.inf
