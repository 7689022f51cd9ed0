"""Which of the nodes that could be integer make a model faster, by the table of costs.

Every unit is float or integer, and a value that passes from one to the other is converted: the
cheapest choice is a minimum cut. A depthwise convolution is faster in floats on most processors and
becomes integer only where that saves conversions; a model in which nothing pays stays float.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import prod

import onnx_ir as ir
import onnx_ir.passes.common as common

from converter.graph.edit import constant, not_none, readers_of
from converter.plan.costs import (
    DEQUANTIZE,
    NODE,
    PLAIN_POOL,
    QUANTIZE,
    REORDER,
    Cost,
    convolves,
    cost,
    in_blocks,
    pooled,
)
from converter.plan.plan import NodePlan, QuantPlan

NO_FASTER = "integers make it no faster here"
# A model that takes less, in nanoseconds, is never slow: a call of the runtime takes as long.
NEGLIGIBLE = 200_000.0
# What stands for a dimension that only data will tell: of a batch, and of space or time.
BATCH, EXTENT = 1, 256
# The two sides, and what feeds the model.
INTEGER, FLOAT, GIVEN = "integer side", "float side", "given"
# A cost that no choice comes to.
NEVER = 1e15

Sizes = Mapping[str, tuple[int, ...]]


def unprofitable(model: ir.Model, plan: QuantPlan, fed: Sizes) -> dict[str, str]:
    """The planned units that had better stay float, with the reason; `fed` are sizes of inputs, as
    far as they are known.
    """
    choice = _Choice(model.graph, plan, sizes_of(model, fed))
    return choice.float_units() if choice.in_floats() > NEGLIGIBLE else {}


def stays_float(node: NodePlan) -> bool:
    """Whether FULL_QUANT computes a node in floats, its weights stored as codes or not."""
    return not node.quantized or node.reason.startswith(NO_FASTER)


def sizes_of(model: ir.Model, fed: Sizes) -> dict[str, tuple[int, ...]]:
    """The shapes of the main graph's values, as far as they follow from those of its inputs."""
    if any(_known(value) is None for value in model.graph.inputs):
        model = model.clone()
        for value in model.graph.inputs:
            shape = fed.get(value.name or "") or value.shape
            if shape is not None:
                value.shape = ir.Shape([_size(d, k) for k, d in enumerate(shape)])
        for value in (v for node in model.graph for v in node.outputs):
            value.shape = None
        common.ShapeInferencePass()(model)
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return {v.name or "": size for v in values if (size := _known(v)) is not None}


