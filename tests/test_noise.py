"""Products that drown in the noise of their inputs' codes, as where quiet channels have large
weights, stay float.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphs import normal, prepared, run
from running import Ear, InMemory, job, resources

from converter.calibrate.noise import PROBED, decibels_left, product_spreads
from converter.pipeline.convert import convert

GRAPH = """g (float[1,8,40,40] x) => (float[] y) {
    [spread] a = Conv (x, w)  [gate] s = Sigmoid (a)  [swish] m = Mul (a, s)
    [deep] d = Conv <group = 8, pads = [1,1,1,1]> (m, v)  [last] y = Conv (d, u)
}"""
# One loud channel sets the step for seven that are 300 times as quiet, and count as much later.
SIZES = np.array([100.0, *[0.3] * 7], np.float32)


def constants(sizes=SIZES):
    v = normal(8, 1, 3, 3, seed=1)
    return {
        "w": normal(8, 8, 1, 1) * sizes[:, None, None, None],
        "v": v / sizes[:, None, None, None],
        "u": normal(8, 8, 1, 1, seed=2),
    }


def conversion(tmp_path, sizes=SIZES, **full_quant):
    """The plan, and decibels of the output on other samples."""
    model = prepared(GRAPH, **constants(sizes))
    task = job(tmp_path, model, {"x": normal(8, 8, 40, 40, seed=3)}, **full_quant)
    plan = convert(task, Ear()).plan
    feeds = {"x": normal(1, 8, 40, 40, seed=9)}
    wanted = run(model, feeds)["y"].astype(np.float64)
    error = run(task.output.read_bytes(), feeds)["y"] - wanted
    return plan, 10 * math.log10(np.square(wanted).sum() / np.square(error).sum())


def test_decibels_are_those_of_rounded_inputs():
    rng = np.random.default_rng(0)
    matrix, x, step = rng.standard_normal((2, 5, 30)), rng.standard_normal((2, 30, 4000)), 0.3
    exact, rounded = matrix @ x, matrix @ (np.round(x / step) * step)
    spread = exact.var(axis=2).mean()
    found = 10 * math.log10(spread / np.square(exact - rounded).mean())
    assert decibels_left(spread, matrix, step) == pytest.approx(found, abs=0.1)


@pytest.mark.parametrize(
    ("spread", "weight"), [(0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0)]
)
def test_where_nothing_is_known_nothing_is_lost(spread, weight):
    assert decibels_left(spread, np.full((1, 2, 3), weight), 0.1) == math.inf


def test_spreads_are_of_channels_over_the_first_samples():
    x = normal(PROBED + 2, 8, 40, 40, seed=3) + np.arange(8, dtype=np.float32)[:, None, None]
    model = prepared(GRAPH, **constants())
    data = InMemory([{"x": row[None]} for row in x])
    wanted = np.mean([np.einsum("oc,chw->ohw", constants()["w"][:, :, 0, 0], row).var((1, 2)).mean()
                      for row in x[:PROBED].astype(np.float64)])  # fmt: skip
    found = product_spreads(model, {"a": 1}, data, resources())
    assert found["a"] == pytest.approx(wanted, rel=1e-5)


def test_what_drowns_stays_float_with_what_makes_its_inputs(tmp_path):
    plan, decibels = conversion(tmp_path)
    assert plan.nodes["deep"].reason.startswith("codes of its input would leave ")
    for name in ("spread", "gate", "swish"):
        assert plan.nodes[name].reason.endswith("dB of the products of deep")
        assert not plan.nodes[name].quantized
    assert plan.nodes["last"].quantized
    assert decibels > 30


def test_even_channels_are_integers(tmp_path):
    plan, decibels = conversion(tmp_path, sizes=np.ones(8, np.float32))
    assert all(plan.nodes[name].quantized for name in ("spread", "deep", "last"))
    assert decibels > 30


@pytest.mark.parametrize("key", [{"require_full_integer": "true"}, {"only_where_it_pays": "false"}])
def test_integers_that_are_asked_for_may_drown(tmp_path, key):
    plan, decibels = conversion(tmp_path, **key)
    assert all(node.quantized for node in plan.nodes.values())
    assert decibels < 20
