"""A prepared float model is read and never changed: not by planning, not by calibration, not by an
attempt; whatever changes is a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import build, frozen, normal, positive, prepared, uneven
from running import write_config
from sample_files import colour

from converter.config import load_config
from converter.job import Job, Watch
from converter.modes import MODES, full_quant
from converter.pipeline.inspect import inspect
from converter.prepare import prepare
from converter.prepare.fake_quant import without_training

CONVOLUTIONS = "c = Conv (x, w, b)  r = Relu (c)  d = Conv (r, v)  y = Relu (d)"
SCALES = {"s": np.float32(0.05), "z": np.uint8(128)}
PAIR = "{1} = QuantizeLinear ({0}, s, z)  {2} = DequantizeLinear ({1}, s, z)"


def convolutions() -> ir.Model:
    """Two, whose channels differ in size, so that there is something to even out."""
    return prepared(
        f"g (float[1,3,8,8] x) => (float[] y) {{ {CONVOLUTIONS} }}",
        w=uneven(8, 3, 3, 3),
        b=normal(8),
        v=normal(4, 8, 1, 1),
    )


def trained() -> ir.Model:
    """One convolution between trained pairs."""
    around = (PAIR.format("x", "q", "p"), PAIR.format("c", "t", "y"))
    text = f"{around[0]}  c = Conv (p, w)  {around[1]}"
    codes = np.random.default_rng(0).integers(-127, 128, (8, 3, 3, 3))
    weight = (codes * 0.01).astype(np.float32)
    return prepare(build(f"g (float[1,3,8,8] x) => (float[] y) {{ {text} }}", w=weight, **SCALES))


def products() -> ir.Model:
    """Of activations with a channel that stands out."""
    text = "n = LayerNormalization (x, g, h)  p = MatMul (n, w)  t = Tanh (p)  y = MatMul (t, v)"
    gain = positive(32)
    gain[3] = 80
    arrays = {"g": gain, "h": normal(32), "w": normal(32, 64), "v": normal(64, 64)}
    return prepare(build(f"g (float[1,6,32] x) => (float[] y) {{ {text} }}", opset=17, **arrays))


@dataclass(frozen=True)
class Case:
    """What a config asks for; `changes` tells that FULL_QUANT needs the model in another form."""

    model: ir.Model
    common: dict[str, object] = field(default_factory=dict)
    sections: dict[str, dict[str, object]] = field(default_factory=dict)
    input_type: str = "DEFAULT"
    changes: bool = False


FULL, EVEN = {"quant_type": "FULL_QUANT"}, {"full_quant": {"per_channel": "false"}}
WEIGHTS = {"quant_type": "WEIGHT_QUANT", "min_quant_weight_channel": 0}
SEARCH = {"mixed_bit_weight_quant": {"search": "SENSITIVITY"}}
CASES = {
    "full": Case(convolutions(), FULL),
    "full, equalized": Case(convolutions(), FULL, EVEN, changes=True),
    "full, smoothed": Case(products(), FULL, changes=True),
    "full, max_drop": Case(convolutions(), FULL, {"full_quant": {"max_drop": 0.00001}}),
    "full, integer edges": Case(convolutions(), FULL, input_type="UINT8"),
    "full, trained": Case(trained(), FULL, changes=True),
    "weight": Case(products(), {**WEIGHTS, "bit_num": 4}),
    "weight, search": Case(products(), {**WEIGHTS, "bit_num": 0}, SEARCH),
    "dynamic": Case(products(), {"quant_type": "DYNAMIC_QUANT"}),
    "float32": Case(trained(), {}, {"transform_quant": {"export_precision_mode": "FLOAT32"}}),
    "float16": Case(products()),
}


def job_of(case: Case, folder: Path) -> Job:
    """The case with six samples."""
    (folder / "model.onnx").write_bytes(frozen(case.model))
    shape = tuple(case.model.graph.inputs[0].shape)
    np.save(folder / "x.npy", normal(6, *shape[1:]))
    data = {"calibrate_path": f"x:{folder / 'x.npy'}", "calibrate_size": 6, "input_type": "NPY"}
    common = {**case.common, "thread_num": 1}
    sections = {"common_quant": common, "data_preprocess": data, **case.sections}
    config = load_config(write_config(folder / "c.cfg", **sections), rules=())
    output = folder / "out.onnx"
    return Job(folder / "model.onnx", output, config, input_type=case.input_type)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_mode_changes_the_model_it_is_given(case, tmp_path):
    job = job_of(case, tmp_path)
    before = frozen(case.model)
    given = without_training(case.model, job)
    MODES[job.mode].make_plan(given, job)
    assert frozen(case.model) == before, "make_plan changed the model: work on model.clone()"
    result = MODES[job.mode].quantize(given, job, Watch())
    result.finish()
    assert frozen(case.model) == before, "quantize changed the model: work on model.clone()"
    assert result.model is not case.model


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("full")])
def test_full_quant_changes_nothing_after_its_set_up(name, tmp_path):
    case = CASES[name]
    job = job_of(case, tmp_path)
    setup = full_quant.set_up(without_training(case.model, job), job, Watch())
    last = frozen(setup.model)
    assert (last != frozen(case.model)) == case.changes
    evidence = full_quant.observed(setup, Watch())
    assert frozen(setup.model) == last, "calibration changed the float model"
    full_quant.attempt(setup, evidence, full_quant.Choice(), Watch())
    found = full_quant.within_drop(setup, evidence, Watch())
    full_quant.set_edges(found.model, setup, evidence, Watch())
    assert frozen(setup.model) == last, "an attempt changed the float model"


def test_pixels_are_folded_into_the_copy_alone(tmp_path):
    case = replace(CASES["full"], input_type="UINT8")
    colour(tmp_path / "a.png", 8, 8)
    pictures = {"calibrate_path": f"x:{tmp_path}", "calibrate_size": 1, "input_type": "IMAGE"}
    normalize = {"normalize_mean": "[0, 0, 0]", "normalize_std": "[50, 60, 70]"}
    case = replace(case, sections={"data_preprocess": {**pictures, **normalize}})
    job, before = job_of(case, tmp_path), frozen(case.model)
    setup = full_quant.set_up(without_training(case.model, job), job, Watch())
    assert setup.pixels is not None
    assert frozen(case.model) == before != frozen(setup.model)


def test_inspect_plans_all_modes_on_one_model(tmp_path):
    job_of(CASES["full, trained"], tmp_path)
    modes = {row["mode"]: row for row in inspect(tmp_path / "model.onnx")["modes"]}
    # What training knew is taken out for one mode alone: in the others its pairs are nodes.
    assert modes["FULL_QUANT"]["nodes"] == 1
    assert modes["WEIGHT_QUANT"]["nodes"] == modes["DYNAMIC_QUANT"]["nodes"] == 5
