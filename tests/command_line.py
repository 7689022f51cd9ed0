"""Runs the command as a user does, and the models it writes as a runtime does; for tests that go
end to end.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from graphs import exactly
from PIL import Image

from converter.cli import main

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits"
MODEL = DIGITS / "digits_cnn.onnx"
CONFIG = ROOT / "configs" / "full_quant.cfg"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Command:
    """`qconvert` in this process, with what it prints."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        self._capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        return Result(code, *self._capsys.readouterr())

    def convert(self, config: Path, output: Path, model: Path = MODEL, *flags: str) -> Result:
        return self(
            f"--modelFile={model}", f"--configFile={config}", f"--outputFile={output}", *flags
        )


def changed(path: Path, *changes: tuple[str, str], base: Path = CONFIG) -> Path:
    """A config like `base`, with absolute data folders and some of its text replaced."""
    text = base.read_text().replace("../examples", f"{ROOT}/examples")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def outputs(model: Path, sample: Arrays, optimized: bool) -> list[np.ndarray]:
    """What ONNX Runtime computes, with all of its graph optimizations or none."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    session = onnxruntime.InferenceSession(
        exactly(model), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(sample)))


def digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of `dev` or `calib` as one batch of model input, with their labels."""
    with (DIGITS / f"{part}.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    pixels = np.stack(
        [np.asarray(Image.open(DIGITS / part / row["file"]).convert("L")) for row in rows]
    )
    images = (pixels[:, None].astype(np.float32) - 127.5) / 127.5
    return images, np.array([int(row["label"]) for row in rows])
