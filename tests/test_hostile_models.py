"""Whatever the model file, a conversion ends in a checked model with the float model's numbers, or
in one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import hostile_models
import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import Command, Result
from graphs import exactly
from hostile_models import BROKEN, ODD
from running import write_config

from converter.plan.ops import computes_on_integers

FULL, WEIGHT, DYNAMIC = "FULL_QUANT", "WEIGHT_QUANT", "DYNAMIC_QUANT"
MODES = (FULL, WEIGHT, DYNAMIC)
SUCCESS = "CONVERT RESULT SUCCESS:0"
TYPES = {1: np.float32, 16: np.float32, 10: np.float16, 11: np.float64, 7: np.int64, 9: np.bool_}
SAMPLES = 4
# Signal to noise of 8-bit outputs; the models have up to three weighted layers.
LEAST_DB = 25.0

# Cases that a mode refuses, with words of the sentence; all others must convert.
REFUSED = {
    ("bfloat16", FULL): "bfloat16",
    ("unknown_domain", FULL): "acme:Secret",
    ("zero_batch", FULL): "the sample is empty",
    ("no_inputs", FULL): "calibrate_path",
    **{("no_output_shape", mode): "Field 'shape' of 'type' is required" for mode in MODES},
    **{("no_shapes", mode): "input 'x' has no known number of dimensions" for mode in MODES},
    **{("sparse_weight", mode): "tensor 'b' is read but nothing defines it" for mode in MODES},
}
# The float model itself gives no numbers that could be compared.
NOT_COMPARED = {
    *("bfloat16", "double", "unknown_domain", "string_input", "one_name_for_all_nodes"),
    *(
        "nan_weight",
        "infinite_weight",
        "nan_bias",
        "infinite_bias",
        "huge_weights",
        "one_huge_weight",
    ),
}
LONG = ("a_thousand_nodes",)
# The ONNX checker does not accept the float model either, which runs nevertheless.
UNCHECKED = {"runtime_normalization"}
# Broken files whose mistake only shows when the model runs, which WEIGHT_QUANT does not need to.
LATE = ("weights_of_strings", "group_zero", "shape_mismatch", "opset_6")


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Random data for every input that can take some: SAMPLES samples along a new first axis."""
    rng, weights = np.random.default_rng(0), {weight.name for weight in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        if value.name in weights or kind.elem_type not in TYPES:
            continue
        dims = [
            d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else 8 if axis else 1
            for axis, d in enumerate(kind.shape.dim)
        ]
        dtype = np.dtype(TYPES[kind.elem_type])
        numbers = (
            rng.standard_normal((SAMPLES, *dims))
            if dtype.kind == "f"
            else rng.integers(0, 20, (SAMPLES, *dims))
        )
        feeds[value.name] = np.asarray(numbers, dtype)
    return feeds


def config_of(folder: Path, mode: str, data: Mapping[str, np.ndarray]) -> Path:
    """A config of this mode; the data of each input in a folder of its own."""
    preprocess = {}
    if mode == FULL and data:
        for name, samples in data.items():
            (folder / f"of_{name}").mkdir(parents=True)
            for number, sample in enumerate(samples):
                np.save(folder / f"of_{name}" / f"{number}.npy", sample)
        paths = ",".join(f"{name}:{folder}/of_{name}" for name in data)
        preprocess = {"calibrate_path": paths, "calibrate_size": SAMPLES, "input_type": "NPY"}
    sections = {"data_preprocess": preprocess} if preprocess else {}
    return write_config(
        folder / "c.cfg", common_quant={"quant_type": mode, "thread_num": 1}, **sections
    )


def run(path: Path, feeds: Mapping[str, np.ndarray], optimized: bool) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    return list(onnxruntime.InferenceSession(exactly(path), options).run(None, dict(feeds)))


def decibels(wanted: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise; of values that the float model leaves infinite only that they stay so."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if wanted.dtype.kind != "f":
        return np.inf if np.array_equal(wanted, found) else -np.inf
    np.testing.assert_array_equal(np.isfinite(wanted), np.isfinite(found))
    x, y = (part[np.isfinite(part)].astype(np.float64) for part in (wanted, found))
    noise = float(((x - y) ** 2).sum())
    return np.inf if noise == 0 else float(10 * np.log10(max((x**2).sum(), 1e-300) / noise))


def assert_refused(result: Result, folder: Path, words: str) -> None:
    """One sentence, which was foreseen, and nothing written."""
    assert result.code in (1, 2)
    assert SUCCESS not in result.out
    (error,) = [line for line in result.err.splitlines() if not line.startswith("WARNING: ")]
    assert re.fullmatch(r"ERROR: .+[.]", error)
    assert words in error
    assert "Something unforeseen" not in error
    assert not list(folder.rglob("q.onnx*"))


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, WEIGHT) for name in BROKEN), *((name, FULL) for name in LATE)]
)
def test_broken_files_are_refused(qconvert: Command, tmp_path: Path, name: str, mode: str) -> None:
    make, words = BROKEN[name]
    path = make(tmp_path)
    config = config_of(tmp_path, mode, {"x": np.zeros((2, 1, 3, 8, 8), np.float32)})
    result = qconvert.convert(config, tmp_path / "out" / "q.onnx", path)
    if name in LATE and (mode == WEIGHT or name == "opset_6"):
        assert result.code == 0
        onnx.checker.check_model(tmp_path / "out" / "q.onnx")
    else:
        assert_refused(result, tmp_path, words)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in ODD]
)
def test_odd_models_compute_the_same(
    qconvert: Command, tmp_path: Path, name: str, mode: str
) -> None:
    model = ODD[name]()
    path, data = hostile_models.written(tmp_path, model), feeds_of(model)
    output = tmp_path / "out" / "q.onnx"
    result = qconvert.convert(config_of(tmp_path, mode, data), output, path)
    if (name, mode) in REFUSED:
        assert_refused(result, tmp_path, REFUSED[name, mode])
        return
    assert result.code == 0, result.err
    assert result.lines[-1] == SUCCESS
    assert all(line.startswith("WARNING: ") for line in result.err.splitlines())
    assert [file.name for file in output.parent.iterdir()] == ["q.onnx"]
    if name not in UNCHECKED:
        onnx.checker.check_model(output)
    if name not in NOT_COMPARED:
        sample = {name: np.asarray(samples[0]) for name, samples in data.items()}
        wanted = run(path, sample, optimized=False)
        for optimized in (False, True):
            found = run(output, sample, optimized)
            assert (
                min((decibels(x, y) for x, y in zip(wanted, found, strict=True)), default=np.inf)
                > LEAST_DB
            )


