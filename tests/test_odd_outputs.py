"""Outputs that cannot be compared value by value, and failures behind a finished conversion: the
file is written in any case, and what could not be done is said.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import Command
from graphs import build, frozen, normal
from running import write_config

CONV = "[conv] a = Conv (x, w)  [second] b = Conv (a, v)"
WEIGHTS = {"w": normal(4, 3, 1, 1), "v": normal(4, 4, 1, 1, seed=1)}
# Every graph reads x (float[1,3,4,4]) and computes b (float[1,4,4,4]).
GRAPHS = {
    "as many rows as are positive": (
        "float[4,N] y",
        "n = NonZero (b)  y = Cast <to = 1> (n)",
    ),
    "texts": ("string[1,4,4,4] y", "s = Greater (b, zero)  y = Cast <to = 8> (s)"),
    "a sequence": ("seq(float[1,4,4,4]) y", "y = SequenceConstruct (b, b)"),
    "minus infinity": ("float[1,4,4,4] y", "m = Greater (x1, zero)  y = Where (m, b, low)"),
    "nothing but a constant": ("float[4] y, float[1,4,4,4] b", "y = Neg (k)"),
}
MODES = {
    "FULL_QUANT": {},
    "DYNAMIC_QUANT": {},
    "WEIGHT_QUANT": {"bit_num": 4, "min_quant_weight_channel": 0},
}


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
    outputs, tail = GRAPHS[case]
    head = "x1 = Slice (x, at0, at1, axis)  " if "x1" in tail else ""
    graph = f"g (float[1,3,4,4] x) => ({outputs}) {{ {CONV} {head}{tail} }}"
    constants = {
        "zero": np.float32(0),
        "low": np.float32(-np.inf),
        "k": np.arange(4, dtype=np.float32),
        "at0": np.array([0]),
        "at1": np.array([1]),
        "axis": np.array([1]),
    }
    model = build(graph, **WEIGHTS, **{k: v for k, v in constants.items() if f"{k}" in graph})
    Path("m.onnx").write_bytes(frozen(model))
    return Path("m.onnx")


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", GRAPHS)
def test_every_kind_of_output(qconvert: Command, case: str, mode: str, data: bool) -> None:
    if mode == "FULL_QUANT" and not data:
        pytest.skip("needs data")
    sections: dict[str, dict[str, object]] = {"common_quant": {"quant_type": mode, **MODES[mode]}}
    if data:
        sections["data_preprocess"] = {
            "calibrate_path": "x:data",
            "calibrate_size": 6,
            "input_type": "NPY",
        }
    sections["common_quant"]["debug_info_save_path"] = "reports"
    config = write_config(Path("c.cfg"), **sections)
    result = qconvert.convert(config, Path("q.onnx"), write_model(case))
    assert result.code == 0, result.err
    assert "not verified" not in result.err
    assert Path("reports/report.html").exists(), result.err
    onnxruntime.InferenceSession("q.onnx", providers=["CPUExecutionProvider"])
    compared = qconvert("compare", "m.onnx", "q.onnx")
    assert compared.code == 0, compared.err
    if case == "minus infinity":
        assert "values of output 'y' are not finite" in result.out
        assert "nan" not in result.out


def test_a_failure_behind_the_file_does_not_lose_it(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        msg = "the disk is gone"
        raise RuntimeError(msg)

    monkeypatch.setattr("converter.pipeline.verify", fail)
    monkeypatch.setattr("converter.pipeline.write_reports", fail)
    config = write_config(
        Path("c.cfg"),
        common_quant={"quant_type": "DYNAMIC_QUANT", "debug_info_save_path": "reports"},
    )
    model = write_model("minus infinity")
    result = qconvert.convert(config, Path("q.onnx"), model)
    assert result.code == 0
    assert Path("q.onnx").exists()
    assert "The result is not verified" in result.err
    assert "There are no reports" in result.err
    assert result.err.count("RuntimeError: the disk is gone") == 2
    # A gate on what was not measured is missed.
    gated = qconvert.convert(config, Path("q.onnx"), model, "--min-cosine=0.5")
    assert gated.code == 3
    assert "cosine was not measured" in gated.err


def test_what_does_not_load_is_not_written(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: ir.Model) -> None:
        model.graph[0].attributes["auto_pad"] = ir.AttrString("auto_pad", "SAME_UPPER")
        model.graph[0].attributes["pads"] = ir.AttrInt64s("pads", [7, 7, 7, 7])

    monkeypatch.setattr("converter.pipeline.forget_inferred", spoil)
    config = write_config(Path("c.cfg"), common_quant={"quant_type": "DYNAMIC_QUANT"})
    result = qconvert.convert(config, Path("q.onnx"), write_model("minus infinity"))
    assert result.code == 1
    assert "The converted model is not written, as it would not load" in result.err
    assert not Path("q.onnx").exists()


def test_zipmap(qconvert: Command) -> None:
    """The classifier as scikit-learn exports it: a label and a map of probabilities."""
    helper, kinds = onnx.helper, onnx.TensorProto
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(kinds.INT64, helper.make_tensor_type_proto(kinds.FLOAT, []))
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="hidden"),
        helper.make_node("Softmax", ["h"], ["p"], name="soft"),
        helper.make_node(
            "ZipMap", ["p"], ["y"], name="zip", domain="ai.onnx.ml", classlabels_int64s=range(8)
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["N", 64])],
        [onnx.ValueInfoProto(name="y", type=maps)],
        [onnx.numpy_helper.from_array(normal(64, 8), "w")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), "m.onnx")
    keys = {"quant_type": "WEIGHT_QUANT", "bit_num": 8, "min_quant_weight_channel": 0}
    config = write_config(Path("c.cfg"), common_quant=keys)
    result = qconvert.convert(config, Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0, result.err
    found = [
        onnxruntime.InferenceSession(path).run(None, {"x": normal(2, 64)})[0]
        for path in ("m.onnx", "q.onnx")
    ]
    assert [list(row) for row in found[1]] == [list(range(8))] * 2
    for before, after in zip(*found, strict=True):
        assert list(after.values()) == pytest.approx(list(before.values()), abs=0.02)
    assert onnx.load("q.onnx").graph.output[0].type == maps
