"""Models that were trained with fake quantization: every form of it, what is kept of it, and what
it becomes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import build, frozen, normal, positive, run, types
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Ear, write_config

from calib.affine import IntFormat, QParams, dequantize, quantize
from converter.calibrate.trained_ranges import in_format
from converter.config import load_config
from converter.errors import ConfigError, ModelError, UsageError
from converter.graph.edit import constant
from converter.graph.files import load
from converter.job import Job
from converter.pipeline.convert import convert, make_plan
from converter.plan.plan import TensorPlan
from converter.plan.targets import CPU, NVGPU
from converter.prepare import prepare
from converter.prepare.fake_quant import take_trained
from converter.prepare.fake_quant_chains import chain_from, format_of
from converter.prepare.fake_quant_ranges import span_of
from converter.weights.trained import _recovered

# Two numbers as they are stored.
F = np.float32
X = normal(4, 4, 6, 6, seed=3)


def task(folder, model, data=None, flags=None, common=None, **transform):
    """The job that imports `model`."""
    (folder / "trained.onnx").write_bytes(frozen(model))
    sections = {"transform_quant": {"export_precision_mode": "QUANT", **transform}}
    if data is not None:
        np.save(folder / "x.npy", data)
        path = {
            "calibrate_path": f"x:{folder / 'x.npy'}",
            "calibrate_size": len(data),
            "input_type": "NPY",
        }
        sections["data_preprocess"] = path
    config = write_config(
        folder / "c.cfg", common_quant={"thread_num": 1, **(common or {})}, **sections
    )
    return Job(
        folder / "trained.onnx",
        folder / "out.onnx",
        load_config(config),
        verify=False,
        **(flags or {}),
    )


def imported(folder, model, data=None, flags=None, common=None, **transform):
    """The imported model, the outcome and what was said."""
    ear, job = Ear(), task(folder, model, data, flags, common, **transform)
    outcome = convert(job, ear)
    return load(job.output, folder / "none"), outcome, ear


def surprises(ear):
    """What was warned of, but that a model of a few numbers grows."""
    return [text for text in ear.warned if "no smaller than the float model" not in text]


def codes_of(model, op_type="Conv", number=0):
    """Codes, scale and zero point of the weight of the model's operator of that type."""
    node = [n for n in model.graph if n.op_type == op_type][number]
    restore = node.inputs[1].producer()
    assert restore.op_type == "DequantizeLinear"
    return [constant(value) for value in restore.inputs]


def close(before, after, feeds, step, share=0.02):
    """Optimized or not, the outputs differ by rounding alone: rarely, and by one step."""
    (wanted,) = run(before, feeds).values()
    for optimize in (False, True):
        (found,) = run(after, feeds, optimize).values()
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        differs = np.abs(found.astype(float) - wanted) > 1e-4 * step
        assert differs.mean() <= share
        assert np.abs(found.astype(float) - wanted).max() <= 1.001 * step


def codes(*shape, most=60, seed=0):
    """Random weight codes that no kernel saturates on; every channel has its largest."""
    found = np.random.default_rng([seed, *shape]).integers(-most, most + 1, shape)
    found.reshape(shape[0], -1)[:, 0] = most
    return found


# --- forms

C = codes(8, 4, 3, 3)
SCALES = (positive(8, seed=1) / 100).astype(F)
B = normal(8, seed=2)
# A convolution between activations of 8 bits, by Q/DQ pairs, with a Relu.
QDQ = """g (float[N,4,6,6] x) => (float[N,8,6,6] y) {{
    xq = QuantizeLinear(x, sx, zx)
    xd = DequantizeLinear(xq, sx, zx)
    {weight}
    c = Conv<pads=[1,1,1,1]>(xd, w, b)
    r = Relu(c)
    rq = QuantizeLinear(r, sr, zr)
    y = DequantizeLinear(rq, sr, zr)
}}"""
ACTIVATIONS = {"sx": F(0.03), "zx": np.uint8(120), "sr": F(0.02), "zr": np.uint8(0), "b": B}


def scaled(codes, scale, zero=0):
    """What codes stand for."""
    return ((codes.astype(np.float64) - zero) * np.asarray(scale, np.float64)).astype(F)


PAIRS = {
    "one scale, signed": (
        "wq = QuantizeLinear(W, s, z) w = DequantizeLinear(wq, s, z)",
        {"W": scaled(C, F(0.01)), "s": F(0.01), "z": np.int8(0)},
        np.full(8, F(0.01)),
    ),
    "one scale, unsigned": (
        "wq = QuantizeLinear(W, s, z) w = DequantizeLinear(wq, s, z)",
        {"W": scaled(C, F(0.01)), "s": F(0.01), "z": np.uint8(131)},
        np.full(8, F(0.01)),
    ),
    "a scale a channel": (
        "wq = QuantizeLinear<axis=0>(W, s, z) w = DequantizeLinear<axis=0>(wq, s, z)",
        {"W": scaled(C, SCALES[:, None, None, None]), "s": SCALES, "z": np.zeros(8, np.int8)},
        SCALES,
    ),
    "integers": (
        "w = DequantizeLinear<axis=0>(W, s, z)",
        {"W": C.astype(np.int8), "s": SCALES, "z": np.zeros(8, np.int8)},
        SCALES,
    ),
    "unsigned integers": (
        "w = DequantizeLinear(W, s, z)",
        {"W": (C + 90).astype(np.uint8), "s": F(0.01), "z": np.uint8(90)},
        np.full(8, F(0.01)),
    ),
    "seven bits": (
        "wq = QuantizeLinear(W, s, z) wc = Clip(wq, low, high) w = DequantizeLinear(wc, s, z)",
        {
            "W": scaled(C, F(0.01)),
            "s": F(0.01),
            "z": np.int8(0),
            "low": np.int8(-64),
            "high": np.int8(63),
        },
        np.full(8, F(0.01)),
    ),
    "arithmetic": (
        "wd = Div(W, s) wr = Round(wd) wc = Clip(wr, low, high) w = Mul(wc, s)",
        {"W": scaled(C, F(0.01)), "s": F(0.01), "low": F(-64), "high": F(63)},
        np.full(8, F(0.01)),
    ),
    "on the grid already": (
        "w = Identity(W)",
        {"W": scaled(C, SCALES[:, None, None, None])},
        SCALES,
    ),
}


