"""Weights and biases: means are kept, codes are near and within the target's bounds, scales are
what was asked for.
"""

from __future__ import annotations

import numpy as np
import pytest
from calibrated import BATCHES, CONSTANTS, IMAGES, TABLES, decided
from graphs import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.affine import IntFormat, dequantize
from calib.session import open_session, run
from converter.emit.qdq import bias_qparams, emit
from converter.graph.edit import Names, values_by_name
from converter.graph.files import saved
from converter.plan.plan import PerAxis, WeightPlan
from converter.weights import stored
from converter.weights.integer import BIAS_LIMIT, Rounding
from converter.weights.layers import INHERITED, products

IMAGE = "g (float[1,4,7,7] x) => (float[] y)"
TABLE = "g (float[2,3,8] x) => (float[] y)"
ROWS = "g (float[5,8] x) => (float[] y)"
# Name → graph, samples, and the tensors that are a product with its bias, with their channel axes.
LAYERS = {
    "conv": (f"{IMAGE} {{ a = Conv (x, w, b)  y = Conv (a, v) }}", IMAGES, {"a": 1}),
    "conv without bias": (
        f"{IMAGE} {{ a = Conv (x, w)  r = Relu (a)  y = Conv (r, v) }}",
        IMAGES,
        {"a": 1},
    ),
    "padded": (
        f"{IMAGE} {{ a = Conv <pads=[1,1,1,1]> (x, w, b)  y = Conv (a, v) }}",
        IMAGES,
        {"a": 1},
    ),
    "depthwise": (
        f"{IMAGE} {{ f = Conv (x, w, b)  a = Conv <group=6> (f, d)  y = Conv (a, v) }}",
        IMAGES,
        {"f": 1, "a": 1},
    ),
    "strided 1 x 1": (
        f"{IMAGE} {{ f = Conv (x, w, b)  a = Conv <strides=[2,2]> (f, v)  y = Conv (a, v) }}",
        IMAGES,
        {"a": 1},
    ),
    "gemm": (
        f"{ROWS} {{ a = Gemm (x, m, b)  y = Gemm <transB=1> (a, t, b) }}",
        BATCHES,
        {"a": 1, "y": 1},
    ),
    "gemm without bias": (
        f"{ROWS} {{ a = Gemm (x, m)  r = Relu (a)  y = Gemm (r, t) }}",
        BATCHES,
        {"a": 1, "y": 1},
    ),
    "matmul and add": (
        (
            f"{TABLE} {{ p = MatMul (x, m)  a = Add (p, b)  r = Relu (a)  q = MatMul (r, t)  y = "
            "Add (b, q) }"
        ),
        TABLES,
        {"a": -1, "y": -1},
    ),
    "shared weight and bias": (
        (
            f"{IMAGE} {{ f = Conv (x, w, b)  a = Conv (f, v, b)  r = Relu (a)  c = Conv (r, v, "
            "b)  y = Conv (c, v) }"
        ),
        IMAGES,
        {"f": 1, "a": 1, "c": 1},
    ),
    "residual": (
        (
            f"{IMAGE} {{ f = Conv (x, w, b)  a = Conv (f, v, b)  s = Add (f, a)  c = Conv (s, v) "
            " y = Conv (c, v) }"
        ),
        IMAGES,
        {"f": 1, "a": 1, "c": 1},
    ),
}


def channel_means(model, names, samples):
    """float64 means of the tensors by channel, runtime optimizations off."""
    with saved(model, names) as path:
        session = open_session(path, optimize=False)
        found = [run(session, list(names), sample) for sample in samples]
    means = {}
    for name, axis in names.items():
        x = np.stack([np.moveaxis(one[name], axis, 0).astype(np.float64) for one in found], axis=1)
        means[name] = x.reshape(len(x), -1).mean(axis=1)
    return means


def steps_of_biases(plan, unit):
    """The step of each channel's int32 bias."""
    return bias_qparams(
        plan.params(unit.inputs[0]), plan.weights[unit.name], plan.biases[unit.name].size
    ).scale


