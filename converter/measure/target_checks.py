"""The last look at a finished graph: what its target's runtime would not compute exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from converter.errors import ModelError
from converter.graph.edit import input_at, nodes_by_name, not_none, operand, readers_of
from converter.graph.qdq import is_conversion, is_dequantize, is_quantize
from converter.plan.matrices import breaks_bound
from converter.plan.ops import rule_of, view_of
from converter.plan.plan import QuantPlan
from converter.plan.targets import WIDE, Target


def check(model: ir.Model, plan: QuantPlan, target: Target) -> None:
    """Raises ModelError, naming the tensor or node, where the target would compute wrongly or
    refuse.
    """
    for violation in (
        *_pairs(model, plan),
        *_parameters(model, plan, target),
        *(found for node in model.graph for found in _between_pairs(node, target)),
    ):
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


def _between_pairs(node: ir.Node, target: Target) -> Iterator[str]:
    """What is wrong with the integers around a standard operator."""
    if node.domain or is_conversion(node):
        return
    yield from _weight_and_bias(node, target)
    types = {_codes_type(restore) for restore in _restoring(node)}
    made = [reader for value in node.outputs for reader in readers_of(value) if is_quantize(reader)]
    if len(types | {_codes_type(quantize) for quantize in made}) > 1:
        yield f"{node.name} reads and makes integers of several types"
    for quantize in made:
        scale, zero = operand(quantize, 1), operand(quantize, 2)
        bits = 0 if zero is None else 8 * zero.itemsize
        given = target.fixed.get((node.op_type, bits))
        if given is not None and [scale, zero] != [*given]:
            yield f"{node.name} must have the scale {given[0]} and the zero point {given[1]}"


def _restoring(node: ir.Node) -> Iterator[ir.Node]:
    """The conversions that a node's activations come from."""
    own = rule_of(node)
    for index in range(len(node.inputs)):
        restore = _restored_at(node, index)
        if restore is None:
            continue
        if not (index in (own.weight, own.bias) and operand(restore, 0) is not None):
            yield restore


def _codes_type(conversion: ir.Node) -> np.dtype[Any] | None:
    zero_point = operand(conversion, 2)
    return None if zero_point is None else zero_point.dtype


def _restored_at(node: ir.Node, index: int | None) -> ir.Node | None:
    """The conversion at an input, if there is one."""
    value = None if index is None else input_at(node, index)
    restore = value.producer() if value is not None else None
    return restore if is_dequantize(restore) else None


def _weight_and_bias(node: ir.Node, target: Target) -> Iterator[str]:
    own = rule_of(node)
    data, weight, bias = (_restored_at(node, index) for index in (0, own.weight, own.bias))
    channels = weight is not None and not_none(operand(weight, 1)).size > 1
    if channels and target.channels is not None and node.op_type not in target.channels:
        yield f"{node.name} has a weight with a scale a channel"
    if bias is None or weight is None or data is None:
        return
    if len(bias.outputs[0].uses()) > 1:
        yield f"{node.name} shares its bias"
    scale = not_none(operand(bias, 1))
    product = np.ravel(not_none(operand(data, 1)) * not_none(operand(weight, 1)))
    if not np.array_equal(scale, np.broadcast_to(product, scale.shape)):
        yield f"{node.name} has a bias of another scale than its products"


def _parameters(model: ir.Model, plan: QuantPlan, target: Target) -> Iterator[str]:
    wide = [np.dtype(WIDE.dtype)] if any(u.activation == WIDE for u in plan.units()) else []
    allowed = {
        *wide,
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