@pytest.mark.parametrize("form", PAIRS)
def test_codes_and_scales_of_a_weight_are_kept(tmp_path, form):
    text, constants, scales = PAIRS[form]
    model = build(QDQ.format(weight=text), **ACTIVATIONS, **constants)
    before = frozen(model)
    after, outcome, ear = imported(tmp_path, model)
    found, scale, zero = codes_of(after)
    np.testing.assert_array_equal(found, C)
    np.testing.assert_array_equal(scale, scales)
    assert not zero.any()
    assert ear.told[0] == "Trained weights of 8 of 8 channels are kept bit for bit."
    assert outcome.plan.nodes[next(n.name for n in after.graph if n.op_type == "Conv")].quantized
    close(before, after, {"x": X}, 0.02)


def test_four_bit_integers_are_kept(tmp_path):
    four = codes(8, 4, 3, 3, most=7)
    packed = ir.tensor(four.astype(np.int8), dtype=ir.DataType.INT4, name="W")
    model = build(
        QDQ.format(weight="w = DequantizeLinear(W, s)"),
        opset=21,
        ir_version=10,
        **ACTIVATIONS,
        s=F(0.1),
    )
    value = ir.Value(
        name="W",
        const_value=packed,
        type=ir.TensorType(ir.DataType.INT4),
        shape=ir.Shape(four.shape),
    )
    restore = next(n for n in model.graph if n.inputs[0].name == "W")
    restore.replace_input_with(0, value)
    model.graph.register_initializer(value)
    before = frozen(model)
    after, _, _ = imported(tmp_path, model)
    found, scale, _ = codes_of(after)
    np.testing.assert_array_equal(found, four)
    np.testing.assert_array_equal(scale, np.full(8, F(0.1)))
    close(before, after, {"x": X}, 0.02)


ARITHMETIC = {
    "divide, add, clip, subtract, multiply": (
        "d = Div(x, s) e = Add(d, z) r = Round(e) c = Clip(r, l, h) f = Sub(c, z) q = Mul(f, s)",
        {"s": F(0.03), "z": F(120), "l": F(0), "h": F(255)},
        (0.03, 120, 255),
    ),
    "multiply with the inverse, clip first": (
        "d = Mul(x, i) c = Clip(d, l, h) r = Round(c) q = Mul(r, s)",
        {"i": F(32), "s": F(1 / 32), "l": F(-128), "h": F(127)},
        (1 / 32, 128, 255),
    ),
    "clip of the values, floor of a half more": (
        (
            "c = Clip(x, l, h) d = Sub(c, l) e = Mul(d, i) f = Add(e, o) r = Floor(f) g = Mul(r, "
            "s) q = Add(g, l)"
        ),
        {"i": F(32), "o": F(0.5), "s": F(1 / 32), "l": F(-4), "h": F(127 / 32)},
        (1 / 32, 128, 255),
    ),
    "zero point behind the rounding": (
        (
            "d = Div(x, s) r = Round(d) e = Add(z, r) c = Min(e, h) f = Max(c, l) g = Sub(f, z) "
            "q = Mul(g, s)"
        ),
        {"s": F(0.2), "z": F(8), "l": F(0), "h": F(15)},
        (0.2, 8, 15),
    ),
    "seven bits, narrow": (
        "d = Div(x, s) r = Round(d) c = Clip(r, l, h) q = Mul(s, c)",
        {"s": F(0.05), "l": F(-63), "h": F(63)},
        (0.05, 64, 126),
    ),
}


@pytest.mark.parametrize("form", ARITHMETIC)
def test_arithmetic_around_a_rounding_is_recognised(tmp_path, form):
    text, constants, (scale, zero, levels) = ARITHMETIC[form]
    graph = (
        f"g (float[N,4,6,6] x) => (float[N,8,6,6] y) {{ {text} y = Conv<pads=[1,1,1,1]>(q, W) }}"
    )
    model = build(graph, **constants, W=scaled(C, F(0.01)))
    before = frozen(model)
    trained = take_trained(prepare(build(graph, **constants, W=scaled(C, F(0.01)))))
    (q,) = (q for name, q in trained.tensors.items() if name == "x")
    span = span_of(q)
    assert q.scale == F(scale)
    assert span.hi - span.lo == pytest.approx(levels * scale, rel=1e-6)
    after, _, _ = imported(tmp_path, model, data=X)  # the output's range is open
    assert "Round" not in types(after)
    assert "Floor" not in types(after)
    quantize = next(
        n for n in after.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "x"
    )
    assert constant(quantize.inputs[1]) == F(scale)
    step = float(constant(after.graph.outputs[0].producer().inputs[1]))
    assert int(constant(quantize.inputs[2])) in (zero, zero - 1 if "narrow" in form else zero)
    close(before, after, {"x": X}, step, share=1.0)


