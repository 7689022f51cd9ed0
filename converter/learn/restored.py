"""The model that a plan stands for, in floats: what gradients go through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

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
    values, names = values_by_name(copy.graph), Names(copy)
    for name, tensor in plan.tensors.items():
        value = values.get(name)
        if value is None or constant(value) is not None or not is_float(value):
            continue
        readers = {node for node, unit in units if name in unit.inputs}
        through = [use for use in value.uses() if name in computed or use.node in readers]
        q, scale = (
            plan.params(name),
            names.constant(scale_of(tensor.group), plan.params(name).scale),
        )
        numbers = (q.zero_point, q.format.qmin, q.format.qmax)
        others = [names.constant(f"{tensor.group}_grid", np.float32(number)) for number in numbers]
        made = ir.Value(name=names.fresh(f"{name}_fake"), shape=value.shape, type=value.type)
        node = fake_quantize(copy, [value, scale, *others], made.name or "", made)
        _insert(copy.graph, value.producer(), node)
        for use in through:
            use.node.replace_input_with(use.idx, made)
    return copy


def scale_of(group: str) -> str:
    """What the scale of a group of activations is called as a constant."""
    return f"{group}_scale_learned"


def _insert(graph: ir.Graph, producer: ir.Node | None, node: ir.Node) -> None:
    """Behind what makes its input, or first of all."""
    if producer is not None:
        graph.insert_after(producer, [node])
    else:
        graph.insert_before(graph[0], [node])


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
    return replace(
        learned, weights={**plan.weights, **weights}, stored=stored, biases=learned.biases
    )
