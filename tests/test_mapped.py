"""Large models without their weights in memory: a file is read where its weights lie, copies share
one file of them, and every mode makes the same of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import build, frozen, normal, run
from running import write_config

from converter.config import load_config
from converter.errors import ModelError
from converter.graph import files, mapped
from converter.graph.files import load, saved, weights_written_once
from converter.job import Job
from converter.pipeline.convert import convert

WORDS, WIDTH = 300, 64
TEXT = """g (int64[B,T] ids) => (float[] y) {
    e = Gather (table, ids)  h = MatMul (e, w)  n = Tanh (h)
    t = Transpose <perm = [1, 0]> (table)  y = MatMul (n, t) }"""
CONSTANTS = {"table": normal(WORDS, WIDTH), "w": normal(WIDTH, WIDTH, seed=1) / 8}
FEEDS = {"ids": np.arange(12).reshape(2, 6)}
MODES = {
    "FULL_QUANT": {"common_quant": {"quant_type": "FULL_QUANT"}},
    "DYNAMIC_QUANT": {"common_quant": {"quant_type": "DYNAMIC_QUANT"}},
    "ON_LOAD": {"common_quant": {"quant_type": "WEIGHT_QUANT", "bit_num": 5}},
    "ON_THE_FLY": {
        "common_quant": {"quant_type": "WEIGHT_QUANT", "bit_num": 4},
        "weight_quant": {"dequant_strategy": "ON_THE_FLY", "block_size": 32},
    },
}


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is so large that its weights are mapped."""
    monkeypatch.setattr(mapped, "MAPPED_ABOVE", 0)


def written(folder: Path, *, apart: bool) -> Path:
    """The model in `folder`, its weights in a file of their own where `apart`."""
    path = folder / "model.onnx"
    proto = onnx.load_from_string(frozen(build(TEXT, **CONSTANTS)))
    onnx.save(
        proto, path, save_as_external_data=apart, location="model.onnx_data", size_threshold=0
    )
    return path


def mapped_weights(model: ir.Model) -> set[str]:
    values = model.graph.initializers.values()
    return {v.name or "" for v in values if isinstance(v.const_value, ir.ExternalTensor)}


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("apart", [True, False])
def test_weights_stay_in_the_file(tmp_path, apart):
    model = load(written(tmp_path, apart=apart))
    assert mapped_weights(model) == set(CONSTANTS)
    for name, wanted in CONSTANTS.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), wanted)


@pytest.mark.usefixtures("all_large")
def test_everything_but_the_weights_is_read_as_it_stands(tmp_path):
    path = written(tmp_path, apart=False)
    own, whole = mapped.read(path), onnx.load(path)
    assert own.graph.node == whole.graph.node
    assert own.graph.input == whole.graph.input
    assert own.opset_import == whole.opset_import
    for found, wanted in zip(own.graph.initializer, whole.graph.initializer, strict=True):
        assert (found.name, found.dims, found.data_type) == (
            wanted.name,
            wanted.dims,
            wanted.data_type,
        )
        place = {entry.key: entry.value for entry in found.external_data}
        start = int(place["offset"])
        content = path.read_bytes()[start : start + int(place["length"])]
        assert content == wanted.raw_data


@pytest.mark.usefixtures("all_large")
def test_weights_that_are_written_number_by_number_are_read_with_the_rest(tmp_path):
    proto = onnx.load_from_string(frozen(build(TEXT, **CONSTANTS)))
    table = proto.graph.initializer[0]
    table.float_data.extend(np.frombuffer(table.raw_data, np.float32))
    table.ClearField("raw_data")
    onnx.save(proto, tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    np.testing.assert_array_equal(
        model.graph.initializers["table"].const_value.numpy(), CONSTANTS["table"]
    )


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("kept", [1, 100, 5000, 20000])
def test_a_file_that_is_cut_off_is_named(tmp_path, kept):
    path = written(tmp_path, apart=False)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.onnx: this is not"):
        load(path)


@pytest.mark.usefixtures("all_large")
def test_copies_of_a_model_share_one_file_of_weights(tmp_path):
    model = load(written(tmp_path, apart=False))
    other = model.clone()
    other.graph.initializers["w"].const_value = ir.tensor(CONSTANTS["w"] * 2, name="w")
    with weights_written_once(), saved(model) as first, saved(other) as second:
        assert first.parent == second.parent
        sizes = [(first.parent / "weights").stat().st_size]
        with saved(model, ["h"]) as third:
            sizes.append((third.parent / "weights").stat().st_size)
        assert sizes[0] == sizes[1]
        outputs = [run(frozen_at(path), FEEDS)["y"] for path in (first, second)]
    assert not first.parent.exists()
    for found, factor in zip(outputs, (1, 2), strict=True):
        wanted = build(TEXT, **{**CONSTANTS, "w": CONSTANTS["w"] * factor})
        np.testing.assert_array_equal(found, run(wanted, FEEDS)["y"])


@pytest.mark.usefixtures("all_large")
def test_weights_are_read_while_arrays_of_them_are_in_use(tmp_path):
    model = load(written(tmp_path, apart=False))
    table = model.graph.initializers["table"].const_value.numpy()
    outputs = run(files.serialized(model), FEEDS)
    np.testing.assert_array_equal(outputs["y"], run(build(TEXT, **CONSTANTS), FEEDS)["y"])
    np.testing.assert_array_equal(table, CONSTANTS["table"])
    assert not mapped_weights(model)


def frozen_at(path: Path) -> bytes:
    return bytes(onnx.load(path).SerializeToString())


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_the_same_of_mapped_weights(tmp_path, monkeypatch, mode, apart):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, WORDS, (8, 6)))
    data = {"calibrate_path": "ids:ids.npy", "calibrate_size": 8, "input_type": "NPY"}
    sections = {**MODES[mode]}
    if mode == "FULL_QUANT":
        sections["data_preprocess"] = data
    config = load_config(write_config(tmp_path / "c.cfg", **sections))
    (tmp_path / "models").mkdir()
    path, results = written(tmp_path / "models", apart=apart).relative_to(tmp_path), []
    for limit in (mapped.MAPPED_ABOVE, 0):
        monkeypatch.setattr(mapped, "MAPPED_ABOVE", limit)
        output = tmp_path / f"out{limit}" / "out.onnx"
        outcome = convert(Job(path, output, config))
        assert outcome.verification is not None
        results.append(output.read_bytes())
    assert results[0] == results[1]


@pytest.mark.usefixtures("all_large")
def test_a_result_of_two_files_is_whole_without_the_float_model(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "EXTERNAL_DATA_ABOVE", 0)
    path = written(tmp_path, apart=True)
    config = load_config(write_config(tmp_path / "c.cfg", **MODES["ON_THE_FLY"]))
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "out.onnx"
    convert(Job(path, output, config))
    path.unlink()
    path.with_name("model.onnx_data").unlink()
    found, wanted = (run(x, FEEDS)["y"] for x in (frozen_at(output), build(TEXT, **CONSTANTS)))
    assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)