@pytest.mark.parametrize("share", np.linspace(0.02, 0.98, 25))
def test_a_file_cut_off_anywhere_is_refused(
    qconvert: Command, tmp_path: Path, share: float
) -> None:
    whole = hostile_models.plain().SerializeToString()
    path = hostile_models.written(tmp_path, whole[: int(len(whole) * share)])
    assert_refused(
        qconvert.convert(config_of(tmp_path, WEIGHT, {}), tmp_path / "q.onnx", path),
        tmp_path,
        "m.onnx",
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in ODD if name.startswith("quantized_")])
def test_a_quantized_model_is_said_to_be_one(
    qconvert: Command, tmp_path: Path, name: str, mode: str
) -> None:
    model = ODD[name]()
    config = config_of(tmp_path, mode, feeds_of(model))
    path = hostile_models.written(tmp_path, model)
    result = qconvert.convert(config, tmp_path / "q.onnx", path)
    imported = (name, mode) == ("quantized_already", FULL)
    assert "Trained weights" in result.out if imported else "is quantized already" in result.err
    integers = [node.op_type for node in model.graph.node if computes_on_integers(node)]
    after = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert all(after.count(op_type) >= integers.count(op_type) for op_type in integers)


@pytest.mark.parametrize("mode", (WEIGHT, DYNAMIC))
@pytest.mark.parametrize("name", ["nan_weight", "infinite_weight"])
def test_weights_that_are_no_numbers_stay_as_they_are(
    qconvert: Command, tmp_path: Path, name: str, mode: str
) -> None:
    path = hostile_models.written(tmp_path, ODD[name]())
    result = qconvert.convert(config_of(tmp_path, mode, {}), tmp_path / "q.onnx", path)
    assert "its weight holds NaN or infinite values" in result.out
    kept = [
        t
        for t in onnx.load(tmp_path / "q.onnx").graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    ]
    assert any(not np.isfinite(onnx.numpy_helper.to_array(tensor)).all() for tensor in kept)


@pytest.mark.parametrize("name", ["external_above", "external_symlink", "external_in_attribute"])
def test_the_model_folder_is_also_known_to_a_relative_path(
    qconvert: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = BROKEN[name][0](tmp_path)
    config = config_of(tmp_path, WEIGHT, {})
    monkeypatch.chdir(path.parent)
    assert_refused(
        qconvert.convert(config, tmp_path / "q.onnx", Path(path.name)),
        tmp_path,
        "outside of the model's folder",
    )
