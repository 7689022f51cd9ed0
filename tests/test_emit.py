"""Emitting: the quantized graph computes what its scales say, in integer kernels, behind the same
names.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from emitted import CONSTANTS, HEAD, IMAGE, ROWS, TABLE, decided, quantized
from graphs import frozen, node, normal, prepared, run, types

from calib.affine import INT8_NARROW, UINT8, QParams
from converter.emit.qdq import bias_qparams, emit
from converter.graph.edit import constant
from converter.graph.files import saved
from converter.plan.plan import QuantizedWeight
from converter.plan.targets import TARGETS


def kernels(model, tmp_path):
    """The operators that ONNX Runtime runs, but for changes of the memory layout."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(frozen(model), options, providers=["CPUExecutionProvider"])
    found = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    return sorted(op for op in found if op != "Transpose")


# --- the numbers


def on_grid(x, scale, zero_point, low=0, high=255):
    """Float64 values of codes, by the formula of the ONNX standard."""
    return (
        np.clip(np.rint(x / np.float64(scale)) + zero_point, low, high) - zero_point
    ) * np.float64(scale)


@pytest.mark.parametrize("per_channel", [True, False])
def test_products_are_what_the_scales_say(per_channel):
    graph = f"{ROWS} {{ [one] a = Gemm (x, k, b)  r = Relu (a)  [two] y = Gemm <transB=1> (r, m) }}"
    model, _, after = quantized(graph, TABLE, per_channel=per_channel)
    k, b, m = CONSTANTS["k"], CONSTANTS["b"], CONSTANTS["m"]
    x, scale = (
        TABLE["x"].astype(np.float64),
        np.float64(np.float32((TABLE["x"].max() - TABLE["x"].min()) / 255)),
    )
    x_hat = on_grid(x, scale, np.rint(-x.min() / scale))
    step_k = np.abs(k).max(axis=0 if per_channel else None) / 127
    step_m = np.abs(m).max(axis=1, keepdims=True) / 127 if per_channel else np.abs(m).max() / 127
    bias = np.rint(b / (scale * step_k)) * scale * step_k
    inner = np.maximum(x_hat @ on_grid(k, step_k, 0, -127, 127) + bias, 0)
    r = np.maximum(TABLE["x"] @ k + b, 0)
    expected = on_grid(inner, r.max() / 255, 0) @ on_grid(m, step_m, 0, -127, 127).T
    for optimize in (False, True):
        np.testing.assert_allclose(run(after, TABLE, optimize)["y"], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - run(model, TABLE)["y"]).max() < 0.1


@pytest.mark.parametrize(
    "operator",
    [
        "Conv (x, w, b)",
        "Conv <strides=[2,2], pads=[1,1,1,1]> (x, w)",
        "Conv <group=4> (x, depthwise, b)",
    ],
)
@pytest.mark.parametrize("optimize", [False, True])
def test_the_error_of_a_convolution_is_within_what_the_scales_allow(operator, optimize):
    model, plan, after = quantized(f"{HEAD} {{ [conv] y = {operator} }}", IMAGE)
    sx, sy = float(plan.params("x").scale), float(plan.params("y").scale)
    weight, steps = constant(model.graph[0].inputs[1]), plan.weights["conv"].qparams.scale
    half = np.broadcast_to(steps.reshape(-1, 1, 1, 1) / 2, weight.shape).astype(np.float32)
    # |w x - (w + dw)(x + dx)| <= |w| |dx| + |dw| (|x| + |dx|), |dx| <= sx where the zero point was
    # rounded too.
    names = [v.name for v in model.graph[0].inputs[1:2]]
    first, second = model.clone(), model.clone()
    for clone, array in ((first, np.abs(weight)), (second, half)):
        clone.graph.initializers[names[0]].const_value = ir.tensor(array, name=names[0])
        if len(clone.graph[0].inputs) > 2:
            clone.graph[0].replace_input_with(2, None)
    bound = (
        run(first, {"x": np.full_like(IMAGE["x"], sx)})["y"]
        + run(second, {"x": np.abs(IMAGE["x"]) + sx})["y"]
    )
    bound = bound + sx * steps.reshape(1, -1, 1, 1) / 2 + sy
    error = np.abs(run(after, IMAGE, optimize)["y"] - run(model, IMAGE)["y"])
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0


def test_without_units_nothing_changes():
    model = prepared(f"{HEAD} {{ [conv] a = Conv (x, w)  y = Relu (a) }}", **CONSTANTS)
    before = frozen(model)
    assert emit(model, decided(model, IMAGE, skip_types=("Conv",))) == {}
    assert frozen(model) == before


