"""Dynamic quantization: what is emitted computes what plain arithmetic says, fuses, and never
overflows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphs import assert_same, build, frozen, normal, run, types
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Ear, write_config

from calib.affine import Array
from converter.config import load_config
from converter.job import Job
from converter.modes import dynamic_quant
from converter.pipeline.convert import convert
from converter.plan.plan import QuantPlan
from converter.prepare import prepare
from converter.prepare.fake_quant import without_training
from converter.prepare.smooth import divide_channels
from converter.weights.smoothquant import Channels, expected_error, smoothing_factors

ROWS = "g (float[B,T,64] x) => (float[] y)"
TOKENS = "g (int64[B,T] ids) => (float[] y)"
W, V, BIAS = normal(64, 48) / 8, normal(48, 32, seed=1) / 7, normal(48)
X = normal(2, 5, 64)


def quantized(
    folder: Path,
    model: ir.Model,
    strategy: str = "ALWC",
    data: dict[str, Array] | None = None,
    **common: object,
) -> tuple[ir.Model, QuantPlan, Ear]:
    """The quantized model, checked, with `data` (input name -> samples along the first axis) to
    calibrate on.
    """
    sections = {
        "common_quant": {"quant_type": "DYNAMIC_QUANT", "thread_num": 1, **common},
        "dynamic_quant": {"quant_strategy": strategy},
    }
    for name, samples in (data or {}).items():
        np.save(folder / f"{name}.npy", samples)
        sections["data_preprocess"] = {
            "calibrate_path": f"{name}:{folder / name}.npy",
            "calibrate_size": len(samples),
            "input_type": "NPY",
        }
    config = load_config(write_config(folder / "c.cfg", **sections))
    ear = Ear()
    job = Job(Path("model.onnx"), Path("out.onnx"), config)
    made = dynamic_quant.quantize(without_training(model, job), job, ear)
    result, plan = made.model, made.plan
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return result, plan, ear


def constants(model: ir.Model) -> dict[str, Array]:
    return {
        v.name or "": v.const_value.numpy() for g in model.graphs() for v in g.initializers.values()
    }


def fused(model: ir.Model, folder: Path) -> list[str]:
    """The operator types that ONNX Runtime makes of it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(frozen(model), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "fused.onnx").graph.node]


def by_tensor(x: Array) -> Array:
    """What DynamicQuantizeLinear leaves of `x`, as the ONNX standard words it."""
    low, high = min(0.0, x.min()), max(0.0, x.max())
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def by_row(x: Array) -> Array:
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def close(found: Array, wanted: Array, steps: float) -> None:
    """Equal but for a code that float32 rounds the other way: `steps` is what one code is worth at
    most.
    """
    off = np.abs(found - wanted)
    assert off.max() <= steps * np.abs(wanted).max()
    assert np.median(off) <= 1e-5 * np.abs(wanted).max()


# --- products


@pytest.mark.parametrize(("strategy", "rounded"), [("ALWC", by_tensor), ("ACWL", by_row)])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_product_is_that_of_rounded_activations_and_stored_weights(
    strategy, rounded, opset, tmp_path
):
    model = build(f"{ROWS} {{ m = MatMul (x, w)  y = Add (b, m) }}", opset=opset, w=W, b=BIAS)
    result, plan, _ = quantized(tmp_path, prepare(model), strategy)
    stored = constants(result)
    assert stored["w_codes"].dtype == np.int8
    assert stored["w_scale"].shape == ((48,) if strategy == "ALWC" else ())
    wanted = (
        rounded(X.astype(np.float64)) @ (stored["w_codes"] * stored["w_scale"].astype(np.float64))
        + BIAS
    )
    for optimize in (False, True):
        close(run(result, {"x": X}, optimize)["y"], wanted, 0.02)
    assert plan.units()[0].absorbed == (plan.nodes["y"].name,)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.floats(0, 4))
