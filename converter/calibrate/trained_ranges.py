"""Trained parameters for the activations of a plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from calib.affine import IntFormat, QParams, qparams_of
from converter.plan.plan import NodePlan, QuantPlan, TensorPlan
from converter.prepare.fake_quant_ranges import span_of


def with_trained_ranges(
    plan: QuantPlan, trained: Mapping[str, QParams], power_of_two: bool = False
) -> QuantPlan:
    """The plan with the parameters that training found for its tensors."""
    qparams: dict[str, QParams] = {}
    for tensor in (*plan.tensors.values(), *plan.converted.values()):
        if (name := tensor.name) in trained:
            qparams.setdefault(tensor.group, in_format(trained[name], tensor, power_of_two))
    plan = plan.with_qparams(qparams)
    return replace(
        plan,
        nodes={name: _with_room(unit, plan) for name, unit in plan.nodes.items()},
    )


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


def in_format(q: QParams, tensor: TensorPlan, power_of_two: bool = False) -> QParams:
    """The same grid in the type of `tensor`, with as many codes; where that has no such grid, one
    of the same range.
    """
    shift = (int(q.format.signed) - int(tensor.format.signed)) << (q.format.bits - 1)
    fmt = IntFormat(q.format.bits, tensor.format.signed, q.format.narrow)
    zero = q.zero_point + shift
    fits = (
        q.format.bits <= tensor.format.bits
        and fmt.qmin <= zero <= fmt.qmax
        and not (tensor.symmetric and zero.any())
    )
    if fits and not (power_of_two and np.frexp(q.scale)[0] != 0.5):
        return QParams(
            q.scale.astype(np.float32),
            zero.astype(fmt.dtype),
            fmt,
        )
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
    reason = "training left the range of '{}' open; input_type = SYNTHETIC finds it"
    return {name: reason.format(tensor) for name, tensor in (readers or makers).items()}