def _known(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value all of whose dimensions are known."""
    sizes = [d for d in value.shape or () if isinstance(d, int) and d >= 0]
    whole = value.shape is not None and len(sizes) == value.shape.rank()
    return tuple(sizes) if whole else None


def _size(dimension: object, axis: int) -> int:
    if isinstance(dimension, int) and dimension >= 0:
        return dimension
    return EXTENT if axis else BATCH


class _Choice:
    """A network of units, and of the codes that float values are converted to."""

    def __init__(self, graph: ir.Graph, plan: QuantPlan, sizes: Sizes) -> None:
        self.plan, self.sizes = plan, sizes
        self.costs: dict[tuple[Hashable, Hashable], float] = {}
        self.units = {n.name or "": n for n in graph if not self._unit(n).inside}
        for name, node in self.units.items():
            self._add_node(name, node)
            for value in [node, *self._absorbed(node)][-1].outputs:
                self._add_value(value, name, node)
        for value in graph.inputs:
            self._add_conversion(value, GIVEN, 0.0)
        self._apart(GIVEN, FLOAT, NEVER)

    def float_units(self) -> dict[str, str]:
        """Units on the float side, with the reason."""
        integers = least_cut(self.costs)
        return {
            name: NO_FASTER
            for name in self.units
            if name not in integers and self.plan.nodes[name].quantized
        }

    def in_floats(self) -> float:
        """Nanoseconds of the float model."""
        return sum(self.costs[INTEGER, name] for name in self.units)

    # --- the network

    def _add_node(self, name: str, node: ir.Node) -> None:
        own, source = self._cost(node), self._source(node)
        inside = sum(self._cost(each).floats for each in self._absorbed(node))
        quantized = self.plan.nodes[name].quantized
        self._apart(INTEGER, name, own.floats + inside + self._reordered(node))
        self._apart(name, FLOAT, own.integers if quantized else NEVER)
        if source and (window := pooled(node)):
            # Only behind an integer convolution there is a fast kernel, and the runtime takes a
            # conversion behind a pool before it.
            codes = name, node.outputs[0].name
            self._apart(name, codes, NEVER)
            self._apart(
                codes,
                source,
                PLAIN_POOL * window * self._count(node.outputs[0]),
            )

    def _add_value(self, value: ir.Value, name: str, node: ir.Node) -> None:
        reorder = REORDER * self._count(value)
        self._add_conversion(value, name, reorder if convolves(node) else 0.0)
        restored = NODE + DEQUANTIZE * self._count(value)
        for reader in self._readers(value, name):
            again = reorder if convolves(self.units[reader]) else 0.0
            self._apart(name, reader, restored + again)
        if value.is_graph_output():
            self._apart(name, FLOAT, restored)

    def _add_conversion(self, value: ir.Value, name: str, more: float) -> None:
        """Floats that integer nodes read are converted once."""
        codes = (name, value.name)
        self._apart(codes, name, NODE + QUANTIZE * self._count(value) + more)
        for reader in self._readers(value, name):
            self._apart(reader, codes, NEVER)

    def _apart(self, integer: Hashable, floats: Hashable, nanoseconds: float) -> None:
        """That the first is integer and the second float costs so much."""
        edge = integer, floats
        self.costs[edge] = self.costs.get(edge, 0.0) + nanoseconds

    # --- what is asked of the graph

    def _cost(self, node: ir.Node) -> Cost:
        read = [v for v in (*node.inputs, *node.outputs) if v is not None and constant(v) is None]
        made = self.sizes.get(node.outputs[0].name or "", ())
        return cost(node, made, max(map(self._count, read), default=0))

    def _reordered(self, node: ir.Node) -> float:
        """What it costs a float convolution to take and give another layout than its own."""
        if not convolves(node):
            return 0.0
        source, made = not_none(node.inputs[0]).producer(), node.outputs[0]
        read = source is not None and not in_blocks(source, self._channels(node.inputs[0]))
        given = not all(in_blocks(reader, self._channels(made)) for reader in readers_of(made))
        values = read * self._count(node.inputs[0]) + given * self._count(made)
        return REORDER * values

    def _unit(self, node: ir.Node) -> NodePlan:
        return self.plan.nodes[node.name or ""]

    def _readers(self, value: ir.Value, name: str) -> list[str]:
        """The units that read a value; the bodies of control flow are not among them."""
        nodes = (node for node in readers_of(value) if node.name in self.plan.nodes)
        names = (self._unit(node).inside or node.name or "" for node in nodes)
        return [reader for reader in dict.fromkeys(names) if reader != name]

    def _absorbed(self, node: ir.Node) -> list[ir.Node]:
        """What is computed inside a unit, in order."""
        chain = [node]
        for inner in self._unit(node).absorbed:
            readers = readers_of(chain[-1].outputs[0])
            chain.append(next(reader for reader in readers if reader.name == inner))
        return chain[1:]

    def _source(self, node: ir.Node) -> str | None:
        """The unit that makes what the node reads first."""
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if producer is None or producer.name not in self.plan.nodes:
            return None
        return self._unit(producer).inside or producer.name

    def _channels(self, value: ir.Value | None) -> int:
        shape = self.sizes.get(value.name or "", ()) if value is not None else ()
        return shape[1] if len(shape) > 1 else 0

    def _count(self, value: ir.Value | None) -> int:
        return prod(self.sizes.get(value.name or "", (0,))) if value is not None else 0


def least_cut(costs: Mapping[tuple[Hashable, Hashable], float]) -> set[Hashable]:
    """The integer side of the cheapest choice; whole picoseconds add up alike in any order."""
    # Imported where it is needed: that takes a fifth of a second.
    import networkx

    network: networkx.DiGraph[Hashable] = networkx.DiGraph()
    for (integer, floats), nanoseconds in costs.items():
        network.add_edge(integer, floats, capacity=round(1000 * nanoseconds))
    _, (integers, _) = networkx.minimum_cut(network, INTEGER, FLOAT)
    return set(integers)