# --- the kernels

KERNELS = {
    "[n] a = Conv (x, w, b)  y = Relu (a)": ["QLinearConv"],
    "[n] a = Conv (x, w)  y = Clip (a, zero, six)": ["QLinearConv"],
    "[n] y = Conv <group=4> (x, depthwise)": ["QLinearConv"],
    "a = Conv (x, w)  p = MaxPool <kernel_shape=[2,2]> (a)  y = Conv (p, v)": [
        "NhwcMaxPool",
        "QLinearConv",
        "QLinearConv",
    ],
    "a = Conv (x, w)  p = Conv (a, point)  s = Add (p, a)  r = Relu (s)  y = Conv (r, v)": [
        *("QLinearAdd", "QLinearConv", "QLinearConv", "QLinearConv"),
    ],
    "a = Conv (x, w)  s = Sigmoid (a)  p = Mul (a, s)  y = Conv (p, v)": [
        *("QLinearConv", "QLinearConv", "QLinearMul", "QLinearSigmoid"),
    ],
    "a = Conv (x, w)  l = LeakyRelu (a)  y = Conv (l, v)": [
        "QLinearConv",
        "QLinearConv",
        "QLinearLeakyRelu",
    ],
    "a = Conv (x, w)  d = Add (a, c)  e = Add (d, a)  y = Conv (e, v)": [
        *("QLinearAdd", "QLinearAdd", "QLinearConv", "QLinearConv"),
    ],
    "a = Conv (x, w)  d = Mul (scalar, a)  e = Add (d, a)  y = Conv (e, v)": [
        *("QLinearAdd", "QLinearConv", "QLinearConv", "QLinearMul"),
    ],
    "a = Conv (x, w)  d = Conv (x, v)  j = Concat <axis=2> (a, d)  y = Conv (j, w)": [
        *("QLinearConcat", "QLinearConv", "QLinearConv", "QLinearConv"),
    ],
    "a = Conv (x, w)  p = AveragePool <kernel_shape=[2,2]> (a)  y = Conv (p, v)": [
        *("QLinearAveragePool", "QLinearConv", "QLinearConv"),
    ],
    "a = Conv (x, w)  p = Pad (a, edges)  y = Conv (p, v)": ["Pad", "QLinearConv", "QLinearConv"],
    "p = Pad (x, edges)  y = Conv (p, v)": ["Pad", "QLinearConv"],
    'a = Conv (x, w)  p = Resize <mode="nearest"> (a, , scales)  y = Conv (p, v)': [
        "QLinearConv",
        "QLinearConv",
        "Resize",
    ],
}


@pytest.mark.parametrize("nodes", KERNELS)
def test_the_runtime_runs_integer_kernels(nodes, tmp_path):
    model, plan, after = quantized(f"{HEAD} {{ {nodes} }}", IMAGE)
    edges = {"QuantizeLinear", "DequantizeLinear"}
    assert [op for op in kernels(after, tmp_path) if op not in edges] == sorted(KERNELS[nodes])
    # One conversion at the input, one at the output.
    assert sum(op in edges for op in kernels(after, tmp_path)) == 2
    plain, fast, exact = (
        run(after, IMAGE)["y"],
        run(after, IMAGE, optimize=True)["y"],
        run(model, IMAGE)["y"],
    )
    step = float(plan.params(next(reversed(plan.tensors))).scale)
    assert np.abs(plain - fast).max() <= 4 * step
    assert np.abs(fast - exact).max() <= 0.05 * np.abs(exact).max() + 2 * step


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("[n] y = Gemm (x, k, b)", ["QGemm"]),
        ("[n] y = Gemm <transB=1> (x, k)", ["QGemm"]),
        ("a = MatMul (x, k)  s = Add (a, b)  y = Relu (s)", ["QGemm", "Relu"]),
        ("a = Gemm (x, k, b)  r = Relu (a)  y = Gemm (r, m)", ["QGemm", "QGemm"]),
        ("[n] y = MatMul (x, k)", ["MatMulIntegerToFloat"]),
        ("[n] y = MatMul (left, x)", ["MatMulIntegerToFloat"]),
        ("a = MatMul (x, k)  y = MatMul (a, m)", ["MatMulIntegerToFloat", "QLinearMatMul"]),
    ],
)
def test_products_run_in_integer_kernels(nodes, expected, tmp_path):
    model, _, after = quantized(f"{ROWS} {{ {nodes} }}", TABLE)
    found = kernels(after, tmp_path)
    assert [op for op in found if op not in {"QuantizeLinear", "DequantizeLinear"}] == expected
    np.testing.assert_allclose(
        run(after, TABLE, optimize=True)["y"], run(model, TABLE)["y"], atol=0.1
    )


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_gives_a_model_that_is_close(target):
    nodes = """a = Conv (x, w, b)  r = Relu (a)  p = Conv (r, point)  s = Add (p, r)
               q = MaxPool <kernel_shape=[2,2]> (s)  t = Conv (q, v)  u = Sigmoid (t)
                 y = GlobalAveragePool (u)"""
    model, plan, after = quantized(f"{HEAD} {{ {nodes} }}", IMAGE, target)
    assert len(plan.units()) >= 4
    for optimize in (False, True):
        np.testing.assert_allclose(
            run(after, IMAGE, optimize)["y"], run(model, IMAGE)["y"], atol=0.03
        )


