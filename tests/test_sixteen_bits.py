"""Activations of 16 bits: what they compute, where conversions stand, which few of them are worth
it, and what a target wants of them.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from emitted import CONSTANTS, HEAD, IMAGE, ROWS, TABLE, decided
from graphs import build, frozen, node, normal, run
from running import Ear, InMemory, job

from calib.affine import UINT8, UINT16, QParams
from converter.calibrate.exact import unrounded
from converter.calibrate.observe import fixed_qparams
from converter.emit.qdq import emit
from converter.errors import ConfigError, ModelError
from converter.graph.edit import constant
from converter.measure.rounding import rounding_costs
from converter.measure.target_checks import check
from converter.pipeline.convert import convert, make_plan
from converter.plan.placement import Wishes, build_plan
from converter.plan.plan import NodePlan, QuantPlan, TensorPlan
from converter.plan.targets import CPU, TARGETS
from converter.plan.widths import Widening, wide_share
from converter.prepare import prepare

QNN = TARGETS["QNN"]
CHAIN = f"""{ROWS} {{ [one] a = MatMul (x, k)  [two] b2 = MatMul (a, m)
             [three] c2 = MatMul (b2, k)  [four] y = MatMul (c2, m) }}"""
FOUR = "named in this test"


def normal_form(graph, **constants):
    return prepare(build(graph, 21, 10, **{**CONSTANTS, **constants}))


def quantized(graph, feeds, target=QNN, **wishes):
    """The float model, the plan and the emitted model, as valid ONNX."""
    model = normal_form(graph)
    plan = decided(model, feeds, target, **wishes)
    plan = plan.with_qparams(fixed_qparams(plan, target))
    after = model.clone()
    emit(after, plan)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    return model, plan, after


def on_grid(x, low, high, bits):
    """Float64 values of codes of so many bits over a range with zero."""
    scale = np.float64(np.float32((high - low) / (2**bits - 1)))
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def spread(x):
    return min(float(x.min()), 0.0), max(float(x.max()), 0.0)


# --- what is computed


@pytest.mark.parametrize("target", ["QNN", "CPU", "ARM"])
def test_sixteen_bits_compute_what_their_scales_say(target):
    graph = f"{ROWS} {{ [one] a = Gemm (x, k, b)  [two] y = Gemm <transB=1> (a, m) }}"
    _, plan, after = quantized(graph, TABLE, TARGETS[target], bits=16, per_channel=False)
    x = TABLE["x"].astype(np.float64)
    k, b, m = (CONSTANTS[name].astype(np.float64) for name in "kbm")
    step_k, step_m = (np.abs(w).max() / 127 for w in (k, m))
    inner = on_grid(x, *spread(x), 16) @ (np.rint(k / step_k) * step_k) + b
    inner = on_grid(inner, *spread(x @ k + b), 16)
    expected = inner @ (np.rint(m / step_m) * step_m).T
    for optimize in (False, True):
        np.testing.assert_allclose(run(after, TABLE, optimize)["y"], expected, atol=2e-3)
    assert {tensor.format for tensor in plan.tensors.values()} == {UINT16}


def test_a_mixture_is_converted_once_where_widths_meet():
    _, plan, after = quantized(CHAIN, TABLE, wide={"two": FOUR, "three": FOUR})
    formats = {name: tensor.format for name, tensor in plan.tensors.items()}
    assert formats == {"x": UINT8, "a": UINT8, "b2": UINT16, "c2": UINT16, "y": UINT8}
    assert {name: t.format for name, t in plan.converted.items()} == {"a": UINT16, "c2": UINT8}
    quantizers = [n for n in after.graph if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == 7
    assert wide_share(plan) == 3 / 5
    x = TABLE["x"].astype(np.float64)
    k, m = (CONSTANTS[name].astype(np.float64) for name in "km")
    weights = [np.rint(w * 127 / np.abs(w).max()) * np.abs(w).max() / 127 for w in (k, m, k, m)]
    floats = [x, x @ k, x @ k @ m, x @ k @ m @ k, x @ k @ m @ k @ m]
    y = x
    for bits, weight, seen in zip(
        [(8,), (8, 16), (16,), (16, 8)], weights, floats[:4], strict=True
    ):
        for width in bits:
            y = on_grid(y, *spread(seen), width)
        y = y @ weight
    expected = on_grid(y, *spread(floats[4]), 8)
    for optimize in (False, True):
        found = run(after, TABLE, optimize)["y"]
        step = np.ptp(floats[4]) / 255
        assert np.abs(found - expected).max() <= 1.01 * step


def test_floats_that_both_widths_read_become_integers_once():
    graph = f"{ROWS} {{ [one] a = MatMul (x, k)  [two] c2 = MatMul (x, m)  y = Add (a, c2) }}"
    _, plan, after = quantized(graph, TABLE, wide={"two": FOUR})
    assert plan.tensors["x"].format == UINT16
    assert plan.converted["x"].format == UINT8
    first, second = (n for n in after.graph if n.op_type == "QuantizeLinear" and "x_" in n.name)
    assert first.inputs[0].name == "x"
    assert second.inputs[0].producer().op_type == "DequantizeLinear"


def test_what_moves_values_has_the_codes_of_what_it_reads():
    nodes = (
        "[one] a = Conv (x, w)  [pool] p = MaxPool <kernel_shape=[2,2]> (a)  [two] y = Conv (p, v)"
    )
    plan = build_plan(normal_form(f"{HEAD} {{ {nodes} }}").graph, QNN, Wishes(wide={"two": FOUR}))
    assert plan.tensors["p"].group == plan.tensors["a"].group == "a"
    assert plan.converted["p"] == TensorPlan("p", UINT16, False, "p as uint16", "read by two")
    wide = {"pool": FOUR, "two": FOUR}
    plan = build_plan(normal_form(f"{HEAD} {{ {nodes} }}").graph, QNN, Wishes(wide=wide))
    assert plan.tensors["p"].group == plan.converted["a"].group == "a as uint16"
    assert plan.groups()["a as uint16"].name == "a"


def test_pairs_of_weights_have_no_limit_beside_sixteen_bits():
    graph = normal_form(CHAIN).graph
    plan = build_plan(graph, CPU, Wishes(wide={"two": FOUR}))
    limits = {name: unit.weight.pair_limit for name, unit in plan.nodes.items()}
    assert limits == {"one": 128, "two": None, "three": 128, "four": 128}


PRODUCTS = f"""{ROWS} {{ [one] a = MatMul (x, k)  [sum] s = Add (a, b)  [two] c2 = Gemm (s, m, b)
               [three] d = Gemm <transB=1> (c2, k, b)  r = Relu (d)  [four] y = MatMul (r, m) }}"""


def as_the_runtime_likes(model):
    """What its own optimizations make of the output."""
    session = ort.InferenceSession(frozen(model), providers=["CPUExecutionProvider"])
    return session.run(None, TABLE)[0]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("target", ["CPU", "QNN"])
def test_a_runtime_that_rounds_products_to_eight_bits_is_gone_round(target, per_channel):
    wishes = {"bits": 16, "per_channel": per_channel}
    _, _, after = quantized(PRODUCTS, TABLE, TARGETS[target], **wishes)
    other = unrounded(after)
    assert other is not after
    assert unrounded(other) is other
    wanted = run(after, TABLE)["y"]
    np.testing.assert_allclose(run(other, TABLE)["y"], wanted, rtol=1e-5, atol=1e-5)
    step = np.ptp(wanted) / 65535
    np.testing.assert_allclose(as_the_runtime_likes(other), wanted, atol=20 * step)
    onnx.checker.check_model(ir.to_proto(other), full_check=True)


def test_products_of_bytes_stay_as_they_are():
    _, _, narrow = quantized(PRODUCTS, TABLE, QNN)
    assert unrounded(narrow) is narrow


# --- which are worth it


def unit(name, read, made):
    return NodePlan(name, "Conv", True, "", (read,), (made,), activation=UINT8)


def line(*names):
    """A plan of operators in a row, each reading what the one before makes."""
    tensors = {n: TensorPlan(n, UINT8, False, n, "") for n in names}
    units = {f"{a}{b}": unit(f"{a}{b}", a, b) for a, b in itertools.pairwise(names)}
    return QuantPlan(units, tensors)


def test_what_saves_most_for_each_wide_tensor_comes_first():
    costs = {"a": 1.0, "b": 9.0, "c": 2.0, "d": 0.0, "e": 5.0}
    steps = list(Widening(line(*"abcde"), costs, {"Conv"}).order())
    # Around b: a, b and c have 16 bits for 9 + 1; the last one of the row costs two for 5.
    assert steps[0] == {"ab", "bc"}
    assert steps[1] == {"ab", "bc", "de", "cd"} or steps[1] == {"ab", "bc", "de"}
    assert steps[-1] == {"ab", "bc", "cd", "de"}
    assert all(before < after for before, after in itertools.pairwise(steps))


def test_a_share_is_not_exceeded_and_nothing_is_spent_on_what_costs_nothing():
    plan = line(*"abcdefghij")
    widening = Widening(plan, {"c": 4.0, "g": 3.0}, {"Conv"})
    assert widening.within(0.3) == {"bc", "cd"}
    assert widening.within(0.6) == {"bc", "cd", "fg", "gh"}
    assert widening.within(0.29) == set()
    assert Widening(plan, dict.fromkeys(plan.tensors, 0.0), {"Conv"}).within(1.0) == set()


def test_operators_without_a_wide_kernel_stay_narrow():
    widening = Widening(line(*"abc"), {"b": 1.0}, set())
    assert widening.within(1.0) == set()
    assert list(widening.order()) == []


def test_what_rounding_costs_is_the_noise_that_it_alone_makes():
    model = normal_form(f"{ROWS} {{ [one] a = MatMul (x, k)  [two] y = MatMul (a, m) }}")
    samples = [{"x": normal(3, 4, seed=i)} for i in range(3)]
    plan = build_plan(model.graph, QNN, Wishes())
    step = {"x": 0.5, "a": 0.25, "y": 0.125}
    zero = np.array(128, np.uint8)
    plan = plan.with_qparams(
        {n: QParams(np.array(s, np.float32), zero, UINT8) for n, s in step.items()}
    )
    costs = rounding_costs(model, plan, InMemory(samples), count=2, threads=1)
    k, m = (CONSTANTS[name].astype(np.float64) for name in "km")
    for name, behind in (("x", k @ m), ("a", m), ("y", np.eye(4))):
        expected = 0.0
        for sample in samples[:2]:
            x = sample["x"].astype(np.float64)
            seen = {"x": x, "a": x @ k, "y": x @ k @ m}[name]
            rounded = np.clip(np.rint(seen / step[name]), -128, 127) * step[name]
            noise = np.square((rounded - seen) @ behind).sum()
            expected += noise / np.square(x @ k @ m).sum()
        assert costs[name] == pytest.approx(expected, rel=1e-2)


# --- in a conversion


LOUD = """g (float[1,8,2,2] x) => (float[1,8,2,2] z) {
    [in] a = Conv (x, w0)  [loud] b = Conv (a, w1)  [out] y = Conv (b, w2)
    [side] s = Conv (x, w3)  [more] t = Conv (s, w4)  [sum] z = Add (y, t)
}"""


def loud_model():
    """The tensor a has a channel a hundred times as loud as those that count."""
    weights = {f"w{i}": normal(8, 8, 1, 1, seed=i) / 3 for i in range(5)}
    weights["w0"][0] *= 100
    weights["w1"][:, 0] = 0
    return build(LOUD, 13, **weights)


def converted(folder, model, **options):
    ear = Ear()
    task = job(folder, model, {"x": normal(24, 8, 2, 2)}, **options)
    return convert(task, ear), ear, ir.load(task.output)


def decibels(outcome):
    return outcome.verification.worst.sqnr_db


def test_sixteen_bits_lose_less_than_eight_and_a_few_do_for_what_is_loud(tmp_path):
    keys = {"target_device": "QNN", "only_where_it_pays": "false", "equalize": "false"}
    found = {
        bits: converted(tmp_path, loud_model(), activation_bits=bits, **keys)[0]
        for bits in ("8", "16", "MIXED")
    }
    assert decibels(found["16"]) > decibels(found["8"]) + 10
    assert wide_share(found["8"].plan) == 0
    assert wide_share(found["16"].plan) == 1


def test_max_drop_widens_no_more_units_than_it_takes(tmp_path):
    keys = {"target_device": "QNN", "activation_bits": "MIXED", "max_drop": 0.003}
    outcome, _, _ = converted(tmp_path, loud_model(), **keys)
    wide = {u.name for u in outcome.plan.units() if u.activation == UINT16}
    assert {"in", "loud"} <= wide < {unit.name for unit in outcome.plan.units()}
    assert not [node for node in outcome.plan.outside if not node.quantized]
    assert "as its tensors lose most in 8" in outcome.plan.nodes["loud"].reason


def test_a_cpu_says_that_sixteen_bits_cost_speed(tmp_path):
    _, ear, after = converted(tmp_path, loud_model(), activation_bits=16)
    assert any("16-bit activations cost speed on target CPU" in line for line in ear.warned)
    assert any(line.startswith("Activations of 16 bits: 100% of") for line in ear.told)
    assert after.graph.opset_imports[""] == 21
    _, ear, _ = converted(tmp_path, loud_model(), activation_bits=16, target_device="QNN")
    assert not any("cost speed" in line for line in ear.warned)


@pytest.mark.parametrize("target", ["NVGPU", "OPENVINO"])
def test_a_target_without_sixteen_bits_refuses_them_before_any_work(tmp_path, target):
    keys = {"target_device": target, "activation_bits": 16}
    task = job(tmp_path, loud_model(), {"x": normal(2, 8, 2, 2)}, **keys)
    with pytest.raises(ConfigError) as caught:
        make_plan(task, Ear())
    message = str(caught.value)
    assert "[full_quant_param] activation_bits: target " in message
    assert message.endswith(
        "write activation_bits = 8, or one of the targets CPU, CPU_VNNI, ARM, DSP, QNN."
    )


# --- what QNN wants


def test_only_convolutions_have_a_scale_a_channel():
    graph = f"{HEAD} {{ [one] a = Conv (x, w)  f = Flatten (a)  [two] y = MatMul (f, tall) }}"
    plan = build_plan(normal_form(graph, tall=normal(144, 5)).graph, QNN, Wishes())
    assert plan.nodes["one"].weight.axis == 0
    assert plan.nodes["two"].weight.axis is None


def test_a_bias_behind_a_product_is_an_addition_of_integers():
    graph = "g (float[2,3,4] x) => (float[] y) { [one] a = MatMul (x, k)  [sum] y = Add (a, b) }"
    assert build_plan(normal_form(graph).graph, CPU, Wishes()).nodes["one"].absorbed == ("sum",)
    _, plan, after = quantized(graph, {"x": normal(2, 3, 4)})
    assert plan.nodes["sum"].quantized
    assert all(v.producer().op_type == "DequantizeLinear" for v in node(after, "sum").inputs)


@pytest.mark.parametrize(
    ("op", "scale", "zero"), [("Sigmoid", 1 / 65536, 0), ("Tanh", 1 / 32768, 32768)]
)
def test_bounded_functions_of_sixteen_bits_have_fixed_parameters(op, scale, zero):
    _, plan, after = quantized(
        f"{ROWS} {{ [one] a = MatMul (x, k)  y = {op} (a) }}", TABLE, bits=16
    )
    assert (plan.params("y").scale, plan.params("y").zero_point) == (np.float32(scale), zero)
    check(after, plan, QNN)
    _, plan, _ = quantized(f"{ROWS} {{ [one] a = MatMul (x, k)  y = {op} (a) }}", TABLE)
    assert plan.params("y").scale != np.float32(scale)


def test_what_is_joined_shares_the_parameters_of_the_whole():
    nodes = """[one] a = Conv (x, w)  [two] c2 = Conv (x, v)  [inner] i = Concat <axis=1> (a, c2)
               [outer] y = Concat <axis=1> (i, a)"""
    graph = normal_form(f"{HEAD} {{ {nodes} }}").graph
    plan = build_plan(graph, QNN, Wishes(joined={"inner", "outer"}))
    assert {plan.tensors[name].group for name in ("a", "c2", "i", "y")} == {"y"}
    plan = build_plan(graph, QNN, Wishes(joined={"inner"}))
    assert {name: plan.tensors[name].group for name in ("a", "c2", "i", "y")} == {
        "a": "i",
        "c2": "i",
        "i": "i",
        "y": "y",
    }


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax <axis=1>"])
def test_what_is_joined_keeps_parameters_that_are_fixed(tmp_path, op):
    graph = f"""g (float[1,4,8,8] x) => (float[] y) {{
        [one] a = Conv (x, w)  s = {op} (a)  [join] c = Concat <axis=1> (s, s)  [two] y = Conv (c, v)
    }}"""
    model = build(graph, w=normal(4, 4, 3, 3), v=normal(4, 8, 1, 1))
    data = {"x": normal(8, 4, 8, 8)}
    task = job(tmp_path, model, data, target_device="QNN", activation_bits=16)
    plan = convert(task, Ear()).plan
    assert plan.tensors["s"].group == "s"
    same = graph.replace(op, "Relu")
    task = job(
        tmp_path, build(same, w=normal(4, 4, 3, 3), v=normal(4, 8, 1, 1)), data, target_device="QNN"
    )
    plan = convert(task, Ear()).plan
    assert plan.tensors["s"].group == "c"


def test_a_layer_normalization_has_a_byte_a_weight_and_an_exact_bias():
    graph = f"{ROWS} {{ [one] a = MatMul (x, k)  [norm] y = LayerNormalization (a, scale, b) }}"
    model = normal_form(graph, scale=normal(4) + 2)
    plan = decided(model, TABLE, QNN, bits=16)
    after = model.clone()
    emit(after, plan)
    check(after, plan, QNN)
    assert plan.weights["norm"].codes.dtype == np.int8
    for optimize in (False, True):
        found = run(after, TABLE, optimize)["y"]
        np.testing.assert_allclose(found, run(model, TABLE)["y"], atol=0.05)


def refusal(model, plan):
    with pytest.raises(ModelError) as caught:
        check(model, plan, QNN)
    return str(caught.value).removeprefix("The converted model does not suit target QNN: ")


BIASED = (
    f"{HEAD} {{ [one] a = Conv (x, w, b)  [two] s = Conv (a, point, b)  [gate] y = Sigmoid (s) }}"
)


def test_a_bias_is_never_shared_and_has_the_scale_of_its_products():
    _, plan, after = quantized(BIASED, IMAGE, bits=16)
    check(after, plan, QNN)
    one, two = (node(after, name) for name in ("one", "two"))
    bias = two.inputs[2]
    two.replace_input_with(2, one.inputs[2])
    assert refusal(after, plan) == "one shares its bias."
    two.replace_input_with(2, bias)
    scale = bias.producer().inputs[1]
    scale.const_value = ir.tensor(np.nextafter(constant(scale), np.float32(1)), name=scale.name)
    assert refusal(after, plan) == "two has a bias of another scale than its products."


def test_two_widths_at_one_operator_are_refused():
    graph = f"{HEAD} {{ [one] a = Conv (x, w)  [two] y = Conv (a, point) }}"
    _, plan, after = quantized(graph, IMAGE, wide={"two": FOUR})
    check(after, plan, QNN)
    narrow = node(after, "two").inputs[0].producer().inputs[0].producer().inputs[0]
    node(after, "two").replace_input_with(0, narrow)
    assert refusal(after, plan) == "two reads and makes integers of several types."


def test_parameters_that_are_fixed_and_differ_are_refused():
    _, plan, after = quantized(BIASED, IMAGE, bits=16)
    own = plan.params("y")
    other = plan.with_qparams({"y": replace(own, scale=np.float32(1 / 65535))})
    after = normal_form(BIASED)
    emit(after, other)
    assert refusal(after, other).startswith("gate must have the scale 1.5")


def test_scales_a_channel_are_refused_where_only_convolutions_have_them():
    graph = f"{ROWS} {{ [one] y = MatMul (x, k) }}"
    model = normal_form(graph)
    plan = decided(model, TABLE, replace(QNN, channels=None))
    emit(model, plan)
    assert refusal(model, plan) == "one has a weight with a scale a channel."
