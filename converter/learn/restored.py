"""The model that a plan stands for, in floats: what gradients go through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from calib.affine import QParams
from converter.emit.stored import as_floats, emit_stored
from converter.graph.edit import Names, constant, is_float, values_by_name
from converter.learn.fake_quant import fake_quantize
from converter.plan.plan import QuantPlan
from converter.plan.units import planned


def restored(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """A copy of the float `model`, or of a part of it, whose weights are constants of what the
    plan's codes stand for, and whose planned activations are fake-quantized.
    """
    copy = model.clone()
    emit_stored(copy, plan, as_floats)
    units = list(planned(copy, plan))
    computed = {name for _, unit in units for name in unit.outputs}
    values = values_by_name(copy.graph)
    for name in plan.tensors:
        value = values.get(name)
        if value is None or constant(value) is not None or not is_float(value):
            continue
        readers = [node for node, unit in units if name in unit.inputs]
        _fake_quantized(copy, value, plan.params(name), None if name in computed else readers)
    return copy


def _fake_quantized(
    model: ir.Model, value: ir.Value, q: QParams, readers: list[ir.Node] | None
) -> None:
    """Sends `readers`, or where None all that reads `value`, through a fake quantization."""
    uses = [use for use in value.uses() if readers is None or use.node in readers]
    names = Names(model)
    numbers = (q.scale, q.zero_point, q.format.qmin, q.format.qmax)
    constants = [names.constant(f"{value.name}_grid", np.float32(number)) for number in numbers]
    made = ir.Value(name=names.fresh(f"{value.name}_fake"), shape=value.shape, type=value.type)
    node = fake_quantize(model, [value, *constants], made.name or "", made)
    producer = value.producer()
    if producer is not None:
        model.graph.insert_after(producer, [node])
    else:
        model.graph.insert_before(model.graph[0], [node])
    for use in uses:
        use.node.replace_input_with(use.idx, made)


def as_stored(plan: QuantPlan) -> QuantPlan:
    """The plan with integer weights as if they were floats again before use."""
    units = [unit for unit in plan.units() if unit.weight and unit.name in plan.weights]
    weights = {(u.name, u.weight.index): plan.weights[u.name] for u in units if u.weight}
    return replace(plan, stored={**plan.stored, **weights})


def with_integers(plan: QuantPlan, learned: QuantPlan) -> QuantPlan:
    """The plan with what was learned of it as by `as_stored`."""
    places = {(u.name, u.weight.index) for u in plan.units() if u.weight and u.name in plan.weights}
    weights = {name: learned.stored[name, index] for name, index in places}
    stored = {place: weight for place, weight in learned.stored.items() if place not in places}
    stored |= {place: learned.stored[place] for place in plan.stored}
    return replace(plan, weights={**plan.weights, **weights}, stored=stored, biases=learned.biases)