# --- the graph


def count(model, op_type):
    return types(model).count(op_type)


def test_a_graph_output_that_is_read_on_keeps_its_name():
    graph = (
        "g (float[1,4,8,8] x) => (float[] a, float[] y) { [one] a = Conv (x, w)  [two] y = Conv "
        "(a, v) }"
    )
    model, _, after = quantized(graph, IMAGE)
    found = run(after, IMAGE)
    np.testing.assert_allclose(found["a"], run(model, IMAGE)["a"], atol=0.1)
    assert node(after, "two").inputs[0] is after.graph.outputs[0]
    assert after.graph.outputs[0].producer().op_type == "DequantizeLinear"


def test_all_readers_share_one_conversion():
    nodes = (
        "a = Conv (x, w)  d = Conv (a, v)  e = Conv (a, point)  f = MaxPool <kernel_shape=[3,3]> "
        "(e)  y = Sub (d, f)"
    )
    _, plan, after = quantized(f"{HEAD} {{ {nodes} }}", IMAGE)
    assert count(after, "QuantizeLinear") == len(plan.tensors) == 4  # x, a, d, e


def test_float_readers_of_an_input_still_read_floats():
    graph = (
        "g (float[1,4,8,8] x) => (float[] y, float[] z) { y = Conv (x, w)  [float] z = Tanh (x) }"
    )
    model, _, after = quantized(graph, IMAGE)
    np.testing.assert_array_equal(run(after, IMAGE)["z"], run(model, IMAGE)["z"])


def test_float_readers_of_an_integer_result_read_what_was_restored():
    graph = (
        "g (float[1,4,8,8] x) => (float[] a, float[] z) { a = Conv (x, w)  [float] z = Tanh (a) }"
    )
    found = run(quantized(graph, IMAGE)[2], IMAGE)
    np.testing.assert_allclose(found["z"], np.tanh(found["a"]), atol=1e-6)


def test_a_subgraph_reads_what_was_restored():
    graph = """g (float[1,4,8,8] x, bool q) => (float[] a, float[] y) {
        a = Conv (x, w)
        y = If (q) < then_branch = t () => (float[1,4,6,6] d) { d = Neg (a) },
                     else_branch = e () => (float[1,4,6,6] f) { f = Abs (a) } >
    }"""
    for q in (True, False):
        feeds = {**IMAGE, "q": np.array(q)}
        found = run(quantized(graph, feeds)[2], feeds)
        np.testing.assert_array_equal(found["y"], -found["a"] if q else np.abs(found["a"]))


def test_constant_operands_are_stored_as_integers():
    nodes = "a = Conv (x, w)  [sum] d = Add (a, c)  e = Add (d, a)  y = Conv (e, v)"
    _, plan, after = quantized(f"{HEAD} {{ {nodes} }}", IMAGE)
    restore = node(after, "sum").inputs[1].producer()
    assert restore.op_type == "DequantizeLinear"
    codes, q = constant(restore.inputs[0]), plan.params("c")
    assert codes.dtype == np.uint8
    c = CONSTANTS["c"].astype(np.float64)
    np.testing.assert_array_equal(codes, np.clip(np.rint(c / q.scale) + q.zero_point, 0, 255))
    assert "c" not in after.graph.initializers


