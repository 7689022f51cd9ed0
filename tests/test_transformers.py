"""Transformers in every mode: tied embeddings stay tied, shapes are computed once, channels move
through attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same, build, changes, frozen, normal, run, types
from running import job, write_config

from calib.affine import Array
from converter.config import load_config
from converter.emit.finish import forget_inferred
from converter.graph.edit import constant
from converter.graph.files import load
from converter.job import Job
from converter.pipeline.convert import convert
from converter.prepare import prepare
from converter.prepare.share import share_shapes
from converter.prepare.smooth import divide_channels, linear_in
from converter.prepare.tie import tie

VOCABULARY, WIDTH = 600, 64
TABLE = normal(VOCABULARY, WIDTH)
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9))
LM = "g (int64[B,T] ids) => (float[] y)"
TRANSPOSED = "t = Transpose <perm = [1, 0]> (table)"


def language_model(text: str = TRANSPOSED, **constants: Array) -> ir.Model:
    """Tokens looked up, mixed, and scored against the table."""
    nodes = (
        f"h = Gather (table, ids)  [mix] p = MatMul (h, w)  n = Tanh (p)  {text}  [score] y = "
        "MatMul (n, t)"
    )
    return build(
        f"{LM} {{ {nodes} }}", table=TABLE, w=normal(WIDTH, WIDTH, seed=1) / 8, **constants
    )


def large(model: ir.Model) -> list[tuple[tuple[int, ...], str]]:
    """Shape and type of the initializers as large as the table."""
    arrays = [v.const_value.numpy() for g in model.graphs() for v in g.initializers.values()]
    return [(a.shape, str(a.dtype)) for a in arrays if a.size == TABLE.size]


def quantized(folder: Path, model: ir.Model, mode: str, given: bool = True) -> ir.Model:
    """The model after a whole conversion, with token ids to calibrate on where `given`."""
    (folder / "model.onnx").write_bytes(frozen(model))
    np.save(folder / "ids.npy", np.random.default_rng(1).integers(0, VOCABULARY, (24, 9)))
    sections = {"common_quant": {"quant_type": mode.split()[0], "thread_num": 1}, **MODES[mode]}
    if given:
        path = f"ids:{folder / 'ids.npy'}"
        sections["data_preprocess"] = {
            "calibrate_path": path,
            "calibrate_size": 24,
            "input_type": "NPY",
        }
    task = Job(
        folder / "model.onnx",
        folder / "out.onnx",
        load_config(write_config(folder / "c.cfg", **sections)),
    )
    convert(task)
    return load(task.output)


# --- tied embeddings


@pytest.mark.parametrize(
    "model", [language_model(), language_model("", t=TABLE.T.copy())], ids=["read", "stored"]
)
def test_a_table_and_its_transposed_are_one(model):
    before = frozen(model)
    after = prepare(model)
    assert_same(before, after, {"ids": IDS})
    assert large(after) == [(TABLE.shape, "float32")]
    assert "score" in {node.name for node in after.graph}


def test_a_weight_of_its_own_and_a_table_as_it_is_are_not_tied():
    other = TABLE.T.copy()
    other[0, 0] += 1
    square = build(f"{LM} {{ h = Gather (t, ids)  y = MatMul (h, t) }}", t=normal(WIDTH, WIDTH))
    for model in (language_model("", t=other), square):
        assert not changes(tie, model)


MODES = {
    "DYNAMIC_QUANT": {},
    "DYNAMIC_QUANT by row": {"dynamic_quant": {"quant_strategy": "ACWL"}},
    "WEIGHT_QUANT": {},
    "FULL_QUANT": {},
}


@pytest.mark.parametrize("small_table", [0, 1 << 20])
@pytest.mark.parametrize(
    ("mode", "given"), [(m, g) for m in MODES for g in (True, False) if g or m != "FULL_QUANT"]
)
def test_one_copy_of_the_codes_serves_lookup_and_product(
    mode, given, small_table, tmp_path, monkeypatch
):
    monkeypatch.setattr("converter.modes.dynamic_quant.SMALL_TABLE", small_table)
    model = language_model()
    wanted = run(model, {"ids": IDS})["y"]
    result = quantized(tmp_path, model, mode, given)
    ((shape, kind),) = large(result)
    assert shape == TABLE.shape
    assert kind in {"int8", "uint8"}
    for optimize in (False, True):
        found = run(result, {"ids": IDS}, optimize)["y"]
        assert np.linalg.norm(found - wanted) < 0.04 * np.linalg.norm(wanted)


def test_tables_of_a_full_quantization_are_stored_and_cost_no_time(tmp_path):
    text = "h = Gather (table, ids)  [mix] p = MatMul (h, w)  y = Tanh (p)"
    model = build(f"{LM} {{ {text} }}", table=TABLE, w=normal(WIDTH, WIDTH, seed=1) / 8)
    result = quantized(tmp_path, model, "FULL_QUANT")
    assert large(result) == [(TABLE.shape, "uint8")]
    lookup = next(node for node in result.graph if node.op_type == "Gather")
    restored = lookup.inputs[0].producer()
    while (
        restored is not None
    ):  # all that it reads depends on constants alone: folded when a runtime loads it
        constants = [v for v in restored.inputs if v.const_value is None]
        restored = constants[0].producer() if constants else None
    found, wanted = (run(m, {"ids": IDS})["y"] for m in (result, model))
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


# --- shapes

INDEXED = "{0}s = Shape ({0})  {0}d = Gather ({0}s, {1})  {0}u = Unsqueeze ({0}d, {2})"


def test_equal_dimensions_are_read_once():
    parts = [INDEXED.format("x", "one", "zero"), "n = Neg (x)", INDEXED.format("n", "uno", "zilch")]
    parts += ["c = Concat <axis = 0> (xu, nu)  y = Expand (k, c)"]
    numbers = {
        "one": np.array(1),
        "uno": np.array(1),
        "zero": np.array([0]),
        "zilch": np.array([0]),
    }
    model = build(
        f"g (float[B,T] x) => (float[] y) {{ {' '.join(parts)} }}",
        k=np.ones((1, 1), np.float32),
        **numbers,
    )
    before = frozen(model)
    after = prepare(model)
    assert_same(before, after, {"x": normal(3, 5)})
    assert sorted(types(after)) == ["Concat", "Expand", "Gather", "Shape", "Unsqueeze"]


@pytest.mark.parametrize("shapes", [("B,T", "B,S"), ("B,3", "B,4"), (None, "B")])
def test_dimensions_that_may_differ_are_read_each(shapes):
    first, second = (f"float[{shape}]" if shape else "float[?,?]" for shape in shapes)
    text = (
        f"g ({first} x, {second} z) => (int64[2] y, int64[2] v) {{ y = Shape (x)  v = Shape (z) }}"
    )
    model = build(text.replace("?,?", "A,?") if "?" in text else text)
    if shapes[0] is None:
        model.graph.inputs[0].shape = None
    assert not changes(share_shapes, model)


# --- channels that stand out

HEADS, SIZE = 4, 16
ATTENTION = """[q] q = MatMul (x, wq)  [v] vm = MatMul (x, wv)  [vb] v = Add (b, vm)
    qr = Reshape (q, split)  vr = Reshape (v, split)  qt = Transpose <perm = [0, 2, 1, 3]> (qr)
    qk = Transpose <perm = [0, 2, 3, 1]> (qr)  s = MatMul (qt, qk)  p = Softmax (s)
    vt = Transpose <perm = [0, 2, 1, 3]> (vr)  c = MatMul (p, vt)
      ct = Transpose <perm = [0, 2, 1, 3]> (c)
    m = Reshape (ct, merge)  [out] y = MatMul (m, wo)"""
WEIGHTS = {name: normal(WIDTH, WIDTH, seed=i) / 8 for i, name in enumerate(("wq", "wv", "wo"))}
STATES = "g (float[B,T,64] x) => (float[] y)"
STATE = {"x": normal(2, 5, WIDTH)}


def attention(split: tuple[int, ...] = (0, 0, HEADS, SIZE), nodes: str = ATTENTION) -> ir.Model:
    shapes = {"split": np.array(split), "merge": np.array([0, 0, WIDTH])}
    return prepare(build(f"{STATES} {{ {nodes} }}", **WEIGHTS, **shapes, b=normal(WIDTH)))


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def places(model: ir.Model, reader: str = "out") -> list[tuple[str, int]]:
    return [(node.name or "", index) for node, index in linear_in([named(model, reader)])]


@pytest.mark.parametrize("split", [(0, 0, HEADS, SIZE), (0, 0, -1, SIZE)])
def test_the_values_of_attention_take_the_division_in(split):
    model = attention(split)
    before, count = frozen(model), len(types(model))
    assert places(model) == [("v", 1), ("vb", 0)]
    divide_channels(model, {"m": np.linspace(1, 9, WIDTH)}, {"m": [named(model, "out")]})
    assert len(types(model)) == count
    wanted, found = (run(m, STATE)["y"] for m in (before, model))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert (
        np.abs(constant(named(model, "v").inputs[1])[:, -1]).max()
        < np.abs(WEIGHTS["wv"][:, -1]).max() / 8
    )


@pytest.mark.parametrize(
    "change",
    [
        ("ct = Transpose <perm = [0, 2, 1, 3]> (c)", "ct = Transpose <perm = [0, 2, 3, 1]> (c)"),
        ("c = MatMul (p, vt)", "e = MatMul (p, vt)  c = Tanh (e)"),
        ("[out] y = MatMul (m, wo)", "[out] r = MatMul (m, wo)  y = Add (r, m)"),
        ("[vb] v = Add (b, vm)", "[vb] u = Add (b, vm)  v = Relu (u)"),
        ("[vb] v = Add (b, vm)", "[vb] v = Add (q, vm)"),
    ],
)
def test_what_is_not_linear_channel_by_channel_does_not(change):
    assert change[0] in ATTENTION
    assert places(attention(nodes=ATTENTION.replace(*change))) == []


def test_values_that_are_read_elsewhere_or_mixed_with_rows_do_not():
    also = ATTENTION.replace(
        "y = MatMul (m, wo)", "r = MatMul (m, wo)  z = ReduceSum (vt)  y = Add (r, z)"
    )
    assert places(attention(nodes=also)) == []
    assert places(attention(split=(2, 10, 2, SIZE))) == []


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ("[p] p = MatMul (x, wq)  [out] y = MatMul (p, wo)", [("p", 1)]),
        (
            "[p] p = MatMul (x, wq)  [a] a = Add (p, b)  [out] y = MatMul (a, wo)",
            [("p", 1), ("a", 1)],
        ),
        ("[n] n = LayerNormalization (x, b, b)  [out] y = MatMul (n, wo)", [("n", 1), ("n", 2)]),
        ("n = LayerNormalization <axis = 1> (x, stack)  [out] y = MatMul (n, wo)", []),
        ("p = MatMul (x, wq)  r = Relu (p)  [out] y = MatMul (r, wo)", []),
        ("p = MatMul (x, wq)  [out] o = MatMul (p, wo)  y = Add (o, p)", []),
        ("[out] y = MatMul (x, wo)", []),
    ],
)
def test_producers_that_take_the_division_in(nodes, wanted):
    constants = {**WEIGHTS, "b": normal(WIDTH), "stack": normal(5, WIDTH)}
    assert (
        places(build(f"g (float[2,5,64] x) => (float[] y) {{ {nodes} }}", opset=17, **constants))
        == wanted
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gemm_takes_the_division_in_with_its_bias(transposed):
    weight = WEIGHTS["wq"].T.copy() if transposed else WEIGHTS["wq"]
    text = (
        f"[p] p = Gemm <transB = {int(transposed)}> (x, w, b)  [out] y = Gemm <transB = "
        f"{int(transposed)}> (p, v)"
    )
    model = build(
        f"g (float[N,64] x) => (float[] y) {{ {text} }}", w=weight, v=WEIGHTS["wo"], b=normal(WIDTH)
    )
    before = frozen(model)
    divide_channels(model, {"p": np.linspace(1, 9, WIDTH)}, {"p": [named(model, "out")]})
    assert types(model) == ["Gemm", "Gemm"]
    wanted, found = (run(m, {"x": STATE["x"][0]})["y"] for m in (before, model))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_what_float_nodes_hand_to_products_is_smoothed_for_static_ranges(tmp_path):
    scale = np.ones(WIDTH, np.float32)
    scale[7] = 80
    text = "n = LayerNormalization (x, scale)  [p] p = MatMul (n, wq)  y = Tanh (p)"
    weights = {"wq": WEIGHTS["wq"] / scale[:, None], "scale": scale}
    model = build(f"g (float[B,5,64] x) => (float[] y) {{ {text} }}", opset=17, **weights)
    task = job(tmp_path, model, {"x": normal(32, 5, WIDTH, seed=3)})
    convert(task)
    result, x = load(task.output), {"x": normal(4, 5, WIDTH, seed=4)}
    assert types(result).count("Mul") == 0
    wanted, found = (run(m, x)["y"] for m in (model, result))
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


# --- what is left out of the file


def test_types_that_runtimes_infer_are_not_stored_but_those_of_other_operators_are():
    model = prepare(build(f"{STATES} {{ a = Neg (x)  c = local.Thing (a)  y = Abs (c) }}"))
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT
    forget_inferred(model)
    stored = ir.to_proto(model).graph
    assert [value.name for value in stored.value_info] == ["c"]
    assert [value.name for value in stored.output] == ["y"]
    assert stored.output[0].type.tensor_type.elem_type == ir.DataType.FLOAT


def test_constants_that_nothing_reads_go_from_bodies_and_branches_that_are_never_taken():
    then = "then_branch = g1 () => (float[2,64] p) { p = Add (x, used) }"
    other = "else_branch = g2 () => (float[2,64] r) { r = Add (x, left) }"
    inner = f"then_branch = g3 () => (float[2,64] i) {{ i = If (yes) <{then}, {other}> }}"
    outer = "else_branch = g4 () => (float[2,64] o) { o = Neg (x) }"
    text = f"g (float[2,64] x, bool flag) => (float[] y) {{ y = If (flag) <{inner}, {outer}> }}"
    constants = {
        "used": normal(64),
        "left": normal(64, seed=1),
        "idle": normal(64, seed=2),
        "yes": np.array(True),
    }
    model = build(text, **constants)
    before = frozen(model)
    body = next(graph for graph in model.graphs() if graph.name == "g3")
    body.register_initializer(
        ir.Value(name="unread", const_value=ir.tensor(normal(64), name="unread"))
    )
    after = prepare(model)
    names = {name for graph in after.graphs() for name in graph.initializers}
    assert names == {"used"}
    for flag in (False, True):
        assert_same(before, after, {"x": normal(2, 64), "flag": np.array(flag)})


def test_equal_large_constants_are_stored_once_also_in_different_bodies():
    then = "then_branch = g1 () => (float[2,64] p) { p = MatMul (x, a) }"
    other = (
        "else_branch = g2 () => (float[2,64] r) { n = Neg (x)  q = MatMul (n, b)  r = Add (q, "
        "bias) }"
    )
    nodes = f"c = If (flag) <{then}, {other}>  d = MatMul (c, e)  y = Add (d, e2)"
    text = f"g (float[2,64] x, bool flag) => (float[] y) {{ {nodes} }}"
    square, small = normal(WIDTH, WIDTH), normal(WIDTH)
    model = build(text, e=square, bias=small, e2=small.copy())
    bodies = {graph.name: graph for graph in model.graphs()}
    for name, body in (("a", "g1"), ("b", "g2")):
        value = ir.Value(
            name=name, const_value=ir.tensor(square, name=name), shape=ir.Shape(square.shape)
        )
        bodies[body].register_initializer(value)
        reader = next(node for node in bodies[body] if node.op_type == "MatMul")
        reader.replace_input_with(1, value)
    before = frozen(model)
    after = prepare(model)
    sizes = sorted(
        v.const_value.size for graph in after.graphs() for v in graph.initializers.values()
    )
    assert sizes == [small.size, small.size, square.size]
    for flag in (False, True):
        assert_same(before, after, {"x": normal(2, 64), "flag": np.array(flag)})
