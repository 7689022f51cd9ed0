"""The last look at a finished graph: what its target's runtime would not compute exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from converter.errors import ModelError
from converter.graph.edit import nodes_by_name, operand
from converter.graph.qdq import is_conversion
from converter.plan.matrices import breaks_bound
from converter.plan.ops import view_of
from converter.plan.plan import QuantPlan
from converter.plan.targets import Target


def check(model: ir.Model, plan: QuantPlan, target: Target) -> None:
    """Raises ModelError, naming the tensor or node, where the target would compute wrongly or
    refuse.
    """
    for violation in (*_pairs(model, plan), *_parameters(model, target)):
        msg = f"The converted model does not suit target {target.name}: {violation}."
        raise ModelError(msg)


def _pairs(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """Weights whose products a kernel that adds in 16 bits would not add exactly."""
    nodes = nodes_by_name(model.graph)
    for unit in plan.units():
        if unit.weight is None or unit.weight.pair_limit is None:
            continue
        codes = plan.weights[unit.name].codes
        view = view_of(nodes[unit.name], codes.shape, unit.weight.index)
        if breaks_bound(
            view.matrix(codes) if view else codes.reshape(1, 1, -1),
            unit.weight.pair_limit,
        ).any():
            yield f"two weights of {unit.name} can overflow together"


def _parameters(model: ir.Model, target: Target) -> Iterator[str]:
    allowed = {
        target.activation.dtype,
        target.weight.dtype,
        *([np.dtype(np.int32)] if target.integer_bias else []),
    }
    for node in model.graph:
        if node.domain or not is_conversion(node):
            continue
        codes, scale, zero_point = (operand(node, index) for index in range(3))
        dtype = (
            zero_point.dtype
            if zero_point is not None
            else codes.dtype
            if codes is not None
            else None
        )
        if dtype is not None and dtype not in allowed:
            yield f"{node.name} uses the type {dtype}"
        if target.symmetric and zero_point is not None and zero_point.any():
            yield f"{node.name} has a zero point that is not 0"
        if scale is None or not np.all(np.isfinite(scale) & (scale > 0)):
            yield f"{node.name} has a scale that is not a positive number"
