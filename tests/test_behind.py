"""What comes behind a finished conversion never loses it; what does not load is never written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import Command
from graphs import build, frozen, normal, positive
from running import write_config

from calib import CalibError
from converter.emit.dequantize import type_for
from converter.graph.files import refusal

GRAPH = "g (float[N,64] x) => (float[N,64] y) { [product] a = MatMul (x, w)  y = Relu (a) }"
DATA = {"calibrate_path": "x:x.npy", "calibrate_size": 4, "input_type": "NPY"}
MODES = ["FULL_QUANT", "DYNAMIC_QUANT", "WEIGHT_QUANT"]
STEPS = ["verify", "tensor_errors", "write_reports"]


def written(graph: str = GRAPH, opset: int = 13, **constants: np.ndarray) -> Path:
    """A model and data for it in the current folder."""
    constants = constants or {"w": normal(64, 64)}
    Path("m.onnx").write_bytes(frozen(build(graph, opset, **constants)))
    np.save("x.npy", normal(4, 64))
    return Path("m.onnx")


def configured(mode: str = "DYNAMIC_QUANT", data: bool = True, **sections: object) -> Path:
    common = {"quant_type": mode, "debug_info_save_path": "reports"}
    given = {"data_preprocess": DATA} if data else {}
    return write_config(Path("c.cfg"), **{"common_quant": common, **given, **sections})


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("the disk is gone"), "RuntimeError: the disk is gone"),
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (CalibError("It does not run."), "It does not run."),
    ],
)
@pytest.mark.parametrize(("mode", "step"), list(zip(MODES, STEPS, strict=True)))
def test_a_step_that_fails_costs_one_warning(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch, mode: str, step: str, error: Exception,
    words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(f"converter.pipeline.convert.{step}", failing(error))
    result = qconvert.convert(configured(mode), Path("q.onnx"), written())
    assert result.code == 0
    assert result.lines[-1] == "CONVERT RESULT SUCCESS:0"
    (warning,) = [line for line in result.err.splitlines() if words in line]
    assert warning.startswith("WARNING: The") and warning.endswith(words)
    onnxruntime.InferenceSession("q.onnx")
    assert Path("reports/report.html").exists() == (step != "write_reports")
    assert ("Verified on" in result.out) == (step != "verify")


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupt_behind_the_file_keeps_it(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(f"converter.pipeline.convert.{step}", failing(KeyboardInterrupt()))
    result = qconvert.convert(configured(), Path("q.onnx"), written())
    assert result.code == 130
    assert result.err.strip().splitlines()[-1] == (
        "ERROR: Interrupted; q.onnx is written, but what comes behind it is not done."
    )
    onnxruntime.InferenceSession("q.onnx")


def test_an_interrupt_before_writes_nothing(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.pipeline.convert.finish", failing(KeyboardInterrupt()))
    result = qconvert.convert(configured(), Path("q.onnx"), written())
    assert result.code == 130
    assert "Interrupted; nothing was written." in result.err
    assert not Path("q.onnx").exists()


def test_details_of_what_failed_come_when_asked_for(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.pipeline.convert.verify", failing(ValueError("odd")))
    result = qconvert.convert(configured(), Path("q.onnx"), written(), "--verbose")
    assert "Traceback (most recent call last):" in result.err
    assert "Traceback" not in qconvert.convert(configured(), Path("q.onnx"), written()).err


def test_a_gate_says_why_there_is_no_figure(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = qconvert.convert(
        configured(), Path("q.onnx"), written(), "--verify=off", "--min-agreement=0.5"
    )
    assert off.code == 3
    assert "agreement was not measured (--verify=off) (--min-agreement 0.5)" in off.err
    monkeypatch.setattr("converter.pipeline.convert.verify", failing(ValueError("odd")))
    failed = qconvert.convert(configured(), Path("q.onnx"), written(), "--min-cosine=0.5")
    assert failed.code == 3
    assert "cosine was not measured (ValueError: odd) (--min-cosine 0.5)" in failed.err
    assert Path("q.onnx").exists()


def test_a_batch_keeps_what_it_could_not_verify(qconvert: Command) -> None:
    # Random numbers are no rows of this table: only the verification runs the model.
    graph = """g (float[N,64] x, int64[1] i) => (float[N,64] y) {
        [product] a = MatMul (x, w)  j = Add (i, nine)  k = Gather (few, j)  y = Add (a, k) }"""
    written(graph, w=normal(64, 64), few=normal(2, 64), nine=np.int64(9))
    Path("jobs").mkdir()
    write_config(
        Path("jobs/one.cfg"),
        job={},
        common_quant={"quant_type": "DYNAMIC_QUANT"},
    )
    text = Path("jobs/one.cfg").read_text()
    text = text.replace("[job_param]", "[job]\nmodel = ../m.onnx\noutput = ../q.onnx")
    Path("jobs/one.cfg").write_text(text)
    result = qconvert("batch", "jobs")
    assert result.code == 0, result.out + result.err
    onnxruntime.InferenceSession("q.onnx")
    summary = Path("jobs/batch_summary.json").read_text()
    assert "The result is not verified: the model does not run on random samples" in summary
    gated = qconvert("batch", "jobs", "--min-cosine=0.5", "--resume")
    assert gated.code == 3
    assert "was not measured (the model does not run on random samples" in gated.out


def test_compare_keeps_its_figures_without_reports(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    qconvert.convert(configured(), Path("q.onnx"), written())
    monkeypatch.setattr("converter.pipeline.compare.findings", failing(ValueError("odd")))
    monkeypatch.setattr("converter.pipeline.compare.write_reports", failing(ValueError("odd")))
    for flags in ([], ["--report=other"]):
        result = qconvert("compare", "m.onnx", "q.onnx", *flags)
        assert result.code == 0
        assert "Verified on 8 random samples" in result.out
        assert "WARNING: There is no look inside: ValueError: odd" in result.err
        assert "Reports in" not in result.out


# --- what the runtime itself writes


NORMALISED = """g (float[N,64] x) => (float[N,64] y) {
    [first] h = MatMul (x, w)  m = ReduceMean <axes = [-1]> (h)  d = Sub (h, m)  p = Pow (d, two)
    v = ReduceMean <axes = [-1]> (p)  e = Add (v, eps)  s = Sqrt (e)  n = Div (d, s)
    g1 = Mul (n, gain)  z = Add (g1, bias)  [second] y = MatMul (z, w2) }"""
BRANCHES = """g (float[1,16,8,8] x) => (float[1,16,8,8] y) {
    [before] h = Conv <pads = [1,1,1,1]> (x, w)  s = ReduceSum <keepdims = 0> (h, axes)
    c = Greater (s, zero)
    y = If (c) <
        then_branch = t () => (float[1,16,8,8] o) { [left] o = Conv <pads = [1,1,1,1]> (h, w2) },
        else_branch = f () => (float[1,16,8,8] q) { [right] q = Conv <pads = [1,1,1,1]> (h, w3) }
    > }"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("graph", [NORMALISED, BRANCHES], ids=["LayerNormalization", "branches"])
