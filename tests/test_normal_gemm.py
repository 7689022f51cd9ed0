"""The normal form of products with bias: the same numbers as before, alpha = beta = 1 and one bias
a column.
"""

from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_same, build, changes, frozen, normal, prepared, types
from onnx_ir.passes.common import ShapeInferencePass

from converter.graph.edit import constant
from converter.prepare.normal_gemm import normal_gemm

ROWS = "g (float[3,4] x) => (float[] y)"
WEIGHT = {"w": normal(4, 4)}


def normalized(graph, changed=True, feeds=None, **constants):
    model = build(graph, **constants)
    ShapeInferencePass()(model)
    before = frozen(model)
    assert changes(normal_gemm, model) is changed
    assert_same(before, model, feeds or {"x": normal(3, 4)})
    assert not changes(normal_gemm, model)
    return model


@pytest.mark.parametrize("add", ["Add (m, b)", "Add (b, m)"])
@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_a_product_and_its_bias_become_one_node(add, shape):
    model = normalized(
        f"{ROWS} {{ [product] m = MatMul (x, w)  [sum] y = {add} }}",
        w=normal(4, 6),
        b=normal(*shape),
    )
    assert [(n.op_type, n.name, n.outputs[0].name) for n in model.graph] == [
        ("Gemm", "product", "y")
    ]
    np.testing.assert_array_equal(constant(model.graph[0].inputs[2]), normal(*shape).reshape(6))


@pytest.mark.parametrize(
    "nodes",
    [
        "m = MatMul (x, w)  y = Add (m, scalar)",
        "m = MatMul (x, w)  y = Add (m, one)",
        "m = MatMul (x, w)  y = Add (m, rows)",
        "m = MatMul (x, w)  y = Add (m, deep)",
        "m = MatMul (x, w)  y = Add (m, x)",
        "m = MatMul (x, w)  y = Add (m, m)",
        "m = MatMul (x, w)  y = Mul (m, b)",
        "m = MatMul (x, w)  a = Add (m, b)  y = Add (a, m)",
        "m = MatMul (x, vector)  y = Add (m, one)",
    ],
)
def test_other_sums_stay(nodes):
    biases = {
        "one": normal(1),
        "rows": normal(3, 1),
        "deep": normal(1, 1, 4),
        "b": normal(4),
        "scalar": normal(),
    }
    model = normalized(f"{ROWS} {{ {nodes} }}", False, **WEIGHT, **biases, vector=normal(4))
    assert "Gemm" not in types(model)


def test_a_product_of_more_dimensions_stays():
    graph = "g (float[2,3,4] x) => (float[] y) { m = MatMul (x, w)  y = Add (m, b) }"
    model = normalized(graph, False, {"x": normal(2, 3, 4)}, **WEIGHT, b=normal(4))
    assert types(model) == ["MatMul", "Add"]


def test_a_product_of_integers_stays():
    graph = "g (int32[3,4] x) => (int32[] y) { m = MatMul (x, w)  y = Add (m, b) }"
    whole = np.arange(12, dtype=np.int32)
    model = normalized(
        graph,
        False,
        {"x": whole.reshape(3, 4)},
        w=np.arange(16, dtype=np.int32).reshape(4, 4),
        b=whole[:4],
    )
    assert types(model) == ["MatMul", "Add"]


def test_a_function_of_another_domain_stays():
    for nodes in (
        "m = local.MatMul (x, w)  y = Add (m, b)",
        "m = MatMul (x, w)  y = local.Add (m, b)",
    ):
        assert not changes(normal_gemm, build(f"{ROWS} {{ {nodes} }}", **WEIGHT, b=normal(4)))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("alpha=0.5", None),
        ("beta=3.0", (4,)),
        ("alpha=0.5, beta=3.0", (4,)),
        ("alpha=0.5, beta=3.0", (1,)),
        ("alpha=0.5, beta=3.0", ()),
        ("beta=0.0", (1, 4)),
        ("beta=1.0", (1, 4)),
        ("beta=1.0", (1, 1)),
        ("beta=1.0", (1,)),
        ("beta=1.0", ()),
    ],
)
def test_factors_move_into_the_operands(attributes, shape, transposed):
    inputs = "x, w" if shape is None else "x, w, b"
    graph = f"{ROWS} {{ y = Gemm <transB={transposed}, {attributes}> ({inputs}) }}"
    model = normalized(graph, w=normal(4, 4), **({} if shape is None else {"b": normal(*shape)}))
    (gemm,) = model.graph
    assert set(gemm.attributes) == {"transB"}
    assert shape is None or constant(gemm.inputs[2]).shape == (4,)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1)])
def test_a_bias_that_differs_from_row_to_row_stays(shape):
    model = normalized(
        f"{ROWS} {{ y = Gemm <alpha=0.5, beta=2.0> (x, w, b) }}", False, **WEIGHT, b=normal(*shape)
    )
    assert set(model.graph[0].attributes) == {"alpha", "beta"}


def test_operands_computed_at_run_time_stay():
    nodes = "y = Gemm <alpha=2.0> (x, w, c)  z = Gemm <beta=2.0, transB=1> (w, x)"
    graph = f"g (float[3,4] x, float[4] c) => (float[] y, float[] z) {{ {nodes} }}"
    normalized(graph, False, {"x": normal(3, 4), "c": normal(4)}, **WEIGHT)


def test_products_that_share_operands_get_their_own():
    graph = (
        "g (float[3,4] x) => (float[] y, float[] z) { y = Gemm <alpha=2.0, beta=3.0> (x, w, b)  "
        "z = Gemm (x, w, b) }"
    )
    model = normalized(graph, **WEIGHT, b=normal(4))
    np.testing.assert_array_equal(constant(model.graph[1].inputs[1]), normal(4, 4))
    np.testing.assert_array_equal(constant(model.graph[1].inputs[2]), normal(4))


def test_batch_norm_behind_a_product_with_bias_folds():
    nodes = "m = MatMul (x, w)  a = Add (m, b)  y = BatchNormalization (a, p, p, p, p)"
    constants = {"w": normal(4, 4), "b": normal(4), "p": np.abs(normal(4))}
    before, model = (
        build(f"{ROWS} {{ {nodes} }}", **constants),
        prepared(f"{ROWS} {{ {nodes} }}", **constants),
    )
    assert_same(before, model, {"x": normal(3, 4)})
    assert types(model) == ["Gemm"]
