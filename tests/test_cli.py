"""The command from end to end: files and arguments in; exit code, stdout, stderr and files out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import CONFIG, DIGITS, MODEL, ROOT, Command, Result, changed, digits, outputs

from converter import __version__
from converter.pipeline import convert as pipeline

SUCCESS = "CONVERT RESULT SUCCESS:0"
# A preset for models that were trained with quantization, which the example was not.
TRAINED = ROOT / "configs" / "trained.cfg"


@pytest.fixture
def qconvert(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """The command in an empty folder, whose temporary files land in that folder too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Command(capsys)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The quantized example and what the installed script printed, run from another folder."""
    folder = tmp_path_factory.mktemp("example")
    output = folder / "digits.onnx"
    script = Path(sys.executable).with_name("qconvert")
    arguments = [f"--modelFile={MODEL}", f"--configFile={CONFIG}", f"--outputFile={output}"]
    done = subprocess.run(
        [script, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return output, Result(done.returncode, done.stdout, done.stderr)


# --- a conversion that works


def test_example_succeeds_and_leaves_one_file(example: tuple[Path, Result]) -> None:
    output, result = example
    assert (result.code, result.err) == (0, "")
    assert list(output.parent.iterdir()) == [output]


def test_summary_says_what_happened(example: tuple[Path, Result]) -> None:
    output, result = example
    before, after = MODEL.stat().st_size, output.stat().st_size
    assert re.match(r"Quantized \d+ of \d+ nodes: 7 Conv, .*\bGemm\.", result.lines[0])
    assert any(
        line.startswith("Left float, ") and "/softmax/Softmax (Softmax)" in line
        for line in result.lines
    )
    size = (
        f"Size {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({100 * after / before:.0f}% of the "
        "float model)."
    )
    assert size in result.lines
    assert result.lines[-2:] == [f"Written to {output}", SUCCESS]


def test_worst_tensors_come_first(example: tuple[Path, Result]) -> None:
    found = re.findall(r"^  (\S+) +(\S+) +(\S+) dB$", example[1].out, re.MULTILINE)
    names, cosines, decibels = zip(*found, strict=True)
    assert len(set(names)) == len(names) == 5
    assert all(0.99 < float(cosine) <= 1 for cosine in cosines)
    assert [float(value) for value in decibels] == sorted(float(value) for value in decibels)


def test_example_is_valid_and_smaller(example: tuple[Path, Result]) -> None:
    output, _ = example
    onnx.checker.check_model(onnx.load(output), full_check=True)
    assert output.stat().st_size < 0.5 * MODEL.stat().st_size


def test_every_weight_of_the_example_is_stored_in_8_bits(example: tuple[Path, Result]) -> None:
    before, after = (onnx.load(path).graph.initializer for path in (MODEL, example[0]))
    matrices = [weight for weight in before if len(weight.dims) > 1]
    types = [weight.data_type for weight in after if len(weight.dims) > 1]
    assert types == [onnx.TensorProto.INT8] * len(matrices)
    assert len(matrices) == 8


def test_example_is_as_good_as_float_with_and_without_optimizations(
    example: tuple[Path, Result],
) -> None:
    images, labels = digits("dev")
    before = outputs(MODEL, {"image": images}, optimized=True)[0]
    plain, fused = (
        outputs(example[0], {"image": images}, optimized)[0] for optimized in (False, True)
    )
    top1 = [np.mean(probabilities.argmax(1) == labels) for probabilities in (before, plain, fused)]
    assert top1[0] >= 0.95
    assert min(top1[1:]) >= top1[0] - 0.02
    assert np.mean(plain.argmax(1) == fused.argmax(1)) >= 0.99
    np.testing.assert_allclose(plain, fused, atol=0.05)


def test_flags_with_blanks_give_the_same_bytes(
    qconvert: Command, example: tuple[Path, Result], tmp_path: Path
) -> None:
    result = qconvert(
        "--modelFile", MODEL, "--configFile", CONFIG, "--outputFile", tmp_path / "a.onnx"
    )
    assert result.code == 0
    assert (tmp_path / "a.onnx").read_bytes() == example[0].read_bytes()


def test_number_of_threads_does_not_change_a_byte(qconvert: Command, tmp_path: Path) -> None:
    written = []
    for threads in (1, 2):
        config = changed(
            tmp_path / "c.cfg", ("bit_num = 8", f"bit_num = 8\nthread_num = {threads}")
        )
        output = tmp_path / f"{threads}.onnx"
        assert qconvert.convert(config, output).code == 0
        written.append(output.read_bytes())
    assert written[0] == written[1]


def test_output_lands_beside_the_model_by_default(qconvert: Command, tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    shutil.copy(MODEL, model)
    assert qconvert(f"--modelFile={model}", f"--configFile={CONFIG}").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"net.onnx", "net_quant.onnx"}


def test_output_gets_its_suffix_and_its_folder(qconvert: Command, tmp_path: Path) -> None:
    result = qconvert.convert(CONFIG, Path("new/folder/net.v2"))
    assert f"Written to {Path('new/folder/net.v2.onnx')}" in result.lines
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["net.v2.onnx"]


def test_an_old_output_is_replaced(
    qconvert: Command, example: tuple[Path, Result], tmp_path: Path
) -> None:
    output = tmp_path / "net.onnx"
    output.write_text("old")
    assert qconvert.convert(CONFIG, output).code == 0
    assert output.read_bytes() == example[0].read_bytes()


def test_quiet_prints_the_result_line_alone(qconvert: Command, tmp_path: Path) -> None:
    result = qconvert.convert(CONFIG, tmp_path / "a.onnx", MODEL, "--quiet")
    assert result == Result(0, f"{SUCCESS}\n", "")


def test_input_shape_is_fixed_in_the_output(qconvert: Command, tmp_path: Path) -> None:
    result = qconvert.convert(CONFIG, tmp_path / "a.onnx", MODEL, "--inputShape=image:1,1,28,28")
    dims = onnx.load(tmp_path / "a.onnx").graph.input[0].type.tensor_type.shape.dim
    assert result.code == 0
    assert [dim.dim_value for dim in dims] == [1, 1, 28, 28]


def test_unusable_pictures_are_warned_of(qconvert: Command, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(DIGITS / "calib", folder)
    (folder / "broken.png").write_bytes(b"not a picture")
    config = changed(tmp_path / "c.cfg", (str(DIGITS / "calib"), str(folder)), ("= 100", "= 150"))
    result = qconvert.convert(config, tmp_path / "a.onnx")
    assert result.code == 0
    assert [
        line
        for line in result.err.splitlines()
        if line.startswith("WARNING: ") and "broken.png" in line
    ]
    assert result.lines[-1] == SUCCESS


def test_skipped_node_is_left_float_and_named(qconvert: Command, tmp_path: Path) -> None:
    config = changed(
        tmp_path / "c.cfg", ("bit_num = 8", "bit_num = 8\nskip_quant_node = /layer4/*")
    )
    result = qconvert.convert(config, tmp_path / "a.onnx")
    assert any(
        line.startswith("Left float, ") and "/layer4/conv/Conv (Conv)" in line
        for line in result.lines
    )
    weights = [
        weight
        for weight in onnx.load(tmp_path / "a.onnx").graph.initializer
        if weight.data_type == 1
    ]
    assert any(len(weight.dims) == 4 for weight in weights)


@pytest.mark.parametrize(
    "config", sorted({*(ROOT / "configs").glob("*.cfg")} - {TRAINED}), ids=lambda path: path.stem
)
def test_every_preset_converts_the_example(qconvert: Command, config: Path, tmp_path: Path) -> None:
    images, labels = digits("dev")
    assert qconvert.convert(config, tmp_path / "a.onnx").lines[-1] == SUCCESS
    top1 = np.mean(
        outputs(tmp_path / "a.onnx", {"image": images}, optimized=True)[0].argmax(1) == labels
    )
    assert top1 >= 0.95


# --- what only looks


def test_dry_run_shows_the_plan_and_reads_no_data(qconvert: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "no_picture.png").write_text("x")
    config = changed(tmp_path / "c.cfg", (str(DIGITS / "calib"), str(tmp_path / "data")))
    before = sorted(tmp_path.rglob("*"))
    result = qconvert.convert(config, tmp_path / "a.onnx", MODEL, "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert re.search(r"^/softmax/Softmax +Softmax +float +\S", result.out, re.MULTILINE)
    assert re.search(r"^/stem/conv/Conv +Conv +integer +\S", result.out, re.MULTILINE)
    assert re.search(r"^image +uint8 +\S", result.out, re.MULTILINE)
    assert SUCCESS not in result.out


def test_version(qconvert: Command) -> None:
    assert qconvert("--version") == Result(0, f"qconvert, version {__version__}\n", "")


def test_help_does_not_wait_for_heavy_imports() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "converter", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert "converter" in imported
    assert not imported & {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "numpy", "PIL", "calib"}
    assert "--modelFile" in done.stdout


# --- mistakes


def _files(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _assert_refused(
    qconvert: Command, folder: Path, code: int, words: str, *arguments: object
) -> None:
    """One line on stderr that holds the words, nothing on stdout, and the folder as it was."""
    before = _files(folder)
    result = qconvert(*arguments)
    assert (result.code, result.out) == (code, "")
    assert re.fullmatch(r"ERROR: .+[.]\n", result.err)
    assert words in result.err
    assert _files(folder) == before


GOOD = (f"--modelFile={MODEL}", f"--configFile={CONFIG}", "--outputFile=a")

MISUSES = {
    "no model": ([f"--configFile={CONFIG}"], "'--modelFile'"),
    "no config": ([f"--modelFile={MODEL}"], "'--configFile'"),
    "framework": ([*GOOD, "--fmk=TF"], "--fmk=ONNX"),
    "unknown flag": ([*GOOD, "--modelPath=x"], "'--modelPath'"),
    "stray argument": ([*GOOD, "model.onnx"], "model.onnx"),
    "fp16": ([*GOOD, "--fp16=yes"], "'on'"),
    "layout": ([*GOOD, "--inputDataFormat=CHW"], "'NCHW'"),
    "shape without name": ([*GOOD, "--inputShape=1,1,28,28"], "name:1,3,224,224"),
    "shape with words": ([*GOOD, "--inputShape=image:1,one,28,28"], "'image:1,one,28,28'"),
    "negative shape": ([*GOOD, "--inputShape=image:1,-2,28,28"], "'image:1,-2,28,28'"),
    "unknown input": ([*GOOD, "--inputShape=img:1,1,28,28"], "'img'"),
    "shape of another rank": ([*GOOD, "--inputShape=image:28,28"], "'image'"),
    "shape that contradicts": ([*GOOD, "--inputShape=image:1,3,28,28"], "'image'"),
    "empty output": ([*GOOD, "--outputFile="], "--outputFile"),
    "output names a folder": ([*GOOD, "--outputFile=out/"], "--outputFile"),
    "output is a folder": ([*GOOD, f"--outputFile={ROOT / 'tests'}/"], "--outputFile"),
    "output inside a file": ([*GOOD, f"--outputFile={MODEL}/a.onnx"], "--outputFile"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_wrong_flags_exit_with_2(qconvert: Command, tmp_path: Path, name: str) -> None:
    arguments, words = MISUSES[name]
    _assert_refused(qconvert, tmp_path, 2, words, *arguments)


def test_the_model_is_never_overwritten(qconvert: Command, tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    shutil.copy(MODEL, model)
    same = tmp_path / "link.onnx"
    same.symlink_to(model)
    for output in ("net.onnx", "./net", same):
        flags = (f"--modelFile={model}", f"--configFile={CONFIG}", f"--outputFile={output}")
        _assert_refused(qconvert, tmp_path, 2, "the float model itself", *flags)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def _cut(path: Path) -> None:
    path.write_bytes(MODEL.read_bytes()[:2000])


def _quantized_text(path: Path) -> None:
    path.write_text("[common_quant_param]\n")


@pytest.mark.parametrize(
    "make", [lambda path: None, Path.mkdir, _empty, _garbage, _cut, _quantized_text]
)
def test_unreadable_model_exits_with_1(
    qconvert: Command, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "m.onnx")
    _assert_refused(
        qconvert,
        tmp_path,
        1,
        "m.onnx",
        "--modelFile=m.onnx",
        f"--configFile={CONFIG}",
        "--outputFile=a",
    )


CONFIG_MISTAKES = {
    "unknown section": (("[full_quant_param]", "[full_quant]"), "[full_quant_param]"),
    "unknown key": (("per_channel", "per_chanel"), "write per_channel"),
    "bad value": (("bit_num = 8", "bit_num = 17"), "bit_num = 8"),
    "bits of another mode": (("bit_num = 8", "bit_num = 4"), "write bit_num = 8"),
    "missing key": (("quant_type = FULL_QUANT", ""), "write quant_type = "),
    "missing data": (("input_type = IMAGE", ""), "input_type: is missing"),
    "reports in a file": (
        ("bit_num = 8", f"debug_info_save_path = {MODEL}"),
        "is a file; give the path of a folder",
    ),
    "unknown input": (("image:", "img:"), "'image'"),
    "no such folder": (("digits/calib", "digits/nowhere"), "nowhere"),
    "wrong channels": (("= GRAY", "= RGB"), "channel"),
}


@pytest.mark.parametrize("name", CONFIG_MISTAKES)
def test_wrong_config_exits_with_1(qconvert: Command, tmp_path: Path, name: str) -> None:
    change, words = CONFIG_MISTAKES[name]
    config = changed(tmp_path / "c.cfg", change)
    flags = (f"--modelFile={MODEL}", f"--configFile={config}", "--outputFile=a")
    _assert_refused(qconvert, tmp_path, 1, words, *flags)


@pytest.mark.parametrize("path", ["nowhere.cfg", "."])
def test_unreadable_config_exits_with_1(qconvert: Command, tmp_path: Path, path: str) -> None:
    _assert_refused(
        qconvert,
        tmp_path,
        1,
        path,
        f"--modelFile={MODEL}",
        f"--configFile={path}",
        "--outputFile=a",
    )


def test_empty_data_folder_exits_with_1(qconvert: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = changed(tmp_path / "c.cfg", (str(DIGITS / "calib"), str(tmp_path / "empty")))
    flags = (f"--modelFile={MODEL}", f"--configFile={config}", "--outputFile=a")
    _assert_refused(qconvert, tmp_path, 1, "empty", *flags)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted; nothing was written."),
        (OSError(28, "No space left on device", "a.onnx"), 1, "a.onnx: no space left on device"),
    ],
)
def test_what_stops_a_conversion_half_way(
    qconvert: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    words: str,
    tmp_path: Path,
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline.models, "save", stop)
    result = qconvert.convert(CONFIG, tmp_path / "a.onnx")
    assert (result.code, result.out) == (code, "")
    assert f"ERROR: {words}" in result.err
    assert not list(tmp_path.iterdir())