def test_per_channel_weights_are_within_half_a_step_of_the_nearest_and_no_pair_overflows(
    seed, skew
):
    weight = normal(10, 6, seed=seed) * np.float32(10) ** np.linspace(
        -skew, skew, 6, dtype=np.float32
    )
    weight[:2] = np.abs(weight).max(axis=0)  # a pair of the largest weights
    node = build("g (float[N,10] x) => (float[N,6] y) { y = MatMul (x, w) }", w=weight).graph[0]
    unit = dynamic_quant.WeightPlan(
        "w", 1, dynamic_quant.INT8_NARROW, dynamic_quant.PerAxis(1), 128
    )
    found = dynamic_quant._fitted(node, unit)
    codes = found.codes.astype(int)
    assert np.abs(codes[::2] + codes[1::2]).max() <= 128
    assert np.abs(codes).max() <= 127
    # 255 * 128 is below 2 ** 15: no sum of two products of uint8 and int8 leaves 16 bits.
    assert 255 * np.abs(codes[::2] + codes[1::2]).max() < 1 << 15
    error = np.linalg.norm(codes * found.qparams.scale - weight, axis=0) / np.linalg.norm(
        weight, axis=0
    )
    assert error.max() < 0.01


def test_gemm_in_both_orientations_with_and_without_bias(tmp_path):
    rows = "g (float[B,64] x) => (float[] y, float[] z)"
    text = f"{rows} {{ y = Gemm <transB = 1> (x, t, b)  z = Gemm (x, w) }}"
    model = prepare(build(text, t=np.ascontiguousarray(W.T), w=W, b=BIAS))
    result, _, _ = quantized(tmp_path, model)
    assert types(result).count("DynamicQuantizeLinear") == 1
    found = run(result, {"x": X[0]})
    np.testing.assert_allclose(found["y"] - BIAS, found["z"], atol=1e-5)
    wanted = X[0].astype(np.float64) @ W
    assert np.linalg.norm(found["z"] - wanted) < 0.015 * np.linalg.norm(wanted)


def test_all_readers_share_one_quantization_and_the_runtime_fuses_products_with_their_biases(
    tmp_path,
):
    text = (
        "q = MatMul (x, a)  qb = Add (q, b)  k = MatMul (x, c)  kb = Add (k, b)  m = Mul (qb, "
        "kb)  y = MatMul (m, v)"
    )
    model = prepare(build(f"{ROWS} {{ {text} }}", a=W, c=W[::-1].copy(), b=BIAS, v=V))
    result, _, _ = quantized(tmp_path, model)
    assert types(result).count("DynamicQuantizeLinear") == 2
    after = fused(result, tmp_path)
    assert sorted(after) == [
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        *["MatMulIntegerToFloat"] * 2,
        "Mul",
    ]


def test_two_computed_operands_and_skipped_nodes_stay_float(tmp_path):
    text = (
        "p = MatMul (x, w)  t = Transpose <perm = [0, 2, 1]> (p)  s = MatMul (p, t)  y = Add (s, s)"
    )
    result, plan, _ = quantized(tmp_path, prepare(build(f"{ROWS} {{ {text} }}", w=W)))
    assert not plan.nodes["s"].quantized
    assert types(result).count("MatMul") == 1
    result, plan, _ = quantized(
        tmp_path, prepare(build(f"{ROWS} {{ {text} }}", w=W)), skip_quant_node="p"
    )
    assert plan.nodes["p"].reason == "named in skip_quant_node"
    assert "MatMulInteger" not in types(result)


def test_rows_with_scales_of_their_own_survive_one_large_row(tmp_path):
    x = X * np.array([1e-3, 1, 1, 1, 1e4], np.float32)[:, None]
    model = prepare(build(f"{ROWS} {{ y = MatMul (x, w) }}", w=W))
    wanted = x.astype(np.float64) @ W
    result, _, _ = quantized(tmp_path, model, "ACWL")
    for optimize in (False, True):
        error = run(result, {"x": x}, optimize)["y"] - wanted
        assert (np.linalg.norm(error, axis=-1) / np.linalg.norm(wanted, axis=-1)).max() < 0.05
    assert not run(result, {"x": np.zeros_like(x)})["y"].any()


