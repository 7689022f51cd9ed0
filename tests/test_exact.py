"""Products of bytes give the same on every processor, whose kernels may saturate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from graphs import build, normal, run
from running import job

from calib.affine import Array
from converter.calibrate.exact import exact, saturates, saturates_here, saturating
from converter.pipeline.convert import convert

RNG = np.random.default_rng(0)


def unsigned(*shape: int) -> Array:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def signed(*shape: int) -> Array:
    return RNG.integers(-128, 128, shape).astype(np.int8)


X, W = unsigned(3, 8), signed(8, 4)
X_ZERO, W_ZERO = np.uint8(120), np.int8(-3)
SUMS = (X.astype(np.int64) - 120) @ (W.astype(np.int64) + 3)
BY_COLUMN = np.array([-3, 5, 0, 127], np.int8)
QUANTIZED = np.clip(np.rint(SUMS / 1e4) + 10, 0, 255)
SCALES = {"s": np.float32(1), "t": np.float32(1e4), "z": np.uint8(10)}
ZEROS = {"xz": X_ZERO, "wz": W_ZERO}


# --- what it is about


def in_16_bits(x: Array, w: Array) -> Array:
    """As kernels multiply that add two products in 16 bits."""
    products = x.astype(np.int64)[:, :, None] * w
    pairs = products.reshape(len(x), -1, 2, w.shape[1]).sum(axis=2)
    return np.asarray(np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1))


def test_kernels_that_saturate_are_told_from_exact_ones():
    assert saturates(in_16_bits)
    assert not saturates(lambda x, w: x.astype(np.int32) @ w.astype(np.int32))
    assert saturates_here() in {True, False}


def test_unsigned_operands_mean_the_same_and_do_not_saturate():
    moved = (W.astype(np.int64) + 128).astype(np.uint8)
    assert not np.array_equal(in_16_bits(X, W), X.astype(np.int64) @ W)
    exactly = X.astype(np.int64) @ moved - 128 * X.sum(axis=1, dtype=np.int64)[:, None]
    np.testing.assert_array_equal(exactly, X.astype(np.int64) @ W)


# --- operators on integers


CASES: Mapping[str, tuple[str, dict[str, Array], dict[str, Array], Array]] = {
    "MatMulInteger": (
        "(uint8[3,8] x) => (int32[3,4] y) { y = MatMulInteger (x, w, xz, wz) }",
        {"x": X},
        {"w": W, **ZEROS},
        SUMS,
    ),
    "without zero points": (
        "(uint8[3,8] x) => (int32[3,4] y) { y = MatMulInteger (x, w) }",
        {"x": X},
        {"w": W},
        X.astype(np.int64) @ W,
    ),
    "a zero point a column": (
        "(uint8[3,8] x) => (int32[3,4] y) { y = MatMulInteger (x, w, xz, wz) }",
        {"x": X},
        {"w": W, "xz": X_ZERO, "wz": BY_COLUMN},
        (X.astype(np.int64) - 120) @ (W.astype(np.int64) - BY_COLUMN),
    ),
    "transposed": (
        "(uint8[3,8] x) => (int32[3,4] y) { v = Transpose (w) y = MatMulInteger (x, v, xz, wz) }",
        {"x": X},
        {"w": W.T.copy(), **ZEROS},
        SUMS,
    ),
    "computed": (
        "(uint8[3,8] x, int8[8,4] w, int8 wz) => (int32[3,4] y) "
        "{ y = MatMulInteger (x, w, xz, wz) }",
        {"x": X, "w": W, "wz": np.array(W_ZERO)},
        {"xz": X_ZERO},
        SUMS,
    ),
    "an untyped input": (
        "(float[3,8] x) => (int32[3,4] y) { c = Cast <to = 2> (x) r = Reshape (c, shape) "
        "y = MatMulInteger (r, w, , wz) }",
        {"x": X.astype(np.float32)},
        {"w": W, "wz": W_ZERO, "shape": np.array([3, 8])},
        X.astype(np.int64) @ (W.astype(np.int64) + 3),
    ),
    "QLinearMatMul": (
        "(uint8[3,8] x) => (uint8[3,4] y) { y = QLinearMatMul (x, s, xz, w, s, wz, t, z) }",
        {"x": X},
        {"w": W, **SCALES, **ZEROS},
        QUANTIZED,
    ),
    "QLinearMatMul of stacked weights": (
        "(uint8[1,3,8] x) => (uint8[1,3,4] y) { y = QLinearMatMul (x, s, xz, w, s, wz, t, z) }",
        {"x": X[None]},
        {"w": W[None], **SCALES, **ZEROS},
        QUANTIZED[None],
    ),
    "QLinearConv": (
        "(uint8[1,8,3,1] x) => (uint8[1,4,3,1] y) { y = QLinearConv (x, s, xz, w, s, wz, t, z) }",
        {"x": X.T[None, :, :, None].copy()},
        {"w": W.T[:, :, None, None].copy(), **SCALES, **ZEROS},
        QUANTIZED.T[None, :, :, None],
    ),
    "ConvInteger, weights on the left": (
        "(int8[1,8,4,1] x) => (int32[1,3,4,1] y) { y = ConvInteger (x, w, xz, wz) }",
        {"x": W[None, :, :, None].copy()},
        {"w": X[:, :, None, None].copy(), "xz": W_ZERO, "wz": X_ZERO},
        SUMS[None, :, :, None],
    ),
    "QGemm": (
        "(uint8[3,8] x) => (uint8[3,4] y) { y = com.microsoft.QGemm (x, s, xz, w, s, wz, , t, z) }",
        {"x": X},
        {"w": W, **SCALES, **ZEROS},
        QUANTIZED,
    ),
    "MatMulIntegerToFloat": (
        "(uint8[3,8] x) => (float[3,4] y) "
        "{ y = com.microsoft.MatMulIntegerToFloat (x, w, s, s, xz, wz) }",
        {"x": X},
        {"w": W, **SCALES, **ZEROS},
        SUMS,
    ),
    # Of numbers from 0 to 255 the scale is 1.
    "DynamicQuantizeMatMul": (
        "(float[3,8] x) => (float[3,4] y) { y = com.microsoft.DynamicQuantizeMatMul (x, w, s, wz) }",
        {"x": np.where(np.arange(24).reshape(3, 8), X, 255).astype(np.float32)},
        {"w": W, **SCALES, "wz": W_ZERO},
        np.where(np.arange(24).reshape(3, 8), X, 255).astype(np.int64) @ (W.astype(np.int64) + 3),
    ),
}


def built(graph: str, constants: Mapping[str, Array], opset: int = 13) -> ir.Model:
    model = build(f"g {graph}", opset, ir_version=10, **constants)
    model.graph.opset_imports["com.microsoft"] = 1
    return model


def assert_exact(
    model: ir.Model, feeds: Mapping[str, Array], wanted: Array, atol: float = 0
) -> ir.Model:
    """The exact model computes what is wanted, optimized or not, and has nothing that saturates."""
    after = exact(model)
    assert after is not model
    assert list(saturating(after)) == []
    for optimize in (False, True):
        found = run(after, feeds, optimize)["y"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=atol)
    return after


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("case", CASES)
def test_operators_on_integers(case, opset):
    graph, feeds, constants, wanted = CASES[case]
    model = built(graph, constants, opset)
    assert len(list(saturating(model))) == 1
    assert_exact(model, feeds, wanted)


def test_attention_on_integers():
    x, w = unsigned(1, 3, 8), signed(8, 24)
    graph = """(uint8[1,3,8] x) => (float[1,3,8] y) {
        y = com.microsoft.QAttention <num_heads = 1> (x, w, b, s, s, , xz, wz)
    }"""
    constants = {"w": w, "b": np.zeros(24, np.float32), "s": np.float32(0.01), **ZEROS}
    rows = (x[0].astype(np.float64) - 120) @ (w.astype(np.float64) + 3) * 1e-4
    q, k, v = np.split(rows, 3, axis=1)
    shares = np.exp(q @ k.T / np.sqrt(8))
    wanted = (shares / shares.sum(axis=1, keepdims=True)) @ v
    assert_exact(built(graph, constants), {"x": x}, wanted[None], atol=1e-5)


def test_recurrence_on_integers():
    w, r, middle = signed(1, 8, 16), signed(1, 4, 16), np.zeros(1, np.int8)
    graph = """(float[5,1,8] x) => (float[5,1,1,4] y) {
        y = com.microsoft.DynamicQuantizeLSTM <hidden_size = 4>
            (x, w, r, , , , , , s, z, s, z)
    }"""
    model = built(graph, {"w": w, "r": r, "s": np.array([0.01], np.float32), "z": middle})
    feeds = {"x": RNG.uniform(-1, 1, (5, 1, 8)).astype(np.float32)}
    after = assert_exact(model, feeds, lstm(feeds["x"][:, 0], w[0] * 0.01, r[0] * 0.01), atol=0.02)
    assert [v.dtype for v in after.graph[0].inputs if v is not None and v.name != "x"].count(
        ir.DataType.UINT8
    ) == 4


def lstm(x: Array, w: Array, r: Array) -> Array:
    """All hidden states (steps, 1, 1, hidden) of a recurrence without biases, gates i, o, f, c."""
    hidden, cell, states = np.zeros(r.shape[0]), np.zeros(r.shape[0]), []
    for row in x:
        i, o, f, c = np.split(row @ w + hidden @ r, 4)
        i, o, f = (1 / (1 + np.exp(-gate)) for gate in (i, o, f))
        cell = f * cell + i * np.tanh(c)
        hidden = o * np.tanh(cell)
        states.append(hidden)
    return np.stack(states)[:, None, None]


# --- products between conversions


def pair(name: str, kind: type, zero: int) -> tuple[str, dict[str, Array]]:
    """Text of a Q/DQ pair of one scale, and its constants."""
    text = f"{name}q = QuantizeLinear ({name}, one, {name}z) {name}d = DequantizeLinear ({name}q, one, {name}z)"
    return text, {f"{name}z": np.array(zero, kind), "one": np.float32(1)}


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("weight", "read"),
    [
        ("v = DequantizeLinear <axis = 1> (w, scales, zeros)", "v"),
        ("v = DequantizeLinear <axis = 1> (w, scales)", "v"),
        ("v = DequantizeLinear (w, one, wz)", "v"),
        ("u = DequantizeLinear <axis = 0> (wt, scales, zeros) v = Transpose (u)", "v"),
    ],
)
def test_products_between_conversions(weight, read, kind, opset):
    zero = 120 if kind is np.uint8 else -8
    into, constants = pair("x", kind, zero)
    scales = np.array([1, 2, 0.5, 4], np.float32)
    constants |= {"w": W, "wt": W.T.copy(), "scales": scales, "wz": W_ZERO, "zeros": BY_COLUMN}
    graph = f"(float[3,8] x) => (float[3,4] y) {{ {into} {weight} y = MatMul (xd, {read}) }}"
    x = X.astype(np.float32) - 120
    shift = BY_COLUMN if "zeros" in weight else -3 if "wz" in weight else 0
    factor = scales if "scales" in weight else 1
    wanted = x.astype(np.float64) @ (W.astype(np.int64) - np.int64(shift)) * factor
    after = assert_exact(built(graph, constants, opset), {"x": x}, wanted)
    assert [n.op_type for n in after.graph].count("MatMul") == 1


def test_what_reads_the_same_codes_elsewhere_keeps_them():
    graph = """(uint8[3,8] x, int64[2] rows) => (int32[3,4] y, int32[3,4] p, int8[2,4] z) {
        y = MatMulInteger (x, w, xz, wz)  p = MatMulInteger (x, v, xz, wz)  z = Gather (w, rows)
    }"""
    model = built(graph, {"w": W, "v": W[::-1].copy(), **ZEROS})
    feeds = {"x": X, "rows": np.array([1, 0])}
    after = assert_exact(model, feeds, SUMS)
    found = run(after, feeds)
    np.testing.assert_array_equal(found["z"], W[[1, 0]])
    np.testing.assert_array_equal(
        found["p"], (X.astype(np.int64) - 120) @ (W[::-1].astype(np.int64) + 3)
    )


def test_products_inside_branches():
    graph = """(uint8[3,8] x, bool c) => (int32[3,4] y) {
        y = If (c) <then_branch = t () => (int32[3,4] a) { a = MatMulInteger (x, w, xz, wz) },
                    else_branch = e () => (int32[3,4] b) { b = MatMulInteger (x, v, xz, wz) }>
    }"""
    model = built(graph, {"w": W, "v": W, **ZEROS})
    assert_exact(model, {"x": X, "c": np.array(True)}, SUMS)


@pytest.mark.parametrize(
    ("graph", "constants"),
    [
        # 64 + 64 fit, and so do neighbours of opposite signs.
        ("MatMulInteger (x, w)", {"w": np.full((8, 4), 64, np.int8)}),
        ("MatMulInteger (x, w)", {"w": np.tile(np.int8([[127], [-127]]), (4, 4))}),
        ("MatMulInteger (x, w)", {"w": W.astype(np.int64).astype(np.uint8)}),
    ],
)
def test_models_that_no_kernel_computes_wrongly_stay_as_they_are(graph, constants):
    model = built(f"(uint8[3,8] x) => (int32[3,4] y) {{ y = {graph} }}", constants)
    assert exact(model) is model


def test_signed_operands_on_both_sides_stay_as_they_are():
    graph = "(int8[3,8] x) => (int32[3,4] y) { y = MatMulInteger (x, w) }"
    model = built(graph, {"w": W})
    assert exact(model) is model


# --- in a conversion


@pytest.mark.parametrize("target", ["ARM", "DSP", "NVGPU"])
def test_conversions_are_the_same_where_kernels_saturate(tmp_path, monkeypatch, target):
    graph = """g (float[1,4,8,8] x) => (float[1,4,8,8] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)  r = Relu (c)  y = Conv <pads = [1,1,1,1]> (r, v)
    }"""
    model = build(graph, w=normal(4, 4, 3, 3), v=normal(4, 4, 3, 3, seed=1))
    task = job(tmp_path, model, {"x": normal(6, 4, 8, 8)}, target_device=target)
    found = []
    for saturating_here in (False, True):
        if saturating_here:  # else as this processor is
            monkeypatch.setattr("converter.calibrate.exact.saturates_here", lambda: True)
        verification = convert(task).verification
        found.append((task.output.read_bytes(), verification and verification.outputs))
    assert found[0] == found[1]


@pytest.mark.parametrize(("code", "found"), [(64, []), (65, ["y"])])
def test_codes_that_are_transposed_when_the_model_is_loaded_are_looked_at(code, found):
    model = build(
        "g (float[N,8] x) => (int32[N,16] z) { c, s, o = DynamicQuantizeLinear (x) "
        "t = Transpose <perm = [1, 0]> (table)  [y] z = MatMulInteger (c, t, o) }",
        table=np.full((16, 8), code, np.int8),
    )
    assert list(saturating(model)) == found
