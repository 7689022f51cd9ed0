"""The commands beside a conversion, from end to end: init, inspect and compare."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import CONFIG, DIGITS, MODEL, Command, changed, digits, outputs
from graphs import build, frozen, normal, positive
from hypothesis import example, given
from hypothesis import strategies as st
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from sample_files import spec

from calib.sources import InputSpec
from converter import convert
from converter.config import load_config
from converter.config.keys import QUANT_TYPES, SECTIONS
from converter.config.starter import Known, Scaling, starter_config
from converter.errors import ModelError
from converter.report.text import columns, fitted

PIXELS = spec(1, 3, 224, 320)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, quantized."""
    from converter.cli import main

    path = tmp_path_factory.mktemp("quantized") / "digits.onnx"
    main([f"--modelFile={MODEL}", f"--configFile={CONFIG}", f"--outputFile={path}", "--quiet"])
    return path


# --- init


def starter(
    folder: Path, *inputs: InputSpec, mode: str = "FULL_QUANT", **options: object
) -> object:
    """What `load_config` makes of the configuration for a model with these inputs, filled in."""
    text = starter_config(Known(inputs), mode)
    (folder / "c.cfg").write_text(filled(text, inputs), encoding="utf-8")
    return load_config(folder / "c.cfg", **options)


def filled(text: str, inputs: tuple[InputSpec, ...] = ()) -> str:
    """The text with what only the user can know."""
    grey = not inputs or 1 in inputs[0].shape[1:]
    return text.replace("= FILL_IN", "= [127.5]" if grey else "= [127.5, 127.5, 127.5]")


@pytest.mark.parametrize("mode", QUANT_TYPES)
def test_what_init_writes_loads_for_every_mode(
    qconvert: Command, tmp_path: Path, mode: str
) -> None:
    result = qconvert("init", MODEL, f"--outputFile={tmp_path / 'my.cfg'}", f"--mode={mode}")
    assert (result.code, result.err) == (0, "")
    assert result.lines[-1] == f"qconvert --configFile={tmp_path / 'my.cfg'}"
    text = (tmp_path / "my.cfg").read_text()
    (tmp_path / "my.cfg").write_text(filled(text))
    config = load_config(tmp_path / "my.cfg")
    assert config.job.model == MODEL
    assert (config.mode, config.warnings) == (mode, ())
    assert bool(config.preprocess.calibrate_path) == (mode == "FULL_QUANT")


def test_init_beside_the_model_and_the_conversion_with_it(
    qconvert: Command, tmp_path: Path
) -> None:
    (tmp_path / "digits.onnx").write_bytes(MODEL.read_bytes())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image").symlink_to(DIGITS / "calib")
    assert qconvert("init", tmp_path / "digits.onnx").code == 0
    text = (tmp_path / "digits.cfg").read_text()
    assert text.count("FILL IN:") == 2
    unfilled = qconvert(f"--configFile={tmp_path / 'digits.cfg'}")
    assert unfilled.code == 1 and "normalize_mean = FILL_IN: is not filled in yet" in unfilled.err
    (tmp_path / "digits.cfg").write_text(filled(text))
    result = qconvert(f"--configFile={tmp_path / 'digits.cfg'}")
    assert (tmp_path / "digits_quant.onnx").exists()
    assert (result.code, result.err, result.lines[-1]) == (0, "", "CONVERT RESULT SUCCESS:0")


def test_init_overwrites_nothing(qconvert: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.cfg").write_text("mine")
    result = qconvert("init", MODEL, "--outputFile=mine.cfg")
    assert result.code == 2
    assert result.err == (
        "ERROR: mine.cfg exists already and is left as it is; give another name with "
        "--outputFile.\n"
    )
    assert (tmp_path / "mine.cfg").read_text() == "mine"


def test_init_names_a_missing_model_and_a_wrong_mode(qconvert: Command, tmp_path: Path) -> None:
    missing, wrong = qconvert("init", "no.onnx"), qconvert("init", MODEL, "--mode=HALF")
    assert (missing.code, wrong.code) == (1, 2)
    assert missing.err.startswith("ERROR: no.onnx: there is no such model file;")
    assert re.fullmatch(r"ERROR: Invalid value for '--mode'.*FULL_QUANT.*\n", wrong.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "colours", "size"),
    [
        ((1, 3, 224, 320), "RGB", (320, 224)),
        ((None, 224, 320, 3), "RGB", (320, 224)),
        ((1, 1, 28, 28), "GRAY", (28, 28)),
        ((1, 3, None, None), "RGB", (None, None)),
    ],
)
def test_pictures(
    tmp_path: Path, shape: tuple[int | None, ...], colours: str, size: tuple[int | None, ...]
) -> None:
    data = starter(tmp_path, spec(*shape)).preprocess
    assert (data.input_type, data.image_to_format) == ("IMAGE", colours)
    assert (data.resize_width, data.resize_height) == size
    assert len(data.normalize_mean) == len(data.normalize_std) == (1 if colours == "GRAY" else 3)


