"""Random models through every mode: valid, computing exactly what the plan says, as exact as the
plan predicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from examination import examine
from generator import random_model
from graphs import build, normal, run
from running import Watch, job
from simulation import noise_to_signal

from converter.pipeline import convert as pipeline
from converter.plan.placement import Wishes, build_plan
from converter.plan.targets import CPU, DSP
from converter.prepare import prepare

FULL, WEIGHT, DYNAMIC = "FULL_QUANT", "WEIGHT_QUANT", "DYNAMIC_QUANT"
WIDE = {"min_quant_weight_channel": 0}
CASES: list[tuple[str, range, dict[str, Any]]] = [
    (FULL, range(36), {}),
    (FULL, range(100, 108), {"full_quant": {"target_device": "OPENVINO"}}),
    (FULL, range(110, 114), {"full_quant": {"target_device": "NVGPU"}}),
    (FULL, range(140, 146), {"full_quant": {"target_device": "QNN"}}),
    (FULL, range(150, 156), {"full_quant": {"target_device": "QNN", "activation_bits": 16}}),
    (FULL, range(160, 168), {"full_quant": {"target_device": "QNN", "activation_bits": "MIXED"}}),
    (FULL, range(170, 174), {"full_quant": {"activation_bits": "MIXED"}}),
    (FULL, range(120, 126), {"full_quant": {"per_channel": "false"}}),
    (
        FULL,
        range(130, 134),
        {"full_quant": {"weight_rounding": "NEAREST", "bias_correction": "false"}},
    ),
    (WEIGHT, range(200, 208), {"common_quant": WIDE}),
    (WEIGHT, range(210, 216), {"common_quant": {**WIDE, "bit_num": 3}, "with_data": True}),
    (
        WEIGHT,
        range(220, 224),
        {"common_quant": {**WIDE, "bit_num": 16}, "weight_quant": {"per_channel": "false"}},
    ),
    (WEIGHT, range(230, 234), {"common_quant": {**WIDE, "bit_num": 0}}),
    (DYNAMIC, range(300, 312), {}),
    (DYNAMIC, range(320, 326), {"dynamic_quant": {"quant_strategy": "ACWL"}}),
]
EACH = [(mode, seed, settings) for mode, seeds, settings in CASES for seed in seeds]


@pytest.mark.parametrize(
    ("mode", "seed", "settings"), EACH, ids=lambda x: str(x) if isinstance(x, int) else ""
)
def test_random_models_compute_what_their_plan_says(
    tmp_path: Path, mode: str, seed: int, settings: dict[str, Any]
) -> None:
    found = examine(tmp_path, seed, mode, **settings)
    assert found.fault is None
    onnx.checker.check_model(tmp_path / "q.onnx", full_check=True)


def test_most_random_models_have_something_to_quantize() -> None:
    graphs = [prepare(ir.from_proto(random_model(seed)[0])).graph for seed in range(20)]
    assert sum(bool(build_plan(graph, CPU, Wishes()).units()) for graph in graphs) >= 14


def test_equal_seeds_make_equal_models() -> None:
    assert random_model(7)[0].SerializeToString() == random_model(7)[0].SerializeToString()
    assert random_model(7)[0].SerializeToString() != random_model(8)[0].SerializeToString()


def test_noise_is_measured_against_the_signal() -> None:
    runs = [{"y": np.array([3.0, 4.0])}, {"y": np.array([0.0, 0.0])}]
    assert noise_to_signal(runs, runs) == 0
    assert noise_to_signal(
        runs, [{"y": np.array([3.0, 4.0])}, {"y": np.array([0.0, 0.5])}]
    ) == pytest.approx(0.1)


# --- what random models found


def test_a_product_without_bias_beside_one_with_a_bias(tmp_path: Path) -> None:
    """Both watch the mean of the same tensor; only one has a place for a correction."""
    _assert_converts(
        tmp_path,
        "g (float[3,8] x) => (float[3,5] y, float[3,5] z) { h = MatMul(x, v) y = Gemm(h, w, "
        "b) z = MatMul(h, u) }",
        v=normal(8, 8) / 3,
        w=normal(8, 5) / 3,
        b=normal(5),
        u=normal(8, 5, seed=1) / 3,
    )


def test_a_side_branch_that_nothing_reads_on_from(tmp_path: Path) -> None:
    """A product with a constant on its left, between the input and an operator with weights."""
    _assert_converts(
        tmp_path,
        "g (float[1,26] x, float[2,8] z) => (float[12,26] y, float[2,5] p) "
        "{ y = MatMul(w, x) t = Tanh(z) p = MatMul(t, v) }",
        w=normal(12, 1),
        v=normal(8, 5),
    )


def test_a_softmax_between_integers_reaches_one(tmp_path: Path) -> None:
    """ONNX Runtime's integer Softmax wraps around beyond the range, so that it must cover 0 to
    1.
    """
    _assert_converts(
        tmp_path,
        "g (float[1,4,6,12] x) => (float[1,4,6,12] y) { a = Conv(x, v) s = Softmax <axis = "
        "-1> (a) y = Conv(s, w) }",
        v=normal(4, 4, 1, 1) / 50,
        w=normal(4, 4, 1, 1, seed=1),
    )


def test_what_bodies_read_on_behind_moves_stays_float(tmp_path: Path) -> None:
    """ONNX Runtime crashes where it takes conversions along a Slice that the body of an If
    reads.
    """
    branches = (
        "then_branch = t () => (float[1,4] a) { a = Tanh(s) }, else_branch = e () => (float[1,4] "
        "b) { b = Exp(s) }"
    )
    model = build(
        "g (float[3,4] x, bool k) => (float[1,4] y, float[3,4] z) { [p] h = MatMul(x, w) "
        f"[c] c = Concat <axis = 0> (h, h) [s] s = Slice(c, zero, one, zero) "
        f"y = If (k) <{branches}> [m] z = MatMul(h, w) }}",
        w=normal(4, 4),
        zero=np.array([0]),
        one=np.array([1]),
    )
    plan = build_plan(prepare(model).graph, DSP, Wishes())
    assert {name for name in "pcsm" if not plan.nodes[name].quantized} == {"c", "s"}
    assert "reads it on" in plan.nodes["c"].reason


def _assert_converts(folder: Path, graph: str, **constants: np.ndarray) -> None:
    model = build(graph, **constants)
    shapes = {value.name or "": value.shape.numpy() for value in model.graph.inputs if value.shape}
    data = {name: normal(4 * shape[0], *shape[1:]) for name, shape in shapes.items()}
    pipeline.convert(job(folder, model, data), Watch())
    sample = {name: array[: shapes[name][0]] for name, array in data.items()}
    wanted = run(model, sample)
    for optimize in (False, True):
        found = run((folder / "quantized.onnx").read_bytes(), sample, optimize)
        assert noise_to_signal([wanted], [found]) < 0.05
