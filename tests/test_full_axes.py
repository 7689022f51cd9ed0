"""Pads and resizes of some axes, and pools with dilations, in the words of older opsets."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same, build, node, normal

from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import CPU
from converter.prepare import prepare

X = "g (float[1,3,6,8] x)"
CASES = {
    "pad": ("float[1,3,10,9] y", "y = Pad (x, pads, , axes)"),
    "scales": ("float[1,3,12,4] y", "y = Resize <axes = [2, 3]> (x, , scales)"),
    "sizes": ("float[1,3,12,4] y", "y = Resize <axes = [2, 3]> (x, , , sizes)"),
    "no dilations": (
        "float[1,3,5,7] y",
        "y = AveragePool <kernel_shape = [2, 2], dilations = [1, 1]> (x)",
    ),
}
CONSTANTS = {
    "pads": np.array([1, 0, 3, 1]),
    "axes": np.array([-2, 3]),
    "scales": np.array([2, 0.5], np.float32),
    "sizes": np.array([12, 4]),
}


@pytest.mark.parametrize("case", CASES)
def test_all_axes_are_named(case: str) -> None:
    output, text = CASES[case]
    constants = {name: array for name, array in CONSTANTS.items() if name in text}
    graph = f"{X} => ({output}) {{ [n] {text} }}"
    model = prepared_at(graph, 19, constants)
    assert "axes" not in node(model, "n").attributes
    assert "dilations" not in node(model, "n").attributes
    assert len(node(model, "n").inputs) <= 4
    assert_same(build(graph, 19, 9, **constants), model, {"x": normal(1, 3, 6, 8)})


def prepared_at(graph: str, opset: int, constants: dict[str, np.ndarray]) -> ir.Model:
    return prepare(build(graph, opset, 9, **constants))


def test_what_cannot_be_said_otherwise_stays() -> None:
    text = 'y = Resize <axes = [2, 3], keep_aspect_ratio_policy = "not_larger"> (x, , , sizes)'
    graph = f"{X} => (float[1,3,H,W] y) {{ [n] {text} }}"
    model = prepared_at(graph, 19, {"sizes": CONSTANTS["sizes"]})
    assert list(node(model, "n").attributes.get_ints("axes")) == [2, 3]
    assert_same(build(graph, 19, 9, sizes=CONSTANTS["sizes"]), model, {"x": normal(1, 3, 6, 8)})


def test_a_dilated_pool_and_its_readers_stay_float() -> None:
    graph = f"""{X} => (float[1,4,4,6] y) {{ [one] a = Conv (x, w)
        [pool] p = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (a)
        [two] y = Conv (p, v) }}"""
    constants = {"w": normal(4, 3, 1, 1), "v": normal(4, 4, 1, 1)}
    plan = build_plan(prepared_at(graph, 19, constants).graph, CPU, Wishes())
    assert [unit.name for unit in plan.units()] == ["one"]
    assert plan.nodes["pool"].reason == "no integer kernel knows its dilations"
    assert plan.nodes["two"].reason == "it reads the dilated pool"
