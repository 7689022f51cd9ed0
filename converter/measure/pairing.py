"""Which values of a quantized model stand for which of the float model: by the names of nodes, else
of tensors.

Any pair will do, also one that another tool made: weights and activations behind Q/DQ pairs,
operators on integers (QLinearConv and its like) and weights that are restored in other ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

import onnx_ir as ir

from calib.affine import INT32, Array, QParams, dequantize
from converter.graph.edit import Names, constant, nodes_of, readers_of, values_by_name
from converter.graph.qdq import codes_behind, is_dequantize, qparams_of, quantizes
from converter.plan.ops import parameters, rule_of
from converter.plan.plan import QuantizedWeight, QuantPlan


@dataclass(frozen=True)
class Place:
    """What a node of the float model reads or writes at one place.

    `name` is the float tensor, `weight` its array if it is constant. `restored` is what the
    quantized model has for a constant; else `counterpart` names the tensor of `Pairing.model` with
    the floats, None if there is none. `qparams` are None where there are no integers, or parameters
    found at run time.
    """

    node: str
    op_type: str
    name: str
    index: int
    output: bool
    weight: Array | None = None
    restored: Array | None = None
    counterpart: str | None = None
    qparams: QParams | None = None

    @property
    def bits(self) -> int | None:
        """Of the integers here; None where there are none, and for sums, as biases are."""
        return self.qparams.format.bits if self.qparams and self.qparams.format != INT32 else None


@dataclass(frozen=True)
class Pairing:
    """All places of `reference`, in the order of its nodes, and a copy of the other model with
    floats for all.
    """

    reference: ir.Model
    model: ir.Model
    places: tuple[Place, ...]

    @property
    def tensors(self) -> list[str]:
        """What the float model computes at the places, and what it is fed."""
        return [place.name for place in self.places if place.output or place.weight is None]


def pair(reference: ir.Model, other: ir.Model, plan: QuantPlan) -> Pairing:
    """The places of the main graph, and constants of subgraphs; `plan`, which may be empty, knows
    stored weights.
    """
    finder = _Finder(reference, other.clone(), plan)
    places = [place for node in nodes_of(reference) for place in finder.places(node)]
    main = {node.name for node in reference.graph}
    return Pairing(
        reference,
        finder.model,
        tuple(p for p in places if p.weight is not None or p.node in main),
    )


def _renamed(reference: ir.Model, names: Set[str]) -> Iterator[tuple[str, str | None]]:
    """What a Relu or Clip makes, where an operator on integers before it does its work, and what it
    reads, to None.
    """
    for node in (node for node in reference.graph if rule_of(node).bounds):
        before, after = (
            value.name if value else None for value in (node.inputs[0], node.outputs[0])
        )
        if (
            f"{before}_quantized" in names
            and after
            and before
            and names.isdisjoint({after, f"{after}_quantized"})
        ):
            yield from ((before, None), (after, before))


class _Finder:
    def __init__(self, reference: ir.Model, model: ir.Model, plan: QuantPlan) -> None:
        self.model, self.plan, self.names = model, plan, Names(model)
        self.values = values_by_name(model.graph)
        self.known = values_by_name(reference.graph).keys()
        self.renamed = dict(_renamed(reference, self.values.keys()))
        self.twins = {node.name: node for node in nodes_of(model)}
        integers = [(node, *each) for node in list(model.graph) for each in parameters(node)]
        # What makes integers says what they stand for: a reader may take them for a multiple.
        integers.sort(key=lambda each: each[1] in each[0].outputs)
        self.codes = {codes: by for _, codes, by in integers}
        for node in (node for node in model.graph if rule_of(node).moves):
            if node.inputs[0] in self.codes:
                self.codes.setdefault(
                    node.outputs[0],
                    self.codes[node.inputs[0]],
                )

    def places(self, node: ir.Node) -> Iterator[Place]:
        twin = self.twins.get(node.name)
        same = twin if twin is not None and twin.op_type == node.op_type else None
        for output, values in (False, node.inputs), (True, node.outputs):
            others = (same.outputs if output else same.inputs) if same else ()
            for index, value in enumerate(values):
                if (
                    value is not None
                    and value.name
                    and isinstance(value.type, ir.TensorType | None)
                ):
                    other = others[index] if index < len(others) else None
                    if output and other and other.name != value.name and other.name in self.known:
                        # The node took over the output of those behind it, and does their work.
                        other = None
                    yield self._place(node, value, index, output=output, twin=other)

    def _place(
        self,
        node: ir.Node,
        value: ir.Value,
        index: int,
        *,
        output: bool,
        twin: ir.Value | None,
    ) -> Place:
        place = Place(
            node.name or "",
            node.op_type,
            value.name or "",
            index,
            output,
            constant(value),
        )
        name = self.renamed.get(place.name, place.name)
        there = (
            None
            if name is None
            else twin or self.values.get(name) or self.values.get(f"{name}_quantized")
        )
        # What a node of the same name reads it computes with; else it is what quantization leaves
        # of the tensor.
        codes = self._codes_of(there, twin is None or output) if there else None
        if there and codes is None and there.name == f"{name}_quantized":
            there = None  # integers of which nothing says what they stand for
        q = qparams_of(codes, *self.codes[codes]) if codes else None
        if place.weight is not None:
            array = constant(codes)
            stored = (
                QuantizedWeight(array, q)
                if q and array is not None
                else self._stored(place.node, index)
            )
            if stored is not None:
                return replace(
                    place,
                    restored=dequantize(stored.codes, stored.qparams),
                    qparams=stored.qparams,
                )
            if (array := constant(there)) is not None:
                return replace(place, restored=array)
        floats = self._floats(codes) if codes else there
        return replace(place, counterpart=floats.name if floats else None, qparams=q)

    def _stored(self, node: str, index: int) -> QuantizedWeight | None:
        """A weight that the plan knows."""
        unit = self.plan.nodes.get(node)
        if unit and unit.weight and unit.weight.index == index and node in self.plan.weights:
            return self.plan.weights[node]
        return self.plan.stored.get((node, index))

    def _codes_of(self, value: ir.Value, follow: bool) -> ir.Value | None:
        """The integers that `value` is, comes from or, to `follow`, becomes."""
        codes = codes_behind(value) or (value if value in self.codes else None)
        if codes or not follow:
            return codes
        quantizers = filter(quantizes, readers_of(value))
        return next(
            (node.outputs[0] for node in quantizers if node.outputs[0] in self.codes),
            None,
        )

    def _floats(self, codes: ir.Value) -> ir.Value:
        """What a DequantizeLinear makes of the codes; a new one if there is none."""
        scale, zero_point, axis = self.codes[codes]
        readers = [
            use.node
            for use in codes.uses()
            if is_dequantize(use.node) and use.node.inputs[1] is scale
        ]
        if not readers:
            inputs = [codes, scale, *([zero_point] if zero_point else [])]
            attributes = {"axis": axis} if scale.shape and scale.shape.rank() else {}
            readers = [
                self.names.node(
                    "DequantizeLinear", inputs, codes.name or "", "floats", attributes=attributes
                )
            ]
            self.model.graph.append(readers[0])
        return readers[0].outputs[0]
