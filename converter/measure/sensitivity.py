"""Which nodes cost the outputs most, and which few of them to keep float so that they stay within a
bound.

What each node costs by itself is found for all nodes at the price of as many float inferences: the
quantized model is cut open, so that its nodes read what the float model computes and one inference
tells what every node does wrong by itself. This error is then added to the float model, at one node
at a time, which runs from about there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, dequantize, quantize
from calib.samples import Dataset
from calib.workers import over_samples
from converter.calibrate.runs import Opened, opened
from converter.errors import DataError
from converter.graph.edit import (
    Names,
    constant,
    not_none,
    only_consumer,
    submodel,
    values_by_name,
    values_read,
)
from converter.graph.qdq import codes_behind, quantizes
from converter.measure.errors import (
    NOTHING,
    Tally,
    TensorError,
    error_of,
    errors_between,
    tally,
    worst_of,
)
from converter.measure.pairing import Pairing
from converter.plan.ops import rule_of
from converter.plan.plan import NodePlan, QuantPlan

# Samples that rank the nodes; the bound itself is measured on all.
RANKED_ON = 8
# Parts of the model whose nodes share one end of it to run.
TAILS = 6


@dataclass(frozen=True)
class Alone:
    """The error of a node's own output, and of the worst graph output, while everything else is
    float.
    """

    own: TensorError
    output: TensorError


def alone(
    pairing: Pairing, floats: Opened, data: Dataset, *, count: int, threads: int
) -> dict[str, Alone]:
    """By name every quantized node of the main graph, over the first samples; none where integers
    feed integers.

    `floats` is the pairing's float model with all of its tensors to look at.
    """
    computed = _float_tensors(pairing.reference, floats)
    units = _units(pairing, computed)
    if not units or any(node.op_type.startswith("QLinear") for node in pairing.model.graph):
        return {}
    local, fed, taps = _cut(pairing, units, computed)
    watched = [name for name, _ in taps.values()]
    cut, tails = opened(local, watched), list(_tails(pairing.reference, floats, units))
    read = {name for tail in tails for name in tail.read}

    def step(index: int) -> Array:
        """Tallies (units, 1 + outputs, …): of the unit's own output, and of the graph's."""
        sample = data.sample(index)
        x = floats.fetch([*taps, *fed, *read], sample)
        y = cut.fetch(
            watched,
            {**sample, **{feed: x[name] for name, feed in fed.items()}},
        )
        there = {
            leaf: y[name] if q is None else dequantize(quantize(y[name], q), q)
            for leaf, (name, q) in taps.items()
        }
        return np.array([row for tail in tails for row in tail.heard(x, there, floats.outputs)])

    sums = sum(over_samples(min(count, len(data)), step, threads))
    costs = {}
    for unit, rows in zip(units, np.asarray(sums), strict=True):
        own, *outputs = map(error_of, [unit, *floats.outputs], rows)
        costs[unit] = Alone(own, _loudest(outputs, own))
    return costs


@dataclass(frozen=True)
class _Tail:
    """The end of the float model that some neighbouring `units`, the leaves of each, are heard in.

    `model` is fed the tensors `read` and, by `deltas`, what is added to each leaf; it gives those
    `outputs` of the whole that are not made before.
    """

    model: Opened
    outputs: tuple[str, ...]
    read: tuple[str, ...]
    deltas: Mapping[str, str]
    units: Sequence[list[str]]

    def heard(
        self, x: Mapping[str, Array], there: Mapping[str, Array], outputs: Sequence[str]
    ) -> Iterator[list[Tally]]:
        """For each unit the tallies of its own output and of all `outputs`, where its leaves are
        `there` instead of the float `x`.
        """
        still = {name: x[name] for name in self.read}
        still |= dict.fromkeys(self.deltas.values(), np.zeros((), np.float32))
        before = self.model.answer(still)
        for leaves in self.units:
            changes = {self.deltas[leaf]: _delta(x[leaf], there[leaf]) for leaf in leaves}
            after = self.model.answer({**still, **changes})
            own = np.sum(
                [tally(x[leaf], there[leaf]) for leaf in leaves],
                axis=0,
            )
            found = dict(zip(self.outputs, map(tally, before, after), strict=True))
            yield [own, *(found.get(name, NOTHING) for name in outputs)]


def _tails(model: ir.Model, floats: Opened, units: Mapping[str, list[str]]) -> Iterator[_Tail]:
    """All units in their order, in TAILS parts."""
    nodes = list(model.graph)
    order = {node.name: place for place, node in enumerate(nodes)}
    known = {each.name for each in (*floats.session.get_outputs(), *floats.session.get_inputs())}
    for part in np.array_split(np.array(list(units)), min(TAILS, len(units))):
        own = [units[name] for name in part.tolist()]
        end = nodes[order[part[0]] :]
        if not all(value.type and value.name in known for value in _read_by(end)):
            end = nodes
        made = {value for node in end for value in node.outputs}
        outputs = tuple(value.name or "" for value in model.graph.outputs if value in made)
        read = tuple(not_none(value.name) for value in _read_by(end))
        tail, deltas = injected(submodel(model, read, outputs), chain.from_iterable(own))
        yield _Tail(opened(tail, optimize=True), outputs, read, deltas, own)


def _read_by(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """The tensors that nodes read, but for constants and what they make themselves."""
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in values_read(node))
    return [value for value in read if value not in made and value.const_value is None]


def _loudest(outputs: Iterable[TensorError], own: TensorError) -> TensorError:
    """The worst of the outputs that can be compared; the unit's own error where none can."""
    compared = [error for error in outputs if error.compared]
    return min(compared or [own], key=lambda error: error.sqnr_db)


