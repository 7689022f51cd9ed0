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
    names = Names(model)
    nodes = [node for node in model.graph if not node.domain]
    tables = [node.inputs[0] for node in nodes if rule_of(node).looks_up]
    arrays = {}
    for value in tables:
        array = constant(value)
        if value is not None and array is not None and array.ndim == 2:
            arrays[value] = array
    products = [node for node in nodes if node.op_type == "MatMul"]
    tied = [(node, table) for node in products if (table := _tied(node, arrays)) is not None]
    release(value for node in nodes for value in node.inputs if value is not None)
    for node, table in tied:
        _read(table, arrays[table].shape, node, names)


def _tied(product: ir.Node, tables: Mapping[ir.Value, Array]) -> ir.Value | None:
    """The table whose transposed is the product's right operand."""
    weight = product.inputs[1]
    maker = weight.producer() if weight else None
    if maker and maker.op_type == "Transpose":
        source = maker.inputs[0]
        turned = list(maker.attributes.get_ints("perm", (1, 0))) == [1, 0]
        return source if turned and source in tables else None
    array = constant(weight)
    if array is None:
        return None
    same = (value for value, table in tables.items() if _same(array.T, table))
    return next(same, None)


def _same(matrix: Array, table: Array) -> bool:
    """Whether they are equal; the first rows tell most apart."""
    return np.array_equal(matrix[:1], table[:1]) and np.array_equal(matrix, table)


def _read(table: ir.Value, sizes: tuple[int, ...], product: ir.Node, names: Names) -> None:
    """Writes x T' as a Gemm over the rows of x, whatever its rank."""
    graph = graph_of(product)
    x = product.inputs[0]
    tape = ir.tape.Tape()

    def ints(what: str, *numbers: int) -> ir.Value:
        return names.constant(f"{product.name}_{what}", np.array(numbers))

    def floats(columns: int) -> ir.Value:
        return ir.Value(
            shape=ir.Shape([None, columns]),
            type=table.type,
        )

    outputs, inputs = sizes
    flat = ints("rows", -1, inputs)
    rows = tape.op("Reshape", [x, flat], output=floats(inputs))
    transposed = {"transB": 1}
    y = tape.op(
        "Gemm",
        [rows, table],
        transposed,
        name=product.name,
        output=floats(outputs),
    )
    shape = tape.op("Shape", [x])
    first = ints("first", 0)
    last = ints("last", -1)
    leading = tape.op("Slice", [shape, first, last])
    columns = ints("columns", outputs)
    shape = tape.op("Concat", [leading, columns], {"axis": 0})
    y = tape.op("Reshape", [y, shape])
    ir.convenience.replace_nodes_and_values(
        graph, product, [product], tape.nodes, product.outputs, [y]
    )
