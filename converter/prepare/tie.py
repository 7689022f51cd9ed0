"""Tied embeddings: one table that tokens are looked up in and that, transposed, a product
multiplies with.

Exporters write the product as MatMul(x, Transpose(table)), or store the table a second time,
transposed. As a Gemm the product reads the table itself, so that it is stored once whatever becomes
of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import Names, constant, graph_of
from converter.graph.mapped import release
from converter.plan.ops import rule_of


def tie(model: ir.Model) -> None:
    """Turns products with the transposed of a table, in the graph that holds it, into Gemm nodes
    that read it.

    Rewrites in place.
    """
    names, nodes = Names(model), [node for node in model.graph if not node.domain]
    tables = [node.inputs[0] for node in nodes if rule_of(node).looks_up]
    arrays = {
        v: a for v in tables if v is not None and (a := constant(v)) is not None and a.ndim == 2
    }
    products = [node for node in nodes if node.op_type == "MatMul"]
    tied = [(node, table) for node in products if (table := _tied(node, arrays)) is not None]
    release(value for node in nodes for value in node.inputs if value is not None)
    for node, table in tied:
        _read(table, arrays[table].shape, node, names)


def _tied(product: ir.Node, tables: Mapping[ir.Value, Array]) -> ir.Value | None:
    """The table whose transposed is the product's right operand."""
    weight = product.inputs[1]
    maker, array = weight.producer() if weight else None, constant(weight)
    if (
        maker
        and maker.op_type == "Transpose"
        and list(maker.attributes.get_ints("perm", (1, 0))) == [1, 0]
    ):
        return maker.inputs[0] if maker.inputs[0] in tables else None
    return next(
        (v for v, table in tables.items() if array is not None and _same(array.T, table)),
        None,
    )


def _same(matrix: Array, table: Array) -> bool:
    """Whether they are equal; the first rows tell most apart."""
    return np.array_equal(matrix[:1], table[:1]) and np.array_equal(matrix, table)


def _read(table: ir.Value, sizes: tuple[int, ...], product: ir.Node, names: Names) -> None:
    """Writes x T' as a Gemm over the rows of x, whatever its rank."""
    graph, x, tape = graph_of(product), product.inputs[0], ir.tape.Tape()

    def ints(what: str, *numbers: int) -> ir.Value:
        return names.constant(f"{product.name}_{what}", np.array(numbers))

    def floats(columns: int) -> ir.Value:
        return ir.Value(shape=ir.Shape([None, columns]), type=table.type)

    rows = tape.op("Reshape", [x, ints("rows", -1, sizes[1])], output=floats(sizes[1]))
    y = tape.op("Gemm", [rows, table], {"transB": 1}, name=product.name, output=floats(sizes[0]))
    leading = tape.op("Slice", [tape.op("Shape", [x]), ints("first", 0), ints("last", -1)])
    shape = tape.op("Concat", [leading, ints("columns", sizes[0])], {"axis": 0})
    y = tape.op("Reshape", [y, shape])
    ir.convenience.replace_nodes_and_values(
        graph, product, [product], tape.nodes, product.outputs, [y]
    )