def test_what_the_runtime_optimizes_is_read_as_it_is(
    qconvert: Command, graph: str, mode: str
) -> None:
    vectors = {"gain": positive(64), "bias": normal(64), "w2": normal(64, 32)}
    numbers = {"two": np.float32(2), "eps": np.float32(1e-5), "w": normal(64, 64)}
    kernels = {name: normal(16, 16, 3, 3, seed=i) for i, name in enumerate(("w", "w2", "w3"))}
    scalars = {"axes": np.array([0, 1, 2, 3]), "zero": np.float32(0)}
    wanted = {**vectors, **numbers} if graph == NORMALISED else {**kernels, **scalars}
    written(graph.replace("[N,64] y", "[N,32] y"), **wanted)
    if graph == BRANCHES:
        np.save("x.npy", normal(4, 16, 8, 8))
    result = qconvert.convert(configured(mode), Path("q.onnx"), Path("m.onnx"))
    assert result.code == 0, result.err
    assert "ONNX Runtime executes" in result.out
    assert "not verified" not in result.err
    compared = qconvert("compare", "m.onnx", "q.onnx")
    assert (compared.code, "ONNX Runtime executes" in compared.out) == (0, True), compared.err


def test_compare_reads_a_file_that_the_runtime_optimized(qconvert: Command) -> None:
    vectors = {"gain": positive(64), "bias": normal(64), "w2": normal(64, 32)}
    numbers = {"two": np.float32(2), "eps": np.float32(1e-5), "w": normal(64, 64)}
    written(NORMALISED.replace("[N,64] y", "[N,32] y"), **vectors, **numbers)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    onnxruntime.InferenceSession("m.onnx", options, providers=["CPUExecutionProvider"])
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model("optimized.onnx")
    result = qconvert("compare", "m.onnx", "optimized.onnx")
    assert result.code == 0, result.err
    assert "cosine 1.00000" in result.out