FLOATS = st.floats(2**-12, 2**12, width=32)


@settings(deadline=None, max_examples=40)
@given(FLOATS, st.integers(1, 8), st.integers(0, 255), st.booleans())
def test_recognised_arithmetic_is_what_its_parameters_say(scale, bits, zero, inverse):
    top = 2**bits - 1
    zero, step = zero % (top + 1), F(scale)
    first = "d = Mul(x, i)" if inverse else "d = Div(x, s)"
    nodes = f"{first} e = Add(d, z) r = Round(e) c = Clip(r, l, h) f = Sub(c, z) y = Mul(f, s)"
    graph = f"g (float[64] x) => (float[64] y) {{ {nodes} }}"
    node = next(
        n
        for n in build(graph, s=step, i=F(1) / step, z=F(zero), l=F(0), h=F(top)).graph
        if n.op_type == "Round"
    )
    q = chain_from(node).qparams
    x = np.linspace(-1.2 * top, 1.2 * top, 64) * float(step)
    wanted = (np.clip(np.rint(x / float(step) + zero), 0, top) - zero) * float(step)
    np.testing.assert_allclose(dequantize(quantize(x, q), q), wanted, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(FLOATS, st.lists(st.integers(-128, 127), min_size=3, max_size=60))
def test_a_channel_on_a_grid_is_found_bit_for_bit(scale, row):
    weights = scaled(np.array(row), F(scale))
    found = _recovered(weights.astype(np.float64))
    restored = np.rint(weights / np.float64(found)) * np.float64(F(found))
    assert np.abs(weights / np.float64(found)).max() <= 128.5
    np.testing.assert_allclose(restored, weights, rtol=2e-7)


@given(st.integers(0, 1000))
def test_a_channel_on_none_is_not(seed):
    assert _recovered(np.random.default_rng(seed).normal(size=27)) == 0


@pytest.mark.parametrize(
    "nodes",
    [
        "d = Div(x, s) r = Round(d) q = Mul(r, s)",  # no bounds
        "d = Div(x, s) r = Round(d) c = Clip(r, l, h) q = Mul(c, t)",  # another scale
        "d = Div(x, s) r = Round(d) c = Clip(r, l, t) q = Mul(c, s)",  # codes of no format
        "d = Div(x, s) r = Floor(d) c = Clip(r, l, h) q = Mul(c, s)",  # cut off, not rounded
    ],
)
def test_other_arithmetic_is_left_alone(nodes):
    graph = f"g (float[N,4,6,6] x) => (float[N,4,6,6] y) {{ {nodes} y = Relu(q) }}"
    model = prepare(build(graph, s=F(0.3), t=F(9.5), l=F(0), h=F(15)))
    before = frozen(model)
    assert not take_trained(model)
    assert frozen(model) == before


def test_integers_held_as_floats(tmp_path):
    """Codes of activations meet codes of weights, and their product is scaled, a channel at a
    time.
    """
    graph = """g (float[N,4,6,6] x) => (float[N,8,6,6] y) {
        d = Div(x, s)
        m = Mul(d, top)
        r = Round(m)
        c = Clip(r, low, top)
        p = Conv<pads=[1,1,1,1]>(c, W)
        t = Mul(p, scales)
        a = Add(t, b)
        y = Relu(a)
    }"""
    scales = (SCALES * F(3 / 127)).reshape(1, 8, 1, 1)
    constants = {
        "s": F(3),
        "top": F(127),
        "low": F(-127),
        "W": C.astype(F),
        "scales": scales,
        "b": B.reshape(1, 8, 1, 1),
    }
    model = build(graph, **constants)
    before = frozen(model)
    after, _, _ = imported(tmp_path, model, data=X)
    found, scale, _ = codes_of(after)
    np.testing.assert_array_equal(found, C)
    np.testing.assert_allclose(scale, SCALES, rtol=1e-6)
    assert types(after).count("Mul") == types(after).count("Div") == 0
    step = float(constant(after.graph.outputs[0].producer().inputs[1]))
    close(before, after, {"x": X}, step, share=1.0)


def test_a_batch_norm_behind_is_folded_with_its_scales(tmp_path):
    graph = QDQ.replace(
        "r = Relu(c)", "n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n)"
    )
    gamma = positive(8, seed=5) * np.where(np.arange(8) % 3, 1, -1).astype(F)
    norm = {
        "gamma": gamma,
        "beta": normal(8),
        "mean": normal(8, seed=6),
        "var": positive(8, seed=7),
    }
    text, constants, scales = PAIRS["a scale a channel"]
    model = build(graph.format(weight=text), **ACTIVATIONS, **constants, **norm)
    before = frozen(model)
    after, _, ear = imported(tmp_path, model)
    found, scale, _ = codes_of(after)
    factor = gamma / np.sqrt(norm["var"].astype(np.float64) + 1e-5)
    np.testing.assert_array_equal(found, C * np.sign(factor)[:, None, None, None])
    np.testing.assert_allclose(scale, scales * np.abs(factor), rtol=1e-6)
    assert "8 of 8" in ear.told[0]
    close(before, after, {"x": X}, 0.02)


def test_a_transposed_weight_keeps_its_codes(tmp_path):
    taught = codes(5, 8)
    graph = """g (float[N,3,8] x) => (float[N,3,5] y) {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wq = QuantizeLinear<axis=0>(W, t, n)
        wd = DequantizeLinear<axis=0>(wq, t, n)
        w = Transpose<perm=[1,0]>(wd)
        y = MatMul(xd, w)
    }"""
    scales = positive(5) / 100
    weight = scaled(taught, scales[:, None])
    model = build(graph, s=F(0.03), z=np.uint8(128), W=weight, t=scales, n=np.zeros(5, np.int8))
    before, x = frozen(model), normal(2, 3, 8)
    after, _, _ = imported(tmp_path, model)
    found, scale, _ = codes_of(after, "MatMul")
    np.testing.assert_array_equal(found, taught.T)
    np.testing.assert_array_equal(scale, scales)
    close(before, after, {"x": x}, 0.05, share=0.0)


# --- activations


def conv_between(sx, zx, sr, zr, clip="", **more):
    """A convolution between pairs of any type, with a Clip on the codes of its output where
    asked.
    """
    graph = QDQ.format(weight="w = DequantizeLinear<axis=0>(W, s, z)")
    if clip:
        graph = graph.replace("y = Deq", f"rc = {clip} y = Deq").replace(
            "(rq, sr, zr)", "(rc, sr, zr)"
        )
    weight = {"W": C.astype(np.int8), "s": SCALES, "z": np.zeros(8, np.int8)}
    return build(graph, sx=sx, zx=zx, sr=sr, zr=zr, b=B, **weight, **more)


def test_signed_activations_get_the_targets_type_on_the_same_grid(tmp_path):
    model = conv_between(F(0.03), np.int8(-5), F(0.02), np.int8(-128))
    before = frozen(model)
    after, _, _ = imported(tmp_path, model)
    first, *_ = [n for n in after.graph if n.op_type == "QuantizeLinear"]
    zero = constant(first.inputs[2])
    assert (zero.dtype, int(zero)) == (np.uint8, 123)
    close(before, after, {"x": X}, 0.02)


@pytest.mark.parametrize(("high", "relu6"), [(15, False), (127, False), (15, True), (3, True)])
def test_fewer_bits_of_an_activation_are_kept(tmp_path, high, relu6):
    model = conv_between(
        F(0.03),
        np.uint8(120),
        F(6 / high),
        np.uint8(0),
        "Clip(rq, l, h)",
        l=np.uint8(0),
        h=np.uint8(high),
    )
    if relu6:
        relu = next(n for n in model.graph if n.op_type == "Relu")
        bounds = [
            ir.Value(name=n, const_value=ir.tensor(F(v), name=n))
            for n, v in (("zero", 0), ("six", 6))
        ]
        for bound in bounds:
            model.graph.register_initializer(bound)
        clip = ir.node("Clip", [relu.inputs[0], *bounds], name="relu6")
        ir.convenience.replace_nodes_and_values(
            model.graph, relu, [relu], [clip], relu.outputs, clip.outputs
        )
    before = frozen(model)
    after, _, _ = imported(tmp_path, model)
    clip = after.graph.outputs[0].producer().inputs[0].producer()
    assert [int(constant(v)) for v in clip.inputs[1:]] == [0, high]
    if relu6:
        # A bound of six that the runtime would see as less than the type's range would part the
        # operators.
        relu6 = next(n for n in after.graph if n.op_type == "Clip" and n is not clip)
        assert len(relu6.inputs) < 3 or relu6.inputs[2] is None
    close(before, after, {"x": X}, 6 / high)


def test_fewer_activation_codes_leave_weights_more_room(tmp_path):
    """With 7 bits, two weights of 127 side by side do not overflow 16 bits; with 8 they would."""
    large = np.full((8, 4, 3, 3), 127)
    large[:, 1::2] = 120
    for high, kept in ((127, True), (255, False)):
        graph = QDQ.format(weight="w = DequantizeLinear<axis=0>(W, s, z)")
        graph = graph.replace("xd = Deq", "xc = Clip(xq, l, h) xd = Deq").replace(
            "(xq, sx, zx)", "(xc, sx, zx)"
        )
        constants = {
            **ACTIVATIONS,
            "sr": F(0.5),
            "W": large.astype(np.int8),
            "s": SCALES,
            "z": np.zeros(8, np.int8),
        }
        model = build(graph, **constants, l=np.uint8(0), h=np.uint8(high))
        found, scale, _ = codes_of(imported(tmp_path, model)[0])
        assert np.array_equal(found, large) == kept
        matrix = found.astype(int)
        assert (np.abs(matrix[:, ::2] + matrix[:, 1::2]).max() <= 128) == (not kept)
        np.testing.assert_allclose(
            scaled(found, scale.reshape(-1, 1, 1, 1)),
            scaled(large, SCALES[:, None, None, None]),
            rtol=0.01,
        )


def test_codes_that_no_signed_byte_holds_are_rounded_anew_and_said(tmp_path):
    asymmetric = codes(8, 4, 3, 3, most=30)
    asymmetric[2, 0, 0, 0] = 200
    constants = {"W": (asymmetric + 40).astype(np.uint8), "s": F(0.01), "z": np.uint8(40)}
    model = build(QDQ.format(weight="w = DequantizeLinear(W, s, z)"), **ACTIVATIONS, **constants)
    after, _, ear = imported(tmp_path, model)
    found, scale, _ = codes_of(after)
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(asymmetric, 2, 0))
    restored, wanted = found[2] * np.float64(scale[2]), asymmetric[2] * 0.01
    error = np.sqrt(np.square(restored - wanted).sum() / np.square(wanted).sum())
    assert 0 < error < 0.05
    assert ear.told[0] == "Trained weights of 7 of 8 channels are kept bit for bit."
    assert f"by {error:.2%}." in ear.told[1]


