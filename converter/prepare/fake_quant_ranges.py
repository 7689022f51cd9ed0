"""Ranges that training left, spread over what only moves or bounds values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from calib.affine import UINT8, QParams, Range, qparams_of
from converter.graph.edit import constant
from converter.plan.ops import Span, rule_of


def spread(graph: ir.Graph, trained: Mapping[str, QParams]) -> dict[str, QParams]:
    """`trained` and what follows from it: ranges pass on to outputs that lie within them, and back
    to what is moved.
    """
    qparams = dict(trained)
    for node in graph:
        own = rule_of(node)
        data = [v.name for v in node.inputs[: None if own.data is None else 1] if v is not None]
        if (own.within or own.moves) and data and all(name in qparams for name in data):
            q = _together([qparams[name or ""] for name in data])
            qparams.update((v.name or "", q) for v in node.outputs if v.name not in qparams)
    for node in reversed(graph):
        own = rule_of(node)
        if node.outputs[0].name in qparams and (own.joins or own.moves):
            sources = node.inputs if own.joins else node.inputs[:1]
            qparams.update(
                (v.name or "", qparams[node.outputs[0].name])
                for v in sources
                if v and v.name not in qparams
            )
    return qparams


def following(graph: ir.Graph, trained: Mapping[str, QParams]) -> dict[str, QParams]:
    """What is sure of tensors that training left open, from ranges before and behind them: outside
    of these there is no value, or none that changes what is trained behind.
    """
    spans = {name: _ends(q) for name, q in trained.items() if q.axis is None}
    while len(known := _followed(graph, spans)) > len(spans):
        spans = known
    return {
        name: qparams_of(Range(np.array(low), np.array(high)), UINT8, symmetric=False)
        for name, (low, high) in spans.items()
        if name not in trained and low < high
    }


def _followed(graph: ir.Graph, spans: Mapping[str, Span]) -> dict[str, Span]:
    """`spans` and those that are a step away."""
    found = dict(spans)
    for node in graph:
        name = node.outputs[0].name or ""
        made = None if name in found else _made(node, found)
        if made is not None:
            found.update((v.name or "", made) for v in node.outputs)
    for node in reversed(graph):
        for value in node.outputs:
            needed = None if value.name in found else _needed(value, found)
            if needed is not None:
                found[value.name or ""] = needed
    return found


def _made(node: ir.Node, spans: Mapping[str, Span]) -> Span | None:
    """The bounds of what a node makes."""
    own = rule_of(node)
    read = [_span(v, spans) for v in node.inputs[: None if own.data is None else 1]]
    known = [span for span in read if span is not None]
    if (own.within or own.moves) and known and len(known) == len(read):
        low, high = min(low for low, _ in known), max(high for _, high in known)
        return (low, high) if own.moves or own.joins else (min(low, 0.0), max(high, 0.0))
    return own.makes(node, read)


def _needed(value: ir.Value, spans: Mapping[str, Span]) -> Span | None:
    """The bounds that all who read a value need; None where one may need more."""
    if value.is_graph_output() or not value.uses():
        return None
    needs = [_needed_by(use.node, value, spans) for use in value.uses()]
    known = [span for span in needs if span is not None]
    if len(known) < len(needs):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _needed_by(node: ir.Node, value: ir.Value, spans: Mapping[str, Span]) -> Span | None:
    own, made = rule_of(node), spans.get(node.outputs[0].name or "")
    if made is None:
        return None
    if own.moves or own.joins or own.bounds:
        return made  # below a floor all is alike
    others = [other for other in node.inputs if other is not None and other is not value]
    if own.adds and len(others) == 1:
        other = _span(others[0], spans)
        return other and (made[0] - other[1], made[1] - other[0])
    if own.multiplies and len(others) == 1:
        return _gated(value, others[0], made)
    return own.needs(node, made)


def _gated(value: ir.Value, gate: ir.Value, made: Span) -> Span | None:
    """What a Mul needs of a value that its own sigmoid gates: that is 0 below, 1 above."""
    maker = gate.producer()
    if maker is None or value not in maker.inputs or rule_of(maker).makes(maker, ()) != (0, 1):
        return None
    low, high = rule_of(maker).knees(maker)
    return low, max(made[1], high)


def _span(value: ir.Value | None, spans: Mapping[str, Span]) -> Span | None:
    """The bounds of a tensor, also of a constant."""
    array = constant(value) if value is not None else None
    if array is not None and array.size and array.dtype.kind == "f":
        return float(array.min()), float(array.max())
    return spans.get(value.name or "") if value is not None else None


def _ends(q: QParams) -> Span:
    span = span_of(q)
    return float(span.lo), float(span.hi)


def _together(parameters: list[QParams]) -> QParams:
    """Parameters of a range that holds all these."""
    first, *others = parameters
    if all(same(q, first) for q in others):
        return first
    spans = [span_of(q) for q in parameters]
    return qparams_of(
        Range(np.min([s.lo for s in spans]), np.max([s.hi for s in spans])),
        UINT8,
        symmetric=False,
    )


def same(first: QParams | None, second: QParams) -> bool:
    """Whether two parameters stand for the same values, their bounds aside."""
    return first is not None and all(
        np.array_equal(getattr(first, part), getattr(second, part))
        for part in ("scale", "zero_point")
    )


def span_of(q: QParams) -> Range:
    """The least and the greatest value that the parameters can express."""
    zero, scale = q.zero_point.astype(np.int64), q.scale.astype(np.float64)
    return Range(
        (q.format.qmin - zero) * scale,
        (q.format.qmax - zero) * scale,
    )