# --- tables, other weights, subgraphs


@pytest.mark.parametrize(("small_table", "casts"), [(0, 1), (1 << 18, 0)])
def test_a_lookup_finds_integers_in_a_large_table_and_floats_in_a_small_one(
    tmp_path, monkeypatch, small_table, casts
):
    monkeypatch.setattr(dynamic_quant, "SMALL_TABLE", small_table)
    table = normal(500, 24)
    result, _, _ = quantized(
        tmp_path, prepare(build(f"{TOKENS} {{ y = Gather (table, ids) }}", table=table))
    )
    stored = constants(result)
    assert stored["table_codes"].shape == table.shape
    assert stored["table_codes"].itemsize == 1
    assert sum(a.nbytes for a in stored.values()) < 0.35 * table.nbytes
    ids = np.array([[0, 3, 499], [7, 7, -1]])
    found = run(result, {"ids": ids})["y"]
    assert np.abs(found - table[ids]).max() < 0.6 * (table.max() - table.min()) / 255
    after = fused(result, tmp_path)
    assert "Gather" in after
    assert after.count("Cast") == casts


def test_bodies_are_quantized_and_read_what_is_outside(tmp_path):
    then = "then_branch = g1 () => (float[B,T,48] p) { p = MatMul (x, w) }"
    other = "else_branch = g2 () => (float[B,T,48] r) { n = Neg (x)  r = MatMul (n, w) }"
    text = f"g (float[B,T,64] x, bool flag) => (float[] y) {{ y = If (flag) <{then}, {other}> }}"
    model = prepare(build(text, w=W))
    result, plan, _ = quantized(tmp_path, model)
    assert {name for name, node in plan.nodes.items() if node.quantized} == {"p", "r"}
    assert [a.dtype for name, a in constants(result).items() if name.endswith("_codes")] == [
        np.int8
    ]
    for flag in (False, True):
        wanted = (1 if flag else -1) * X.astype(np.float64) @ W
        found = run(result, {"x": X, "flag": np.array(flag)}, True)["y"]
        assert np.linalg.norm(found - wanted) < 0.015 * np.linalg.norm(wanted)


def test_convolutions_are_stored_in_8_bits_and_compute_in_floats(tmp_path):
    text = "g (float[1,8,9,9] x) => (float[] y) { y = Conv (x, w) }"
    model = prepare(build(text, w=normal(32, 8, 3, 3)))
    result, _, _ = quantized(tmp_path, model)
    assert "ConvInteger" not in types(result)
    assert fused(result, tmp_path).count("Conv") == 1
    x = {"x": normal(1, 8, 9, 9)}
    wanted = run(model, x)["y"]
    assert np.linalg.norm(run(result, x)["y"] - wanted) < 0.01 * np.linalg.norm(wanted)


# --- outlier channels


def channels_of(x: Array) -> Channels:
    return Channels(x.min(axis=0), x.max(axis=0), (x.astype(np.float64) ** 2).mean(axis=0))


def test_expected_error_is_that_of_rounding():
    # Without outliers and on many columns, the model of uniform rounding errors is close.
    x, weight = normal(4000, 64), normal(64, 256, seed=3)
    channels = channels_of(x)
    x_step = (x.max() - x.min()) / 255
    w_step = np.abs(weight).max(axis=0) / 127
    rounded_x, rounded_w = np.rint(x / x_step) * x_step, np.rint(weight / w_step) * w_step
    of_x = np.square((rounded_x - x) @ weight).sum(axis=1).mean()
    of_w = np.square(x @ (rounded_w - weight)).sum(axis=1).mean()
    found = expected_error(channels, weight, np.ones(64))
    assert found == pytest.approx(4 * of_x + of_w, rel=0.05)