def test_one_scale_for_all_where_asked(tmp_path):
    text, constants, _ = PAIRS["one scale, signed"]
    model = build(QDQ.format(weight=text), **ACTIVATIONS, **constants)
    job = task(tmp_path, model)
    job = replace(
        job,
        config=replace(job.config, full_quant=replace(job.config.full_quant, per_channel=False)),
    )
    convert(job)
    found, scale, _ = codes_of(load(job.output, tmp_path / "none"))
    np.testing.assert_array_equal(found, C)
    assert (scale.shape, scale) == ((), F(0.01))


TENSOR = TensorPlan("t", CPU.activation, False, "t", "")
SYMMETRIC = TensorPlan("t", NVGPU.activation, True, "t", "")


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "zero"),
    [
        (8, True, False, -3),
        (8, True, True, 0),
        (8, False, True, 128),
        (4, True, False, 0),
        (4, True, True, 0),
        (7, False, False, 9),
    ],
)
def test_another_type_has_the_same_numbers(bits, signed, narrow, zero):
    q = QParams(np.array(0.1, F), np.array(zero), IntFormat(bits, signed, narrow))
    other = in_format(q, TENSOR)
    numbers = {(code - zero) * F(0.1) for code in range(q.format.qmin, q.format.qmax + 1)}
    codes = range(other.format.qmin, other.format.qmax + 1)
    assert {(code - int(other.zero_point)) * other.scale for code in codes} == numbers
    assert min(codes) >= 0
    assert max(codes) <= 255


