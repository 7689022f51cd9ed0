"""Graphs that take and return integers: the codes of the floats, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from emitted import HEAD, IMAGE, quantized
from graphs import run, types

from converter.emit.integer_edges import feed_integers, hand_out_integers


def codes_of(x, q):
    return np.clip(np.rint(x.astype(np.float64) / q.scale) + q.zero_point, 0, 255).astype(np.uint8)


def test_integers_in_and_out_are_the_codes_of_the_floats():
    _, plan, after = quantized(f"{HEAD} {{ a = Conv (x, w, b)  y = Relu (a) }}", IMAGE)
    expected = run(after, IMAGE)["y"]
    feed_integers(after.graph, "x")
    hand_out_integers(after.graph, "y")
    assert [(v.name, v.dtype) for v in (*after.graph.inputs, *after.graph.outputs)] == [
        ("x", ir.DataType.UINT8),
        ("y", ir.DataType.UINT8),
    ]
    for optimize in (False, True):
        found = run(after, {"x": codes_of(IMAGE["x"], plan.params("x"))}, optimize)["y"]
        assert np.abs(found.astype(int) - codes_of(expected, plan.params("y"))).max() <= (
            1 if optimize else 0
        )
    onnx.checker.check_model(ir.to_proto(after), full_check=True)


def test_float_readers_of_an_integer_input_read_what_its_codes_mean():
    graph = (
        "g (float[1,4,8,8] x) => (float[] y, float[] z) { y = Conv (x, w)  [float] z = Neg (x) }"
    )
    _, plan, after = quantized(graph, IMAGE)
    feed_integers(after.graph, "x")
    q = plan.params("x")
    codes = codes_of(IMAGE["x"], q)
    found = run(after, {"x": codes})
    np.testing.assert_allclose(found["z"], -(codes - np.float64(q.zero_point)) * q.scale, rtol=1e-6)


def test_an_integer_output_that_is_read_on():
    graph = "g (float[1,4,8,8] x) => (float[] a, float[] y) { a = Conv (x, w)  y = Conv (a, v) }"
    _, plan, after = quantized(graph, IMAGE)
    before = run(after, IMAGE)
    hand_out_integers(after.graph, "a")
    found = run(after, IMAGE)
    np.testing.assert_array_equal(found["a"], codes_of(before["a"], plan.params("a")))
    np.testing.assert_array_equal(found["y"], before["y"])


def test_integers_fed_to_an_operator_that_runs_bare():
    graph = (
        "g (float[1,4,8,8] x) => (float[] y, float[] z) { p = Pad (x, edges)  y = Conv (p, w)  "
        "[float] z = Neg (x) }"
    )
    _, plan, after = quantized(graph, IMAGE)
    expected = run(after, IMAGE)["y"]
    feed_integers(after.graph, "x")
    q = plan.params("x")
    codes = codes_of(IMAGE["x"], q)
    found = run(after, {"x": codes})
    np.testing.assert_array_equal(found["y"], expected)
    np.testing.assert_allclose(found["z"], -(codes - np.float64(q.zero_point)) * q.scale, rtol=1e-6)


def test_integers_fed_to_nothing_but_an_operator_that_runs_bare():
    _, plan, after = quantized(f"{HEAD} {{ p = Pad (x, edges)  y = Conv (p, w) }}", IMAGE)
    expected = run(after, IMAGE)["y"]
    feed_integers(after.graph, "x")
    assert types(after)[-5:] == [
        "Pad",
        *("DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear"),
    ]
    np.testing.assert_array_equal(
        run(after, {"x": codes_of(IMAGE["x"], plan.params("x"))})["y"], expected
    )