def test_a_channel_that_stands_out_is_cut_off_and_even_ones_are_left():
    x = normal(4000, 64)
    assert smoothing_factors(channels_of(x), normal(64, 48)) is None
    assert smoothing_factors(channels_of(np.zeros_like(x)), normal(64, 48)) is None
    x[:, 5] *= 50
    factors = smoothing_factors(channels_of(x), normal(64, 48))
    assert factors is not None
    assert factors.argmax() == 5
    assert factors[5] > 4
    assert (np.delete(factors, 5) == 1).mean() > 0.9


NORM = "n = LayerNormalization (x, scale, shift)"


@pytest.mark.parametrize(
    ("text", "muls"), [("y = MatMul (n, w)", 0), ("m = MatMul (n, w)  y = Add (m, n)", 1)]
)
def test_smoothing_leaves_the_function_as_it_is(text, muls):
    square, gains = normal(64, 64), np.exp(normal(64)).astype(np.float32)
    model = build(
        f"{ROWS} {{ {NORM}  {text} }}", opset=17, w=square, scale=gains, shift=normal(64, seed=2)
    )
    before = frozen(model)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    divide_channels(model, {"n": np.linspace(1, 9, 64)}, {"n": [product]})
    assert types(model).count("Mul") == muls
    found, wanted = run(model, {"x": X})["y"], run(before, {"x": X})["y"]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_random_tokens_show_channels_that_stand_out(tmp_path):
    table = normal(200, 64)
    table[:, 9] *= 60
    text = f"{TOKENS} {{ e = Gather (table, ids)  y = MatMul (e, w) }}"
    weight = normal(64, 48)
    weight[9] /= 60
    model = prepare(build(text, table=table, w=weight))
    result, _, ear = quantized(tmp_path, model)
    assert ear.said[0] == "Channels that stand out in 1 of 1 tensors are moved into the weights."
    ids = np.arange(12)[None]
    wanted = table[ids].astype(np.float64) @ weight
    error = np.linalg.norm(run(result, {"ids": ids})["y"] - wanted) / np.linalg.norm(wanted)
    plain = np.linalg.norm((by_tensor(table[ids]) - table[ids]) @ weight) / np.linalg.norm(wanted)
    assert error < plain / 2


def test_data_makes_weights_and_biases_better(tmp_path):
    mixed = (normal(256, 1, 64) @ normal(64, 64, seed=4) + 3 * normal(64, seed=5)).astype(
        np.float32
    )
    model = prepare(build(f"{ROWS} {{ m = MatMul (x, w)  y = Add (m, b) }}", w=W, b=BIAS))
    wanted = mixed.astype(np.float64) @ W + BIAS
    errors = []
    for data in (None, {"x": mixed}):
        result, plan, _ = quantized(tmp_path, model, data=data)
        stored = constants(result)
        values = mixed.astype(np.float64) @ (
            stored["w_codes"] * stored["w_scale"].astype(np.float64)
        )
        errors.append(values + plan.biases.get("m", BIAS) - wanted)
    assert np.linalg.norm(errors[1]) < 0.8 * np.linalg.norm(errors[0])
    assert np.abs(errors[1].mean(axis=(0, 1))).max() < 1e-4 * np.abs(wanted).max()


def test_the_float_model_is_left_alone(tmp_path):
    model = prepare(build(f"{ROWS} {{ y = MatMul (x, w) }}", w=W))
    before = frozen(model)
    quantized(tmp_path, model, data={"x": normal(8, 1, 64)[:, None, 0]})
    assert_same(before, model, {"x": X})


def test_a_network_of_convolutions_is_told_that_nothing_becomes_integer(tmp_path):
    graph = "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { y = Conv <pads = [1,1,1,1]> (x, w) }"
    (tmp_path / "model.onnx").write_bytes(frozen(build(graph, w=normal(4, 3, 3, 3))))
    config = load_config(
        write_config(tmp_path / "c.cfg", common_quant={"quant_type": "DYNAMIC_QUANT"})
    )
    convert(Job(tmp_path / "model.onnx", tmp_path / "out.onnx", config), ear := Ear())
    assert any("Nothing of this model computes in integers" in line for line in ear.warned)