def test_where_no_grid_is_the_same_the_range_is():
    q = QParams(np.array(0.1, F), np.array(7), IntFormat(8, signed=False))
    other = in_format(q, SYMMETRIC)
    assert other.zero_point == 0
    assert float(span_of(other).hi) == pytest.approx(24.8, rel=1e-6)
    wide = in_format(QParams(np.array(1e-3, F), np.array(0), IntFormat(16, signed=True)), TENSOR)
    assert float(span_of(wide).hi - span_of(wide).lo) == pytest.approx(65.535, rel=1e-5)
    power = in_format(q, TENSOR, power_of_two=True)
    assert power.scale == 0.125


@pytest.mark.parametrize(
    ("low", "high", "bits", "narrow"),
    [(0, 255, 8, False), (-127, 127, 8, True), (0, 1, 1, False), (1, 15, 4, True)],
)
def test_formats(low, high, bits, narrow):
    assert format_of(low, high) == IntFormat(bits, low < 0, narrow)


@pytest.mark.parametrize(("low", "high"), [(0, 100), (-100, 127), (5, 5), (-3, -1)])
def test_ranges_of_no_format(low, high):
    assert format_of(low, high) is None


def test_each_reader_may_have_a_grid_of_its_own(tmp_path):
    graph = """g (float[N,4,6,6] x) => (float[N,8,6,6] y, float[N,8,6,6] z) {
        xq = QuantizeLinear(x, s, o)
        xd = DequantizeLinear(xq, s, o)
        y = Conv<pads=[1,1,1,1]>(xd, W)
        xr = QuantizeLinear(x, t, o)
        xe = DequantizeLinear(xr, t, o)
        z = Conv<pads=[1,1,1,1]>(xe, W)
    }"""
    model = build(graph, s=F(0.03), t=F(0.3), o=np.uint8(128), W=scaled(C, F(0.01)))
    before = frozen(model)
    after, _, _ = imported(tmp_path, model, data=X)
    scales = [
        constant(n.inputs[1])
        for n in after.graph
        if n.op_type == "QuantizeLinear" and n.inputs[0].name == "x"
    ]
    assert sorted(scales) == [F(0.03), F(0.3)]
    for name, wanted in run(before, {"x": X}).items():
        found = run(after, {"x": X}, optimize=True)[name]
        assert np.square(found - wanted).sum() < 1e-3 * np.square(wanted).sum()


def test_codes_restored_on_another_grid_are_left_alone():
    graph = (
        "g (float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z) d = "
        "DequantizeLinear(q, t, z) y = Relu(d) }"
    )
    model = prepare(build(graph, s=F(0.3), t=F(0.6), z=np.uint8(9)))
    take_trained(model)
    assert types(model) == ["QuantizeLinear", "DequantizeLinear", "Relu"]


def test_a_range_beside_zero_is_widened():
    q = QParams(np.array(0.1, F), np.array(-20), IntFormat(8, signed=False))
    other = in_format(q, TENSOR)
    assert (other.zero_point, float(span_of(other).hi)) == (0, pytest.approx(27.5, rel=1e-6))


