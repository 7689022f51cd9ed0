"""Real trained models, where they are at hand: QCONVERT_DATA names a folder with models/ and
images/.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import DIGITS, ROOT, Command, outputs
from PIL import Image

DATA = Path(os.environ.get("QCONVERT_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Case:
    """A model, how its data is preprocessed, and the least cosine similarity of its outputs to the
    float model's.
    """

    model: str
    input_name: str
    data: str
    preprocessing: str
    cosine: float

    @property
    def path(self) -> Path:
        return DATA / "models" / f"{self.model}.onnx"


PICTURES = "input_type = IMAGE\n"
IMAGENET = PICTURES + "resize_short_side = 256\ncenter_crop_width = 224\ncenter_crop_height = 224\n"
CASES = (
    Case(
        "mobilenet_v1_0.75_224",
        "input",
        "imagenet/calib",
        IMAGENET + "normalize_mean = [127.5, 127.5, 127.5]\nnormalize_std = [127.5, 127.5, 127.5]",
        0.95,
    ),
    Case(
        "resnet20_cifar10",
        "input",
        "cifar10/calib",
        PICTURES
        + "normalize_mean = [123.675, 116.28, 103.53]\nnormalize_std = [58.395, 57.12, 57.375]",
        0.99,
    ),
    Case("mnist_cnn", "Input3", "digits", PICTURES + "image_to_format = GRAY", 0.99),
    Case("mlperf_tiny_kws_dscnn", "input_1", "features", "input_type = NPY", 0.99),
    Case(
        "super_resolution_224",
        "input",
        "imagenet/calib",
        IMAGENET + "normalize_mean = [0]\nnormalize_std = [255]",
        0.999,
    ),
)


def _features(file: Path) -> Path:
    """Smooth random features with the spread of MFCCs, a row a sample: the first coefficients are
    the largest.
    """
    spread = 60.0 / (1 + np.arange(10.0))
    steps = np.random.default_rng(5).normal(size=(16, 49, 10)).cumsum(axis=1) / 4
    np.save(file, (steps * spread)[..., None].astype(np.float32))
    return file


def _data(case: Case, scratch: Path) -> Path:
    if case.data == "features":
        return _features(scratch / "features.npy")
    return DIGITS / "calib" if case.data == "digits" else DATA / "images" / case.data


def _config(case: Case, scratch: Path) -> Path:
    config = scratch / "real.cfg"
    config.write_text(
        "[common_quant_param]\nquant_type = FULL_QUANT\n[data_preprocess_param]\ncalibrate_size "
        "= 12\n"
        f'calibrate_path = {case.input_name}:"{_data(case, scratch)}"\n{case.preprocessing}\n'
    )
    return config


def _sample(case: Case, scratch: Path) -> np.ndarray:
    """A sample made here, by plain arithmetic: what the model would be fed in use."""
    if case.data == "features":
        return np.load(scratch / "features.npy")[:1]
    picture = Image.open(sorted(_data(case, scratch).glob("*.*"))[0])
    if case.data == "cifar10/calib":
        pixels = (np.asarray(picture, np.float64) - [123.675, 116.28, 103.53]) / [
            58.395,
            57.12,
            57.375,
        ]
        return pixels.transpose(2, 0, 1)[None].astype(np.float32)
    if case.model.startswith("mobilenet"):
        pixels = np.asarray(picture.convert("RGB").resize((224, 224)), np.float32) / 127.5 - 1
        return pixels.transpose(2, 0, 1)[None]
    grey = np.asarray(
        picture.convert("L").resize((28, 28) if case.data == "digits" else (224, 224)), np.float32
    )
    return grey[None, None] / np.float32(1 if case.data == "digits" else 255)


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    a, b = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_real_model(case: Case, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not case.path.is_file():
        pytest.skip(f"{case.path} is not there")
    output = tmp_path / "quantized.onnx"
    result = Command(capsys).convert(_config(case, tmp_path), output, case.path)
    assert (result.code, result.err) == (0, "")
    onnx.checker.check_model(onnx.load(output), full_check=True)
    assert output.stat().st_size < 0.8 * case.path.stat().st_size

    feed = {case.input_name: _sample(case, tmp_path)}
    reference = outputs(case.path, feed, optimized=True)[0]
    plain, fused = (outputs(output, feed, optimized)[0] for optimized in (False, True))
    assert _cosine(plain, reference) > case.cosine
    assert _cosine(fused, reference) > case.cosine
    assert _cosine(plain, fused) > case.cosine


STORED = "[common_quant_param]\nquant_type = WEIGHT_QUANT\nbit_num = 2\n"
DISTILLED = "[data_preprocess_param]\ninput_type = SYNTHETIC\ncalibrate_size = 24\n"


@pytest.mark.slow
def test_distilled_samples_tell_how_weights_are_rounded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.model == "resnet20_cifar10")
    if not case.path.is_file():
        pytest.skip(f"{case.path} is not there")
    pictures = sorted((DATA / "images" / "cifar10" / "dev").iterdir())[:500]
    mean, std = np.array([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], np.float32)
    images = (np.asarray(Image.open(path).convert("RGB"), np.float32) for path in pictures)
    x = np.stack([((image - mean) / std).transpose(2, 0, 1) for image in images])

    def answers(path: Path) -> np.ndarray:
        return np.asarray(outputs(path, {"input": x}, True)[0].argmax(1))

    same = []
    for text in (STORED, STORED + DISTILLED):
        config, output = tmp_path / "c.cfg", tmp_path / "q.onnx"
        config.write_text(text)
        assert Command(capsys).convert(config, output, case.path).code == 0
        same.append(float((answers(output) == answers(case.path)).mean()))
    assert same[1] > same[0] + 0.02