def test_a_tied_weight_is_stored_once():
    nodes = "[one] y = Conv (x, w)  [two] a = Relu (x)  [three] z = Conv (a, w)"
    _, _, after = quantized(f"g (float[1,4,8,8] x) => (float[] y, float[] z) {{ {nodes} }}", IMAGE)
    large = [
        v.name
        for v in after.graph.initializers.values()
        if v.const_value.size == CONSTANTS["w"].size
    ]
    assert large == ["w_quantized"]
    assert constant(after.graph.initializers["w_quantized"]).dtype == np.int8


def test_float_weights_are_gone():
    _, _, after = quantized(f"{HEAD} {{ y = Conv (x, w, b) }}", IMAGE)
    floats = [v for v in after.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert {v.name for v in floats} == {"x_scale", "w_scale", "b_scale", "y_scale"}


@pytest.mark.parametrize("operator", ["Conv (x, w)", "Conv (x, w, b)"])
def test_a_bias_is_int32_in_units_of_the_products(operator):
    model = prepared(f"{HEAD} {{ [conv] y = {operator} }}", **CONSTANTS)
    shift = np.array([1, -2, 0.5, 3], np.float32)
    plan = decided(model, IMAGE)
    plan = plan.with_weights({}, {"conv": shift})
    before = run(model, IMAGE)["y"] - (CONSTANTS["b"].reshape(4, 1, 1) if "b" in operator else 0)
    emit(model, plan)
    restore = node(model, "conv").inputs[2].producer()
    codes, scale = (constant(value) for value in restore.inputs)
    assert (codes.dtype, restore.attributes.get_int("axis")) == (np.int32, 0)
    products = plan.params("x").scale * plan.weights["conv"].qparams.scale
    np.testing.assert_array_equal(scale, products)
    np.testing.assert_array_equal(codes, np.rint(shift / products.astype(np.float64)))
    # Clipped at the old range where the shift leads beyond it.
    middle = np.abs(before + shift.reshape(4, 1, 1)) < 0.5 * np.abs(before).max()
    error = run(model, IMAGE)["y"] - before - shift.reshape(4, 1, 1)
    assert middle.sum() > 50
    assert np.abs(error[middle]).max() < 0.1


def test_one_scale_serves_a_bias_of_many_channels():
    data = QParams(np.float32(0.5), np.uint8(3), UINT8)
    weight = QuantizedWeight(
        np.zeros((4, 2), np.int8), QParams(np.float32(0.25), np.int8(0), INT8_NARROW)
    )
    q = bias_qparams(data, weight, 4)
    np.testing.assert_array_equal(q.scale, [0.125] * 4)
    assert (q.axis, q.format.bits, q.format.signed) == (0, 32, True)


def test_the_names_of_restored_tensors_are_returned():
    nodes = "a = Conv (x, w)  p = MaxPool <kernel_shape=[2,2]> (a)  y = Conv (p, v)"
    model = prepared(f"g (float[1,4,8,8] x) => (float[] a, float[] y) {{ {nodes} }}", **CONSTANTS)
    plan = decided(model, IMAGE)
    floats = {name: run(model, IMAGE).get(name) for name in ("a", "y")}
    restored = emit(model, plan)
    assert set(restored) == set(plan.tensors)
    assert (restored["a"], restored["y"]) == ("a", "y")
    with saved(model, restored.values()) as path:
        found = run(path.read_bytes(), IMAGE)
    np.testing.assert_allclose(found[restored["x"]], IMAGE["x"], atol=0.02)
    np.testing.assert_allclose(found[restored["a"]], floats["a"], atol=0.1)


def test_names_that_are_taken_are_left_alone():
    graph = """g (float[1,4,8,8] x, float[1,4,8,8] x_quantized) => (float[] y_float, float[] y) {
        [x_QuantizeLinear] x_dequantized = Neg (x_quantized)
        [w_scale] y_float = Abs (x_dequantized)
        y = Conv (x, w)
    }"""
    feeds = {**IMAGE, "x_quantized": normal(1, 4, 8, 8, seed=5)}
    model, _, after = quantized(graph, feeds)
    np.testing.assert_array_equal(run(after, feeds)["y_float"], np.abs(feeds["x_quantized"]))
    np.testing.assert_allclose(run(after, feeds)["y"], run(model, feeds)["y"], atol=0.1)


def test_a_graph_output_in_front_of_an_operator_that_runs_bare():
    graph = (
        "g (float[1,4,8,8] x) => (float[] a, float[] y) { a = Conv (x, w)  p = Pad (a, edges)  y "
        "= Conv (p, v) }"
    )
    model, _, after = quantized(graph, IMAGE)
    np.testing.assert_allclose(run(after, IMAGE)["a"], run(model, IMAGE)["a"], atol=0.1)