@pytest.mark.parametrize(
    "inputs",
    [
        [spec(1, 64, 7, 7)],
        [spec(1, 10)],
        [spec(1, 3, 224, 320, dtype=np.int64)],
        [PIXELS, spec(1, 10, name="y")],
        [PIXELS, spec(1, 1, 224, 320, name="y")],
    ],
)
def test_what_is_no_picture_comes_as_arrays(tmp_path: Path, inputs: list[InputSpec]) -> None:
    data = starter(tmp_path, *inputs).preprocess
    assert data.input_type == "NPY"
    assert [name for name, _ in data.calibrate_path] == [item.name for item in inputs]


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1),
        unique=True,
    )
)
@example(
    ["a:b", "serving_default_x:0", "a,b", "it's", 'say "x"', "a #b", "[x]", "; x", "=", " ", "é/ü"]
)
def test_any_input_name_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    inputs = [spec(1, 10, name=name) for name in names]
    if any("'" in name and '"' in name for name in names):
        with pytest.raises(ModelError, match="rename it in the model"):
            starter_config(Known(inputs), "FULL_QUANT")
    elif names:
        config = starter(tmp_path_factory.getbasetemp(), *inputs)
        assert [name for name, _ in config.preprocess.calibrate_path] == names


@pytest.mark.parametrize("mode", QUANT_TYPES)
def test_every_line_behind_a_mark_is_one_that_may_be_used(tmp_path: Path, mode: str) -> None:
    text = starter_config(Known([PIXELS], scaling=Scaling("[1]", "[2]", "Why.")), mode)
    names = [name for section in SECTIONS.values() for name in section.keys]
    used = re.sub(rf"^# ({'|'.join(names)}) =", r"\1 =", text, flags=re.MULTILINE)
    (tmp_path / "c.cfg").write_text(used)
    config = load_config(tmp_path / "c.cfg", rules=())
    assert config.mode == mode
    wanted = [
        name
        for section in SECTIONS.values()
        for name, key in section.keys.items()
        if mode in key.scope.modes
    ]
    assert [name for _, name in config.lines] == wanted


# --- inspect


def test_inspect_says_what_is_in_the_model(qconvert: Command) -> None:
    found = json.loads(qconvert("inspect", MODEL, "--json").out)
    proto = onnx.load(MODEL)
    assert (found["bytes"], found["opset"]) == (MODEL.stat().st_size, proto.opset_import[0].version)
    assert found["inputs"] == [{"name": "image", "type": "float32", "shape": ["N", 1, 28, 28]}]
    operators = Counter(node.op_type for node in proto.graph.node)
    assert {row["operator"]: row["count"] for row in found["operators"]} == operators
    layers = {row["layer"]: (row["weights"], row["bytes"]) for row in found["layers"]}
    sizes = {weight.name: list(weight.dims) for weight in proto.graph.initializer}
    convolutions = {
        node.name: sizes[node.input[1]] for node in proto.graph.node if node.op_type == "Conv"
    }
    # Each has a bias, in which the BatchNorm is.
    assert {name: layers[name] for name in convolutions} == {
        name: (shape, 4 * (int(np.prod(shape)) + shape[0])) for name, shape in convolutions.items()
    }
    assert (found["integer_weights"], found["quantization_parameters"]) == ([], [])