# --- what does not load


def spoil(model: ir.Model, *_: object, **__: object) -> tuple[str, ...]:
    """Gives the first node an attribute that the runtime refuses, and ONNX's checker does not."""
    model.graph[0].domain = "nobody.knows"
    model.graph.opset_imports["nobody.knows"] = 1
    return ()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("verify", ["on", "off"])
def test_what_does_not_load_is_not_written(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch, mode: str, verify: str
) -> None:
    monkeypatch.setattr("converter.pipeline.convert.finish", spoil)
    Path("q.onnx").write_text("old")
    result = qconvert.convert(configured(mode), Path("q.onnx"), written(), f"--verify={verify}")
    assert result.code == 1
    assert "The converted model is not written, as it would not load: " in result.err
    assert Path("q.onnx").read_text() == "old"


@pytest.mark.parametrize("verify", ["on", "off"])
def test_where_the_float_model_does_not_load_either_both_are_named(
    qconvert: Command, verify: str
) -> None:
    graph = GRAPH.replace("y = Relu (a)", "y = local.Unheard (a)")
    result = qconvert.convert(
        configured(data=False), Path("q.onnx"), written(graph), f"--verify={verify}"
    )
    assert result.code == 0, result.err
    assert "Neither the float model nor the converted one can be tried: " in result.err
    assert {node.op_type for node in onnx.load("q.onnx").graph.node} > {"MatMulInteger", "Unheard"}


