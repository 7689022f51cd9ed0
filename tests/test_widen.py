"""float16 and bfloat16 models are quantized from float32 copies."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, changes, frozen, run

from calib.affine import Array
from converter.prepare import prepare
from converter.prepare.widen import NARROW, widen

TEXT = """
g (float16[N, 4] x, bool choice) => (float16[N, 3] y, float16[N, 3] z)
{
  h = MatMul (x, w)
  i = Cast <to = 1> (h)
  c = Cast <to = 10> (i)
  z = Relu (c)
  y = If (choice) <
    then_branch = t () => (float16[N, 3] a) { a = Add (z, w2) },
    else_branch = e () => (float16[N, 3] b) { b = Mul (z, w2) }
  >
}
"""


def half_model(dtype: type = np.float16) -> ir.Model:
    rng = np.random.default_rng(0)
    text = TEXT if dtype == np.float16 else TEXT.replace("float16", "bfloat16").replace("10", "16")
    return build(text, w=rng.normal(size=(4, 3)).astype(dtype), w2=rng.normal(size=3).astype(dtype))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("choice", [False, True])
def test_it_computes_the_same_and_keeps_its_types(optimize: bool, choice: bool) -> None:
    model = half_model()
    wide = prepare(model.clone())
    assert [v.dtype for v in (*wide.graph.inputs, *wide.graph.outputs)] == [
        ir.DataType.FLOAT16,
        ir.DataType.BOOL,
    ] + [ir.DataType.FLOAT16] * 2
    assert [v.name for v in wide.graph.outputs] == ["y", "z"]
    feed = {
        "x": np.random.default_rng(1).normal(size=(5, 4)).astype(np.float16),
        "choice": np.array(choice),
    }
    old, new = run(model, feed, optimize), run(wide, feed, optimize)
    for name in ("y", "z"):
        assert new[name].dtype == np.float16
        np.testing.assert_allclose(new[name], old[name], rtol=4e-3, atol=2e-3)


def test_nothing_narrow_is_left_inside() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        wide = prepare(half_model(dtype))
        onnx.checker.check_model(ir.to_proto(wide), full_check=True)
        casts = {v for node in wide.graph for v in node.outputs if node.op_type == "Cast"} | set(
            wide.graph.inputs
        )
        values = [
            v
            for g in wide.graphs()
            for v in (*g.initializers.values(), *(o for n in g for o in n.outputs))
        ]
        assert not [v.name for v in values if v.dtype in NARROW and v not in casts]


def test_float32_models_stay_as_they_are() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    assert [node.op_type for node in prepare(model).graph] == ["Relu"]


# Places where a type hides, between two products: the opset and the nodes from a to b. The text has
# float16 by its bits: 14336 is 0.5, 16896 is 3.
HALF = {"half": np.array(0.5, np.float16), "scale": np.array(0.02, np.float16)}
HIDDEN = {
    "constant of shape": (
        13,
        "s = Shape (a)  k = ConstantOfShape <value = float16[1] {14336}> (s)  b = Add (a, k)",
    ),
    "constant": (13, "k = Constant <value = float16[1] {16896}> ()  b = Add (a, k)"),
    "cast": (13, "i = Cast <to = 1> (a)  j = Exp (i)  b = Cast <to = 10> (j)"),
    "cast like": (15, "i = Cast <to = 1> (a)  j = Exp (i)  b = CastLike (j, half)"),
    "window": (17, "k = HannWindow <output_datatype = 10> (four)  b = Mul (a, k)"),
    "eye": (13, "k = EyeLike <dtype = 10> (a)  b = Add (a, k)"),
    "random": (
        13,
        "k = RandomUniformLike <dtype = 10, low = 0.0, high = 0.0> (a)  b = Add (a, k)",
    ),
    "normalization": (17, "b = LayerNormalization <stash_type = 1> (a, gains)"),
    "conversions": (
        19,
        "q = QuantizeLinear (a, scale, zero)  b = DequantizeLinear (q, scale, zero)",
    ),
    "output of a conversion": (
        23,
        """q = QuantizeLinear (a, scale, zero)
           b = DequantizeLinear <output_dtype = 10> (q, scale32, zero)""",
    ),
    "empty sequence": (
        13,
        """e = SequenceEmpty <dtype = 10> ()  f = SequenceInsert (e, a)
           b = SequenceAt (f, first)""",
    ),
    "bits": (26, "i = BitCast <to = 4> (a)  b = BitCast <to = 10> (i)"),
    "branch": (
        13,
        """b = If (choice) <
             then_branch = t () => (float16[N, 4] c) {
               s = Shape (a)  k = ConstantOfShape <value = float16[1] {14336}> (s)  c = Add (a, k) },
             else_branch = e () => (float16[N, 4] d) { d = Neg (a) } >""",
    ),
    "loop": (
        13,
        """b = Loop (two, choice, a) <body = l (int64 i, bool go, float16[N, 4] u)
               => (bool on, float16[N, 4] r) {
             on = Identity (go)  f = Cast <to = 1> (u)  g = Tanh (f)  r = Cast <to = 10> (g) } >""",
    ),
}
CONSTANTS: dict[str, Array] = {
    **HALF,
    "four": np.array(4),
    "two": np.array(2),
    "first": np.array(0),
    "choice": np.array(True),
    "gains": np.array([1, 2, 0.5, 1], np.float16),
    "zero": np.array(128, np.uint8),
    "scale32": np.array(0.02, np.float32),
}


def between_products(opset: int, nodes: str, head: str = "float16[N, 5] y") -> ir.Model:
    rng = np.random.default_rng(3)
    constants = {name: array for name, array in CONSTANTS.items() if name in nodes.split("=", 1)[1]}
    weights = {"w": rng.normal(size=(4, 4)), "v": rng.normal(size=(4, 5))}
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    graph = f"g (float16[N, 4] x) => ({head}) {{ a = MatMul (x, w)  {nodes}  y = MatMul (b, v) }}"
    return build(graph, opset, 13 if opset > 23 else 10, **constants, **halves)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("place", HIDDEN)
def test_types_are_found_wherever_they_hide(place: str, twice: bool) -> None:
    """Also by a second preparation, as the first leaves narrow inputs and outputs."""
    opset, nodes = HIDDEN[place]
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"opset {opset} is not known here")
    model = between_products(opset, nodes)
    before = frozen(model)
    wide = prepare(prepare(model) if twice else model)
    x = {"x": np.random.default_rng(1).normal(size=(3, 4)).astype(np.float16)}
    for optimize in (False, True):
        found, wanted = run(wide, x, optimize)["y"], run(before, x, optimize)["y"]
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, wanted, rtol=4e-3, atol=1e-2)
    weights = [node.inputs[1] for node in wide.graph if node.op_type == "MatMul"]
    assert all(value is not None and value.dtype == ir.DataType.FLOAT for value in weights)


def test_an_optional_of_a_named_type() -> None:
    kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT16, None)
    make = onnx.helper.make_node
    nodes = [make("Optional", [], ["o"], type=kind), make("OptionalHasElement", ["o"], ["h"])]
    nodes += [make("Cast", ["h"], ["f"], to=10), make("Add", ["x", "f"], ["y"])]
    edges = [onnx.helper.make_tensor_value_info(name, 10, [2]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", edges[:1], edges[1:])
    proto = onnx.helper.make_model(
        graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 15)]
    )
    x = {"x": np.array([1, 2], np.float16)}
    wide = prepare(ir.from_proto(proto))
    np.testing.assert_array_equal(run(wide, x)["y"], run(proto.SerializeToString(), x)["y"])


def test_casts_that_have_become_idle_are_dropped() -> None:
    wide = prepare(between_products(13, "i = Cast <to = 1> (a)  j = Exp (i)  b = Cast <to=10> (j)"))
    assert [node.op_type for node in wide.graph] == ["Cast", "MatMul", "Exp", "MatMul", "Cast"]


def test_nodes_of_unknown_domains_keep_their_types() -> None:
    model = between_products(13, "c = local.Secret (a, half)  b = Neg (c)")
    secret = next(node for node in model.graph if node.op_type == "Secret")
    secret.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    wide = prepare(model)
    secret = next(node for node in wide.graph if node.op_type == "Secret")
    read = [value for value in secret.inputs if value is not None]
    assert [value.dtype for value in read] == [ir.DataType.FLOAT16] * 2
    (reader,) = (use.node for use in secret.outputs[0].uses())
    assert reader.op_type == "Cast"
    assert reader.outputs[0].dtype == ir.DataType.FLOAT


def test_outputs_in_any_place_keep_type_and_name() -> None:
    """An input, a constant and what is read on handed out, one of them twice."""
    head = "float16[N, 5] y, float16[N, 4] x, float16[4, 5] v, float16[N, 4] b, float16[N, 5] y"
    model = between_products(13, "b = Relu (a)", head)
    before = frozen(model)
    x = {"x": np.random.default_rng(1).normal(size=(3, 4)).astype(np.float16)}
    wanted, found = run(before, x), run(prepare(model), x)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name], array, rtol=4e-3, atol=1e-2)


def test_a_model_that_gives_a_sequence_of_halves_stays_as_it_is() -> None:
    text = "g (float16[2, 4] x) => (seq(float16[2, 2]) y) { y = SplitToSequence <axis = 1> (x, k) }"
    model = build(text, 13, k=np.array([2, 2]))
    before = frozen(model)
    assert not changes(widen, model)
    assert frozen(model) == before
