"""The passes that bring a float model into normal form: every one computes the same as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import assert_same, build, changes, frozen, node, normal, positive, run, types

from converter.errors import ModelError, UsageError
from converter.graph.edit import constant
from converter.graph.files import load
from converter.prepare import prepare
from converter.prepare.drop_identities import drop_identities
from converter.prepare.fold_constants import fold_constants
from converter.prepare.inputs import set_input_shapes
from converter.prepare.names import name_nodes
from converter.prepare.opset import opset_of, raise_opset

X = "g (float[2,4] x)"
W = normal(64, 64)


def apply(step, model, feeds=None):
    """The model after a pass, proven to compute the same."""
    before = frozen(model)
    step(model)
    assert_same(before, model, {"x": normal(2, 4)} if feeds is None else feeds)
    return model


def names_of(model):
    return [n.name for graph in model.graphs() for n in graph]


# --- names


def test_unnamed_nodes_are_named_after_their_first_output():
    model = build(f"{X} => (float[2,4] y) {{ a = Abs (x)  [given] b = Neg (a)  y = Relu (b) }}")
    assert names_of(apply(name_nodes, model)) == ["a", "given", "y"]
    assert names_of(apply(name_nodes, model)) == ["a", "given", "y"]


def test_repeated_names_are_numbered():
    model = build(
        f"{X} => (float[2,4] y) {{ [n] a = Abs (x)  [n] b = Neg (a)  [n_2] c = Abs (b)  [n] "
        "y = Relu (c) }"
    )
    name_nodes(model)
    assert names_of(model) == ["n", "n_3", "n_2", "n_4"]


def test_a_given_name_is_never_lost_to_an_unnamed_node():
    model = build(
        f"{X} => (float[2,4] y) {{ conv = Abs (x)  [conv] b = Neg (conv)  y = Relu (b) }}"
    )
    assert names_of(apply(name_nodes, model)) == ["conv_2", "conv", "y"]


def test_names_are_unique_across_subgraphs():
    model = build(
        """g (float[2,4] x, bool q) => (float[2,4] y) { [n] a = Abs (x)
            y = If (q) < then_branch = t () => (float[2,4] b) { [n] b = Neg (a) },
                         else_branch = e () => (float[2,4] c) { c = Abs (a) } > }"""
    )
    name_nodes(model)
    assert sorted(names_of(model)) == ["c", "n", "n_2", "y"]


# --- identities


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("a = Identity (x)  y = Relu (a)", ["Relu"]),
        ("a = Identity (x)  b = Identity (a)  y = Add (a, b)", ["Add"]),
        ("a = Relu (x)  b = Dropout (a)  y = Neg (b)", ["Relu", "Neg"]),
        ("a = Relu (x)  b, mask = Dropout (a)  y = Neg (b)", ["Relu", "Neg"]),
        ("a = Relu (x)  b = Dropout (a, ratio)  y = Neg (b)", ["Relu", "Neg"]),
        ("a = Relu (x)  b = Dropout (a, , off)  y = Neg (b)", ["Relu", "Neg"]),
        ("a = Relu (x)  b = Dropout (a, zero, on)  y = Neg (b)", ["Relu", "Dropout", "Neg"]),
        (
            "a = Relu (x)  b, mask = Dropout (a)  c = Where (mask, b, x)  y = Neg (c)",
            ["Relu", "Dropout", "Where", "Neg"],
        ),
        ("a = Relu (x)  y = Identity (a)", ["Relu", "Identity"]),
        ("a = Identity (k)  y = Add (x, a)", ["Add"]),
    ],
)
def test_identities_and_dropouts(nodes, left):
    constants = {"ratio": 0.5, "zero": 0.0, "off": False, "on": True, "k": normal(4)}
    arrays = {
        k: np.array(v, np.bool_ if isinstance(v, bool) else np.float32)
        for k, v in constants.items()
    }
    model = build(f"{X} => (float[2,4] y) {{ {nodes} }}", **arrays)
    assert types(apply(drop_identities, model)) == left
    assert not changes(drop_identities, model)


def test_identities_of_other_domains_stay():
    model = build(f"{X} => (float[2,4] y) {{ a = local.Identity (x)  y = Relu (a) }}")
    assert not changes(drop_identities, model)


@pytest.mark.parametrize("q", [True, False])
def test_identities_around_subgraphs(q):
    model = build(
        """g (float[2,4] x, bool q) => (float[2,4] y) {
            a = Identity (x)
            y = If (q) <
                then_branch = t () => (float[2,4] b) { b = Identity (a) },
                else_branch = e () => (float[2,4] f) { c = Neg (a)  d = Identity (c)
                  f = Abs (d) } > }"""
    )
    after = apply(drop_identities, model, {"x": normal(2, 4), "q": np.array(q)})
    # A subgraph must not hand out a value of the outer graph, so the copy `b` stays.
    assert [[n.op_type for n in graph] for graph in after.graphs()] == [
        ["If"],
        ["Identity"],
        ["Neg", "Abs"],
    ]


# --- constants


def test_what_depends_on_constants_only_is_computed():
    nodes = "a = Mul (w, k)  b = Transpose (a)  y = MatMul (x, b)"
    model = build(
        f"{X} => (float[2,6] y) {{ {nodes} }}", w=normal(6, 4), k=np.array([1, 2, 3, 4], np.float32)
    )
    after = apply(fold_constants, model)
    assert types(after) == ["MatMul"]
    expected = (normal(6, 4) * np.array([1, 2, 3, 4], np.float32)).T
    np.testing.assert_allclose(constant(after.graph[0].inputs[1]), expected, rtol=1e-6)


def test_large_weights_are_computed_too():
    model = build(
        "g (float[2,300] x) => (float[] y) { a = Mul (w, w)  y = MatMul (x, a) }",
        w=normal(300, 300),
    )
    assert types(apply(fold_constants, model, {"x": normal(2, 300)})) == ["MatMul"]


def test_shapes_of_static_inputs_are_computed():
    nodes = """s = Shape (x)  n = Gather (s, zero)  t = Unsqueeze (n, axes)
               u = Concat <axis=0> (t, minus)  y = Reshape (x, u)"""
    constants = {"zero": np.array(0), "axes": np.array([0]), "minus": np.array([-1])}
    model = build(f"g (float[2,4,3] x) => (float[] y) {{ {nodes} }}", **constants)
    assert types(prepare(apply(fold_constants, model, {"x": normal(2, 4, 3)}))) == ["Reshape"]


def test_weights_stored_as_integers_stay():
    nodes = "a = DequantizeLinear (q, s)  y = Mul (x, a)  h = Cast <to=1> (few)  z = Add (y, h)"
    constants = {
        "q": np.arange(4, dtype=np.int8),
        "s": np.float32(0.1),
        "few": np.arange(4, dtype=np.int8),
    }
    model = build(f"{X} => (float[] z) {{ {nodes} }}", **constants)
    assert types(apply(fold_constants, model)) == ["DequantizeLinear", "Mul", "Cast", "Add"]


def test_generated_tables_stay_small():
    model = build(
        "g (float[2000] x) => (float[] y) { a = Expand (k, s)  y = Add (x, a) }",
        k=np.float32(1),
        s=np.array([2000, 2000]),
    )
    assert types(apply(fold_constants, model, {"x": normal(2000)})) == ["Expand", "Add"]


# --- opset

OLD = {
    7: (
        "Conv <pads=[1,1,1,1]> (x, w)",
        "BatchNormalization (a, p, p, p, p)",
        "Upsample <scales=[1.0,1.0,2.0,2.0]> (b)",
    ),
    8: ("Conv (x, w)", "Sum (a, a)", "Dropout (b)"),
    9: ("Conv (x, w)", "Clip <min=-0.5, max=0.5> (a)", "Unsqueeze <axes=[0]> (b)"),
    11: ("Conv (x, w)", "Clip (a, low, high)", "ReduceSum <axes=[1]> (b)"),
    12: ("Conv (x, w)", "Softmax <axis=1> (a)", "Squeeze <axes=[0]> (b)"),
}


@pytest.mark.parametrize("opset", OLD)
def test_old_opsets_are_raised(opset):
    first, second, third = OLD[opset]
    constants = {
        "w": normal(4, 3, 3, 3),
        "p": positive(4),
        "low": np.float32(-0.5),
        "high": np.float32(0.25),
    }
    graph = (
        f"g (float[1,3,6,6] x) => (float[] c) {{ [conv] a = {first}  [second] b = {second}  "
        f"[third] c = {third} }}"
    )
    old = build(graph, opset, **constants)
    before, feeds = frozen(old), {"x": normal(1, 3, 6, 6)}
    model = raise_opset(old)
    assert (opset_of(old), opset_of(model)) == (opset, 13)
    assert_same(before, model, feeds)
    assert {"conv", "second"} <= {n.name for n in model.graph}
    assert_same(before, prepare(model), feeds)


@pytest.mark.parametrize(
    ("opset", "text", "scales"),
    [
        (8, 'Upsample <mode = "linear", scales = [1.0, 1.0, 2.0, 3.0]> (x)', None),
        (9, 'Upsample <mode = "linear"> (x, s)', [1, 1, 2, 3]),
        (9, 'Upsample <mode = "nearest"> (x, s)', [1, 1, 2.6, 1.5]),
        (10, 'Resize <mode = "linear"> (x, s)', [1, 1, 2, 0.5]),
        (10, 'Resize <mode = "nearest"> (x, s)', [1, 1, 2.3, 1.7]),
        (10, 'Resize <mode = "nearest"> (x, s)', [1, 1, 0.6, 0.4]),
    ],
)
def test_old_resizes_find_the_same_samples(opset, text, scales):
    graph = f"g (float[1,2,5,7] x) => (float[1,2,H,W] y) {{ y = {text} }}"
    constants = {} if scales is None else {"s": np.array(scales, np.float32)}
    old = build(graph, opset, **constants)
    before, feeds = frozen(old), {"x": normal(1, 2, 5, 7)}
    model = raise_opset(old)
    assert opset_of(model) == 13
    assert_same(before, model, feeds)


def former(opset: int, text: str) -> ir.Model:
    return build(f"g (float[1,2,5,7] x) => (float[1,2,5,7] y) {{ [old] y = {text} (x) }}", opset)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "ImageScaler <scale = 0.5, bias = [1.0, -2.0]>",
            lambda x: x * 0.5 + np.reshape([1.0, -2.0], (2, 1, 1)),
        ),
        ("Affine <alpha = 2.0, beta = -0.5>", lambda x: 2 * x - 0.5),
        ("Affine <alpha = 2.0>", lambda x: 2 * x),
        ("Scale <scale = 3.0>", lambda x: 3 * x),
        ("ScaledTanh <alpha = 1.5, beta = 0.5>", lambda x: 1.5 * np.tanh(0.5 * x)),
        (
            "ParametricSoftplus <alpha = 1.5, beta = 0.5>",
            lambda x: 1.5 * np.log1p(np.exp(0.5 * x)),
        ),
    ],
)
def test_operators_that_there_are_no_more_become_arithmetic(text, wanted):
    x = normal(1, 2, 5, 7)
    for opset in (7, 9):
        model = raise_opset(former(opset, text))
        assert [n.name for n in model.graph][-1] == "old"
        given = run(frozen(model), {"x": x})["y"]
        np.testing.assert_allclose(given, wanted(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
    before = frozen(former(9, text))
    if "Softplus" not in text and "Scale <" not in text:  # which the runtime lacks
        assert_same(before, raise_opset(former(9, text)), {"x": x})


def test_what_only_the_runtime_knows_is_passed_on():
    graph = """g (float[2,8] x) => (float[2,8] y) { a = LayerNormalization (x, s, b)
        [up] y = Relu (a) }"""
    old = build(graph, 11, s=positive(8), b=normal(8))
    before = frozen(old)
    assert_same(before, raise_opset(old), {"x": normal(2, 8)})


def test_weights_in_other_files_stay_where_they_are(tmp_path, monkeypatch):
    """Also where a file of the same name lies in the current folder."""
    proto = ir.to_proto(
        build("g (float[1,64] x) => (float[1,64] y) { y = MatMul (x, w) }", 11, w=W)
    )
    (tmp_path / "sub").mkdir()
    onnx.save(
        proto,
        tmp_path / "sub" / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    (tmp_path / "m.data").write_bytes(bytes(W.nbytes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("converter.graph.mapped.MAPPED_ABOVE", 0)
    model = load(Path("sub/m.onnx"))
    raised = raise_opset(model)
    tensor = raised.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), W)


def test_new_opsets_are_left_as_they_are():
    model = build(f"{X} => (float[2,4] y) {{ y = Relu (x) }}", opset=17)
    assert raise_opset(model) is model


def test_an_opset_that_cannot_be_raised():
    model = build(
        f"{X} => (float[] y) {{ y = Upsample <height_scale=2.0, width_scale=2.0> (x) }}", opset=1
    )
    with pytest.raises(
        ModelError,
        match=r"opset 1 cannot be converted to 13 .*; export it again with opset 13 or newer",
    ):
        raise_opset(model)


# --- shapes

DYNAMIC = "g (float[N,4] x, float[M] z) => (float[] y) { y = Relu (x) }"


@pytest.mark.parametrize(
    ("given", "expected"),
    [((3, 4), "[3,4]"), ((3, None), "[3,4]"), ((None, 4), "[N,4]"), ((None, None), "[N,4]")],
)
def test_dynamic_dimensions_are_set(given, expected):
    model = build(DYNAMIC)
    set_input_shapes(model, {"x": given})
    assert str(model.graph.inputs[0].shape) == expected
    assert str(model.graph.inputs[1].shape) == "[M]"


@pytest.mark.parametrize("given", [(3, 5), (3,), (3, 4, 1)])
def test_contradicting_shapes_are_refused(given):
    with pytest.raises(
        UsageError, match=r"input 'x' has the shape \[\?, 4\], which \[3.*\] contradicts\."
    ):
        set_input_shapes(build(DYNAMIC), {"x": given})


def test_unknown_inputs_are_refused():
    with pytest.raises(
        UsageError, match=r"--inputShape: the model has no input 'xx'; write one of x, z\."
    ):
        set_input_shapes(build(DYNAMIC), {"xx": (1, 4)})


def test_an_input_of_unknown_rank_gets_a_shape():
    model = build("g (float[] x) => (float[] y) { y = Relu (x) }")
    set_input_shapes(model, {"x": (1, 4)})
    assert str(model.graph.inputs[0].shape) == "[1,4]"


# --- the whole


def test_prepare_brings_a_model_into_normal_form():
    graph = """g (float[2,4,5,5] x, float[6,4,3,3] w) => (float[] y) {
        k = Constant <value_float=2.0> ()
        w2 = Mul (w, k)
        a = Identity (x)
        [conv] c = Conv (a, w2)
        d = BatchNormalization (c, p, p, p, p)
        e = Dropout (d)
        [unused] f = Neg (e)
        y = Relu (e)
    }"""
    model = build(graph, w=normal(6, 4, 3, 3), p=positive(6))
    feeds = {"x": normal(2, 4, 5, 5)}
    before = frozen(model)
    after = prepare(model)
    assert_same(before, after, feeds)
    assert [(n.op_type, n.name) for n in after.graph] == [("Conv", "conv"), ("Relu", "y")]
    assert [v.name for v in after.graph.inputs] == ["x"]
    once = frozen(after)
    assert_same(once, prepare(after), feeds)
    assert [n.name for n in after.graph] == ["conv", "y"]


def test_functions_are_inlined_and_their_nodes_named():
    model = build(
        f"{X} => (float[2,4] y) {{ [one] a = local.Twice (x)  [two] y = local.Twice (a) }}"
    )
    inner = build("g (float[2,4] i) => (float[2,4] o) { s = Add (i, i)  o = Relu (s) }").graph
    model.functions[("local", "Twice", "")] = ir.Function(
        "local", "Twice", graph=inner, attributes=[]
    )
    before = frozen(model)
    after = prepare(model)
    assert_same(before, after, {"x": normal(2, 4)})
    assert types(after) == ["Add", "Relu", "Add", "Relu"]
    assert len({n.name for n in after.graph} - {"", None}) == 4


@pytest.mark.parametrize(
    "nodes", ["y = Constant <value_floats=[1.0, 2.0]> ()", "y = Add (k, k)", "y = Identity (k)"]
)
def test_an_output_that_is_constant_keeps_its_name(nodes):
    model = build(f"{X} => (float[2] y, float[2,4] z) {{ {nodes}  z = Relu (x) }}", k=normal(2))
    before = frozen(model)
    assert_same(before, prepare(model), {"x": normal(2, 4)})


def test_values_that_subgraphs_read_survive():
    graph = """g (float[2,4] x, bool q) => (float[] y) {
        a = Identity (x)
        [matmul] b = MatMul (a, w)
        y = If (q) <
            then_branch = t () => (float[2,3] c) { k = Constant <value_float=2.0> ()
              c = Mul (b, k) },
            else_branch = e () => (float[2,3] d) { d = Relu (b) } >
    }"""
    for q in (True, False):
        model = build(graph, w=normal(4, 3))
        before = frozen(model)
        assert_same(before, prepare(model), {"x": normal(2, 4), "q": np.array(q)})
        assert node(model, "matmul").outputs[0].name == "b"
