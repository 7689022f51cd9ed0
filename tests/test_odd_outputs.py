"""Outputs that cannot be compared value by value: what can be compared is, the rest is counted, in
every mode, search and report.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import Command
from graphs import build, frozen, normal
from running import write_config

from calib.affine import Array
from converter import convert
from converter.weights import layers
from converter.weights.grids import Rows
from converter.weights.stored import Inputs

CONV = "[conv] a = Conv (x, w)  [second] b = Conv (a, v)"
WEIGHTS = {"w": normal(32, 3, 1, 1), "v": normal(32, 32, 1, 1, seed=1)}
# Every graph reads x (float[1,3,4,4]) and computes b (float[1,32,4,4]).
GRAPHS = {
    "as many columns as are positive": (
        "float[4,N] y",
        "r = Relu (b)  n = NonZero (r)  y = Cast <to = 1> (n)",
    ),
    "rows picked, then multiplied": (
        "float[N,48] y",
        "t = Transpose <perm = [0, 2, 3, 1]> (b)  rows = Reshape (t, flat)"
        "  s = ReduceSum <keepdims = 0> (rows, axis)  c = Greater (s, zero)"
        "  q = Compress <axis = 0> (rows, c)  [product] y = MatMul (q, u)",
    ),
    "texts": ("string[1,32,4,4] y", "s = Greater (b, zero)  y = Cast <to = 8> (s)"),
    "a sequence": ("seq(float[1,32,4,4]) y", "y = SequenceConstruct (b, b)"),
    "an optional": ("optional(float[1,32,4,4]) y", "y = Optional (b)"),
    "minus infinity": ("float[1,32,4,4] y", "m = Greater (x1, zero)  y = Where (m, b, low)"),
    "logarithms": ("float[1,32,4,4] y", "r = Relu (b)  y = Log (r)"),
    "roots of negative numbers": ("float[1,32,4,4] y", "y = Sqrt (b)"),
    "a sequence of a branch": (
        "float[1,32,4,4] y",
        "s = ReduceSum <keepdims = 0> (b)  c = Greater (s, zero)"
        "  q = If (c) <then_branch = t () => (seq(float[N,32,4,4]) o) { o = SequenceConstruct (b) },"
        "  else_branch = e () => (seq(float[N,32,4,4]) p) { p = SequenceConstruct (b, b) }>"
        "  i = Identity (q)  z = SequenceAt (i, first)  [third] y = Conv (z, v)",
    ),
    "a type that NumPy lacks": (
        "bfloat16[1,32,4,4] y, float[1,32,4,4] b",
        "y = Cast <to = 16> (b)",
    ),
    "nothing but a constant": ("float[4] y, float[1,32,4,4] b", "y = Neg (k)"),
    "a map": ("", ""),
}
CONSTANTS = {
    "zero": np.float32(0),
    "low": np.float32(-np.inf),
    "k": np.arange(4, dtype=np.float32),
    "u": normal(32, 48),
    "flat": np.array([-1, 32]),
    "at0": np.array([0]),
    "at1": np.array([1]),
    "axis": np.array([1]),
    "first": np.int64(0),
}
NEWER = {"an optional": 18}
MODES = {
    "FULL_QUANT": {},
    "DYNAMIC_QUANT": {},
    "WEIGHT_QUANT": {"bit_num": 4, "min_quant_weight_channel": 0},
}
DATA = {"calibrate_path": "x:data", "calibrate_size": 6, "input_type": "NPY"}


@pytest.fixture
def qconvert(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for i in range(8):
        np.save(tmp_path / "data" / f"{i}.npy", normal(1, 3, 4, 4, seed=i))
    return Command(capsys)


def write_model(case: str) -> Path:
    path = Path("m.onnx")
    if case == "a map":
        onnx.save(classifier(), path)
        return path
    outputs, tail = GRAPHS[case]
    head = "x1 = Slice (x, at0, at1, axis)  " if "x1" in tail else ""
    graph = f"g (float[1,3,4,4] x) => ({outputs}) {{ {CONV} {head}{tail} }}"
    read = {name: array for name, array in CONSTANTS.items() if re.search(rf"\b{name}\b", graph)}
    path.write_bytes(frozen(build(graph, NEWER.get(case, 13), **WEIGHTS, **read)))
    return path


def classifier() -> onnx.ModelProto:
    """A label and a map of probabilities, as scikit-learn's classifiers are exported."""
    helper, kinds = onnx.helper, onnx.TensorProto
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(kinds.INT64, helper.make_tensor_type_proto(kinds.FLOAT, []))
    )
    graph = f"""g (float[1,3,4,4] x) => (int64[1] label, float[1,32] p) {{ {CONV}
        c = GlobalAveragePool (b)  f = Flatten (c)  p = Softmax <axis = 1> (f)
        label = ArgMax <axis = 1, keepdims = 0> (p) }}"""
    model = onnx.load_from_string(frozen(build(graph, 17, **WEIGHTS)))
    node = helper.make_node(
        "ZipMap", ["p"], ["y"], name="zip", domain="ai.onnx.ml", classlabels_int64s=range(32)
    )
    model.graph.node.append(node)
    model.graph.output.pop()
    model.graph.output.append(onnx.ValueInfoProto(name="y", type=maps))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    return model


