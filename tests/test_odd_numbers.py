"""Numbers that are no numbers, very large ones, and constants in odd clothes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Command, Result
from graphs import assert_same, build, frozen, normal, prepared, run, types
from running import write_config

from calib import trellis
from calib.affine import UINT8, QParams, quantize
from converter.calibrate.observe import channel_mean
from converter.graph.edit import constant, is_float, values_by_name
from converter.job import Watch
from converter.plan.ops import is_normalized
from converter.plan.placement import is_named
from converter.plan.plan import NodePlan, PerAxis, QuantPlan, WeightPlan
from converter.prepare import prepare
from converter.weights.gptq import helps_everywhere
from converter.weights.layers import store_by_weights
from converter.weights.moments import usable
from converter.weights.stored import Storage

MODES: dict[str, dict[str, object]] = {
    "FULL_QUANT": {},
    "DYNAMIC_QUANT": {},
    "WEIGHT_QUANT": {"bit_num": 4, "min_quant_weight_channel": 0},
}


@pytest.fixture
def qconvert(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


def write_data(samples: list[np.ndarray]) -> dict[str, object]:
    Path("data").mkdir()
    for i, sample in enumerate(samples):
        np.save(f"data/{i}.npy", sample)
    return {"calibrate_path": "x:data", "calibrate_size": len(samples), "input_type": "NPY"}


def finite_constants(path: str) -> bool:
    arrays = (onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer)
    return all(np.isfinite(a.astype(np.float64)).all() for a in arrays if a.dtype != object)


NETWORK = """g (float[1,8,4,4] x) => (float[1,8,4,4] y)
    { [one] a = Conv (x, w, b)  r = Relu (a)  [two] y = Conv (r, v, b) }"""
WEIGHTS = {"w": normal(8, 8, 1, 1), "v": normal(8, 8, 1, 1, seed=1), "b": normal(8)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 3e38])
def test_one_odd_value_leaves_the_model_sound(qconvert: Command, mode: str, value: float) -> None:
    samples = [normal(1, 8, 4, 4, seed=i) for i in range(8)]
    samples[3][0, 2, 1, 1] = value
    data = write_data(samples)
    Path("m.onnx").write_bytes(frozen(build(NETWORK, **WEIGHTS)))
    config = write_config(
        Path("c.cfg"),
        common_quant={"quant_type": mode, **MODES[mode]},
        data_preprocess=data,
    )
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0, result.err
    assert finite_constants("q.onnx")
    if np.isnan(value):
        assert "3.npy: 1 values are NaN; the sample is left out." in result.err
        feeds = {"x": samples[0]}
        before, after = (run(Path(p).read_bytes(), feeds)["y"] for p in ("m.onnx", "q.onnx"))
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_numbers_inside_spoil_no_other(qconvert: Command, mode: str) -> None:
    """0 / 0 in one row, as a fully masked row of an attention gives."""
    graph = """g (float[6,8] x) => (float[6,8] y) { [one] a = MatMul (x, w)
        z = Mul (a, keep)  n = Div (z, keep)  [two] m = MatMul (n, v)  [bias] y = Add (m, b) }"""
    keep = np.ones((6, 1), np.float32)
    keep[2] = 0
    constants = {"w": normal(8, 8), "v": normal(8, 8, seed=1), "b": normal(8), "keep": keep}
    Path("m.onnx").write_bytes(frozen(build(graph, **constants)))
    data = write_data([normal(6, 8, seed=i) for i in range(8)])
    keys = {"quant_type": mode, **MODES[mode]}
    config = write_config(Path("c.cfg"), common_quant=keys, data_preprocess=data)
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0, result.err
    assert finite_constants("q.onnx")
    feeds = {"x": normal(6, 8)}
    found = run(Path("q.onnx").read_bytes(), feeds)["y"]
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_samples_may_all_hold_what_is_no_number(qconvert: Command) -> None:
    """A model that takes NaN for a missing value."""
    graph = """g (float[4,8] x) => (float[4,8] y)
        { n = IsNaN (x)  f = Where (n, zero, x)  [one] y = MatMul (f, w) }"""
    model = build(graph, zero=np.float32(0), w=normal(8, 8))
    Path("m.onnx").write_bytes(frozen(model))
    samples = [normal(4, 8, seed=i) for i in range(4)]
    for sample in samples:
        sample[0, 0] = np.nan
    config = write_config(
        Path("c.cfg"),
        common_quant={"quant_type": "FULL_QUANT"},
        data_preprocess=write_data(samples),
    )
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0, result.err
    assert "Quantized 1 of 3 nodes" in result.out


def test_means_are_of_the_finite_values() -> None:
    x = np.array([[[1.0, 2.0], [np.nan, 4.0]], [[3.0, np.inf], [np.nan, 6.0]]], np.float32)
    np.testing.assert_array_equal(channel_mean(x, 1), [2.0, 5.0])
    assert np.isnan(channel_mean(x[:, :, :1], 1)[1])
    np.testing.assert_allclose(channel_mean(np.full((1, 1, 4), 3e38, np.float32), 1), [3e38])


def test_inputs_without_finite_squares_are_not_drawn() -> None:
    drawn = np.array([[[1, 2], [np.nan, 0], [1e30, 0], [3, 4]]], np.float32)
    np.testing.assert_array_equal(usable(drawn), [True, False, False, True])


def test_no_number_becomes_zero() -> None:
    q = QParams(np.float32(0.5), np.uint8(3), UINT8)
    codes = quantize(np.array([np.nan, 1.0, np.inf, -np.inf], np.float32), q)
    np.testing.assert_array_equal(codes, [3, 5, 255, 0])


def test_more_numbers_than_a_chunk_in_one_row() -> None:
    aims = np.random.default_rng(0).normal(7.5, 4, (1, 40_001))
    codes = trellis.nearest(aims, np.ones(40_001), 4, trellis.SHORT)
    assert codes.shape == aims.shape
    parts = [
        trellis.nearest(aims[:, i : i + 8], np.ones(8), 4, trellis.SHORT)
        for i in range(0, 40_000, 8)
    ]
    np.testing.assert_array_equal(codes[:, :40_000], np.concatenate(parts, axis=1))


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_more_channels_than_a_chunk(bits: int) -> None:
    model = prepared(
        "g (float[1,4] x) => (float[1,N] y) { [n] y = MatMul (x, w) }", w=normal(4, 40_000)
    )
    weight = WeightPlan("w", 1, UINT8, PerAxis(1))
    unit = NodePlan("n", "MatMul", True, "", ("x",), weight=weight).in_bits(bits)
    plan = store_by_weights(model, QuantPlan({"n": unit}, {}), Storage(), watch=Watch())
    assert plan.stored["n", 1].codes.shape == (4, 40_000)


# --- corrections


def test_a_correction_that_spoils_quiet_rows_does_not_help() -> None:
    weight = np.ones((1, 1, 2))
    rounded = weight + 0.01
    loud, quiet = [[1.0, 1.0]], [[1e-4, 1e-4]]
    x = np.array([loud * 5 + quiet * 5], np.float32)
    shift = np.array([-0.02 * 0.5])  # the mean error of all ten rows
    assert not helps_everywhere(x, weight, rounded, bias=np.zeros(1), shift=shift)
    assert helps_everywhere(x[:, :5], weight, rounded, bias=np.zeros(1), shift=np.array([-0.02]))


def test_a_normalisation_is_seen_behind_sums_and_moves() -> None:
    model = build(
        """g (float[2,4] x) => (float[4,2] y, float[2,4] z) { a = Neg (x)  b = Add (a, x)
        c = Transpose (b)  m = ReduceMean <axes = [1]> (c)  y = Sub (c, m)  n = Abs (x)
        z = Exp (n) }"""
    )
    values = values_by_name(model.graph)
    assert is_normalized(values["a"])
    assert not is_normalized(values["n"])


def test_quiet_inputs_before_a_normalisation_keep_their_bias(qconvert: Command) -> None:
    graph = """g (float[1,3,8,8] x) => (float[1,4,8,8] y) { [one] c = Conv (x, w, b)
        q = Mul (c, c)  m = ReduceMean <axes = [1]> (q)  s = Sqrt (m)  n = Div (c, s)
        [two] y = Conv (n, v) }"""
    constants = {"w": normal(16, 3, 3, 3), "b": np.zeros(16, np.float32), "v": normal(4, 16, 1, 1)}
    graph = graph.replace("Conv (x", "Conv <pads = [1, 1, 1, 1]> (x")
    Path("m.onnx").write_bytes(frozen(build(graph, **constants)))
    samples = [normal(1, 3, 8, 8, seed=i) for i in range(8)]
    for sample in samples:
        sample[:, :, :4] *= 1e-4
    keys = {"quant_type": "WEIGHT_QUANT", "bit_num": 8, "min_quant_weight_channel": 0}
    data = write_data(samples)
    config = write_config(Path("c.cfg"), common_quant=keys, data_preprocess=data)
    assert qconvert.convert(config, Path("q.onnx"), Path("m.onnx")).code == 0
    before, after = (
        run(Path(p).read_bytes(), {"x": samples[0]})["y"].astype(np.float64)
        for p in ("m.onnx", "q.onnx")
    )
    assert 10 * np.log10(np.sum(before**2) / np.sum((before - after) ** 2)) > 40


# --- constants and types


@pytest.mark.parametrize("op", ["RandomNormalLike (k)", "Bernoulli (k)", "RandomUniformLike (k)"])
def test_random_numbers_are_drawn_anew(op: str) -> None:
    graph = f"g (float[64] x) => (float[64] y, float[64] z) {{ a = {op}  b = {op}  y = Add (x, a)  z = Add (x, b) }}"
    model = prepare(build(graph, 15, k=np.full(64, 0.5, np.float32)))
    assert types(model)[:2] == [op.split()[0]] * 2
    found = run(model, {"x": np.zeros(64, np.float32)})
    assert (found["y"] != found["z"]).any()


DROPOUTS = {
    "of a constant": "a = Dropout (k, half, yes)  b = Dropout (k, half, yes)",
    "of an input": "a = Dropout (x, half, yes)  b = Dropout (x, half, yes)",
    "inside": """c = Dropout (k, half, yes)  a = Mul (c, k)  d = Dropout (k, half, yes)
        b = Mul (d, k)""",
}


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("case", DROPOUTS)
def test_a_dropout_in_training_drops_at_every_run(qconvert: Command, case: str, half: bool) -> None:
    graph = f"""g (float[4,64] x) => (float[4,64] y) {{ {DROPOUTS[case]}  s = Sub (a, b)
        m = MatMul (x, w)  y = Add (m, s) }}"""
    constants = {"half": np.float32(0.5), "yes": np.array(True), "w": normal(64, 64)}
    if "k" in DROPOUTS[case]:
        constants["k"] = np.ones((4, 64), np.float32)
    Path("m.onnx").write_bytes(frozen(build(graph, 17, **constants)))
    config = write_config(Path("c.cfg"), common_quant={"quant_type": "WEIGHT_QUANT"})
    flags = ("--fp16=on",) if half else ()
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"), *flags)
    assert result.code == 0, result.err
    assert "The model draws random numbers ('" in result.err
    assert "like the float model's" not in result.err
    product = normal(4, 64) @ normal(64, 64)
    for optimize in (False, True):
        draws = [
            run(Path("q.onnx").read_bytes(), {"x": normal(4, 64)}, optimize)["y"] - product
            for _ in range(3)
        ]
        # What the two dropped is not the same, and not the same again.
        assert all(np.abs(draw).mean() > 0.3 for draw in draws)
        assert np.abs(draws[0] - draws[1]).mean() > 0.3


def test_a_dropout_in_use_is_folded() -> None:
    graph = "g (float[4] x) => (float[4] y) { a = Dropout (k, half, no)  y = Add (x, a) }"
    constants = {"k": normal(4), "half": np.float32(0.5), "no": np.array(False)}
    assert types(prepared(graph, **constants)) == ["Add"]


def test_random_numbers_do_not_count_as_a_change_of_opset(qconvert: Command) -> None:
    """The conversion adds nodes, and ONNX Runtime draws by a node's number."""
    graph = """g (float[4,64] x) => (float[4,64] y) { u = Unsqueeze <axes = [0]> (x)
        v = Squeeze <axes = [0]> (u)  m = MatMul (v, w)  r = RandomNormalLike (m)
        y = Add (m, r) }"""
    Path("m.onnx").write_bytes(frozen(build(graph, 11, w=normal(64, 64))))
    config = write_config(Path("c.cfg"), common_quant={"quant_type": "WEIGHT_QUANT"})
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"), "--verbose")
    assert result.code == 0, result.err
    assert "unchecked, as the model draws random numbers" in result.out + result.err