def test_a_search_keeps_nothing_that_does_not_load(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emitted(*given: object, **named: object) -> ir.Model:
        model = original(*given, **named)
        spoil(model)
        return model

    from converter.modes import weight_quant

    original = weight_quant._emitted
    monkeypatch.setattr(weight_quant, "_emitted", emitted)
    Path("q.onnx").write_text("old")
    common = {"quant_type": "WEIGHT_QUANT", "bit_num": 0}
    search = {"search": "SENSITIVITY", "target_ratio": 4}
    config = configured(common_quant=common, mixed_bit_weight_quant=search)
    result = qconvert.convert(config, Path("q.onnx"), written())
    assert result.code == 1
    assert "would not load" in result.err
    assert Path("q.onnx").read_text() == "old"


# --- opsets


def refusing_above(newest: int) -> Callable[..., str | None]:
    """As a runtime does that lacks an operator in opsets above `newest`."""

    def look(path: Path, optimize: bool = True) -> str | None:
        opset = next(x.version for x in onnx.load(path).opset_import if not x.domain)
        return "Swish(25) is missing" if opset > newest else refusal(path, optimize)

    return look


@pytest.mark.parametrize(
    ("opset", "newest", "bits", "kind"),
    [
        (24, 24, 2, onnx.TensorProto.UINT4),
        (13, 21, 1, onnx.TensorProto.UINT4),
        (13, 13, 2, onnx.TensorProto.UINT8),
        (13, 20, 4, onnx.TensorProto.UINT8),
        (13, 25, 2, onnx.TensorProto.UINT2),
        (13, 21, 4, onnx.TensorProto.UINT4),
    ],
)
def test_integers_in_memory_ask_for_no_opset_that_does_not_load(
    qconvert: Command,
    monkeypatch: pytest.MonkeyPatch,
    opset: int,
    newest: int,
    bits: int,
    kind: int,
) -> None:
    monkeypatch.setattr("converter.modes.weight_quant.refusal", refusing_above(newest))
    config = configured(
        common_quant={"quant_type": "WEIGHT_QUANT", "bit_num": bits},
        weight_quant={"dequant_strategy": "ON_THE_FLY"},
    )
    result = qconvert.convert(config, Path("q.onnx"), written(opset=opset))
    assert result.code == 0, result.err
    model = onnx.load("q.onnx")
    assert kind in {tensor.data_type for tensor in model.graph.initializer}
    assert model.opset_import[0].version <= newest
    wide = {onnx.TensorProto.UINT2: 2, onnx.TensorProto.UINT4: 4, onnx.TensorProto.UINT8: 8}[kind]
    warned = f"Weights of fewer than {wide} bits are stored in as many." in result.err
    assert warned == (newest < type_for(bits, False, 25)[1])


@pytest.mark.parametrize(("bits", "blocks"), [(12, {}), (4, {"block_size": 32}), (0, {})])
def test_integers_that_have_no_type_are_refused_before_the_work(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch, bits: int, blocks: dict[str, int]
) -> None:
    monkeypatch.setattr("converter.modes.weight_quant.refusal", refusing_above(13))
    monkeypatch.setattr("converter.modes.weight_quant.Fitter", failing(AssertionError()))
    config = configured(
        common_quant={"quant_type": "WEIGHT_QUANT", "bit_num": bits},
        weight_quant={"dequant_strategy": "ON_THE_FLY", **blocks},
    )
    result = qconvert.convert(config, Path("q.onnx"), written())
    assert result.code == 1
    assert "[weight_quant_param] dequant_strategy" in result.err
    assert "write ON_LOAD" in result.err
    assert "Swish(25) is missing" in result.err


LOGARITHMS = "g (float[N,64] x) => (float[N,32] y) { m = MatMul (x, w)  l = Log (m)  {}  }"


def raised(tail: str, **constants: np.ndarray) -> Path:
    graph = LOGARITHMS.replace("{}", tail)
    return written(graph, 11, w=normal(64, 32), **constants)


def test_numbers_that_are_not_finite_in_both_opsets_are_no_change(qconvert: Command) -> None:
    result = qconvert.convert(
        configured(data=False), Path("q.onnx"), raised("y = Relu (l)"), "--verbose"
    )
    assert result.code == 0, result.err
    assert "Opset 11 converted to 13; the outputs differ by 0.0e+00" in result.err


def test_other_numbers_that_are_not_finite_are_a_change(
    qconvert: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.prepare import opset

    def changed(model: ir.Model, least: int) -> ir.Model:
        found = original(model, least)
        next(node for node in found.graph if node.op_type == "Log").op_type = "Sqrt"
        return found

    original = opset._converted
    monkeypatch.setattr(opset, "_converted", changed)
    result = qconvert.convert(configured(data=False), Path("q.onnx"), raised("y = Floor (l)"))
    assert result.code == 1
    assert "Opset 11 converted to 13, which changes the outputs by" in result.err
    assert re.search(
        r"of their largest value, first at '\w*' \(Log\); export the model", result.err
    )


def test_without_any_finite_number_an_opset_is_unchecked(qconvert: Command) -> None:
    model = raised("y = Add (l, low)", low=np.float32(-np.inf))
    result = qconvert.convert(configured(data=False), Path("q.onnx"), model)
    assert result.code == 0, result.err
    assert (
        "Opset 11 converted to 13, unchecked: the outputs hold no finite value for random input."
        in result.err
    )


def test_what_wants_positive_numbers_is_checked_on_some(qconvert: Command) -> None:
    # The least of 64 numbers between -1 and 1 has no logarithm, that of their magnitudes has.
    graph = """g (float[N,64] x) => (float[N,64] y) {
        a = ReduceMin <axes = [1]> (x)  b = Log (a)  y = MatMul (b, w) }"""
    model = written(graph, 11, w=normal(1, 64))
    result = qconvert.convert(configured(data=False), Path("q.onnx"), model, "--verbose")
    assert result.code == 0, result.err
    assert "Opset 11 converted to 13; the outputs differ by 0.0e+00" in result.err
