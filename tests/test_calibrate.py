"""Calibration: the statistics are those of the tensors the float model computes, however the work
is spread.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from command_line import MODEL, digits
from evidence import CONSTANTS, EVERYTHING, GRAPH, SAMPLES, assert_equal
from graphs import build, normal, prepared, run
from hypothesis import given
from hypothesis import strategies as st
from running import Ear, InMemory, resources

from calib.affine import INT8, UINT8
from calib.ranges import RANGE_METHODS, RangeSpec
from calib.stats import TensorStats
from converter.calibrate import runs
from converter.calibrate.observe import (
    Wanted,
    activation_qparams,
    channel_mean,
    observe,
)
from converter.graph.files import load
from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import TARGETS
from converter.prepare import prepare
from converter.weights.layers import products


def seen(wanted=EVERYTHING, samples=SAMPLES, threads=1, memory=64 << 20):
    ear = Ear()
    evidence = observe(
        prepared(GRAPH, **CONSTANTS),
        wanted,
        InMemory(samples),
        resources=resources(threads, memory),
        watch=ear,
    )
    return evidence, ear


def truth():
    """All tensors over all samples, in float64."""
    x = np.stack([sample["x"] for sample in SAMPLES]).astype(np.float64)
    m = x @ CONSTANTS["w"].astype(np.float64)
    r = np.maximum(m, 0)
    s = r + CONSTANTS["b"]
    return {"x": x, "m": m, "r": r, "s": s, "y": 1 / (1 + np.exp(-s)), "b": CONSTANTS["b"]}


def test_statistics_are_those_of_the_tensors():
    evidence, ear = seen()
    for name, values in truth().items():
        if name not in EVERYTHING.tensors:
            continue
        stats = evidence.statistics[name]
        assert stats.count == values.size
        np.testing.assert_allclose([stats.lo, stats.hi], [values.min(), values.max()], rtol=1e-6)
    assert evidence.statistics["r"].zero_count == (truth()["m"] < 0).sum()
    np.testing.assert_allclose(
        evidence.statistics["m"].sample_extremes[:, 0], truth()["m"].min(axis=(1, 2)), rtol=1e-6
    )
    np.testing.assert_allclose(
        evidence.statistics["m"].sample_extremes[:, 1], truth()["m"].max(axis=(1, 2)), rtol=1e-6
    )
    assert evidence.statistics.keys() == set(EVERYTHING.tensors)
    assert ear.warned == []


def test_means_are_those_of_the_channels():
    means = seen()[0].means
    assert {key: mean.dtype for key, mean in means.items()} == dict.fromkeys(
        EVERYTHING.means, np.float64
    )
    for (name, _), mean in means.items():
        np.testing.assert_allclose(mean, truth()[name].mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)


def test_means_are_of_the_first_samples_only_where_asked():
    evidence = seen(replace(EVERYTHING, first=3))[0]
    np.testing.assert_allclose(
        evidence.means["m", 1], truth()["m"][:3].mean(axis=(0, 1)), rtol=1e-5, atol=1e-6
    )
    assert evidence.statistics["m"].count == truth()["m"].size
    assert evidence.first == 3


def test_means_along_two_axes_of_one_tensor():
    both = (("m", 0), ("m", 1))
    means = seen(Wanted((), both, histogram=False, samples=False))[0].means
    for key, others in zip(both, ((0, 2), (0, 1)), strict=True):
        np.testing.assert_allclose(means[key], truth()["m"].mean(axis=others), rtol=1e-5, atol=1e-6)


def test_what_was_not_asked_for_is_not_kept():
    evidence, _ = seen(Wanted(("m",), (), histogram=False, samples=False))
    assert evidence.statistics.keys() == {"m"}
    assert evidence.means == {}
    assert evidence.statistics["m"].to_arrays().keys() == {"totals", "extremes"}


def test_inputs_and_constants_alone_need_no_tap():
    evidence, _ = seen(Wanted(("x", "b"), (), histogram=False, samples=False))
    assert evidence.statistics["x"].count == 7 * 12
    assert evidence.statistics["b"].count == 6


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("memory", [1, 200, 64 << 20])
def test_memory_and_threads_do_not_change_a_bit(threads, memory):
    assert_equal(seen(threads=threads, memory=memory)[0], seen()[0])


def test_the_order_of_samples_does_not_matter():
    wanted = Wanted(EVERYTHING.tensors, EVERYTHING.means, histogram=True, samples=False)
    forward, backward = seen(wanted)[0], seen(wanted, SAMPLES[::-1])[0]
    for name, stats in forward.statistics.items():
        for key, array in stats.to_arrays().items():
            np.testing.assert_array_equal(array, backward.statistics[name].to_arrays()[key])
    for name, mean in forward.means.items():
        np.testing.assert_allclose(mean, backward.means[name], rtol=1e-12)


def test_memory_and_threads_do_not_change_a_bit_of_the_example():
    model, images = prepare(load(MODEL)), digits("calib")[0][:9]
    plan = build_plan(model.graph, TARGETS["CPU"], Wishes())
    wanted = Wanted(tuple(plan.groups()), products(model.graph, plan), histogram=True, samples=True)
    data = InMemory([{"image": image[None]} for image in images])
    reference = observe(model, wanted, data, resources=resources(1), watch=Ear())
    for other in (resources(3), resources(2, 300_000)):
        assert_equal(observe(model, wanted, data, resources=other, watch=Ear()), reference)


def test_tensors_are_observed_in_groups_that_fit():
    # m, r, s and y hold 3 * 6 floats a sample, x 3 * 4: 72 and 48 bytes.
    assert seen(memory=72 * 4 + 48)[1].said == [
        "Calibrating 5 tensors of 0 MB a sample, 1 pass(es) over the data."
    ]
    assert "2 pass(es)" in seen(memory=72 * 4 + 47)[1].said[0]
    assert "5 pass(es)" in seen(memory=1)[1].said[0]
    # Two workers each hold a sample: x and one, two, one in a pass.
    assert "3 pass(es)" in seen(memory=72 * 4 + 48, threads=2)[1].said[0]


def test_sizes_are_those_of_one_sample(monkeypatch):
    monkeypatch.setattr(runs, "PROBED", 2)
    names = ["x", "m", "r", "y"]
    sizes = runs.opened(prepared(GRAPH, **CONSTANTS), names).sizes(names, SAMPLES[0])
    assert sizes == {"x": 48, "m": 72, "r": 72, "y": 72}


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 50), max_size=12), st.integers(0, 120))
def test_groups_fit_the_budget_and_keep_the_order(sizes, budget):
    groups = list(runs.groups_within(sizes, budget))
    assert [name for group in groups for name in group] == list(sizes)
    totals = [sum(sizes[name] for name in group) for group in groups]
    assert all(
        total <= budget or len(group) == 1 for total, group in zip(totals, groups, strict=True)
    )
    # No group has room for the first tensor of the next.
    assert all(
        total + sizes[group[0]] > budget for total, group in zip(totals, groups[1:], strict=False)
    )


# --- data that is not as it should be


def test_values_that_are_no_numbers_are_told_of_and_left_out():
    odd = SAMPLES[0]["x"].copy()
    odd[0, :3] = np.nan, np.inf, -np.inf
    evidence, ear = seen(
        Wanted(("x",), (), histogram=True, samples=False), [{"x": odd}, SAMPLES[1]]
    )
    kept = np.concatenate([odd.ravel()[3:], SAMPLES[1]["x"].ravel()])
    assert (evidence.statistics["x"].lo, evidence.statistics["x"].hi) == (kept.min(), kept.max())
    assert ear.warned == [
        "Tensor 'x' held 1 NaN and 2 infinite values in the calibration data; its range "
        "ignores them."
    ]


def test_tensors_without_any_number_are_told_of():
    empty = [{"x": np.zeros((0, 4), np.float32)}]
    evidence, ear = seen(Wanted(("x", "m"), (), histogram=True, samples=True), empty)
    assert evidence.statistics["m"].count == 0
    assert ear.warned == [
        f"Tensor '{name}' had no finite value in the calibration data; its range is a guess."
        for name in "xm"
    ]


def test_only_nan():
    _, ear = seen(
        Wanted(("x",), (), histogram=True, samples=True),
        [{"x": np.full((1, 4), np.nan, np.float32)}],
    )
    assert [sentence.split(";")[0] for sentence in ear.warned] == [
        "Tensor 'x' held 4 NaN and 0 infinite values in the calibration data",
        "Tensor 'x' had no finite value in the calibration data",
    ]


# --- small parts


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 3, 4, 5), 1), ((2, 3, 4, 5), -1), ((2, 3), 1), ((2, 3), -1), ((3,), -1), ((2, 4, 3), -1)],
)
def test_channel_means(shape, axis):
    x = normal(*shape)
    mean = channel_mean(x, axis)
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    assert mean.dtype == np.float64
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=others), rtol=1e-5, atol=1e-6)


def test_ranges_follow_the_tensors_format():
    graph = (
        "g (float[1,4] x) => (float[1,6] y) { a = MatMul (x, w)  r = Relu (a)  y = MatMul (r, v) }"
    )
    model = build(graph, w=normal(4, 6), v=normal(6, 6))
    stats = TensorStats(histogram=False)
    stats.update(np.array([-1.0, 3.0], np.float32), 0)
    for target, expected in (("CPU", (4 / 255, 64, UINT8)), ("NVGPU", (3 / 127, 0, INT8))):
        plan = build_plan(model.graph, TARGETS[target], Wishes())
        statistics = dict.fromkeys(plan.groups(), stats)
        found = activation_qparams(
            plan, statistics, RANGE_METHODS["MAX_MIN"], RangeSpec(UINT8, False)
        )
        assert found.keys() == plan.groups().keys()
        for q in found.values():
            np.testing.assert_allclose(q.scale, expected[0], rtol=1e-6)
            assert (int(q.zero_point), q.format.bits, q.format.signed) == (
                expected[1],
                expected[2].bits,
                expected[2].signed,
            )


def test_the_float_model_is_not_touched():
    model = prepared(GRAPH, **CONSTANTS)
    before = ir.to_proto(model).SerializeToString()
    observe(model, EVERYTHING, InMemory(SAMPLES), resources=resources(2), watch=Ear())
    assert ir.to_proto(model).SerializeToString() == before
    assert list(run(model, SAMPLES[0])) == ["y"]