def configured(mode: str, data: bool = True, **sections: Mapping[str, object]) -> Path:
    common = {"quant_type": mode, **MODES[mode], **sections.pop("common_quant", {})}
    given = {"data_preprocess": DATA} if data else {}
    return write_config(Path("c.cfg"), common_quant=common, **{**given, **sections})


def table(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("mode", "data"),
    [(mode, data) for mode in MODES for data in (True, False) if data or mode != "FULL_QUANT"],
)
@pytest.mark.parametrize("case", GRAPHS)
def test_every_kind_of_output(qconvert: Command, case: str, mode: str, data: bool) -> None:
    config = configured(mode, data, common_quant={"debug_info_save_path": "reports"})
    result = qconvert.convert(config, Path("q.onnx"), write_model(case))
    assert result.code == 0, result.err
    assert "not verified" not in result.err
    assert "Error" not in result.err
    assert "nan" not in result.out
    onnxruntime.InferenceSession("q.onnx", providers=["CPUExecutionProvider"])
    outputs = [value.name for value in onnx.load("m.onnx").graph.output]
    rounds = 6 if data else 1
    found = table("reports/output_summary.csv")
    rows = [(row["Round"], row["TensorName"]) for row in found]
    assert sorted(rows) == sorted((str(i), name) for i in range(rounds) for name in outputs)
    for row in (row for i in range(rounds) for row in table(f"reports/round_{i}.csv")):
        assert {"nan", "inf", "-inf"}.isdisjoint(row.values())
    if data and mode != "FULL_QUANT":
        return
    compared = qconvert("compare", "m.onnx", "q.onnx", "--report=compared")
    assert compared.code == 0, compared.err
    assert "WARNING: There" not in compared.err
    assert "Reports in compared" in compared.out


# --- the figures


def leaves(x: object) -> Iterator[Array]:
    """The numbers of a tensor, a sequence or a map."""
    if isinstance(x, list):
        for each in x:
            yield from leaves(each)
    elif isinstance(x, dict):
        yield np.array([x[key] for key in sorted(x)])
    elif x is not None:
        yield np.asarray(x).ravel()


def flat(x: object) -> Array:
    return np.concatenate([np.zeros(0), *(each.astype(np.float64) for each in leaves(x))])


def run_both(output: str) -> Iterator[tuple[Array, Array]]:
    """What the two models give for the samples held back."""
    sessions = [onnxruntime.InferenceSession(path) for path in ("m.onnx", "q.onnx")]
    for i in (6, 7):
        sample = {"x": normal(1, 3, 4, 4, seed=i)}
        before, after = (flat(session.run([output], sample)[0]) for session in sessions)
        yield before, after


