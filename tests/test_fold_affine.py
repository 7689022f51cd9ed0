"""Folding scales and shifts into the operator before them: the same numbers with fewer nodes, or
nothing at all.
"""

from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_same, build, changes, frozen, node, normal, positive, types

from converter.graph.edit import constant
from converter.prepare.fold_affine import fold_affine

IMAGE = "g (float[2,4,5,5] x) => (float[] y)"
ROWS = "g (float[3,4] x) => (float[] y)"
BN = "[bn] y = BatchNormalization (c, gamma, beta, mean, var)"


def batch_norm(channels):
    return {
        "gamma": normal(channels, seed=1),
        "beta": normal(channels, seed=2),
        "mean": normal(channels, seed=3),
        "var": positive(channels, seed=4),
    }


def feeds(model):
    return {v.name: normal(*(int(d) for d in v.shape)) for v in model.graph.inputs if v.name == "x"}


def fold(graph, opset=13, **constants):
    """The model after folding, proven to compute the same; the pass says truthfully whether it
    changed anything.
    """
    model = build(graph, opset, **constants)
    before, count = frozen(model), len(model.graph)
    assert changes(fold_affine, model) == (len(model.graph) < count)
    assert_same(before, model, feeds(model))
    return model


OPERATORS = {
    "conv": (IMAGE, "c = Conv (x, w)", {"w": normal(6, 4, 3, 3)}, 6),
    "conv with bias": (
        IMAGE,
        "c = Conv <pads=[1,1,1,1]> (x, w, b)",
        {"w": normal(6, 4, 3, 3), "b": normal(6)},
        6,
    ),
    "grouped": (
        IMAGE,
        "c = Conv <group=2> (x, w, b)",
        {"w": normal(6, 2, 3, 3), "b": normal(6)},
        6,
    ),
    "depthwise": (IMAGE, "c = Conv <group=4> (x, w)", {"w": normal(4, 1, 3, 3)}, 4),
    "depthwise, two each": (IMAGE, "c = Conv <group=4> (x, w)", {"w": normal(8, 1, 3, 3)}, 8),
    "transposed": (IMAGE, "c = ConvTranspose <strides=[2,2]> (x, w)", {"w": normal(4, 3, 2, 2)}, 3),
    "transposed in groups": (
        IMAGE,
        "c = ConvTranspose <group=2> (x, w, b)",
        {"w": normal(4, 3, 2, 2), "b": normal(6)},
        6,
    ),
    "gemm": (ROWS, "c = Gemm (x, w, b)", {"w": normal(4, 6), "b": normal(6)}, 6),
    "gemm without bias": (ROWS, "c = Gemm (x, w)", {"w": normal(4, 6)}, 6),
    "gemm transposed": (
        ROWS,
        "c = Gemm <transB=1> (x, w, b)",
        {"w": normal(6, 4), "b": normal(6)},
        6,
    ),
    "square gemm": (ROWS, "c = Gemm (x, w, b)", {"w": normal(4, 4), "b": normal(4)}, 4),
    "square gemm transposed": (
        ROWS,
        "c = Gemm <transB=1> (x, w, b)",
        {"w": normal(4, 4), "b": normal(4)},
        4,
    ),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_batch_norm_folds_into_the_operator_before_it(kind):
    head, operator, constants, channels = OPERATORS[kind]
    model = fold(f"{head} {{ [op] {operator}  {BN} }}", **constants, **batch_norm(channels))
    assert [(n.name, n.outputs[0].name) for n in model.graph] == [("op", "y")]


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize(
    "arithmetic",
    ["Mul (c, k)", "Mul (k, c)", "Div (c, k)", "Add (c, k)", "Add (k, c)", "Sub (c, k)"],
)
@pytest.mark.parametrize("scalar", [True, False])
def test_a_constant_a_channel_folds(kind, arithmetic, scalar):
    head, operator, constants, channels = OPERATORS[kind]
    space = (1, 1) if head is IMAGE else ()
    k = positive(1) if scalar else positive(channels, *space)
    assert len(fold(f"{head} {{ [op] {operator}  y = {arithmetic} }}", **constants, k=k).graph) == 1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 1, 1, 1), (6, 1, 1), (1, 6, 1, 1)])
def test_shapes_that_are_one_value_a_channel(shape):
    model = fold(
        f"{IMAGE} {{ c = Conv (x, w)  y = Mul (c, k) }}", w=normal(6, 4, 3, 3), k=positive(*shape)
    )
    assert types(model) == ["Conv"]