def test_inspect_counts_what_a_conversion_does(qconvert: Command, tmp_path: Path) -> None:
    found = json.loads(qconvert("inspect", MODEL, "--json").out)
    modes = {row["mode"]: row for row in found["modes"]}
    for mode in QUANT_TYPES:
        config = changed(tmp_path / "c.cfg", ("= FULL_QUANT", f"= {mode}"))
        first = qconvert.convert(config, tmp_path / "q.onnx", MODEL, "--verify=off").lines
        (said,) = (
            re.match(r"Quantized (\d+) of (\d+) nodes", line)
            for line in first
            if line.startswith("Quantized")
        )
        assert (modes[mode]["integer"] + modes[mode]["stored"], modes[mode]["nodes"]) == tuple(
            map(int, said.groups())
        )
        left = sum(row["nodes"] for row in found["left_float"] if row["mode"] == mode)
        assert left == modes[mode]["float"]


def test_inspect_finds_quantization_that_is_there(qconvert: Command, quantized: Path) -> None:
    found = json.loads(qconvert("inspect", quantized, "--json").out)
    graph = onnx.load(quantized).graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    expected = {
        n.input[0]: arrays[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear"
    }
    rows = {row["tensor"]: row for row in found["quantization_parameters"]}
    assert set(rows) == set(expected)
    for name, scales in expected.items():
        assert rows[name]["scales"] == scales.size
        assert rows[name]["least_scale"] == pytest.approx(scales.min())
        assert rows[name]["greatest_scale"] == pytest.approx(scales.max())
    integers = {name for name, array in arrays.items() if array.dtype == np.int8 and array.ndim > 1}
    assert {row["name"] for row in found["integer_weights"]} == integers


def test_inspect_prints_columns(qconvert: Command) -> None:
    lines = qconvert("inspect", MODEL).lines
    assert lines[1] == f"Bytes: {MODEL.stat().st_size}"
    header, first = lines[lines.index("Layers") + 1 : lines.index("Layers") + 3]
    assert header.split() == ["Layer", "Operator", "Weights", "Bytes", *QUANT_TYPES]
    assert first.split()[0] == "/stem/conv/Conv"
    assert first.index("Conv ") == header.index("Operator") or first.index(
        " Conv"
    ) + 1 == header.index("Operator")
    assert "Quantization parameters: none" in lines


def test_inspect_shortens_long_names_and_prints_none_as_a_dash(
    qconvert: Command, tmp_path: Path
) -> None:
    model = build("g (float[1, n] x) => (float[1, n] y) { y = Relu(x) }")
    model.graph.inputs[0].name = "x" * 100 + "end"
    (tmp_path / "m.onnx").write_bytes(frozen(model))
    text = qconvert("inspect", "m.onnx").out
    assert re.search(r"^  x{20}…x{48}end  float32  \[1, n\]$", text, re.MULTILINE)
    assert "Layers: none" in text


def test_inspect_counts_the_weights_of_subgraphs(qconvert: Command, tmp_path: Path) -> None:
    text = """g (bool c, float[1, 8] x) => (float[1, 4] y) {
        y = If (c) <then_branch = t () => (float[1, 4] a) { a = MatMul(x, w) },
                    else_branch = e () => (float[1, 4] b) { b = MatMul(x, v) }>
    }"""
    (tmp_path / "m.onnx").write_bytes(frozen(build(text, w=normal(8, 4), v=normal(8, 4))))
    found = json.loads(qconvert("inspect", "m.onnx", "--json").out)
    assert [(row["operator"], row["bytes"]) for row in found["layers"]] == [("MatMul", 128)] * 2


@pytest.mark.parametrize("command", ["init", "inspect"])
def test_what_is_no_model_is_said_in_a_sentence(
    qconvert: Command, tmp_path: Path, command: str
) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for arguments, code, words in (
        ((), 2, "Missing argument 'MODEL'"),
        (("no.onnx",), 1, "no.onnx: there is no such model file"),
        (("text.onnx",), 1, "text.onnx: this is not a"),
    ):
        result = qconvert(command, *arguments)
        assert result.code == code
        assert result.err.startswith(f"ERROR: {words}")
        assert (result.err.count("\n"), result.out) == (1, "")


# --- compare

DATA = f"""[data_preprocess_param]
calibrate_path = image:{DIGITS / "calib"}
calibrate_size = 10
input_type = IMAGE
image_to_format = GRAY
normalize_mean = [127.5]
normalize_std = [127.5]
"""


class Samples(CalibrationDataReader):
    """Samples for onnxruntime's own tools."""

    def __init__(self, name: str, samples: np.ndarray) -> None:
        self._rows = iter([{name: sample[None]} for sample in samples])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rows, None)