@pytest.mark.parametrize("case", ["a sequence", "an optional", "a map", "minus infinity"])
@pytest.mark.parametrize("mode", MODES)
def test_the_cosine_is_that_of_all_finite_numbers(qconvert: Command, case: str, mode: str) -> None:
    found = convert(write_model(case), configured(mode), "q.onnx").verification
    assert found is not None
    error = next(error for error in found.outputs if error.name == "y")
    x, y = (np.concatenate(each) for each in zip(*run_both("y"), strict=True))
    finite = np.isfinite(x)
    assert np.array_equal(x[~finite], y[~finite])
    assert (error.compared, error.left_out) == (finite.sum(), (~finite).sum())
    assert (error.lost, error.apart) == (0, 0)
    x, y = x[finite], y[finite]
    assert error.cosine == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_logarithm_that_one_model_alone_has_is_lost(qconvert: Command, mode: str) -> None:
    result = qconvert.convert(configured(mode), Path("q.onnx"), write_model("logarithms"))
    x, y = (np.concatenate(each) for each in zip(*run_both("y"), strict=True))
    lost, same = (np.isfinite(x) != np.isfinite(y)).sum(), np.isfinite(x) & np.isfinite(y)
    share = 1 - lost / len(x)
    x, y = x[same], y[same]
    cosine = share * (x @ y) / np.sqrt((x @ x) * (y @ y))
    told = float(re.search(r"Verified on .*cosine ([\d.]+)", result.out)[1])
    assert told == pytest.approx(cosine, abs=1e-4)
    said = f"{lost} values of output 'y' are finite in one of the two models only"
    assert (said in result.out) == (lost > 0)


def test_samples_of_other_shapes_are_counted_and_the_others_compared(qconvert: Command) -> None:
    model = write_model("as many columns as are positive")
    config = configured("WEIGHT_QUANT", common_quant={"bit_num": 2})
    result = qconvert.convert(config, Path("q.onnx"), model)
    pairs = list(run_both("y"))
    apart = sum(len(x) != len(y) for x, y in pairs)
    assert apart > 0
    assert f"Not compared: {apart} of 2 samples of output 'y' have another shape." in result.out


def test_reports_leave_cells_empty_that_cannot_be_filled(qconvert: Command) -> None:
    config = configured(
        "WEIGHT_QUANT", common_quant={"bit_num": 2, "debug_info_save_path": "reports"}
    )
    model = write_model("as many columns as are positive")
    assert qconvert.convert(config, Path("q.onnx"), model).code == 0
    sessions = [onnxruntime.InferenceSession(path) for path in ("m.onnx", "q.onnx")]
    cells = [row["CosineSimilarity"] for row in table("reports/output_summary.csv")]
    for i, cell in enumerate(cells):
        sample = {"x": normal(1, 3, 4, 4, seed=i)}
        before, after = (session.run(["y"], sample)[0] for session in sessions)
        assert bool(cell) == (before.shape == after.shape)
    outputs = json.loads(Path("reports/summary.json").read_text())["verification"]["outputs"]
    assert outputs[0]["apart"] > 0


def test_same_texts_are_counted(qconvert: Command) -> None:
    found = convert(write_model("texts"), configured("WEIGHT_QUANT"), "q.onnx").verification
    assert found is not None
    sessions = [onnxruntime.InferenceSession(path) for path in ("m.onnx", "q.onnx")]
    samples = [{"x": normal(1, 3, 4, 4, seed=i)} for i in (6, 7)]
    before, after = ([s.run(["y"], x)[0] for x in samples] for s in sessions)
    same = np.mean(np.array(before) == np.array(after))
    assert found.outputs[0].cosine == pytest.approx(same)


# --- what searches make of them


@pytest.mark.parametrize("case", GRAPHS)
def test_a_bound_on_the_loss_leaves_integers_where_there_is_no_loss(
    qconvert: Command, case: str
) -> None:
    config = configured("FULL_QUANT", full_quant={"max_drop": 0.5})
    result = qconvert.convert(config, Path("q.onnx"), write_model(case))
    assert result.code == 0, result.err
    types = {node.op_type for node in onnx.load("q.onnx").graph.node}
    # Where no sample keeps its shape, nothing tells that little is lost.
    assert "QuantizeLinear" in types or case == "as many columns as are positive"


