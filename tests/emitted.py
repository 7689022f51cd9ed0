"""Tiny models quantized with the ranges of one sample and nearest rounding, without calibration and
algorithms.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from graphs import normal, prepared, run

from calib.affine import Range, qparams_of, quantize
from converter.emit.qdq import emit
from converter.graph.edit import constant, values_by_name
from converter.graph.files import saved
from converter.plan.placement import Wishes, build_plan
from converter.plan.plan import QuantizedWeight
from converter.plan.targets import CPU

HEAD = "g (float[1,4,8,8] x) => (float[] y)"
ROWS = "g (float[3,4] x) => (float[] y)"
IMAGE, TABLE = {"x": normal(1, 4, 8, 8)}, {"x": normal(3, 4)}
CONSTANTS = {
    "w": normal(4, 4, 3, 3) / 6,
    "v": normal(4, 4, 3, 3, seed=1) / 6,
    "point": normal(4, 4, 1, 1) / 2,
    "depthwise": normal(4, 1, 3, 3),
    "k": normal(4, 4) / 2,
    "m": normal(4, 4, seed=1) / 2,
    "left": normal(3, 3),
    "wide": normal(36, 5) / 6,
    "b": normal(4),
    "five": normal(5),
    "c": normal(1, 4, 1, 1),
    "scalar": np.float32(0.7),
    "zero": np.float32(0),
    "six": np.float32(6),
    "edges": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "scales": np.array([1, 1, 2, 2], np.float32),
}


def by_range(array, fmt, symmetric, axis=None):
    others = None if axis is None else tuple(i for i in range(array.ndim) if i != axis)
    return qparams_of(Range(array.min(others), array.max(others)), fmt, symmetric, axis=axis)


def decided(model, feeds, target=CPU, **wishes):
    """A plan with ranges of one sample and nearest rounding."""
    plan = build_plan(model.graph, target, Wishes(**wishes))
    values = values_by_name(model.graph)
    with saved(model, [name for name in plan.tensors if values[name].producer()]) as path:
        seen = {**feeds, **run(path.read_bytes(), feeds)}
    qparams = {}
    for group, tensor in plan.groups().items():
        array = constant(values[tensor.name])
        qparams[group] = by_range(
            seen[tensor.name] if array is None else array, tensor.format, tensor.symmetric
        )
    weights, biases = {}, {}
    for unit in plan.units():
        if unit.weight:
            array = constant(values[unit.weight.name])
            q = by_range(array, unit.weight.format, True, unit.weight.axis)
            weights[unit.name] = QuantizedWeight(quantize(array, q), q)
        if unit.bias:
            biases[unit.name] = constant(values[unit.bias]).reshape(-1)
    return plan.with_qparams(qparams).with_weights(weights, biases)


def quantized(graph, feeds, target=CPU, **wishes):
    """The float model, the plan and the emitted model, which the ONNX checker accepts."""
    model = prepared(graph, **CONSTANTS)
    plan = decided(model, feeds, target, **wishes)
    after = model.clone()
    emit(after, plan)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert [v.name for v in after.graph.inputs] == [v.name for v in model.graph.inputs]
    assert [v.name for v in after.graph.outputs] == [v.name for v in model.graph.outputs]
    return model, plan, after
