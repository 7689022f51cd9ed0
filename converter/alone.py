"""What each quantized node costs the outputs by itself, for all nodes at the price of as many float inferences.

The quantized model is cut open: its nodes read what the float model computes, so that one inference tells what every
node does wrong by itself. This error is then added to the float model, at one node at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxruntime import InferenceSession

from calib.affine import Array, QParams, dequantize, quantize
from calib.samples import Dataset
from calib.session import Sample, open_session, over_samples, run
from converter.compare import TensorError, error_of, products
from converter.job import Resources
from converter.model import Names, constant, only_consumer, saved, values_by_name
from converter.pairs import QUANTIZERS, Pairing

# What runtimes compute together with the operator before it.
FUSED = {"Add", "Relu", "Clip"}


@dataclass(frozen=True)
class Alone:
    """The error of a node's own output, and of the worst graph output, while everything else is float."""

    own: TensorError
    output: TensorError


def alone(pairing: Pairing, data: Dataset, count: int, resources: Resources) -> dict[str, Alone]:
    """By name every quantized node of the main graph, over the first samples; none where integers feed integers."""
    known = _float_tensors(pairing.reference)
    units = _units(pairing, known)
    if not units or any(node.op_type.startswith("QLinear") for node in pairing.model.graph):
        return {}
    local, fed, taps = _cut(pairing, {leaf for leaves in units.values() for leaf in leaves}, set(units), known)
    injected, deltas = _injected(pairing.reference, list(taps))
    tapped, watched = list(dict.fromkeys([*taps, *fed])), [name for name, _ in taps.values()]
    with saved(pairing.reference, tapped) as a, saved(local, watched) as b, saved(injected) as c:
        first, second, third = (open_session(path, optimize=path == c) for path in (a, b, c))

        def step(index: int) -> Array:
            sample = data.sample(index)
            floats = run(first, tapped, sample)
            found = run(second, watched, {**sample, **{feed: floats[name] for name, feed in fed.items()}})
            there = {leaf: _as_integers(found[name], q) for leaf, (name, q) in taps.items()}
            moved = [{leaf: there[leaf] - floats[leaf] for leaf in leaves} for leaves in units.values()]
            own = [sum(np.array(products(floats[x], there[x])) for x in leaves) for leaves in units.values()]
            return np.concatenate([np.array(own)[:, None], _effects(third, deltas, moved, sample)], axis=1)

        sums = sum(over_samples(min(count, len(data)), step, resources.threads))
    names = [value.name or "" for value in pairing.reference.graph.outputs]
    return {unit: _alone(unit, names, rows) for unit, rows in zip(units, np.asarray(sums), strict=True)}


def _effects(
    session: InferenceSession, deltas: Mapping[str, str], moved: Iterable[Mapping[str, Array]], sample: Sample
) -> Array:
    """Inner products of every output before and after each change of tensors: (changes, outputs, 4)."""
    names = [output.name for output in session.get_outputs()]
    still = {**sample, **dict.fromkeys(deltas.values(), np.zeros((), np.float32))}
    before, rows = run(session, names, still), []
    for change in moved:
        after = run(session, names, {**still, **{deltas[leaf]: delta for leaf, delta in change.items()}})
        rows.append([products(before[name], after[name]) for name in names])
    return np.array(rows)


def _alone(unit: str, names: list[str], rows: Array) -> Alone:
    errors = [error_of(name, row) for name, row in zip(names, rows[1:], strict=True)]
    return Alone(error_of(unit, rows[0]), min(errors, key=lambda error: error.sqnr_db))


def _as_integers(x: Array, q: QParams | None) -> Array:
    return x if q is None else dequantize(quantize(x, q), q)


def _float_tensors(model: ir.Model) -> set[str]:
    """The computed tensors of the main graph that hold float32, as ONNX Runtime infers their types."""
    with saved(model, [value.name for node in model.graph for value in node.outputs if value.name]) as path:
        outputs = open_session(path, optimize=False).get_outputs()
    return {output.name for output in outputs if output.type == "tensor(float)"}


def _units(pairing: Pairing, floats: set[str]) -> dict[str, list[str]]:
    """The nodes that read anything quantized, with the tensors in which their work becomes visible."""
    integer = {place.name for place in pairing.places if place.output and place.qparams is not None}
    quantized = {place.node for place in pairing.places if not place.output and place.qparams is not None}
    paired = floats & {place.name for place in pairing.places if place.output and place.counterpart}
    units = {}
    for node in pairing.reference.graph:
        leaves = [_leaf(value, integer) for value in node.outputs if value.name]
        if node.name in quantized and leaves and paired.issuperset(leaves):
            units[node.name or ""] = leaves
    return units


def _leaf(value: ir.Value, integer: set[str]) -> str:
    """`value`, or what operators with constants that run in one kernel with its producer make of it."""
    reader = only_consumer(value) if value.name not in integer else None
    if reader is None or reader.op_type not in FUSED:
        return value.name or ""
    others = [operand for operand in reader.inputs if operand is not None and operand is not value]
    return value.name or "" if any(constant(v) is None for v in others) else _leaf(reader.outputs[0], integer)


def _cut(
    pairing: Pairing, leaves: Iterable[str], units: set[str], known: set[str]
) -> tuple[ir.Model, dict[str, str], dict[str, tuple[str, QParams | None]]]:
    """The quantized model with an input for every tensor that quantized nodes read.

    Returns the names of these inputs by float tensor, and by leaf the tensor to look at with the integers it is to
    become.
    """
    model = pairing.model.clone()
    names, values, taps = Names(model), values_by_name(model.graph), {}
    wanted = set(leaves)
    fed: dict[str, str] = {}
    sources = {}
    for place in pairing.places:
        value = values.get(place.counterpart or "")
        source = _source(value) if value is not None else None
        if place.output and place.name in wanted and value is not None:
            taps[place.name] = (value.name or "", None) if source is None else (source.name or "", place.qparams)
        elif place.node in units and not place.output and place.name in known and source is not None:
            sources[source] = place.name
    for source, name in sources.items():
        value = ir.Value(name=names.fresh(f"{name}_fed"), type=source.type or ir.TensorType(ir.DataType.FLOAT))
        source.replace_all_uses_with(value)
        model.graph.inputs.append(value)
        fed[name] = value.name or ""
    return model, fed, taps


def _source(value: ir.Value) -> ir.Value | None:
    """The floats before their quantization; None if integers were computed from integers."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return value
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    return maker.inputs[0] if maker is not None and maker.op_type in QUANTIZERS else None


def _injected(model: ir.Model, leaves: Iterable[str]) -> tuple[ir.Model, Mapping[str, str]]:
    """The float model with an input for each tensor that is added to it, and the inputs' names by tensor."""
    clone = model.clone()
    names, values, inputs = Names(clone), values_by_name(clone.graph), {}
    for leaf in leaves:
        value, delta = values[leaf], ir.Value(name=names.fresh(f"{leaf}_delta"), type=ir.TensorType(ir.DataType.FLOAT))
        output = ir.Value(name=names.fresh(f"{leaf}_moved"), type=value.type, shape=value.shape)
        value.replace_all_uses_with(output, replace_graph_outputs=True)
        node = ir.node("Add", [value, delta], outputs=[output], name=output.name)
        producer = value.producer()
        assert producer is not None
        clone.graph.insert_after(producer, node)
        clone.graph.inputs.append(delta)
        inputs[leaf] = delta.name or ""
    return clone, inputs