@pytest.fixture
def data_only(tmp_path: Path) -> Path:
    """A configuration that says nothing of quantization."""
    (tmp_path / "data.cfg").write_text(DATA)
    return tmp_path / "data.cfg"


def by_onnxruntime(folder: Path, model: Path, name: str, samples: np.ndarray, kind: str) -> Path:
    """The model quantized by onnxruntime, activations in uint8 where they are calibrated."""
    path = folder / f"{kind}.onnx"
    if kind == "dynamic":
        quantize_dynamic(model, path)
    else:
        form = QuantFormat.QDQ if kind == "QDQ" else QuantFormat.QOperator
        quantize_static(
            model, path, Samples(name, samples), quant_format=form, activation_type=QuantType.QUInt8
        )
    return path


def test_compare_needs_no_more_than_data(
    qconvert: Command, data_only: Path, quantized: Path, tmp_path: Path
) -> None:
    result = qconvert("compare", MODEL, quantized, f"--configFile={data_only}")
    assert (result.code, result.err) == (0, "")
    before, after = MODEL.stat().st_size, quantized.stat().st_size
    assert result.lines[0] == (
        f"Size {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.0%} of the "
        "float model)."
    )
    assert result.lines[1].startswith("Verified on 10 samples of calibrate_path: cosine 1.0000")
    assert any(line.startswith("Nodes that cost the outputs most") for line in result.lines)
    assert [path.name for path in tmp_path.iterdir()] == ["data.cfg"]


def test_compare_without_a_config_says_that_samples_are_random(
    qconvert: Command, quantized: Path
) -> None:
    result = qconvert("compare", MODEL, quantized, "--verbose")
    assert result.code == 0
    assert "random samples" in result.err


@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "dynamic"])
def test_compare_measures_what_other_tools_lost(
    qconvert: Command, data_only: Path, tmp_path: Path, kind: str
) -> None:
    other = by_onnxruntime(tmp_path, MODEL, "image", digits("calib")[0][:10], kind)
    result = qconvert("compare", MODEL, other, f"--configFile={data_only}", "--report=seen")
    assert result.code == 0
    summary = json.loads((tmp_path / "seen" / "summary.json").read_text())
    # Those that were given.
    samples = [{"image": image[None]} for image in digits("calib")[0][:10]]
    x, y = (
        np.concatenate([outputs(path, s, optimized=True)[0] for s in samples])
        for path in (MODEL, other)
    )
    x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    (measured,) = summary["verification"]["outputs"]
    assert measured["cosine"] == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-9)
    assert measured["sqnr_db"] == pytest.approx(
        10 * np.log10(x @ x / ((x - y) @ (x - y))), abs=1e-3
    )
    assert summary["bytes"] == {"before": MODEL.stat().st_size, "after": other.stat().st_size}
    written = {path.name for path in (tmp_path / "seen").iterdir()}
    assert written >= {
        "report.html",
        "output_summary.csv",
        "quant_param.csv",
        "sensitivity.csv",
        "round_9.csv",
    }
    assert f"<title>{other.name}" in (tmp_path / "seen" / "report.html").read_text()


def test_compare_names_saturation_and_where(qconvert: Command, tmp_path: Path) -> None:
    # Pairs of codes of one sign add up to 127 + 127 at most, and to none of opposite signs.
    signs = np.tile(np.float32([[1], [-1]]), (16, 1))
    weights = {"w": positive(64, 32), "v": positive(32, 4) * signs}
    text = (
        "g (float[1, 64] x) => (float[1, 4] y) { [first] h = MatMul(x, w) [second] y = MatMul(h, "
        "v) }"
    )
    (tmp_path / "m.onnx").write_bytes(frozen(build(text, **weights)))
    other = by_onnxruntime(tmp_path, tmp_path / "m.onnx", "x", positive(8, 64), "QDQ")
    result = qconvert("compare", "m.onnx", other)
    (sentence,) = (line for line in result.lines if line.startswith("- Saturation"))
    assert "first" in sentence
    assert "second" not in sentence