def aimed(model, quantized, plan, tensor, name, axis, samples):
    """The means that a product is to have: the float model's, but for a part of what the float
    weight would make of the inputs that the quantized layers before hand on.
    """
    unit = unit_of(model, plan, tensor)
    whole, values = quantized.clone(), values_by_name(model.graph)
    node = next(node for node in whole.graph if node.name == unit.name)
    weight = values[unit.weight.name].const_value.numpy()
    node.replace_input_with(unit.weight.index, Names(whole).constant("whole", weight))
    bias = values[unit.bias].const_value.numpy().astype(float) if unit.bias else 0.0
    own = channel_means(whole, {name: axis}, samples)[name] - plan.biases[unit.name] + bias
    return INHERITED * channel_means(model, {tensor: axis}, samples)[tensor] + (1 - INHERITED) * own


# A GPU computes products as small as these in floats.
PRODUCTS = {"gemm", "gemm without bias", "matmul and add"}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("name", "target"),
    [(n, t) for n in LAYERS for t in ("CPU", "OPENVINO" if n in PRODUCTS else "NVGPU")],
)
def test_channel_means_keep_what_weights_change_and_a_part_of_what_came_before(
    name, target, per_channel
):
    graph, samples, tensors = LAYERS[name]
    model, plan = decided(graph, samples, target, per_channel=per_channel)
    quantized = model.clone()
    restored = emit(quantized, plan)
    made = {value.name: value for node in quantized.graph for value in node.outputs}
    # Where a tensor is handed on as integers, the product is what is converted to them.
    names = {
        n: made[restored[n]].producer().inputs[0].producer().inputs[0].name if n in restored else n
        for n in tensors
    }
    found = channel_means(quantized, {names[n]: axis for n, axis in tensors.items()}, samples)
    for tensor, axis in tensors.items():
        unit = unit_of(model, plan, tensor)
        wanted = aimed(model, quantized, plan, tensor, names[tensor], axis, samples)
        # The bias of an Add behind a MatMul stays float, and so do all where the target wants it.
        step = (
            steps_of_biases(plan, unit)
            if unit.integer_bias and unit.op_type != "MatMul"
            else np.zeros(6)
        )
        # With a float bias, codes near the middle of two may be others without optimizations.
        flip = 0.0 if unit.integer_bias else one_flip(plan, unit, samples)
        # Half a step of the bias that is found, and a quarter of the one that is aimed at.
        np.testing.assert_array_less(
            np.abs(found[names[tensor]] - wanted), 0.75 * step.astype(float) + flip + 2e-5
        )


def one_flip(plan, unit, samples):
    """What one code more in one position of the input adds to the mean of a channel."""
    weight = plan.weights[unit.name]
    largest = float(np.abs(dequantize(weight.codes, weight.qparams)).max())
    return float(plan.params(unit.inputs[0]).scale) * largest / (4 * len(samples))


def unit_of(model, plan, tensor):
    """The unit that makes a tensor, or what is computed inside it."""
    weighted = (unit for unit in plan.units() if unit.weight)
    return next(u for u in weighted if tensor in outputs_of(model, (u.name, *u.absorbed)))


def outputs_of(model, names):
    return [value.name for node in model.graph if node.name in names for value in node.outputs]


def test_without_correction_means_shift():
    graph, samples, _ = LAYERS["depthwise"]
    model, plan = decided(graph, samples, correct=False)
    quantized = model.clone()
    emit(quantized, plan)
    wanted, found = (channel_means(m, {"a": 1}, samples)["a"] for m in (model, quantized))
    assert np.abs(found - wanted).max() > 1e-3
    assert plan.biases.keys() == {unit.name for unit in plan.units() if unit.bias}
    (bias,) = plan.biases.values()
    np.testing.assert_array_equal(bias, CONSTANTS["b"].astype(np.float64))


def test_shared_constants_get_a_bias_for_each_reader():
    _, plan = decided(*LAYERS["shared weight and bias"][:2])
    biases = list(plan.biases.values())
    assert len(biases) == 4
    assert len({bias.tobytes() for bias in biases}) == 4


