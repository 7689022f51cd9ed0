"""Ranges that training left, spread over what only moves or bounds values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from calib.affine import UINT8, QParams, Range, qparams_of
from converter.plan.ops import rule_of


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
    return Range((q.format.qmin - zero) * scale, (q.format.qmax - zero) * scale)