def test_operators_of_other_domains_are_not_taken_for_one() -> None:
    """Whether they give the same twice, nobody knows."""
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[4] x) => (float[4] y) { a = com.microsoft.Gelu (x)  b = com.microsoft.Gelu (x)
        y = Sub (a, b) }"""
    model = prepare(ir.from_proto(onnx.parser.parse_model(text)))
    assert types(model) == ["Gelu", "Gelu", "Sub"]


# A weight in other clothes; what W stands for is 8 x 8.
CLOTHES = {
    "Cast": "v = Cast <to = 1> (w)",
    "CastLike": "v = CastLike (w, one)",
    "there and back": "c = Cast <to = 11> (w)  v = Cast <to = 1> (c)",
    "Identity": "c = Identity (w)  v = Cast <to = 1> (c)",
    "Transpose": "c = Cast <to = 1> (w)  v = Transpose (c)",
    "before the Cast": "c = Transpose (w)  v = Cast <to = 1> (c)",
    "Reshape": "c = Reshape (w, square)  v = Cast <to = 1> (c)",
    "Unsqueeze": "c = Unsqueeze (w, zero)  d = Cast <to = 1> (c)  v = Squeeze (d, zero)",
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("case", CLOTHES)
def test_weights_in_other_clothes_are_weights(case: str, dtype: type) -> None:
    graph = f"g (float[4,8] x) => (float[4,8] y) {{ {CLOTHES[case]}  y = MatMul (x, v) }}"
    others = {"one": np.float32(1), "square": np.array([8, 8]), "zero": np.array([0])}
    used = {name: x for name, x in others.items() if f", {name})" in CLOTHES[case]}
    constants = {"w": normal(8, 8).astype(dtype), **used}
    model = prepared(graph, **constants)
    assert types(model) == ["MatMul"]
    assert_same(build(graph, 15, **constants), model, {"x": normal(4, 8)})


@pytest.mark.parametrize("reader", ["t = Transpose (c)  u = MatMul (x, t)", "s = ReduceMax (w)"])
def test_large_weights_that_others_read_too_are_weights(reader: str) -> None:
    """More numbers than what is generated may have."""
    graph = f"""g (float[1,1100] x) => (float[1,1100] y) {{ c = Cast <to = 1> (w)
        y = MatMul (x, c)  {reader} }}"""
    graph = graph.replace("y) {", "y, float[] u) {" if "u =" in reader else "y, double[] s) {")
    model = prepared(graph, w=normal(1100, 1100).astype(np.float64))
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert products
    assert all(constant(node.inputs[1]) is not None for node in products)


def test_weights_of_branches_are_weights(qconvert: Command) -> None:
    body = "() => (float[1,8] {0}) {{ c{0} = Cast <to = 1> (w)  {0} = MatMul (x, c{0}) }}"
    graph = f"""g (float[1,8] x, bool c) => (float[1,8] y) {{ y = If (c) <
        then_branch = t {body.format("p")}, else_branch = e {body.format("q")}> }}"""
    model = prepared(graph, w=normal(8, 8).astype(np.float64))
    inner = [node.op_type for node in model.graph.all_nodes() if node.op_type != "If"]
    assert inner == ["MatMul"] * 2


def test_integers_behind_a_cast_stay_integers() -> None:
    graph = "g (float[4,8] x) => (float[4,8] y) { c = Cast <to = 1> (w)  y = MatMul (x, c) }"
    model = prepared(graph, w=np.arange(64, dtype=np.int8).reshape(8, 8))
    assert types(model) == ["Cast", "MatMul"]


def test_what_other_domains_compute_gets_its_type_from_the_runtime() -> None:
    onnx_text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2,8] x, int64[2] i) => (float[2,8] y) { a = com.microsoft.Gelu (x)
        [m] b = MatMul (a, w)  s = com.microsoft.BiasGelu (b, c)  y = Identity (s) }"""
    proto = onnx.parser.parse_model(onnx_text)
    for name, array in {"w": normal(8, 8), "c": normal(8)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    values = values_by_name(prepare(ir.from_proto(proto)).graph)
    assert is_float(values["a"])
    assert not is_float(values["i"])


def test_inputs_with_dimensions_of_one_name_may_differ_in_fact() -> None:
    graph = """g (float[N,4] x, float[N,4] z) => (float[A] y) { s = Shape (x)  t = Shape (z)
        a = ConstantOfShape (s)  b = ConstantOfShape (t)  u = Concat <axis = 0> (a, b)
        y = ReduceSum <keepdims = 0> (u, one) }"""
    model = build(graph, one=np.array([1]))
    before = frozen(model)
    feeds = {"x": normal(2, 4), "z": normal(3, 4)}
    assert_same(before, prepare(model), feeds)


def test_names_are_taken_literally_before_they_are_patterns() -> None:
    for name in ("blocks[0].attn/MatMul", "a*b?", "[x]", "plain"):
        assert is_named(name, name)
    assert is_named("blocks3", "blocks[0-9]")
    assert not is_named("blocks0.attn", "blocks[0].attn/MatMul")


NAMES = [
    *("blocks[0].attn/MatMul", "a,b", "a b", " a", "a:0", "/a/b", "a#b", "a #b", "#a", "[a", "a]"),
    *("a=b", "it's", "'a'", 'say "a", b', "a'b\"c,d", "a\nb", "\u00e9"),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_message_on_a_wrong_name_says_how_to_write_the_right_one(
    qconvert: Command, name: str
) -> None:
    model = build("g (float[2,4] x) => (float[2,4] y) { y = Tanh (x) }")
    model.graph[0].name = name
    Path("m.onnx").write_bytes(frozen(model))

    def planned(written: str) -> Result:
        keys = {"quant_type": "WEIGHT_QUANT", "skip_quant_node": written}
        config = write_config(Path("c.cfg"), common_quant=keys)
        return qconvert.convert(config, Path("q.onnx"), Path("m.onnx"), "--dry-run")

    wrong = planned("wrong")
    assert wrong.code == 1
    (written,) = re.findall(r"the nearest is (?:'.*', written (.*)|'(.*)')\.$", wrong.err, re.M)
    right = planned(written[0] or written[1])
    assert right.code == 0, right.err
    assert "named in skip_quant_node" in right.out


@pytest.mark.parametrize("mode", MODES)
def test_a_conversion_that_changes_nothing_says_so(qconvert: Command, mode: str) -> None:
    Path("m.onnx").write_bytes(frozen(build("g (float[2,4] x) => (float[2,4] y) { y = Tanh (x) }")))
    config = write_config(
        Path("c.cfg"),
        common_quant={"quant_type": mode, **MODES[mode]},
        data_preprocess=write_data([normal(2, 4)]),
    )
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0
    assert "No node could be quantized" in result.err


@pytest.mark.parametrize("mode", MODES)
def test_what_computes_in_float64_is_said_to(qconvert: Command, mode: str) -> None:
    graph = """g (float[4,64] x) => (float[4,64] y) { a = Cast <to = 11> (x)  b = MatMul (a, w)
        y = Cast <to = 1> (b) }"""
    Path("m.onnx").write_bytes(frozen(build(graph, w=normal(64, 64).astype(np.float64))))
    config = write_config(
        Path("c.cfg"),
        common_quant={"quant_type": mode, **MODES[mode]},
        data_preprocess=write_data([normal(4, 64)]),
    )
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0
    assert "No node could be quantized, as its" in result.err
    assert "not float32" in result.err


def test_half_precision_that_saves_nothing_says_so(qconvert: Command) -> None:
    graph = "g (float[2,4] x) => (float[2,4] y) { y = MatMul (x, w) }"
    Path("m.onnx").write_bytes(frozen(build(graph, w=normal(4, 4))))
    result = qconvert("--modelFile=m.onnx", "--outputFile=q.onnx", "--fp16=on")
    assert result.code == 0
    assert "The result is no smaller than the float model" in result.err


def test_what_is_not_finite_is_never_written(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: ir.Model, *_: object, **__: object) -> tuple[str, ...]:
        scale = next(v for name, v in model.graph.initializers.items() if "scale" in name)
        scale.const_value = ir.tensor(np.array(np.nan, np.float32), name=scale.name)
        return ()

    monkeypatch.setattr("converter.pipeline.convert.finish", spoil)
    Path("m.onnx").write_bytes(frozen(build(NETWORK, **WEIGHTS)))
    config = write_config(
        Path("c.cfg"),
        common_quant={"quant_type": "FULL_QUANT"},
        data_preprocess=write_data([normal(1, 8, 4, 4)]),
    )
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 1
    assert "holds NaN or infinite values" in result.err
    assert not Path("q.onnx").exists()


@pytest.mark.parametrize("lowest", [-1e5, -1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("form", ["Add (s, k)", "Where (m, s, low)"])
def test_masks_set_no_range(qconvert: Command, lowest: float, form: str) -> None:
    graph = f"""g (float[4,8] x) => (float[4,5] y) {{ [one] s = MatMul (x, w)  t = {form}
        p = Softmax (t)  [two] y = MatMul (p, v) }}"""
    masked = np.tril(np.ones((4, 6), bool), 2)
    constants = {
        "w": normal(8, 6),
        "v": normal(6, 5),
        "k": np.where(masked, 0, lowest).astype(np.float32),
        "m": masked,
        "low": np.float32(lowest),
    }
    used = {
        n: a
        for n, a in constants.items()
        if n in "wv" or n in form.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    Path("m.onnx").write_bytes(frozen(build(graph, **used)))
    samples = [normal(4, 8, seed=i) for i in range(8)]
    config = write_config(
        Path("c.cfg"),
        common_quant={"quant_type": "FULL_QUANT"},
        full_quant={"target_device": "DSP"},
        data_preprocess=write_data(samples),
    )
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0, result.err
    before, after = (
        run(Path(p).read_bytes(), {"x": samples[0]})["y"].astype(np.float64)
        for p in ("m.onnx", "q.onnx")
    )
    assert 10 * np.log10(np.sum(before**2) / np.sum((before - after) ** 2)) > 20