@pytest.mark.parametrize(
    "shape",
    [
        (6,),  # along the width, which equals the number of channels
        (1, 6),
        (6, 1),  # along the height
        (2, 1, 1, 1),  # along the batch
        (6, 6, 1),
        (1, 6, 6),
        (2, 6, 1, 1),
        (1, 1, 1, 1, 1),  # adds a dimension to the output
        (1, 2, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("operator", ["Mul", "Add"])
def test_shapes_that_are_not(shape, operator):
    model = fold(
        f"g (float[2,4,8,8] x) => (float[] y) {{ c = Conv (x, w)  y = {operator} (c, k) }}",
        w=normal(6, 4, 3, 3),
        k=positive(*shape),
    )
    assert types(model) == ["Conv", operator]


@pytest.mark.parametrize("shape", [(3, 1), (3, 6), (1, 1, 6), (1, 1, 1)])
def test_shapes_that_are_not_one_value_a_column_of_a_gemm(shape):
    model = fold(
        f"{ROWS} {{ c = Gemm (x, w)  y = Mul (c, k) }}", w=normal(4, 6), k=positive(*shape)
    )
    assert types(model) == ["Gemm", "Mul"]


@pytest.mark.parametrize(
    "arithmetic",
    ["Sub (k, c)", "Div (k, c)", "Pow (c, k)", "Add (c, c)", "Mul (c, c)", "Add (c, x)"],
)
def test_other_arithmetic_stays(arithmetic):
    graph = f"{IMAGE} {{ c = Conv (x, w)  y = {arithmetic} }}"
    assert len(fold(graph, w=positive(4, 4, 1, 1), k=np.full((4, 1, 1), 2, np.float32)).graph) == 2


def test_division_by_zero_stays():
    k = np.array([1, 0, 2, 3], np.float32).reshape(4, 1, 1)
    model = build(f"{IMAGE} {{ c = Conv (x, w)  y = Div (c, k) }}", w=positive(4, 4, 1, 1), k=k)
    assert not changes(fold_affine, model)


def test_a_chain_folds_whole():
    chain = """c = Conv (x, w)  d = Mul (c, k)  e = BatchNormalization (d, gamma, beta, mean, var)
               f = Sub (e, k)  y = Relu (f)"""
    model = fold(
        f"{IMAGE} {{ {chain} }}", w=normal(6, 4, 3, 3), k=positive(6, 1, 1), **batch_norm(6)
    )
    assert types(model) == ["Conv", "Relu"]
    assert model.graph[0].outputs[0].name == "f"


def test_epsilon_counts():
    bn = "y = BatchNormalization <epsilon=0.5> (c, gamma, beta, mean, var)"
    assert (
        len(
            fold(
                f"{IMAGE} {{ c = Conv (x, w)  {bn} }}", w=normal(6, 4, 3, 3), **batch_norm(6)
            ).graph
        )
        == 1
    )


@pytest.mark.parametrize("attribute", ["alpha=0.5", "beta=2.0", "transA=1"])
def test_a_scaled_or_turned_gemm_stays(attribute):
    graph = f"g (float[4,4] x) => (float[] y) {{ c = Gemm <{attribute}> (x, w, b)  {BN} }}"
    assert types(fold(graph, w=normal(4, 4), b=normal(4), **batch_norm(4))) == [
        "Gemm",
        "BatchNormalization",
    ]


@pytest.mark.parametrize("shape", [(), (1,), (1, 6), (3, 1), (3, 6)])
def test_a_gemm_whose_bias_is_not_one_value_a_column(shape):
    model = fold(
        f"{ROWS} {{ c = Gemm (x, w, b)  {BN} }}", w=normal(4, 6), b=normal(*shape), **batch_norm(6)
    )
    assert types(model) == ["Gemm", "BatchNormalization"]


@pytest.mark.parametrize(
    "graph",
    [
        f"g (float[2,4,5,5] x, float[6,4,3,3] w) => (float[] y) {{ c = Conv (x, w)  {BN} }}",
        f"g (float[2,4,5,5] x, float[6] gamma) => (float[] y) {{ c = Conv (x, k)  {BN} }}",
    ],
    ids=["weight", "gamma"],
)
def test_what_is_computed_at_run_time_stays(graph):
    model = build(
        graph,
        k=normal(6, 4, 3, 3),
        **{k: v for k, v in batch_norm(6).items() if f" {k})" not in graph},
    )
    assert not changes(fold_affine, model)


def test_batch_norm_in_training_mode_stays():
    bn = "y, m, v = BatchNormalization <training_mode=1> (c, gamma, beta, mean, var)"
    model = fold(
        f"{IMAGE} {{ c = Conv (x, w)  {bn} }}", opset=15, w=normal(6, 4, 3, 3), **batch_norm(6)
    )
    assert types(model) == ["Conv", "BatchNormalization"]


def test_batch_norm_of_old_opsets_with_statistics_as_outputs_stays():
    bn = "y, m, v, s, t = BatchNormalization (c, gamma, beta, mean, var)"
    model = build(f"{IMAGE} {{ c = Conv (x, w)  {bn} }}", w=normal(6, 4, 3, 3), **batch_norm(6))
    assert not changes(fold_affine, model)


def test_an_output_read_elsewhere_is_left_alone():
    graph = (
        "g (float[2,4,5,5] x) => (float[] y, float[] z) { c = Conv (x, w)  "
        + BN
        + "  z = Relu (c) }"
    )
    assert types(fold(graph, w=normal(6, 4, 3, 3), **batch_norm(6))) == [
        "Conv",
        "BatchNormalization",
        "Relu",
    ]


def test_a_graph_output_in_between_is_left_alone():
    graph = "g (float[2,4,5,5] x) => (float[] c, float[] y) { c = Conv (x, w)  " + BN + " }"
    assert types(fold(graph, w=normal(6, 4, 3, 3), **batch_norm(6))) == [
        "Conv",
        "BatchNormalization",
    ]


def test_batch_norm_before_the_operator_is_left_alone():
    graph = f"{IMAGE} {{ c = BatchNormalization (x, gamma, beta, mean, var)  y = Conv (c, w) }}"
    assert types(fold(graph, w=normal(6, 4, 3, 3), **batch_norm(4))) == [
        "BatchNormalization",
        "Conv",
    ]


TWINS = """g (float[2,4,5,5] x) => (float[] y, float[] z) {
    [one] c = Conv (x, w, b)  y = BatchNormalization (c, gamma, beta, mean, var)
    [two] d = Conv (x, w, b)  z = Mul (d, k)
}"""


def test_operators_that_share_a_weight_get_one_each():
    shared = {"w": normal(6, 4, 3, 3), "b": normal(6), "k": positive(6, 1, 1)}
    model = fold(TWINS, **shared, **batch_norm(6))
    assert [(n.name, n.outputs[0].name) for n in model.graph] == [("one", "y"), ("two", "z")]
    first, second = (constant(n.inputs[1]) for n in model.graph)
    np.testing.assert_allclose(second, shared["w"] * shared["k"][:, None], rtol=1e-6)
    assert np.abs(first - second).max() > 0.1


def test_a_shared_weight_whose_other_reader_stays_is_untouched():
    graph = (
        "g (float[2,4,5,5] x) => (float[] y, float[] z) { [one] c = Conv (x, w)  "
        + BN
        + "  [two] z = Conv (x, w) }"
    )
    model = fold(graph, w=normal(6, 4, 3, 3), **batch_norm(6))
    assert types(model) == ["Conv", "Conv"]
    np.testing.assert_array_equal(constant(node(model, "two").inputs[1]), normal(6, 4, 3, 3))


def test_a_weight_that_is_an_output_too_is_untouched():
    graph = "g (float[2,4,5,5] x) => (float[] y, float[6,4,3,3] w) { c = Conv (x, w)  " + BN + " }"
    assert types(fold(graph, w=normal(6, 4, 3, 3), **batch_norm(6))) == ["Conv"]


def test_folding_inside_and_not_across_subgraphs():
    graph = """g (bool q, float[2,4,5,5] x) => (float[] y) {
        o = Conv (x, w)
        y = If (q) <
            then_branch = t () => (float[] a) { i = Conv (x, w)  a = Mul (i, k) },
            else_branch = e () => (float[] n) { n = Mul (o, k) } >
    }"""
    model = build(graph, w=normal(6, 4, 3, 3), k=positive(6, 1, 1))
    before = frozen(model)
    assert changes(fold_affine, model)
    for q in (True, False):
        assert_same(before, model, {"q": np.array(q), "x": normal(2, 4, 5, 5)})
    then, other = (
        model.graph[1].attributes[name].as_graph() for name in ("then_branch", "else_branch")
    )
    assert [[n.op_type for n in part] for part in (then, other)] == [["Conv"], ["Mul"]]


def test_a_function_of_another_domain_is_not_touched():
    model = build(
        f"{IMAGE} {{ c = local.Conv (x, w)  {BN} }}", w=normal(6, 4, 3, 3), **batch_norm(6)
    )
    assert not changes(fold_affine, model)
    model = build(
        f"{IMAGE} {{ c = Conv (x, w)  y = local.Mul (c, k) }}", w=normal(6, 4, 3, 3), k=positive(1)
    )
    assert not changes(fold_affine, model)
