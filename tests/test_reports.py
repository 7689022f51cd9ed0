"""The debug reports, held against figures computed here from the tensors that ONNX Runtime
gives.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from calibrated import IMAGES, decided
from graphs import build, frozen, normal, positive, run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from running import Ear, InMemory, job, resources, write_config

from calib.affine import Array
from converter.calibrate.exact import saturating
from converter.calibrate.runs import opened
from converter.config import load_config
from converter.emit.qdq import emit
from converter.errors import ConfigError
from converter.graph.files import load, saved
from converter.job import Job
from converter.measure.both import Both, paired
from converter.measure.errors import errors_between
from converter.measure.pairing import pair
from converter.measure.results import Findings, Verification
from converter.measure.sensitivity import alone, only
from converter.pipeline.convert import convert
from converter.plan.plan import QuantPlan
from converter.plan.result import Quantized
from converter.report.collect import findings
from converter.report.rounds import rounds, summary
from converter.version import __version__

GRAPH = """g (float[1,4,8,8] x) => (float[1,6] y, float[1,6,8,8] z) {
    ["one, two"] a = Conv <pads = [1,1,1,1]> (x, w, b)
    [relu] r = Relu (a)
    [conv] c = Conv <pads = [1,1,1,1]> (r, v)
    [add] z = Add (c, r)
    [mean] m = GlobalAveragePool (z)
    [flat] f = Flatten (m)
    [gemm] y = Gemm (f, k)
}"""
WEIGHTS = {"w": normal(6, 4, 3, 3), "b": normal(6), "v": normal(6, 6, 3, 3), "k": normal(6, 6)}
DATA = np.stack([normal(1, 4, 8, 8, seed=seed) for seed in range(5)])[:, 0]
ROUND = [
    *("NodeName", "NodeType", "TensorName", "InOutFlag", "DataTypeFlag", "TensorTypeFlag"),
    *("Min", "Q1", "Median", "Q3", "MAX", "Mean", "Var", "Sparsity", "Clip", "CosineSimilarity"),
]


def both(result: Quantized, memory: int = 64 << 20) -> Both:
    return Both(result, paired(result, inside=True), resources(memory=memory), Ear())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def model(graph: str = GRAPH, **weights: Array) -> ir.Model:
    return build(graph, **(weights or WEIGHTS))


def converted(folder: Path, mode: str, **common: object) -> tuple[Job, Path]:
    """A conversion of `model` with reports, calibrated on three of five samples where there is
    data.
    """
    reports = folder / "reports"
    task = job(
        folder,
        model(),
        {"x": DATA},
        {"debug_info_save_path": reports, "quant_type": mode, **common},
    )
    text = task.config.path.read_text().replace("calibrate_size = 5", "calibrate_size = 3")
    task.config.path.write_text(text)
    task = replace(task, config=load_config(task.config.path))
    convert(task)
    return task, reports


def tensors(model: ir.Model, names: list[str], sample: Array) -> dict[str, Array]:
    """The named tensors as ONNX Runtime computes them without optimizations."""
    with saved(model, names) as path:
        return run(path.read_bytes(), {"x": sample})


def expected(x: Array, y: Array) -> dict[str, float]:
    """The columns of a Dequant row, from sorted values and plain sums."""
    values, a, b = (
        sorted(y.ravel().tolist()),
        x.ravel().astype(np.float64),
        y.ravel().astype(np.float64),
    )
    n, mean = len(values), math.fsum(values) / len(values)
    return {
        **{
            name: values[k]
            for name, k in zip(ROUND[6:11], (0, n // 4, n // 2, 3 * n // 4, n - 1), strict=True)
        },
        "Mean": mean,
        "Var": math.fsum((value - mean) ** 2 for value in values) / n,
        "Sparsity": sum(value == 0 for value in values) / n,
        "Clip": sum(not values[0] <= value <= values[-1] for value in a.tolist()) / n,
        "CosineSimilarity": float(a @ b / (math.sqrt((a @ a) * (b @ b)) or 1)),
    }


def assert_row(row: dict[str, str], wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-6, abs=1e-9), (row, name)


MODES = {
    "FULL_QUANT": {"r": "r_dequantized", "z": "z", "y": "y", "x": "x_dequantized"},
    "WEIGHT_QUANT": {"r": "r", "z": "z", "y": "y", "x": "x"},
    "DYNAMIC_QUANT": {"r": "r", "z": "z", "y": "y", "x": "x"},
}


@pytest.mark.parametrize("mode", MODES)
def test_figures_are_those_of_the_tensors(tmp_path, mode):
    task, reports = converted(tmp_path, mode)
    before, after = load(task.model), load(task.output)
    assert [path.name for path in sorted(reports.glob("round_*"))] == [
        "round_0.csv",
        "round_1.csv",
        "round_2.csv",
    ]
    for index in range(3):
        rows = table(reports / f"round_{index}.csv")
        assert list(rows[0]) == ROUND
        left = tensors(before, ["a", "r", "c", "z", "m", "f", "y"], DATA[index : index + 1])
        left["x"] = DATA[index : index + 1]
        right = tensors(
            after, [name for name in MODES[mode].values() if name != "x"], DATA[index : index + 1]
        )
        right["x"] = left["x"]
        for name, other in MODES[mode].items():
            found = [row for row in rows if row["TensorName"] == name]
            assert {row["InOutFlag"] for row in found} >= {"Input"} if name == "x" else {"Output"}
            for origin, dequant in zip(found[::2], found[1::2], strict=True):
                assert (origin["DataTypeFlag"], dequant["DataTypeFlag"]) == ("Origin", "Dequant")
                assert_row(
                    origin, {**expected(left[name], left[name]), "Clip": 0, "CosineSimilarity": 1}
                )
                assert_row(dequant, expected(left[name], right[other]))
    summary_rows = table(reports / "output_summary.csv")
    assert [(row["Round"], row["TensorName"]) for row in summary_rows] == [
        (str(i), n) for i in range(3) for n in "zy"
    ]
    assert float(summary_rows[-1]["CosineSimilarity"]) == float(rows[-1]["CosineSimilarity"])


@pytest.mark.parametrize("mode", MODES)
def test_every_place_of_every_node_has_its_rows(tmp_path, mode):
    task, reports = converted(tmp_path, mode)
    rows = table(reports / "round_0.csv")
    places = [
        (row["NodeName"], row["NodeType"], row["TensorName"], row["InOutFlag"]) for row in rows
    ]
    wanted = [
        (node.name, node.op_type, value.name, flag)
        for node in load(task.model).graph
        for flag, values in (("Input", node.inputs), ("Output", node.outputs))
        for value in values
    ]
    assert places[::2] == places[1::2] == wanted
    weights = {row["TensorName"] for row in rows if row["TensorTypeFlag"] == "Weight"}
    assert weights == set(WEIGHTS)


def test_weights_and_their_parameters(tmp_path):
    task, reports = converted(tmp_path, "FULL_QUANT")
    rows = [row for row in table(reports / "quant_param.csv") if row["TensorName"] == "w"]
    codes = next(i for i in onnx.load(task.output).graph.initializer if i.name == "w_quantized")
    restored = (
        onnx.numpy_helper.to_array(codes)
        * np.array([float(row["Scale"]) for row in rows])[:, None, None, None]
    )
    assert [
        (r["NodeName"], r["ElementsNum"], r["Dims"], r["ZeroPoint"], r["Bits"]) for r in rows
    ] == [("one, two", "216", "6 4 3 3", "0", "8")] * 6
    assert {(row["CorrectionVar"], row["CorrectionMean"]) for row in rows} == {("1", "0")}
    (row,) = (
        row
        for row in table(reports / "round_0.csv")
        if row["TensorName"] == "w" and row["DataTypeFlag"] == "Dequant"
    )
    assert_row(row, expected(WEIGHTS["w"], restored.astype(np.float32)))
    assert not [row for row in table(reports / "quant_param.csv") if row["TensorName"] == "b"]


@pytest.mark.parametrize("bits", [3, 8])
def test_stored_weights_have_their_bits(tmp_path, bits):
    common = {
        "quant_type": "WEIGHT_QUANT",
        "bit_num": bits,
        "debug_info_save_path": (reports := tmp_path / "reports"),
    }
    large = build("g (float[1,64] x) => (float[] y) { [gemm] y = Gemm (x, k) }", k=normal(64, 96))
    convert(job(tmp_path, large, {"x": normal(3, 64)}, common))
    rows = table(reports / "quant_param.csv")
    assert len(rows) == 96
    assert {row["Bits"] for row in rows} == {str(bits)}
    similar = [
        row for row in table(reports / "round_0.csv") if row["TensorName"] == rows[0]["TensorName"]
    ]
    assert 0.9 < float(similar[1]["CosineSimilarity"]) < 1


def test_without_data_there_is_one_round(tmp_path):
    reports = tmp_path / "a" / "reports"
    (tmp_path / "model.onnx").write_bytes(frozen(model()))
    common = {
        "quant_type": "WEIGHT_QUANT",
        "min_quant_weight_channel": 0,
        "debug_info_save_path": reports,
    }
    config = write_config(tmp_path / "c.cfg", common_quant=common)
    convert(Job(tmp_path / "model.onnx", tmp_path / "q.onnx", load_config(config)))
    assert {path.name for path in reports.iterdir()} == {
        *(
            "round_0.csv",
            "output_summary.csv",
            "quant_param.csv",
            "sensitivity.csv",
            "time.csv",
            "summary.json",
            "report.html",
        )
    }


def test_an_earlier_run_is_replaced_and_other_files_stay(tmp_path):
    reports = tmp_path / "reports"
    reports.mkdir()
    for name in ("round_0.csv", "round_17.csv", "round_x.csv", "notes.txt"):
        (reports / name).write_text("old")
    converted(tmp_path, "FULL_QUANT")
    assert {path.name for path in reports.glob("round_*")} == {
        f"round_{i}.csv" for i in (0, 1, 2, "x")
    }
    assert (reports / "round_0.csv").read_text() != "old" == (reports / "notes.txt").read_text()
    assert not list(tmp_path.glob(".reports*"))


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_file_in_the_way(tmp_path, below):
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(
        ConfigError, match=r"debug_info_save_path: .*reports is a file; give the path of a folder\."
    ):
        converted(tmp_path, "FULL_QUANT", debug_info_save_path=tmp_path / "reports" / below)


def test_memory_does_not_change_the_figures(tmp_path):
    converted(tmp_path, "FULL_QUANT")
    wanted = (tmp_path / "reports" / "round_2.csv").read_text()
    task = Job(
        tmp_path / "model.onnx", tmp_path / "quantized.onnx", load_config(tmp_path / "c.cfg")
    )
    before, after = load(task.model), load(task.output)
    data = InMemory([{"x": DATA[i : i + 1]} for i in range(3)])
    result = Quantized(before, after, QuantPlan({}, {}), data)
    whole, parts = (list(rounds(both(result, memory), data, 3))[2] for memory in (1 << 30, 1))
    assert whole == parts
    assert f"{whole.figures['r', 'r_dequantized'].cosine:.9g}" in wanted


@given(arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32)))
def test_summaries(x):
    assert summary(x) == pytest.approx(tuple(expected(x, x).values())[:8], rel=1e-9, abs=1e-9)


# --- what to do next


def test_the_cheap_ranking_is_the_thorough_one():
    graph = """g (float[1,4,7,7] x) => (float[] y) {
        [one] a = Conv (x, w1)  r = Relu (a)  [two] p = Conv (r, w2)  [three] q = Conv (p, w3)
          [four] s = Conv (q, w4)
        [five] y = Conv (s, w5)
    }"""
    powers = {"w1": 4, "w2": 0.3, "w3": 30, "w4": 1, "w5": 1}
    spread = {
        n: normal(4, 4, 1, 1, seed=i) * positive(1, 4, 1, 1) ** k
        for i, (n, k) in enumerate(powers.items())
    }
    float_model, plan = decided(graph, IMAGES, **spread)
    thorough = {}
    for unit in plan.units():
        by_itself = float_model.clone()
        emit(by_itself, only(plan, unit))
        (error,) = errors_between(opened(float_model), opened(by_itself), InMemory(IMAGES), 1)
        thorough[unit.name] = error.sqnr_db
    quantized = float_model.clone()
    emit(quantized, plan)
    pairing = pair(float_model, quantized, plan)
    floats = opened(float_model, pairing.tensors)
    cheap = alone(pairing, floats, InMemory(IMAGES), count=len(IMAGES), threads=1)
    assert thorough.keys() == cheap.keys()
    for name, sqnr in thorough.items():
        assert cheap[name].output.sqnr_db == pytest.approx(sqnr, abs=0.01)
    assert sorted(cheap, key=lambda name: cheap[name].output.sqnr_db) == sorted(
        thorough, key=lambda name: thorough[name]
    )


class Reader(CalibrationDataReader):
    def __init__(self, data: Array) -> None:
        self.rows = iter(data)

    def get_next(self) -> dict[str, Array] | None:
        row = next(self.rows, None)
        return None if row is None else {"x": row[None]}


@pytest.fixture(params=["QDQ", "QOperator"])
def foreign(request, tmp_path):
    """The model and what another tool makes of it, with unsigned activations and signed weights."""
    (tmp_path / "float.onnx").write_bytes(frozen(model()))
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "other.onnx",
        Reader(DATA),
        quant_format=getattr(QuantFormat, request.param),
        activation_type=QuantType.QUInt8,
    )
    return load(tmp_path / "float.onnx"), load(tmp_path / "other.onnx")


def test_models_of_other_tools_are_paired(foreign):
    before, after = foreign
    places = [p for p in pair(before, after, QuantPlan({}, {})).places if p.name not in {"b", "f"}]
    # Integer operators take the Relu in: what lies between exists in the float model alone.
    missing = {
        place.name for place in places if place.restored is None and place.counterpart is None
    }
    assert missing <= {"a", "c"}
    data = InMemory([{"x": DATA[:1]}])
    (only_round,) = rounds(both(Quantized(before, after, QuantPlan({}, {}), data)), data, 1)
    figures = only_round.figures.items()
    similar = {key[0]: found.cosine for key, found in figures if found.dequant is not None}
    assert {"x", "r", "z", "y"} <= similar.keys()
    assert 0.99 < min(similar.values()) <= max(similar.values()) < 1
    weight = next(place for place in places if place.name == "v")
    assert weight.restored is not None
    assert weight.qparams is not None
    np.testing.assert_allclose(
        weight.restored, WEIGHTS["v"], atol=float(weight.qparams.scale.max()) / 2 * 1.001
    )


def test_a_report_names_saturation_and_its_nodes(foreign):
    before, after = foreign
    result = Quantized(before, after, QuantPlan({}, {}), InMemory([{"x": DATA[:1]}]))
    verified = Verification(**NOTHING, saturated=tuple(saturating(after)))
    found = findings(both(result), Findings({}, (1, 1), verified))
    assert any(line.startswith("Saturation: the weights of one, two") for line in found.advice)
    assert {node.name for node in found.nodes if "saturate" in node.advice} == {
        "one, two",
        "conv",
        "gemm",
    }


NOTHING = {
    "samples": 1,
    "held_back": True,
    "outputs": (),
    "fused_difference": 0.0,
    "speed": None,
    "top1": None,
    "agreement": None,
    "kernels": {},
    "conversions": (),
}
MERGE = """g (float[1,4,8,8] x) => (float[] y) {
    [p] p = Mul (x, small)  [q] q = Conv (x, v)  [tail] y = Concat <axis = 1> (p, q)
}"""


@pytest.mark.parametrize(("small", "named"), [(0.05, True), (0.8, False)])
def test_a_report_names_mixed_ranges(tmp_path, small, named):
    before = build(MERGE, small=np.float32(small), v=np.eye(4, dtype=np.float32)[..., None, None])
    (tmp_path / "float.onnx").write_bytes(frozen(before))
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "other.onnx", Reader(DATA), quant_format=QuantFormat.QDQ
    )
    result = Quantized(
        before, load(tmp_path / "other.onnx"), QuantPlan({}, {}), InMemory([{"x": DATA[:1]}])
    )
    found = findings(both(result), Findings({}, (1, 1), None))
    advice = {node.name: node.advice for node in found.nodes}
    assert ("mixed ranges" in advice["tail"]) == named
    assert (
        any(line.startswith("Mixed ranges: the inputs of tail ") for line in found.advice) == named
    )
    if named:
        assert f"{1 / small:.0f}" in advice["tail"]


def test_a_report_names_what_is_cut_off():
    graph = (
        "g (float[5,8] x) => (float[] y) { [first] h = Gemm (x, m)  [second] y = Gemm (h, last) }"
    )
    samples = [{"x": normal(5, 8, seed=seed)} for seed in range(4)]
    float_model, plan = decided(graph, samples, last=normal(6, 3))
    h = plan.tensors["h"].group
    narrow = replace(plan.qparams[h], scale=plan.qparams[h].scale / 4)
    quantized = float_model.clone()
    emit(quantized, plan.with_qparams({h: narrow}))
    result = Quantized(float_model, quantized, plan, InMemory(samples))
    found = findings(both(result), Findings({}, (1, 1), None))
    advice = {node.name: node.advice for node in found.nodes}
    assert "of h is cut off" in advice["first"]
    assert any(line.startswith("Much is cut off at first") for line in found.advice)
    tensor = next(tensor for tensor in found.tensors if tensor.name == "h")
    x = np.concatenate([tensors(float_model, ["h"], s["x"])["h"].ravel() for s in samples])
    low, high = (float(narrow.scale) * (code - int(narrow.zero_point)) for code in (0, 255))
    assert tensor.range == pytest.approx((low, high))
    assert tensor.clipped == pytest.approx(np.mean((x < low) | (x > high)), abs=0.02)
    assert tensor.counts.sum() == x.size


def test_the_summary_is_for_programs(tmp_path):
    task, reports = converted(tmp_path, "FULL_QUANT")
    found = json.loads((reports / "summary.json").read_text())
    assert found["bytes"] == {
        "before": task.model.stat().st_size,
        "after": task.output.stat().st_size,
    }
    assert found["verification"]["samples"] == 2
    assert found["verification"]["held_back"] is True
    assert {node["name"] for node in found["worst_nodes"]} <= {
        node.name for node in load(task.model).graph
    }
    assert str(tmp_path) not in (reports / "summary.json").read_text()


def test_sensitivities_are_sorted_and_add_up(tmp_path):
    _, reports = converted(tmp_path, "FULL_QUANT")
    rows = table(reports / "sensitivity.csv")
    shares = [float(row["Share"]) for row in rows if row["Share"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert {row["Bits"] for row in rows} == {"8"}


# --- where a model comes from


def test_a_model_tells_where_it_comes_from(tmp_path):
    task, _ = converted(tmp_path, "FULL_QUANT")
    told = load(task.output).metadata_props
    assert told["qconvert.version"] == __version__
    assert told["qconvert.mode"] == "FULL_QUANT"
    assert told["qconvert.model_sha256"] == sha256(task.model.read_bytes()).hexdigest()
    data = sha256((tmp_path / "x.npy").read_bytes()).hexdigest()
    assert told["qconvert.calibration_sha256"] == sha256(f"{data}\n".encode()).hexdigest()
    assert not any(str(tmp_path) in value for value in told.values())


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [("thread_num", 2, True), ("calibration_memory", 64, True), ("skip_quant_node", "conv", False)],
)
def test_the_fingerprint_of_the_settings(tmp_path, key, value, same):
    found = []
    for common in ({}, {key: value}):
        task, _ = converted(tmp_path, "FULL_QUANT", **common)
        found.append(load(task.output).metadata_props["qconvert.config_sha256"])
    assert (found[0] == found[1]) == same