def test_two_operators_may_see_channels_along_different_axes():
    graph = """g (float[1,6,6] x) => (float[] y) {
        f = Conv (x, n, b)  r = Relu (f)  p = MatMul (r, t)  q = Add (p, b)  s = Conv (r, n, b)
          y = Add (q, s)
    }"""
    samples = [{"x": normal(1, 6, 6, seed=i) + 0.3} for i in range(6)]
    model, plan = decided(graph, samples, n=normal(6, 6, 1, seed=7))
    assert len(set(products(model.graph, plan))) == 3
    quantized = model.clone()
    emit(quantized, plan)
    for name, axis in (("q", -1), ("s", 1)):
        found = channel_means(quantized, {name: axis}, samples)[name]
        wanted = aimed(model, quantized, plan, name, name, axis, samples)
        np.testing.assert_allclose(found, wanted, atol=2e-3)


# --- codes


def pairs(codes):
    """Codes that a kernel multiplies and adds in pairs: kernel positions first, then channels of
    the group.
    """
    rows = np.moveaxis(codes.astype(np.int64), 1, -1).reshape(len(codes), -1)
    return rows[:, : rows.shape[1] - 1 : 2] + rows[:, 1::2]


@pytest.mark.parametrize("compensate", [True, False])
def test_pairs_of_codes_stay_within_what_the_target_adds_exactly(compensate):
    # A positive weight whose largest codes would otherwise stand side by side.
    heavy = {"w": np.abs(normal(6, 4, 3, 3)) + 1}
    graph = f"{IMAGE} {{ a = Conv (x, w)  y = Conv (a, v) }}"
    found = {}
    for target in ("CPU", "CPU_VNNI", "ARM"):
        _, plan = decided(graph, IMAGES, target, Rounding(compensate), **heavy)
        found[target] = next(
            w.codes for w in plan.weights.values() if w.codes.shape == (6, 4, 3, 3)
        )
    assert np.abs(pairs(found["CPU"])).max() <= 128
    assert np.abs(pairs(found["CPU_VNNI"])).max() > 128
    assert np.abs(found["CPU_VNNI"]).max() == 127
    np.testing.assert_array_equal(found["ARM"], found["CPU_VNNI"])


def test_a_depthwise_weight_uses_the_full_range():
    graph = f"{IMAGE} {{ f = Conv (x, w)  a = Conv <group=6> (f, d)  y = Conv (a, v) }}"
    _, plan = decided(
        graph, IMAGES, d=np.abs(CONSTANTS["d"]) + 1, rounding=Rounding(compensate=False)
    )
    codes = next(w.codes for w in plan.weights.values() if w.codes.shape == (6, 1, 3, 3))
    assert np.abs(pairs(codes)).max() > 128


def test_nearest_codes_are_nearest():
    model, plan = decided(LAYERS["conv"][0], IMAGES, "ARM", Rounding(compensate=False))
    for unit in plan.units():
        weight = next(n for n in model.graph if n.name == unit.name).inputs[1].const_value.numpy()
        stored = plan.weights[unit.name]
        scale = stored.qparams.scale.reshape(-1, 1, 1, 1).astype(np.float64)
        error = np.abs(dequantize(stored.codes, stored.qparams) - weight)
        inside = np.abs(weight) <= 127 * scale
        assert (error <= scale / 2 * (1 + 1e-5))[inside].all()
        assert (np.abs(stored.codes[~inside]) == 127).all()


def test_compensated_codes_give_nearer_outputs():
    graph = f"{ROWS} {{ a = Gemm (x, m)  y = Gemm (a, t) }}"
    # Inputs of few directions: most of a rounding error can be made up for.
    samples = [
        {"x": (normal(5, 2, seed=i) @ normal(2, 8, seed=9)).astype(np.float32)} for i in range(8)
    ]
    x = np.concatenate([sample["x"] for sample in samples]).astype(np.float64)
    errors = {}
    for compensate in (True, False):
        _, plan = decided(graph, samples, "ARM", Rounding(compensate), correct=False)
        stored = next(w for w in plan.weights.values() if w.codes.shape == (8, 6))
        errors[compensate] = np.square(
            x @ (dequantize(stored.codes, stored.qparams) - CONSTANTS["m"])
        ).mean()
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("name", ["conv", "gemm"])
def test_scales_that_are_powers_of_two(name):
    graph, samples, _ = LAYERS[name]
    _, plan = decided(graph, samples, rounding=Rounding(power_of_two=True))
    scales = [q.scale for q in plan.qparams.values()] + [
        w.qparams.scale for w in plan.weights.values()
    ]
    for scale in scales:
        np.testing.assert_array_equal(np.exp2(np.rint(np.log2(scale))), scale)