# --- ranges that training left open

# Two convolutions; only the input and the first one's weight were trained.
OPEN = """g (float[N,4,6,6] x) => (float[N,8,6,6] y) {
    xq = QuantizeLinear(x, s, z)
    xd = DequantizeLinear(xq, s, z)
    a = Conv<pads=[1,1,1,1]>(xd, V)
    p = MaxPool<kernel_shape=[1,1]>(a)
    y = Conv<pads=[1,1,1,1]>(p, W)
}"""


def opened():
    return build(
        OPEN, s=F(0.03), z=np.uint8(128), V=normal(8, 4, 3, 3), W=normal(8, 8, 3, 3, seed=9)
    )


def test_without_data_what_has_no_range_stays_float_and_is_named(tmp_path):
    _, outcome, _ = imported(tmp_path, opened())
    reasons = {
        node.op_type: node.reason for node in outcome.plan.nodes.values() if not node.quantized
    }
    assert reasons["Conv"] == "training left the range of 'p' open; input_type = SYNTHETIC finds it"
    assert not outcome.plan.units()


def test_with_data_it_is_calibrated(tmp_path):
    model = opened()
    before = frozen(model)
    after, outcome, _ = imported(tmp_path, model, data=X)
    assert [unit.op_type for unit in outcome.plan.units()] == ["Conv", "MaxPool", "Conv"]
    first = next(n for n in after.graph if n.op_type == "QuantizeLinear")
    assert constant(first.inputs[1]) == F(0.03)
    (wanted,), (found,) = run(before, {"x": X}).values(), run(after, {"x": X}).values()
    error = np.square(found - wanted).sum() / np.square(wanted).sum()
    assert error < 1e-3


def test_an_untrained_weight_beside_a_trained_one(tmp_path):
    """With data it is rounded as ever, without data for least error of the weights."""
    graph = QDQ.replace(
        "y = DequantizeLinear(rq, sr, zr)", "d = DequantizeLinear(rq, sr, zr) y = Conv(d, V)"
    )
    text, constants, _ = PAIRS["a scale a channel"]
    weight = normal(8, 8, 1, 1, seed=11) / 10
    weight[3] = 0
    model = build(
        graph.format(weight=text).replace("[N,8,6,6] y", "[N,8,6,6] y"),
        **ACTIVATIONS,
        **constants,
        V=weight,
    )
    before = frozen(model)
    (wanted,) = run(before, {"x": X}).values()
    for folder, data in (("data", X), ("none", None)):
        (tmp_path / folder).mkdir()
        after, _, ear = imported(tmp_path / folder, model, data)
        found = [codes_of(after, number=i) for i in range(2 if data is not None else 1)]
        np.testing.assert_array_equal(found[0][0], C)
        (output,) = run(after, {"x": X}).values()
        assert np.square(output - wanted).sum() < 1e-3 * np.square(wanted).sum()
    assert "8 of 8 channels" in ear.told[0]


def test_a_range_goes_through_what_keeps_it(tmp_path):
    """Pool and Concat have none of their own."""
    graph = """g (float[N,4,6,6] x) => (float[N,8,1,1] y) {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        p = AveragePool<kernel_shape=[3,3], strides=[3,3]>(xd)
        m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(p)
        n = MaxPool<kernel_shape=[2,2], strides=[2,2]>(p)
        c = Concat<axis=1>(m, n)
        w = DequantizeLinear(W, t, o)
        r = Conv(c, w)
        rq = QuantizeLinear(r, v, z)
        y = DequantizeLinear(rq, v, z)
    }"""
    taught = codes(8, 8, 1, 1).astype(np.int8)
    model = build(graph, s=F(0.03), z=np.uint8(128), W=taught, t=F(0.02), o=np.int8(0), v=F(0.05))
    before = frozen(model)
    after, outcome, _ = imported(tmp_path, model)
    # What reads the input before any weight stays float, but its ranges are known.
    assert "Conv" in [unit.op_type for unit in outcome.plan.units()]
    read = next(n for n in after.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "c")
    assert constant(read.inputs[1]) == F(0.03)
    (wanted,), (found,) = run(before, {"x": X}).values(), run(after, {"x": X}).values()
    assert np.abs(found - wanted).max() < 0.03 * 8


# Ranges in front of convolutions alone, as Paddle trains; what stands between has none.
BETWEEN = {
    "Relu": "o = Relu(c)",
    "HardSwish": "o = HardSwish(c)",
    "HardSwish in parts": "h = HardSigmoid<alpha=0.1666667, beta=0.5>(c) o = Mul(c, h)",
    "SiLU": "h = Sigmoid(c) o = Mul(c, h)",
    "HardSigmoid": "o = HardSigmoid<alpha=0.25, beta=0.5>(c)",
    "Relu6": "o = Clip(c, low, high)",
    "LeakyRelu": "o = LeakyRelu<alpha=0.25>(c)",
    "residual": "m = Add(c, xd) o = Relu(m)",
    "residual of another sign": "m = Add(xd, c) n = MaxPool<kernel_shape=[1,1]>(m) o = Relu(n)",
}
SPARSE = """g (float[N,4,6,6] x) => (float[N,4,6,6] y) {{
    xq = QuantizeLinear(x, s, z)
    xd = DequantizeLinear(xq, s, z)
    w = DequantizeLinear<axis=0>(W, t, zs)
    c = Conv<pads=[1,1,1,1]>(xd, w, b)
    {between}
    oq = QuantizeLinear(o, u, z)
    od = DequantizeLinear(oq, u, z)
    v = DequantizeLinear<axis=0>(V, t, zs)
    d = Conv<pads=[1,1,1,1]>(od, v, b)
    dq = QuantizeLinear(d, s, z)
    y = DequantizeLinear(dq, s, z)
}}"""


