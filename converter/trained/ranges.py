"""Trained parameters for the activations of a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from calib.affine import UINT8, IntFormat, QParams, Range, qparams_of
from converter.ops import OPS
from converter.plan import NodePlan, QuantPlan, TensorPlan

# Operators, beside those that only move values, whose outputs lie within the range of their inputs.
SEVERAL = {"Concat", "Max", "Min"}
WITHIN = {
    *SEVERAL,
    "AveragePool",
    "GlobalAveragePool",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "Relu",
    "Clip",
}


def spread(graph: ir.Graph, trained: Mapping[str, QParams]) -> dict[str, QParams]:
    """`trained` and what follows from it: ranges pass on to outputs that lie within them, and back
    to what is moved.
    """
    found = dict(trained)
    for node in graph:
        data = [
            v.name for v in node.inputs[: None if node.op_type in SEVERAL else 1] if v is not None
        ]
        if _keeps(node) and data and all(name in found for name in data):
            q = _together([found[name or ""] for name in data])
            found.update((v.name or "", q) for v in node.outputs if v.name not in found)
    for node in reversed(graph):
        if node.outputs[0].name in found and (
            node.op_type == "Concat" or (_keeps(node) and OPS[node.op_type].moves)
        ):
            sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            found.update(
                (v.name or "", found[node.outputs[0].name])
                for v in sources
                if v and v.name not in found
            )
    return found


def _keeps(node: ir.Node) -> bool:
    return node.op_type in WITHIN or (node.op_type in OPS and OPS[node.op_type].moves)


def _together(parameters: list[QParams]) -> QParams:
    """Parameters of a range that holds all these."""
    first, *others = parameters
    if all(same(q, first) for q in others):
        return first
    spans = [span_of(q) for q in parameters]
    return qparams_of(
        Range(np.min([s.lo for s in spans]), np.max([s.hi for s in spans])), UINT8, symmetric=False
    )


def with_trained_ranges(
    plan: QuantPlan, trained: Mapping[str, QParams], power_of_two: bool = False
) -> QuantPlan:
    """The plan with the parameters that training found for its tensors."""
    found: dict[str, QParams] = {}
    for name, tensor in plan.tensors.items():
        if name in trained:
            found.setdefault(tensor.group, in_format(trained[name], tensor, power_of_two))
    plan = plan.with_qparams(found)
    return replace(plan, nodes={name: _with_room(unit, plan) for name, unit in plan.nodes.items()})


def _with_room(unit: NodePlan, plan: QuantPlan) -> NodePlan:
    """Products of fewer activation codes leave the codes of a pair of weights more room."""
    tensor = plan.tensors.get(unit.inputs[0]) if unit.inputs else None
    if (
        unit.weight is None
        or unit.weight.pair_limit is None
        or tensor is None
        or tensor.group not in plan.qparams
    ):
        return unit
    limit = unit.weight.pair_limit * tensor.format.qmax // plan.params(tensor.name).format.qmax
    return replace(unit, weight=replace(unit.weight, pair_limit=limit))


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


def in_format(q: QParams, tensor: TensorPlan, power_of_two: bool = False) -> QParams:
    """The same grid in the type of `tensor`, with as many codes; where that has no such grid, one
    of the same range.
    """
    shift = (int(q.format.signed) - int(tensor.format.signed)) << (q.format.bits - 1)
    fmt, zero = (
        IntFormat(q.format.bits, tensor.format.signed, q.format.narrow),
        q.zero_point + shift,
    )
    fits = (
        q.format.bits <= tensor.format.bits
        and fmt.qmin <= zero <= fmt.qmax
        and not (tensor.symmetric and zero.any())
    )
    if fits and not (power_of_two and np.frexp(q.scale)[0] != 0.5):
        return QParams(q.scale.astype(np.float32), zero.astype(fmt.dtype), fmt)
    return qparams_of(span_of(q), tensor.format, tensor.symmetric, power_of_two=power_of_two)


def untrained(plan: QuantPlan, constants: Collection[str]) -> dict[str, str]:
    """The nodes to leave float as a range of theirs is open, with the reason: who reads one or, if
    none, makes it.

    The ranges of `constants` need neither training nor data.
    """
    known = {*plan.qparams, *constants}
    unknown = {name for name, tensor in plan.tensors.items() if tensor.group not in known}
    readers = {
        u.name: next(n for n in u.inputs if n in unknown)
        for u in plan.units()
        if unknown & set(u.inputs)
    }
    makers = {
        u.name: next(n for n in u.outputs if n in unknown)
        for u in plan.units()
        if unknown & set(u.outputs)
    }
    reason = "training left the range of '{}' open, and there is no data"
    return {name: reason.format(tensor) for name, tensor in (readers or makers).items()}