@pytest.mark.parametrize("case", GRAPHS)
def test_searches_of_bits(qconvert: Command, case: str) -> None:
    search = {"search": "SENSITIVITY", "min_cosine": 0.9}
    config = configured("WEIGHT_QUANT", common_quant={"bit_num": 0}, mixed_bit_weight_quant=search)
    result = qconvert.convert(config, Path("q.onnx"), write_model(case))
    assert result.code == 0, result.err
    assert "nan" not in result.out


def test_outputs_without_any_number_cannot_be_bounded(qconvert: Command) -> None:
    graph = f"g (float[1,3,4,4] x) => (float[] y) {{ {CONV}  c = Abs (b)  d = Sub (low, c) "
    graph += " y = Log (d) }"
    Path("m.onnx").write_bytes(frozen(build(graph, **WEIGHTS, low=np.float32(-1))))
    config = configured("FULL_QUANT", full_quant={"max_drop": 0.5})
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 1
    assert "No output of the model can be compared, as none holds a finite number" in result.err
    gated = qconvert.convert(
        configured("FULL_QUANT"), Path("q.onnx"), Path("m.onnx"), "--min-cosine=0.5"
    )
    assert gated.code == 3
    assert "cosine was not measured" in gated.err
    assert "no output can be compared" in gated.out


def test_labels_need_scores(qconvert: Command) -> None:
    Path("labels.csv").write_text("file,label\n" + "".join(f"{i}.npy,0\n" for i in range(8)))
    config = configured(
        "FULL_QUANT",
        full_quant={"max_drop": 0.5},
        data_preprocess={**DATA, "label_file": "labels.csv"},
    )
    result = qconvert.convert(config, Path("q.onnx"), write_model("a map"))
    assert result.code == 1
    assert "label_file: output 'label', the first, holds no score for each class" in result.err


def rows_picked(path: str) -> list[int]:
    """How many rows the model picks, sample by sample."""
    model = onnx.load(path)
    model.graph.output.append(onnx.ValueInfoProto(name="q"))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    samples = [{"x": normal(1, 3, 4, 4, seed=i)} for i in range(6)]
    return [len(session.run(["q"], sample)[0]) for sample in samples]


def test_only_samples_with_as_many_rows_stand_for_one_another(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, original = [], layers.fitted_to_outputs

    def fitted(matrix: Array, pair: Inputs, *rest: Any, **named: Any) -> Rows:
        compared.append(pair.own.shape[1])
        return original(matrix, pair, *rest, **named)

    monkeypatch.setattr(layers, "fitted_to_outputs", fitted)
    config = configured("WEIGHT_QUANT", common_quant={"bit_num": 1})
    model = write_model("rows picked, then multiplied")
    result = qconvert.convert(config, Path("q.onnx"), model)
    assert result.code == 0, result.err
    before, after = rows_picked("m.onnx"), rows_picked("q.onnx")
    same = [x for x, y in zip(before, after, strict=True) if x == y]
    assert 0 < len(same) < 6
    # The product is decided last.
    assert compared[-1] == sum(same)


# --- maps


@pytest.mark.parametrize("strategy", ["ON_LOAD", "ON_THE_FLY"])
def test_maps_keep_their_type_and_keys(qconvert: Command, strategy: str) -> None:
    config = configured("WEIGHT_QUANT", weight_quant={"dequant_strategy": strategy})
    result = qconvert.convert(config, Path("q.onnx"), write_model("a map"))
    assert result.code == 0, result.err
    sample = {"x": normal(1, 3, 4, 4)}
    before, after = (
        onnxruntime.InferenceSession(path).run(["y"], sample)[0] for path in ("m.onnx", "q.onnx")
    )
    assert list(before[0]) == list(after[0]) == list(range(32))
    kinds = [onnx.load(path).graph.output[1].type for path in ("m.onnx", "q.onnx")]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("case", ["a map", "a sequence", "an optional", "texts"])
def test_what_is_no_tensor_of_floats_stays_when_outputs_become_integers(
    qconvert: Command, case: str
) -> None:
    model = write_model(case)
    result = qconvert.convert(
        configured("FULL_QUANT"), Path("q.onnx"), model, "--outputDataType=UINT8"
    )
    assert result.code == 0, result.err
    before, after = (onnx.load(path).graph.output for path in ("m.onnx", "q.onnx"))
    assert [value.type for value in before] == [value.type for value in after]
