"""Stores what is left of float32 constants as float16, behind a Cast that runtimes fold when they
load the model.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import Names, constant, graph_of, input_at, not_none
from converter.graph.qdq import is_conversion
from converter.plan.ops import draws
from converter.plan.plan import NodePlan, QuantPlan
from converter.plan.units import bias_place, planned

# Below this many elements the Cast costs more bytes than float16 saves.
LEAST_SIZE = 64
# The most relative error of a number, and of the energy of a channel of weights: float16 rounds to
# 2^-11, but below 6e-5 in steps of 6e-8.
MOST_ERROR, MOST_CHANNEL_ERROR = 2.0**-9, 2.0**-16
# Weights of fewer bits than this lose so much more that float16 does for the biases beside them.
FULL_BITS = 8


def store_constants_as_half(model: ir.Model) -> list[str]:
    """Changes the model in place; returns the constants that stay float32, as float16 cannot hold
    them: beyond 65504, or so small that it loses them.
    """
    names, kept = Names(model), list[str]()
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if not _worthwhile(value):
                continue
            if _fits(not_none(constant(value))):
                _store(graph, value, names)
            else:
                kept.append(value.name or "")
    return kept


def store_biases_as_half(model: ir.Model, plan: QuantPlan) -> None:
    """Changes the model, in which `plan` is emitted, in place: the biases beside weights of few
    bits.
    """
    names = Names(model)
    for node, unit in planned(model, plan):
        value = input_at(*bias_place(node, unit))
        if value is None or not (_worthwhile(value) and _narrow(unit, plan)):
            continue
        bias = not_none(constant(value)).astype(np.float64)
        # Of numbers near 0 less is kept, which adds nothing to what the others lose.
        with np.errstate(over="ignore"):
            lost = np.square(bias.astype(np.float16) - bias).sum()
        if lost <= MOST_CHANNEL_ERROR * np.square(bias).sum():
            _store(graph_of(value), value, names)


def _narrow(unit: NodePlan, plan: QuantPlan) -> bool:
    stored = [plan.stored[unit.name, weight.index] for weight in unit.weights]
    return all(weight.qparams.format.bits < FULL_BITS for weight in stored)


def _worthwhile(value: ir.Value) -> bool:
    array = constant(value)
    if (
        array is None
        or array.dtype != np.float32
        or array.size < LEAST_SIZE
        or value.is_graph_output()
    ):
        return False
    return not any(_wants_constant(use.node, use.idx) for use in value.uses())


def _wants_constant(node: ir.Node, index: int) -> bool:
    """Whether `node` must read a constant itself: a scale, for runtimes to recognise the operator
    around it, and what a Dropout in training drops, which ONNX Runtime would drop once, at loading.
    """
    scale = is_conversion(node) and index == 1
    return scale or draws(node)


def _fits(array: Array) -> bool:
    """Whether float16 holds a constant: every number of a row, every channel of a weight."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16).astype(np.float64)
    if not np.array_equal(np.isfinite(half), np.isfinite(array)):
        return False
    finite = np.where(np.isfinite(array), array, 0).astype(np.float64)
    error = np.where(np.isfinite(array), half, 0) - finite
    if array.ndim < 2:
        return bool((np.abs(error) <= MOST_ERROR * np.abs(finite)).all())
    for axis in (0, array.ndim - 1):
        others = tuple(a for a in range(array.ndim) if a != axis)
        noise, energy = (np.square(x).sum(axis=others) for x in (error, finite))
        if (noise > MOST_CHANNEL_ERROR * energy).any():
            return False
    return True


def _store(graph: ir.Graph, value: ir.Value, names: Names) -> None:
    """What reads `value` finds it behind a Cast, whose name is short: it stands in the file twice
    more.
    """
    name = names.fresh("u")
    restored = ir.Value(name=name)
    value.replace_all_uses_with(restored)
    half = not_none(constant(value)).astype(np.float16)
    value.const_value = ir.tensor(half, name=value.name)
    value.type = ir.TensorType(ir.DataType.FLOAT16)  # of its own: copies of a model share types
    to_float = {"to": ir.DataType.FLOAT}
    cast = ir.node("Cast", [value], to_float, name=name, outputs=[restored])
    graph.insert_before(graph[0], cast)
