"""Asking about and editing a graph: constants, consumers, fresh names, replacements."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from calib.affine import Array

T = TypeVar("T")


def submodel(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """A copy of the part of `model` between tensors; it shares the weights' memory."""
    graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
    return ir.Model(graph, ir_version=model.ir_version)


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every named value of the top-level graph: inputs, initializers and node outputs."""
    values = [
        *graph.inputs,
        *graph.initializers.values(),
        *(v for node in graph for v in node.outputs),
    ]
    return {value.name: value for value in values if value.name}


def nodes_by_name(graph: ir.Graph) -> dict[str, ir.Node]:
    """Every node of the top-level graph."""
    return {node.name or "": node for node in graph}


def values_read(node: ir.Node) -> list[ir.Value]:
    """The values of its own graph that `node` reads, those that its subgraphs take from there
    included.
    """
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inner = [n for graph in graphs for n in graph.all_nodes()]
    return [v for n in (node, *inner) for v in n.inputs if v is not None and v.graph is node.graph]


def reached(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Value]:
    """The values, and all of the graph that depend on them."""
    found = set(values)
    for node in graph:
        if not found.isdisjoint(values_read(node)):
            found.update(node.outputs)
    return found


def nodes_of(model: ir.Model) -> list[ir.Node]:
    """The nodes of all graphs, graph by graph."""
    return [node for graph in model.graphs() for node in graph]


def initializers_of(model: ir.Model) -> list[ir.Value]:
    """The initializers of all graphs."""
    return [value for graph in model.graphs() for value in graph.initializers.values()]


def readers_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, as often as they do."""
    return [use.node for use in value.uses()]


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included."""
    return sum(v.const_value.nbytes for v in initializers_of(model) if v.const_value)


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer, None for anything computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """What `node` reads at `index`, None for nothing."""
    return node.inputs[index] if index < len(node.inputs) else None


def set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Lets `node` read `value` at `index`, also where it reads nothing yet."""
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, value)


def operand(node: ir.Node, index: int) -> Array | None:
    """The constant that `node` reads at `index`, None for anything else and for nothing."""
    return constant(input_at(node, index))


def not_none(found: T | None) -> T:
    """`found`, where it is certain that something was."""
    assert found is not None
    return found


def graph_of(part: ir.Node | ir.Value) -> ir.Graph:
    """The graph that a node or value of a model without functions is part of."""
    assert isinstance(part.graph, ir.Graph)
    return part.graph


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is a tensor of float32."""
    tensor = value is not None and isinstance(value.type, ir.TensorType)
    return tensor and not_none(value).dtype == ir.DataType.FLOAT


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`, None if there are several, it is a graph output or read in
    a subgraph.
    """
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    reader = next(iter(value.uses())).node
    return reader if reader.graph is value.graph else None


class Names:
    """Hands out names that no value or node of the model bears, subgraphs included, and what bears
    them.
    """

    def __init__(self, model: ir.Model) -> None:
        self._main = model.graph
        self._constants = dict[tuple[Any, ...], ir.Value]()
        nodes = [node for graph in model.graphs() for node in graph.all_nodes()]
        inputs = [value for graph in model.graphs() for value in graph.inputs]
        self._taken = (
            {n.name for n in nodes}
            | {v.name for n in nodes for v in n.outputs}
            | {v.name for v in (*inputs, *initializers_of(model))}
        )

    def fresh(self, wish: str) -> str:
        """`wish`, or the first free of `wish_2`, `wish_3`, …; taken from now on."""
        name = wish
        for number in itertools.count(2):
            if name not in self._taken:
                break
            name = f"{wish}_{number}"
        self._taken.add(name)
        return name

    def constant(self, wish: str, array: Array | np.generic) -> ir.Value:
        """An initializer of the main graph, which all graphs see; equal ones of one wish are stored
        once.
        """
        key = (wish, array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = add_constant(
                self._main,
                self.fresh(wish),
                np.asarray(array),
            )
        return self._constants[key]

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        wish: str,
        output: str = "",
        *,
        attributes: Mapping[str, Any] | None = None,
        like: ir.Value | None = None,
        count: int = 1,
    ) -> ir.Node:
        """A node `wish`_`op_type` of no graph yet, with outputs `wish`_`output` of the shape and
        type of `like`.
        """
        output = output or f"{op_type}_output"
        shape, kind = (like.shape, like.type) if like else (None, None)
        made = [
            ir.Value(name=self.fresh(f"{wish}_{output}"), shape=shape, type=kind)
            for _ in range(count)
        ]
        return ir.node(
            op_type,
            inputs,
            attributes,
            name=self.fresh(f"{wish}_{op_type}"),
            outputs=made,
        )


def add_constant(
    graph: ir.Graph, name: str, array: Array, kind: ir.DataType | None = None
) -> ir.Value:
    """Registers an initializer, stored as `kind` where given; `name` must be free (see Names)."""
    tensor = ir.tensor(np.asarray(array, order="C"), kind, name=name)
    value = ir.Value(
        name=name,
        const_value=tensor,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
    )
    graph.register_initializer(value)
    return value


def replace_constant(node: ir.Node, index: int, array: Array, names: Names) -> None:
    """Gives `node` another constant operand; a node that reads the same constant keeps the old
    one.
    """
    old = input_at(node, index)
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
        return
    name = names.fresh(old.name if old and old.name else f"{node.name}.bias")
    set_input(node, index, add_constant(graph_of(node), name, array))


def drop_unread(model: ir.Model) -> None:
    """Drops the constants of all graphs that nothing reads, or only a branch that is part of the
    model no more.
    """
    alive = set(nodes_of(model))
    for value in initializers_of(model):
        for use in [use for use in value.uses() if use.node not in alive]:
            use.node.replace_input_with(use.idx, None)
        if not value.uses() and not value.is_graph_output():
            del graph_of(value).initializers[not_none(value.name)]