@pytest.mark.parametrize("target", ["NVGPU", "DSP"])
@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution(target, group):
    graph = f"{IMAGE} {{ c = ConvTranspose <group={group}> (x, u)  y = Conv (c, v) }}"
    weight = normal(4, 6 // group, 2, 2)
    _, plan = decided(graph, IMAGES, target, u=weight)
    stored = next(w for w in plan.weights.values() if w.codes.shape == weight.shape)
    assert stored.qparams.axis == (1 if group == 1 else None)
    scale = stored.qparams.scale.reshape(1, -1, 1, 1) if group == 1 else stored.qparams.scale
    inside = np.abs(weight) <= 127 * scale
    error = np.abs(dequantize(stored.codes, stored.qparams) - weight)
    assert (error <= scale / 2 * (1 + 1e-5))[inside].all()
    assert inside.mean() > 0.9


def test_a_huge_bias_widens_the_scale_until_int32_holds_it():
    graph = f"{IMAGE} {{ a = Conv (x, w, b)  y = Conv (a, v) }}"
    huge = np.array([1e9, -1e9, 1, 2, 3, 4], np.float32)
    _, plan = decided(graph, IMAGES, b=huge, correct=False)
    unit = next(unit for unit in plan.units() if unit.bias)
    codes = huge / steps_of_biases(plan, unit)
    assert np.abs(codes).max() <= BIAS_LIMIT * (1 + 1e-6)
    _, whole = decided(graph, IMAGES, b=huge, correct=False, per_channel=False)
    assert np.abs(huge / steps_of_biases(whole, unit)).max() <= BIAS_LIMIT * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["CPU", "ARM"]), st.booleans())
def test_any_weight_gets_finite_scales_and_codes_in_range(seed, target, per_channel):
    rng = np.random.default_rng(seed)
    weight = (
        rng.standard_normal((6, 4, 3, 3)) * 10.0 ** rng.integers(-20, 10, (6, 1, 1, 1))
    ).astype(np.float32)
    weight[rng.integers(6)] = 0
    _, plan = decided(
        f"{IMAGE} {{ a = Conv (x, w)  y = Conv (a, v) }}",
        IMAGES[:1],
        target,
        per_channel=per_channel,
        w=weight,
    )
    for kept in plan.weights.values():
        assert np.isfinite(kept.qparams.scale).all()
        assert (kept.qparams.scale > 0).all()
        assert np.abs(kept.codes.astype(int)).max() <= 127
        assert not kept.qparams.zero_point.any()


HEAD_OF_A_DETECTOR = "g (float[1,16,120,120] x) => (float[] y) { y = Conv (x, head) }"


@pytest.mark.parametrize("loud", [True, False])
def test_a_channel_that_is_loud_in_few_places_keeps_its_weight(loud):
    """As the class head of a detector: what says "face" is active where there is a face only."""
    samples = [{"x": np.abs(normal(1, 16, 120, 120, seed=i))} for i in range(4)]
    for number, sample in enumerate(samples):
        sample["x"][0, 5] = 0
        # A few of 57,600 positions, with a third of the others' mean square or next to nothing.
        sample["x"][0, 5, 30:34, 20 * number] = 36 if loud else 0.3
    head = normal(4, 16, 1, 1) / 16
    head[:, 5] = [[[0.7]], [[-0.7]], [[0.6]], [[0.65]]]
    _, plan = decided(HEAD_OF_A_DETECTOR, samples, "CPU_VNNI", correct=False, head=head)
    (weight,) = plan.weights.values()
    found = dequantize(weight.codes, weight.qparams)
    np.testing.assert_allclose(found[:, 5], head[:, 5], rtol=0.03 if loud else 0.3)
    np.testing.assert_allclose(found, head, atol=0.01 if loud else 0.2)