def _delta(x: Array, y: Array) -> Array:
    """What is added to `x` to make it `y`; nothing where `x` is not finite or of another shape."""
    if x.shape != y.shape:
        return np.zeros((), np.float32)
    return np.subtract(
        y,
        x,
        out=np.zeros_like(x),
        where=np.isfinite(x),
    )


def _float_tensors(model: ir.Model, floats: Opened) -> set[str]:
    """The computed tensors of the main graph that hold float32, as ONNX Runtime infers their
    types.
    """
    computed = {value.name for node in model.graph for value in node.outputs}
    outputs = floats.session.get_outputs()
    return {x.name for x in outputs if x.type == "tensor(float)" and x.name in computed}


def _units(pairing: Pairing, floats: set[str]) -> dict[str, list[str]]:
    """The nodes that read anything quantized, with the tensors in which their work becomes
    visible.
    """
    integer = {place.name for place in pairing.places if place.output and place.qparams is not None}
    quantized = {
        place.node for place in pairing.places if not place.output and place.qparams is not None
    }
    paired = floats & {place.name for place in pairing.places if place.output and place.counterpart}
    units = {}
    for node in pairing.reference.graph:
        leaves = [_leaf(value, integer) for value in node.outputs if value.name]
        if node.name in quantized and leaves and paired.issuperset(leaves):
            units[node.name or ""] = leaves
    return units


def _leaf(value: ir.Value, integer: set[str]) -> str:
    """`value`, or what operators with constants that run in one kernel with its producer make of
    it.
    """
    reader = only_consumer(value) if value.name not in integer else None
    if reader is None or not (rule_of(reader).adds or rule_of(reader).bounds):
        return value.name or ""
    others = [operand for operand in reader.inputs if operand is not None and operand is not value]
    return (
        value.name or ""
        if any(constant(v) is None for v in others)
        else _leaf(reader.outputs[0], integer)
    )


