"""The light models in onnx's backend tests, real networks whose weights are one constant each,
through every mode.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import onnxruntime
import pytest
from command_line import Command
from graphs import exactly
from running import write_config

FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "light"
MODELS = sorted(FOLDER.glob("light_*.onnx"))
QUICK = {f"light_{name}" for name in ("squeezenet", "shufflenet", "inception_v1")}
EACH = [
    pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem)
    for path in MODELS
]
MODES = ("FULL_QUANT", "WEIGHT_QUANT", "DYNAMIC_QUANT")


def _runs(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return list(onnxruntime.InferenceSession(exactly(path), options).run(None, feeds))


def test_there_are_light_models() -> None:
    assert len(MODELS) >= 9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", EACH)
def test_light_models_convert(qconvert: Command, tmp_path: Path, model: Path, mode: str) -> None:
    (value,) = onnxruntime.InferenceSession(model).get_inputs()
    sample = np.random.default_rng(0).standard_normal(value.shape).astype(np.float32)
    np.save(tmp_path / "x.npy", sample)
    data = {
        "calibrate_path": f"{value.name}:{tmp_path}/x.npy",
        "calibrate_size": 1,
        "input_type": "NPY",
    }
    sections = {"data_preprocess": data} if mode == "FULL_QUANT" else {}
    config = write_config(tmp_path / "c.cfg", common_quant={"quant_type": mode}, **sections)
    result = qconvert.convert(config, tmp_path / "q.onnx", model, "--quiet")
    assert result.code == 0, result.err
    onnx.checker.check_model(tmp_path / "q.onnx", full_check=True)
    (wanted,), (found,) = (
        _runs(path, {value.name: sample}) for path in (model, tmp_path / "q.onnx")
    )
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max(), rtol=0.05)