def test_a_channel_that_is_silent_everywhere_costs_the_others_nothing():
    samples = [{"x": np.abs(normal(1, 16, 120, 120, seed=i))} for i in range(4)]
    for sample in samples:
        sample["x"][0, 5] = 0
    head = normal(4, 16, 1, 1) / 16
    head[:, 5] = 9
    _, plan = decided(HEAD_OF_A_DETECTOR, samples, "CPU_VNNI", correct=False, head=head)
    (weight,) = plan.weights.values()
    heard = np.delete(head, 5, axis=1)
    assert (weight.qparams.scale <= 1.1 * np.abs(heard).max(axis=(1, 2, 3)) / 127).all()


def seen_and_unseen_error(seed: int) -> tuple[float, float]:
    """Relative errors of rounding to 2 bits on 24 samples of 40 inputs that are much alike, and on
    others of the same kind; layers before add noise to inputs.
    """
    columns = 64
    mix = normal(columns, columns, seed=99) * np.geomspace(1, 0.05, columns)

    def inputs(count: int, alike: int, seed: int) -> stored.Inputs:
        samples = (normal(count, columns, seed=seed) @ mix.T).repeat(alike, axis=0)
        reference = samples + 0.1 * normal(*samples.shape, seed=seed + 1)
        own = reference + 0.2 * normal(*samples.shape, seed=seed + 2)
        return stored.Inputs(
            own[None].astype(np.float32),
            reference[None].astype(np.float32),
            centered=False,
        )

    matrix = normal(1, 32, columns, seed=5).astype(np.float64)
    seen, unseen = inputs(24, 40, seed), inputs(300, 2, seed + 500)
    wanted = WeightPlan("w", 1, IntFormat(2, signed=False), PerAxis(0))
    rows = stored.fitted_to_outputs(
        matrix, seen, wanted, stored.Storage(True), sides=(columns,), threads=1
    )

    def error(pair: stored.Inputs) -> float:
        outputs = pair.reference @ matrix.swapaxes(1, 2)
        difference = pair.own @ rows.values().swapaxes(1, 2) - outputs
        return float(np.square(difference).mean() / np.square(outputs).mean())

    return error(seen), error(unseen)


@pytest.mark.parametrize(("most", "coded"), [(7, False), (8, True), (40, True)])
def test_a_trellis_is_for_weights_that_codes_cannot_hold(most, coded):
    numbers = np.random.default_rng(0).standard_normal((96, 128))
    weight = np.clip(np.rint(numbers * most / 3), -most, most).astype(np.float32)
    assert len(np.unique(weight)) == 2 * most + 1
    wanted = WeightPlan("w", 1, IntFormat(4, signed=False), PerAxis(0))
    found = stored.fitted_alone(weight, wanted, stored.Storage(correct=False))
    assert (found.qparams.format.trellis > 0) == coded


@pytest.mark.parametrize(
    ("columns", "mean", "kept"),
    # Eight bits for 128 weights would take 9 % of the error away: less than a mean of 0.33 is of the
    # energy, more than one of 0.05. Rows of 9 are too short for a trellis.
    [(128, 0.05, False), (128, 0.33, True), (9, 0.05, True)],
)
def test_zeros_are_kept_where_the_means_of_rows_are_worth_them(columns, mean, kept):
    matrix = normal(1, 2048, columns, seed=5).astype(np.float64) + mean
    x = normal(1, 4096, columns, seed=6)
    pair = stored.Inputs(x, x, centered=False)
    wanted = WeightPlan("w", 1, IntFormat(4, signed=False), PerAxis(0))
    rows = stored.fitted_to_outputs(matrix, pair, wanted, stored.Storage(True), sides=(), threads=1)
    assert (set(rows.zero.flat) != {7.5}) == kept


def test_few_samples_are_not_fitted_at_the_cost_of_others():
    errors = np.mean([seen_and_unseen_error(seed) for seed in (0, 10, 20)], axis=0)
    assert errors[1] < 4 * errors[0]