def test_compare_holds_the_gates(qconvert: Command, data_only: Path, quantized: Path) -> None:
    arguments = ("compare", MODEL, quantized, f"--configFile={data_only}")
    assert qconvert(*arguments, "--min-cosine=0.9", "--max-size=60%").code == 0
    missed = qconvert(*arguments, "--max-size=10%")
    assert missed.code == 3
    assert missed.err.startswith(f"ERROR: {quantized} misses a quality gate: ")


def test_compare_says_what_is_wrong_in_a_sentence(
    qconvert: Command, data_only: Path, quantized: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.onnx").write_bytes(
        frozen(build("g (float[1, 3] x) => (float[1, 3] y) { y = Relu(x) }"))
    )
    (tmp_path / "bad.cfg").write_text(DATA.replace("= 10", "= ten"))
    (tmp_path / "file").touch()
    config = f"--configFile={data_only}"
    cases = (
        (("compare", MODEL), 2, "Missing argument 'QUANT'"),
        (("compare", MODEL, "no.onnx"), 1, "no.onnx: there is no such model file"),
        (
            ("compare", MODEL, "other.onnx", config),
            1,
            "other.onnx has the inputs 'x' (float32) but ",
        ),
        (("compare", MODEL, quantized, "--configFile=no.cfg"), 1, "no.cfg: cannot be read"),
        (
            ("compare", MODEL, quantized, "--configFile=bad.cfg"),
            1,
            "bad.cfg:3: [data_preprocess_param] calibrate_size",
        ),
        (("compare", MODEL, quantized, config, "--report=file"), 1, "--report: file is a file"),
    )
    for arguments, code, words in cases:
        result = qconvert(*arguments)
        assert result.code == code, arguments
        assert result.err.startswith(f"ERROR: {words}"), result.err
        assert result.err.count("\n") == 1


# --- flags and tables


def test_a_flag_that_is_given_twice_is_an_error(qconvert: Command) -> None:
    result = qconvert(f"--modelFile={MODEL}", "--modelFile", "other.onnx", f"--configFile={CONFIG}")
    assert (result.code, result.err) == (
        2,
        "ERROR: --modelFile is given more than once; keep one of them.\n",
    )


def test_the_format_may_be_written_small(qconvert: Command) -> None:
    result = qconvert("--fmk=onnx", f"--modelFile={MODEL}", f"--configFile={CONFIG}", "--dry-run")
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("width", [40, 80, 100])
def test_a_plan_fits_the_terminal(width: int) -> None:
    names = [f"/a/rather/long/path/of/names/block{n}/conv/Conv" for n in range(3)]
    reason = "a reason of so many words that it cannot stand in a line of any terminal of today"
    table = [("node", "operator", "why"), *((name, "Conv", reason) for name in names)]
    lines = list(fitted(table, width))
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert [word for word in words if word in reason.split()].count("terminal") == 3
    assert sum("…" in line for line in lines) == 3
    assert list(fitted(table, None)) == list(columns(table))


def test_an_outcome_prints_its_summary(tmp_path: Path) -> None:
    config = changed(tmp_path / "c.cfg", ("calibrate_size = 100", "calibrate_size = 20"))
    text = str(convert(MODEL, config, tmp_path / "out.onnx"))
    assert text.startswith("Quantized 12 of 13 nodes: ") and "Verified on " in text
    assert text.endswith(f"Written to {tmp_path / 'out.onnx'}")


def test_a_pattern_does_not_convert_its_own_results(qconvert: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").write_bytes(MODEL.read_bytes())
    (tmp_path / "w.cfg").write_text("[common_quant_param]\nquant_type = WEIGHT_QUANT\n")
    (tmp_path / "jobs.csv").write_text("model,config,output\n*.onnx,w.cfg,\n")
    for _ in range(2):
        assert qconvert("batch", tmp_path / "jobs.csv", "--verify=off").code == 0
        found = sorted(path.name for path in tmp_path.glob("*.onnx"))
        assert found == ["a.onnx", "a_quant.onnx", "b.onnx", "b_quant.onnx"]
