"""Sessions of ONNX Runtime that a conversion opens, each for a model of its own."""

from __future__ import annotations

import hashlib
import traceback
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from command_line import MODEL
from running import write_config

from converter.calibrate.exact import saturates_here
from converter.config import load_config
from converter.job import Job
from converter.pipeline.convert import convert

IMAGES = MODEL.parent / "calib"


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The model of every session that is opened from now on, and whether a walk over layers opened
    it.
    """
    saturates_here()  # asked once in a process
    found: list[tuple[str, bool]] = []

    class Noted(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, source: str | bytes, options: Any, **more: Any) -> None:
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            level = str(options.graph_optimization_level)
            walks = any(f.filename.endswith("walk.py") for f in traceback.extract_stack())
            found.append((hashlib.sha256(content + level.encode()).hexdigest(), walks))
            super().__init__(source, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Noted)
    return found


def example(folder: Path, **common: object) -> Job:
    """The conversion of the shipped example."""
    data = {
        "calibrate_path": f"image:{IMAGES}",
        "calibrate_size": 12,
        "input_type": "IMAGE",
        "image_to_format": "GRAY",
        "normalize_mean": "[0]",
        "normalize_std": "[255]",
    }
    sections = {"common_quant": {"quant_type": "FULL_QUANT", **common}, "data_preprocess": data}
    return Job(MODEL, folder / "q.onnx", load_config(write_config(folder / "c.cfg", **sections)))


# What the model is fed and answers, calibration, how large products are, the file before it is
# kept, the user's own file, both models as they are executed, and both with all that is looked
# at; reports add what tells what each node costs, the quantized model cut open and six ends of
# the float one, and open both models once more to time what executes them.
@pytest.mark.parametrize(("reports", "count", "timed"), [(False, 9, 0), (True, 16, 2)])
def test_a_conversion_opens_each_model_once(
    tmp_path: Path, sessions: list[tuple[str, bool]], reports: bool, count: int, timed: int
) -> None:
    more = {"debug_info_save_path": tmp_path / "reports"} if reports else {}
    convert(example(tmp_path, **more))
    outside = [model for model, walks in sessions if not walks]
    assert len(outside) - timed == len(set(outside)) == count
    assert (tmp_path / "reports").exists() == reports


def test_what_reports_measure_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = convert(example(tmp_path)).errors
    assert len(alone) > 5
    assert sorted(alone, key=lambda error: error.sqnr_db) == list(alone)

    def again(*_: object) -> None:
        pytest.fail("tensors inside are compared a second time")

    monkeypatch.setattr("converter.pipeline.convert.tensor_errors", again)
    assert convert(example(tmp_path, debug_info_save_path=tmp_path / "reports")).errors == alone