@pytest.mark.parametrize("name", BETWEEN)
def test_a_range_between_two_that_were_trained_follows_from_them(tmp_path, name):
    """What it cuts off changes nothing behind: that is cut off there, or level."""
    constants = {
        "s": F(1 / 32),
        "u": F(1 / 64),
        "z": np.int8(0),
        "W": codes(4, 4, 3, 3).astype(np.int8),
        "V": codes(4, 4, 3, 3, seed=2).astype(np.int8),
        "t": (positive(4, seed=1) / 150).astype(F),
        "zs": np.zeros(4, np.int8),
        "b": normal(4, seed=2),
        "low": F(0),
        "high": F(6),
    }
    model = build(SPARSE.format(between=BETWEEN[name]), opset=14, **constants)
    before = frozen(model)
    job = task(tmp_path, model)
    settings = replace(job.config.full_quant, only_where_it_pays=False)
    job = replace(job, config=replace(job.config, full_quant=settings))
    outcome = convert(job, Ear())
    convolutions = [node for node in outcome.plan.units() if node.op_type == "Conv"]
    assert len(convolutions) == 2
    after, loud = load(job.output, tmp_path / "none"), np.clip(4 * X, -3.9, 3.9)
    (wanted,) = run(before, {"x": loud}).values()
    for optimize in (False, True):
        (found,) = run(after, {"x": loud}, optimize).values()
        # Codes of some steps more or less in between, never what a range of its own would cut off.
        error = np.square(found - wanted).mean() / np.square(wanted).mean()
        assert error < 1e-3
        assert np.abs(found - wanted).max() < 8 / 32


def test_with_data_what_training_left_open_is_calibrated_not_bounded(tmp_path):
    text = SPARSE.format(between="m = Add(c, xd) o = Relu(m)")
    constants = {
        "s": F(1 / 32),
        "u": F(1 / 64),
        "z": np.int8(0),
        "W": codes(4, 4, 3, 3).astype(np.int8),
        "V": codes(4, 4, 3, 3, seed=2).astype(np.int8),
        "t": F([0.0001] * 4),
        "zs": np.zeros(4, np.int8),
        "b": normal(4, seed=2) / 100,
    }
    scales = []
    for folder, data in (("data", X), ("none", None)):
        (tmp_path / folder).mkdir()
        job = task(tmp_path / folder, build(text, **constants), data)
        settings = replace(job.config.full_quant, only_where_it_pays=False)
        plan = convert(replace(job, config=replace(job.config, full_quant=settings)), Ear()).plan
        scales.append(float(plan.params("c").scale))
    # From (127 / 64 + 4) down to -4, without data.
    assert scales[1] == pytest.approx((127 / 64 + 128 / 32 + 127 / 32 + 2) / 255, rel=0.05)
    assert scales[0] < scales[1] / 10


def test_nothing_trained_and_no_data(tmp_path):
    model = build(
        "g (float[N,4,6,6] x) => (float[N,8,4,4] y) { y = Conv(x, W) }", W=normal(8, 4, 3, 3)
    )
    for mode, advice in (
        ("QUANT", "give it calibrate_path"),
        ("FLOAT32", "convert a model that was"),
    ):
        with pytest.raises(
            ModelError,
            match=rf"c\.cfg:4: .*trained\.onnx was not trained with quantization; {advice}",
        ):
            convert(task(tmp_path, model, export_precision_mode=mode))


def test_the_plan_shows_what_would_stay_float(tmp_path):
    plan = make_plan(task(tmp_path, opened()), Ear())
    assert [node.quantized for node in plan.nodes.values()] == [False] * 3


# --- inputs and outputs

INTEGER_EDGES = """g (uint8[N,4,6,6] x) => (uint8[N,8,6,6] y) {
    xd = DequantizeLinear(x, sx, zx)
    w = DequantizeLinear<axis=0>(W, s, z)
    c = Conv<pads=[1,1,1,1]>(xd, w, b)
    r = Relu(c)
    y = QuantizeLinear(r, sr, zr)
}"""
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 6), np.uint8)


def edges():
    weight = {"W": C.astype(np.int8), "s": SCALES, "z": np.zeros(8, np.int8)}
    return build(INTEGER_EDGES, **ACTIVATIONS, **weight)


def test_integer_inputs_and_outputs_stay(tmp_path):
    model = edges()
    before = frozen(model)
    after, _, ear = imported(tmp_path, model)
    assert [v.dtype for v in (*after.graph.inputs, *after.graph.outputs)] == [ir.DataType.UINT8] * 2
    assert not surprises(ear)
    # The model's own conversion of its input serves.
    assert "Q" not in "".join(t[0] for t in types(after)[:2])
    close(before, after, {"x": PIXELS}, 1)


