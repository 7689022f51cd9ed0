"""Equalization: the model computes the same, and the channels of neighbouring weights are of one
size.
"""

from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_same, changes, frozen, node, normal, positive, prepared, types, uneven

from converter.graph.edit import constant
from converter.prepare.equalize import equalize

HEAD = "g (float[1,4,8,8] x) => (float[] y)"
X = {"x": normal(1, 4, 8, 8)}
WEIGHTS = {
    "w": uneven(6, 4, 3, 3),
    "b": normal(6),
    "v": uneven(5, 6, 1, 1, axis=1, seed=1),
    "d": uneven(6, 1, 3, 3, seed=2),
    "e": uneven(12, 1, 3, 3, seed=3),
    "g": uneven(8, 3, 3, 3, seed=4),
    "u": normal(5, 12, 1, 1, seed=5),
    "six": np.array(6, np.float32),
    "zero": np.array(0, np.float32),
    "q": normal(6, 6, 1, 1),
}


def equalized(nodes, **more):
    model = prepared(f"{HEAD} {{ {nodes} }}", **WEIGHTS, **more)
    before = frozen(model)
    changed = changes(equalize, model)
    assert_same(before, model, X)
    return model, before, changed


def sizes(model, name, axis=0):
    """Largest magnitude of each channel of a convolution's weight."""
    weight = np.abs(constant(node(model, name).inputs[1]))
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).max(axis=1)


@pytest.mark.parametrize("between", ["", "r = Relu (a)"])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_pair(between, bias):
    read = "r" if between else "a"
    model, before, modified = equalized(
        f"[one] a = Conv (x, w{bias})  {between}  [two] y = Conv ({read}, v)"
    )
    assert modified
    assert frozen(model) != before
    expected = np.sqrt(
        np.abs(WEIGHTS["w"]).max(axis=(1, 2, 3)) * np.abs(WEIGHTS["v"]).max(axis=(0, 2, 3))
    )
    np.testing.assert_allclose(sizes(model, "one"), expected, rtol=1e-5)
    np.testing.assert_allclose(sizes(model, "two", axis=1), expected, rtol=1e-5)


def test_the_bias_is_divided_too():
    model, _, _ = equalized("[one] a = Conv (x, w, b)  r = Relu (a)  [two] y = Conv (r, v)")
    factor = sizes(model, "one") / np.abs(WEIGHTS["w"]).max(axis=(1, 2, 3))
    np.testing.assert_allclose(
        constant(node(model, "one").inputs[2]), WEIGHTS["b"] * factor, rtol=1e-5
    )


def test_a_chain_with_a_depthwise_convolution_evens_out():
    model, _, _ = equalized(
        """[one] a = Conv (x, w, b)  r = Relu (a)  [two] c = Conv <group=6, pads=[1,1,1,1]> (r, d)
          s = Relu (c)
           [three] y = Conv (s, v)"""
    )
    # Both weights of a pair are equally large in every channel, to which the rounds converge.
    np.testing.assert_allclose(sizes(model, "one"), sizes(model, "two"), rtol=1e-2)
    np.testing.assert_allclose(sizes(model, "two"), sizes(model, "three", axis=1), rtol=1e-2)


def test_a_depthwise_convolution_with_a_multiplier():
    model, _, _ = equalized(
        "[one] a = Conv (x, w)  [two] c = Conv <group=6> (a, e)  y = Conv (c, u)"
    )
    widest = sizes(model, "two").reshape(6, 2).max(axis=1)
    np.testing.assert_allclose(sizes(model, "one"), widest, rtol=1e-2)


def test_a_grouped_convolution_hands_on_but_does_not_take():
    first = "[one] a = Conv (x, w)  [two] c = Conv <group=2> (a, g)  [three] y = Conv (c, k)"
    model, _, _ = equalized(first, k=normal(3, 8, 1, 1))
    np.testing.assert_array_equal(sizes(model, "one"), np.abs(WEIGHTS["w"]).max(axis=(1, 2, 3)))
    np.testing.assert_allclose(sizes(model, "two"), sizes(model, "three", axis=1), rtol=1e-5)


LEFT_ALONE = {
    "a bounded Clip": "a = Conv (x, w)  r = Clip (a, zero, six)  y = Conv (r, v)",
    "two readers": "a = Conv (x, w)  c = Conv (a, q)  y = Add (c, a)",
    "another function": "a = Conv (x, w)  r = Sigmoid (a)  y = Conv (r, v)",
    "a pool": "a = Conv (x, w)  r = AveragePool <kernel_shape=[2,2]> (a)  y = Conv (r, v)",
    "a weight computed at run time": "t = Relu (k)  a = Conv (x, w)  y = Conv (a, t)",
}


@pytest.mark.parametrize("nodes", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_does_not_commute_is_left_alone(nodes):
    graph = HEAD.replace("x)", "x, float[5,6,1,1] k)") if "Relu (k)" in nodes else HEAD
    model = prepared(f"{graph} {{ {nodes} }}", **WEIGHTS)
    before = frozen(model)
    assert not changes(equalize, model)
    assert frozen(model) == before


def test_a_graph_output_between_is_left_alone():
    model = prepared(
        "g (float[1,4,8,8] x) => (float[] a, float[] y) { a = Conv (x, w)  y = Conv (a, v) }",
        **WEIGHTS,
    )
    before = frozen(model)
    equalize(model)
    assert frozen(model) == before


def test_a_bias_computed_at_run_time_is_respected():
    graph = HEAD.replace("x)", "x, float[6] k)")
    model = prepared(f"{graph} {{ t = Neg (k)  a = Conv (x, w, t)  y = Conv (a, v) }}", **WEIGHTS)
    before = frozen(model)
    equalize(model)
    assert_same(before, model, {**X, "k": normal(6)})


def test_channels_of_zeros_stay():
    dead, deaf = WEIGHTS["w"].copy(), WEIGHTS["v"].copy()
    dead[2], deaf[:, 4] = 0, 0
    model, _, _ = equalized("[one] a = Conv (x, w2, b)  [two] y = Conv (a, v2)", w2=dead, v2=deaf)
    assert np.isfinite(constant(node(model, "one").inputs[1])).all()
    np.testing.assert_array_equal(constant(node(model, "one").inputs[1])[4], dead[4])
    np.testing.assert_array_equal(constant(node(model, "two").inputs[1])[:, 2], deaf[:, 2])


def test_shared_weights_are_parted():
    model, _, _ = equalized(
        "[one] a = Conv (x, w, b)  r = Relu (a)  [two] c = Conv (r, q, b)  s = Relu (c)  "
        "[three] y = Conv (s, q)"
    )
    assert types(model) == ["Conv", "Relu", "Conv", "Relu", "Conv"]


def test_one_dimension():
    weights = {"w1": uneven(6, 4, 3), "v1": positive(3, 6, 3)}
    graph = "g (float[1,4,9] x) => (float[] y) { [one] a = Conv (x, w1)  [two] y = Conv (a, v1) }"
    model = prepared(graph, **weights)
    before = frozen(model)
    equalize(model)
    assert_same(before, model, {"x": normal(1, 4, 9)})
    np.testing.assert_allclose(sizes(model, "one"), sizes(model, "two", axis=1), rtol=1e-5)
