"""What integers make no faster stays float, its weights in codes."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from graphs import normal, prepared, run
from hypothesis import given
from hypothesis import strategies as st
from running import Ear, job

from converter.errors import ConfigError
from converter.job import Watch
from converter.pipeline.convert import convert
from converter.plan.costs import NODE, Cost, cost
from converter.plan.payoff import FLOAT, INTEGER, NO_FASTER, least_cut, sizes_of, unprofitable
from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import CPU, TARGETS
from converter.report.text import summary_lines

IMAGE = "g (float[1,64,112,112] x) => (float[] y)"
CONSTANTS = {
    "w": normal(64, 64, 3, 3),
    "v": normal(64, 64, 3, 3, seed=1),
    "few": normal(64, 1, 3, 3),
    "thin": normal(8, 64, 1, 1),
    "b": normal(64),
    "slopes": np.full((64, 1, 1), 0.1, np.float32),
}


def slow_units(graph, **constants):
    model = prepared(graph, **CONSTANTS | constants)
    return unprofitable(model, build_plan(model.graph, CPU, Wishes()), {})


# --- the cheapest choice


NAMES = "abcdef"
EDGES = [
    (i, f)
    for i in (INTEGER, *NAMES)
    for f in (*NAMES, FLOAT)
    if i != f and (i, f) != (INTEGER, FLOAT)
]


def price(costs, integers):
    """What a choice costs, term by term."""
    return sum(c for (i, f), c in costs.items() if i in integers and f not in integers)


@given(st.dictionaries(st.sampled_from(EDGES), st.integers(0, 1000), min_size=1))
def test_no_choice_is_cheaper(costs):
    chosen = least_cut({(INTEGER, "a"): 0.0, ("a", FLOAT): 0.0, **costs})
    choices = itertools.chain.from_iterable(
        itertools.combinations(NAMES, count) for count in range(len(NAMES) + 1)
    )
    least = min(price(costs, {INTEGER, *choice}) for choice in choices)
    assert price(costs, chosen) == pytest.approx(least)


# --- what pays


def test_heavy_products_are_integers():
    assert not slow_units(
        f"{IMAGE} {{ [one] a = Conv <pads = [1,1,1,1]> (x, w)  [two] y = Conv (a, v) }}"
    )


def test_a_depthwise_convolution_alone_stays_float():
    slow = slow_units(f"{IMAGE} {{ [deep] y = Conv <group = 64> (x, few) }}")
    assert slow == {"deep": NO_FASTER}


def test_a_depthwise_convolution_between_heavy_products_is_no_reason_to_convert():
    graph = f"{IMAGE} {{ [one] a = Conv (x, w)  [deep] d = Conv <group = 64> (a, few)  [two] y = Conv (d, v) }}"
    assert not slow_units(graph)


def test_what_stands_between_float_operators_is_not_worth_its_conversions():
    graph = f"{IMAGE} {{ [before] p = PRelu (x, slopes)  [thin] a = Conv (p, thin)  [after] y = Softmax (a) }}"
    assert slow_units(graph) == {"thin": NO_FASTER}


def test_a_small_model_is_integer_all_the_same():
    assert not slow_units("g (float[1,4,8,8] x) => (float[] y) { [deep] y = Conv <group = 4> (x, k) }",
                          k=normal(4, 1, 3, 3))  # fmt: skip


@pytest.mark.parametrize("broken", [{"group": 0}, {"group": 3}])
def test_shapes_that_no_runtime_takes_are_no_reason_to_fail(broken):
    model = prepared(f"{IMAGE} {{ [c] y = Conv <group = {broken['group']}> (x, w) }}", **CONSTANTS)
    node = next(iter(model.graph))
    assert cost(node, (1, 64, 54, 54), 1).floats >= NODE


def test_open_dimensions_have_a_plausible_size():
    model = prepared("g (float[N,64,H,W] x) => (float[] y) { [c] y = Conv (x, w) }", **CONSTANTS)
    assert sizes_of(model, {})["y"] == (1, 64, 254, 254)
    assert sizes_of(model, {"x": (2, 64, 16, 20)})["y"] == (2, 64, 14, 18)
    assert [d for d in model.graph.inputs[0].shape if isinstance(d, int)] == [64]


def test_a_cost_is_of_a_node_and_of_what_it_does():
    assert Cost(2.0, 3.0).times(10) == Cost(NODE + 20, NODE + 30)
    assert Cost(2.0, 3.0).times(10, Cost(1.0, 5.0)) == Cost(21.0, 35.0)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_table_is_of_one_kind_of_processor(name):
    assert TARGETS[name].counts_costs == (name in {"CPU", "CPU_VNNI"})


# --- the file


SLOW = f"{IMAGE} {{ [deep] a = Conv <group = 64> (x, few, b)  [soft] y = Softmax (a) }}"


def slow_job(tmp_path, **full_quant):
    model = prepared(SLOW, **CONSTANTS)
    return job(tmp_path, model, {"x": normal(3, 64, 112, 112)}, **full_quant)


def conversion(tmp_path, **full_quant):
    """The plan, and the file."""
    task = slow_job(tmp_path, **full_quant)
    return convert(task, Watch()).plan, task.output.read_bytes()


def test_weights_are_codes_where_integers_make_nothing_faster(tmp_path):
    plan, file = conversion(tmp_path)
    assert plan.nodes["deep"].reason == f"{NO_FASTER}; its weights are stored in 8 bits"
    written = onnx.load_from_string(file)
    assert "QuantizeLinear" not in {node.op_type for node in written.graph.node}
    codes = [i for i in written.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
    assert [tuple(i.dims) for i in codes] == [(64, 1, 3, 3)]


def test_a_model_that_integers_make_no_faster_is_said_to_be_float(tmp_path):
    ear = Ear()
    outcome = convert(slow_job(tmp_path), ear)
    assert any(
        text.startswith("Nothing of this model is faster in integers here") for text in ear.warned
    )
    first, left, *_ = summary_lines(outcome, tmp_path / "q.onnx")
    assert first.startswith("Quantized 0 of 2 nodes")
    assert left == f"Left float, {NO_FASTER}; its weights are stored in 8 bits: deep (Conv)."


@pytest.mark.parametrize("optimize", [False, True])
def test_codes_of_8_bits_lose_next_to_nothing(tmp_path, optimize):
    _, file = conversion(tmp_path)
    feeds = {"x": normal(1, 64, 112, 112, seed=9)}
    weight = CONSTANTS["few"].astype(np.float64)
    step = (weight.max((1, 2, 3)) - weight.min((1, 2, 3))) / 255
    # Half a step off in each of nine products, with a probability's slope of at most a fourth.
    most = 9 * step.max() / 2 * np.abs(feeds["x"]).max() / 4
    wanted = run(prepared(SLOW, **CONSTANTS), feeds)["y"]
    np.testing.assert_allclose(run(file, feeds, optimize)["y"], wanted, atol=1.05 * most)


def test_weights_of_a_float_model_are_fitted_to_its_outputs(tmp_path):
    fitted, file = conversion(tmp_path)
    (bias,) = fitted.biases.values()
    assert np.abs(bias - CONSTANTS["b"]).max() > 1e-5
    written = {i.name: i for i in onnx.load_from_string(file).graph.initializer}
    conv = next(n for n in onnx.load_from_string(file).graph.node if n.op_type == "Conv")
    stored = onnx.numpy_helper.to_array(written[conv.input[2]])
    np.testing.assert_array_equal(stored, bias.astype(np.float32))
    plain, _ = conversion(tmp_path, bias_correction="false")
    assert not plain.biases


def test_the_key_makes_integers_of_all(tmp_path):
    plan, _ = conversion(tmp_path, only_where_it_pays="false")
    assert plan.nodes["deep"].reason == "integer kernel of target CPU"


def test_what_must_be_integer_is(tmp_path):
    with pytest.raises(ConfigError, match="soft"):
        conversion(tmp_path, require_full_integer="true")