def test_a_flag_makes_them_floats(tmp_path):
    model = edges()
    (wanted,) = run(frozen(model), {"x": PIXELS}).values()
    after, _, _ = imported(
        tmp_path, model, flags={"input_type": "FLOAT32", "output_type": "FLOAT32"}
    )
    assert [v.dtype for v in (*after.graph.inputs, *after.graph.outputs)] == [ir.DataType.FLOAT] * 2
    floats = scaled(PIXELS, F(0.03), 120)
    (found,) = run(after, {"x": floats}).values()
    assert np.abs(found / 0.02 - wanted).max() <= 1.001


def test_a_float_output_becomes_integers(tmp_path):
    model = conv_between(F(0.03), np.uint8(120), F(0.02), np.uint8(0))
    (wanted,) = run(frozen(model), {"x": X}).values()
    after, _, ear = imported(tmp_path, model, flags={"output_type": "UINT8"})
    (found,) = run(after, {"x": X}).values()
    assert np.abs(found - wanted / 0.02).max() <= 1.001
    assert ear.told[-1] == f"Output 'y' is UINT8: value = (code - 0) * {float(F(0.02))}."
    model = build(
        "g (float[N,4,6,6] x) => (float[N,8,6,6] y) "
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
        "y = Conv<pads=[1,1,1,1]>(d, W) }",
        s=F(0.03),
        z=np.uint8(9),
        W=scaled(C, F(0.01)),
    )
    with pytest.raises(
        UsageError,
        match="training left the range of output 'y' open; give calibrate_path, or floats",
    ):
        imported(tmp_path, model, flags={"output_type": "UINT8"})


def test_mean_and_std_dev_make_pixels_the_input(tmp_path):
    model = conv_between(F(1 / 64), np.uint8(128), F(0.02), np.uint8(0))
    after, _, ear = imported(tmp_path, model, mean=128, std_dev=64)
    assert after.graph.inputs[0].dtype == ir.DataType.UINT8
    assert not surprises(ear)
    (wanted,) = run(frozen(model), {"x": ((PIXELS - 128.0) / 64).astype(F)}).values()
    (found,) = run(after, {"x": PIXELS}, optimize=True).values()
    assert np.abs(found - wanted).max() <= 0.0201


def test_a_mean_between_two_pixels_is_said(tmp_path):
    model = conv_between(F(1 / 127.5), np.uint8(128), F(0.02), np.uint8(0))
    _, _, ear = imported(tmp_path, model, mean=127.5, std_dev=127.5)
    assert surprises(ear) == [
        "mean = 127.5 lies between two pixels: a pixel p stands for (p - 128) / 127.5, 0.0039 off."
    ]


# --- the example

EXAMPLE = Path(__file__).parents[1] / "examples" / "qat_digits"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_example(tmp_path, bits):
    """Arithmetic alone in the file, integers alone in the import, and the same answers."""
    path = EXAMPLE / f"qat_{bits}.onnx"
    config = load_config(EXAMPLE.parents[1] / "configs" / "trained.cfg")
    ear = Ear()
    outcome = convert(Job(path, tmp_path / "q.onnx", config, verify=False), ear)
    assert all(node.quantized or node.inside for node in outcome.plan.nodes.values())
    held_out = np.load(EXAMPLE / "held_out.npz")
    before, after = path.read_bytes(), (tmp_path / "q.onnx").read_bytes()
    (wanted,) = run(before, {"image": held_out["images"]}).values()
    for optimize in (False, True):
        (found,) = run(after, {"image": held_out["images"]}, optimize).values()
        assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.98
    if bits < 8:
        assert ear.told[0] == "Trained weights of 46 of 46 channels are kept bit for bit."


REAL = (
    Path(__file__).parents[2] / "shared" / "data" / "models" / "mobilenet_v2_1.0_224_qat_qdq.onnx"
)


@pytest.mark.skipif(not REAL.exists(), reason="the reference models are not here")
def test_a_real_model_answers_as_it_was_trained(tmp_path):
    ear, config = Ear(), load_config(EXAMPLE.parents[1] / "configs" / "trained.cfg")
    outcome = convert(Job(REAL, tmp_path / "q.onnx", config, verify=False), ear)
    assert len(outcome.plan.units()) == 64
    assert ear.told[0] == "Trained weights of 17602 of 18057 channels are kept bit for bit."
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    (wanted,), (found,) = (
        run(path.read_bytes(), {"input": pixels}, True).values()
        for path in (REAL, tmp_path / "q.onnx")
    )
    assert found.dtype == np.uint8
    assert found.argmax() == wanted.argmax()
    assert np.abs(found.astype(int) - wanted).max() <= 16


# --- float again


def test_float32_takes_the_quantization_away(tmp_path):
    model = conv_between(F(0.03), np.uint8(120), F(0.02), np.uint8(0))
    after, outcome, ear = imported(tmp_path, model, export_precision_mode="FLOAT32")
    assert types(after) == ["Conv", "Relu"]
    assert not outcome.plan.units()
    assert not ear.warned
    node = next(n for n in after.graph if n.op_type == "Conv")
    np.testing.assert_array_equal(constant(node.inputs[1]), scaled(C, SCALES[:, None, None, None]))


def test_quant_type_and_float32_exclude_each_other(tmp_path):
    with pytest.raises(
        ConfigError, match="does not go with quant_type = FULL_QUANT; remove one of the two"
    ):
        task(
            tmp_path, edges(), common={"quant_type": "FULL_QUANT"}, export_precision_mode="FLOAT32"
        )