def _cut(
    pairing: Pairing, units: Mapping[str, Iterable[str]], computed: set[str]
) -> tuple[ir.Model, dict[str, str], dict[str, tuple[str, QParams | None]]]:
    """The quantized model with an input for every tensor that quantized nodes read.

    Returns the names of these inputs by float tensor, and by leaf the tensor to look at with the
    integers it is to become.
    """
    model = pairing.model.clone()
    names = Names(model)
    values = values_by_name(model.graph)
    leaves = set().union(*units.values())
    taps, fed, sources = {}, {}, {}
    for place in pairing.places:
        value = values.get(place.counterpart or "")
        source = _source(value) if value is not None else None
        if place.output and place.name in leaves and value is not None:
            taps[place.name] = (
                (value.name or "", None) if source is None else (source.name or "", place.qparams)
            )
        elif (
            place.node in units
            and not place.output
            and place.name in computed
            and source is not None
        ):
            sources[source] = place.name
    for source, name in sources.items():
        value = ir.Value(
            name=names.fresh(f"{name}_fed"),
            type=source.type or ir.TensorType(ir.DataType.FLOAT),
        )
        for use in source.uses():  # a graph output stays what it is
            use.node.replace_input_with(use.idx, value)
        model.graph.inputs.append(value)
        fed[name] = value.name or ""
    return model, fed, taps


def _source(value: ir.Value) -> ir.Value | None:
    """The floats before their quantization; None if integers were computed from integers."""
    codes = codes_behind(value)
    if codes is None:
        return value
    maker = codes.producer()
    return maker.inputs[0] if quantizes(maker) else None


def injected(model: ir.Model, leaves: Iterable[str]) -> tuple[ir.Model, Mapping[str, str]]:
    """The float model with an input for each tensor that is added to it, and the inputs' names by
    tensor.
    """
    clone = model.clone()
    names, values, inputs = Names(clone), values_by_name(clone.graph), {}
    for leaf in leaves:
        value = values[leaf]
        delta = ir.Value(name=names.fresh(f"{leaf}_delta"), type=ir.TensorType(ir.DataType.FLOAT))
        node = names.node("Add", [None, delta], leaf, "moved", like=value)
        value.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        node.replace_input_with(0, value)
        clone.graph.insert_after(not_none(value.producer()), node)
        clone.graph.inputs.append(delta)
        inputs[leaf] = delta.name or ""
    return clone, inputs


def only(plan: QuantPlan, unit: NodePlan) -> QuantPlan:
    """The part of `plan` that quantizes one unit."""
    return plan.part([replace(unit, bare=False)])


def output_drop(
    reference: Opened,
    other: Opened,
    data: Dataset,
    labels: Mapping[str, int] | None,
    *,
    threads: int,
) -> float:
    """What the other model loses over all samples: top-1 share with `labels` by file, else
    1 - cosine.
    """
    if labels is None:
        errors = errors_between(reference, other, data, threads)
        if worst := worst_of(errors):
            return 1 - worst.cosine
        if any(error.apart for error in errors):
            return 1.0  # no sample keeps its shape
        msg = (
            "No output of the model can be compared, as none holds a finite number or a text for "
            "any sample; give other data, or leave max_drop and min_cosine out."
        )
        raise DataError(msg)
    return top1(reference, data, labels, threads) - top1(other, data, labels, threads)


def top1(model: Opened, data: Dataset, labels: Mapping[str, int], threads: int) -> float:
    """Share of the samples whose first output, of one row, is largest at the label of their first
    file.
    """
    output = model.outputs[0]

    def right(index: int) -> bool:
        scores = model.fetch([output], data.sample(index))[output]
        if not _are_scores(scores):
            msg = (
                f"label_file: output '{output}', the first, holds no score for each class; leave "
                "label_file out, or put the scores first."
            )
            raise DataError(msg)
        if scores.ndim > 1 and len(scores) > 1:
            msg = (
                f"label_file: output '{output}' has {len(scores)} rows a sample; give "
                "--inputShape with a batch of 1."
            )
            raise DataError(msg)
        return int(np.argmax(scores)) == labels[str(data.files(index)[0])]

    return float(np.mean(list(over_samples(len(data), right, threads))))


def _are_scores(x: object) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "fiu" and x.size > 1
