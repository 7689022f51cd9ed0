"""The checks before a conversion: each mistake is named with the lines that put it right, and what
is right is left alone.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from command_line import CONFIG, DIGITS, MODEL, Command, changed
from graphs import build, frozen
from PIL import Image
from running import Ear

from converter.calibrate.data import spec_of
from converter.config import load_config
from converter.config.rules import DATA_RULES
from converter.doctor.checks import CHECKS
from converter.doctor.evidence import Summary
from converter.doctor.examine import examine, findings
from converter.doctor.scenes import suited
from converter.job import Job, Watch
from converter.pipeline.convert import convert

with (DIGITS / "calib.csv").open(newline="") as table:
    LABELS = {row["file"]: int(row["label"]) for row in csv.DictReader(table)}
CLASSES, PICTURES, SIDE = 12, 60, 8
# Colours far from grey and from one another, and a cast that tells red from blue.
COLOURS = np.random.default_rng(3).uniform(20, 235, (CLASSES, 3)) * [1.0, 0.9, 0.6]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def pictures(folder: Path, count: int = PICTURES, side: int = SIDE) -> dict[str, int]:
    """Noise around one colour of each class; the class of each file."""
    rng, labels = np.random.default_rng(0), {}
    for number in range(count):
        noise = rng.normal(0, 18, (side, side, 3))
        pixels = np.clip(COLOURS[number % CLASSES] + noise, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        labels[f"{number}.png"] = number % CLASSES
    return labels


def classifier(mean=MEAN, std=STD, norm: bool = True):
    """The nearest colour, of pictures that are fed as (pixel - mean) / std; with a BatchNorm that
    has seen them.
    """
    colours = (COLOURS - mean) / std
    rng = np.random.default_rng(1)
    seen = (np.clip(COLOURS[:, None] + rng.normal(0, 18, (CLASSES, 500, 3)), 0, 255) - mean) / std
    average, variance = seen.mean((0, 1)), seen.var((0, 1))
    scale = np.sqrt(variance + 1e-5) if norm else np.ones(3)
    first = "BatchNormalization (c, scale, average, average, variance)" if norm else "Identity (c)"
    weight = 6 * colours.T * 2
    graph = f"""g (float[N, 3, {SIDE}, {SIDE}] x) => (float[N, {CLASSES}] y) {{
        c = Conv (x, unit)
        n = {first}
        p = GlobalAveragePool (n)
        f = Flatten (p)
        y = Gemm (f, weight, bias)
    }}"""
    constants = {
        "unit": np.eye(3)[:, :, None, None],
        "weight": weight,
        "bias": -6 * (colours**2).sum(1),
    }
    if norm:
        constants |= {"scale": scale, "average": average, "variance": variance}
    return build(graph, **{name: x.astype(np.float32) for name, x in constants.items()})


@dataclass
class Case:
    folder: Path
    labels: dict[str, int]
    keys: dict[str, object] = field(default_factory=dict)

    def found(self, cheap: bool = False, labelled: bool = True, **keys: object) -> dict[str, str]:
        """Findings by the title of their check."""
        given = {
            "calibrate_path": f"x:{self.folder / 'pictures'}",
            "calibrate_size": PICTURES,
            "input_type": "IMAGE",
            "normalize_mean": list(MEAN),
            "normalize_std": list(STD),
            **keys,
        }
        if labelled:
            rows = "".join(f"{name},{label}\n" for name, label in self.labels.items())
            (self.folder / "labels.csv").write_text(f"file,label\n{rows}")
            given["label_file"] = self.folder / "labels.csv"
        lines = "\n".join(f"{key} = {value}" for key, value in given.items())
        config = self.folder / "c.cfg"
        config.write_text(
            f"[common_quant_param]\nquant_type = FULL_QUANT\nthread_num = 1\n"
            f"[data_preprocess_param]\n{lines}\n"
        )
        job = Job(
            self.folder / "m.onnx", self.folder / "o.onnx", load_config(config, rules=DATA_RULES)
        )
        examined = examine(job, Watch(), cheap)
        return {check.title: " ".join(map(str, found)) for check, found in examined if found}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "m.onnx").write_bytes(frozen(classifier()))
    return Case(tmp_path, pictures(tmp_path / "pictures"))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_what_is_right_is_left_alone(case, labelled, cheap, norm):
    (case.folder / "m.onnx").write_bytes(frozen(classifier(norm=norm)))
    assert not case.found(cheap, labelled)


UNIT = [round(x / 255, 4) for x in MEAN], [round(x / 255, 4) for x in STD]
WRONG = {
    "constants of 0..1": {"normalize_mean": UNIT[0], "normalize_std": UNIT[1]},
    "0..1": {"normalize_mean": [0, 0, 0], "normalize_std": [255, 255, 255]},
    "no normalisation": {"normalize_mean": [0, 0, 0], "normalize_std": [1, 1, 1]},
    "-1..1": {"normalize_mean": [127.5] * 3, "normalize_std": [127.5] * 3},
    "exchanged": {"normalize_mean": list(STD), "normalize_std": list(MEAN)},
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("labelled", [True, False])
def test_wrong_constants_are_named_and_the_right_ones_proposed(case, name, labelled):
    assert "First BatchNorm" in case.found(True, labelled, **WRONG[name])
    proposal = case.found(False, labelled, **WRONG[name])["Preprocessing"]
    for key, wanted in (("normalize_mean", MEAN), ("normalize_std", STD)):
        line = next(x for x in proposal.split("Write: ")[1].split("; ") if x.startswith(key))
        numbers = [float(x) for x in line.split("[")[1].rstrip("]").split(",")]
        np.testing.assert_allclose(numbers, wanted, rtol=0.01)


def test_without_a_batch_norm_answers_and_labels_tell(case):
    (case.folder / "m.onnx").write_bytes(frozen(classifier(norm=False)))
    for labelled in (True, False):
        found = case.found(False, labelled, **WRONG["no normalisation"])
        assert "ImageNet" in found["Preprocessing"]


def test_constants_of_unit_pixels_are_multiplied(case):
    found = case.found(True, False, **WRONG["constants of 0..1"])
    assert (
        "multiply both by 255" in found["Constants"]
        and "normalize_mean = [123.6" in found["Constants"]
    )


def test_the_other_channel_order_shows_by_its_right_answers(case):
    for cheap, title in ((True, "Channel order"), (False, "Preprocessing")):
        found = case.found(cheap, image_to_format="BGR", normalize_mean=[127.5] * 3)
        if title in found:
            assert "image_to_format = RGB" in found[title]
        else:
            pytest.fail(f"{cheap}: {found}")


@pytest.mark.parametrize(("step", "word"), [(1, "smaller"), (-1, "greater"), (3, "smaller")])
def test_labels_off_by_a_constant_are_named_with_it(case, step, word):
    case.labels = {name: label + step for name, label in case.labels.items()}
    assert f"labels {abs(step)} {word}" in case.found(True)["Labels"]


def test_labels_of_other_pictures_and_of_another_model_are_named(case):
    true = dict(case.labels)
    values = np.random.default_rng(0).permutation(list(true.values()))
    case.labels = dict(zip(true, map(int, values), strict=True))
    assert "no more than by chance" in case.found(True)["Labels"]
    case.labels = {**true, "0.png": 99}
    assert "such as 99, are no class" in case.found(True)["Labels"]


def test_copies_and_blank_and_dark_pictures_are_named(case):
    folder = case.folder / "pictures"
    for path in folder.iterdir():
        Image.new("RGB", (SIDE, SIDE)).save(path)
    found = case.found(True, False)
    assert "59 of" in found["Copies"] or "31 of 32" in found["Copies"]
    assert "one colour" in found["Content"]
    rng = np.random.default_rng(0)
    for path in folder.iterdir():
        Image.fromarray(rng.integers(0, 2, (SIDE, SIDE, 3), np.uint8)).save(path)
    assert "0 to 1 of 255" in case.found(True, False)["Content"]


@pytest.mark.parametrize("count", [1, 3])
def test_few_samples_are_named(case, count):
    assert "calibrate_size = 100" in case.found(True, calibrate_size=count)["Number of samples"]


def test_enlarged_pictures_are_named(case):
    for path in (case.folder / "pictures").iterdir():
        Image.open(path).resize((2, 2)).save(path)
    found = case.found(True, False, resize_width=SIDE, resize_height=SIDE)
    assert "enlarged 4.0 times, the first from 2x2" in found["Enlarged pictures"]


def test_a_model_that_normalises_by_itself_needs_no_constants(case):
    graph = f"""g (float[N, 3, {SIDE}, {SIDE}] x) => (float[N, 3] y) {{
        s = Sub (x, mean)
        d = Div (s, std)
        p = GlobalAveragePool (d)
        y = Flatten (p)
    }}"""
    constants = {"mean": np.float32(127.5), "std": np.float32(127.5)}
    (case.folder / "m.onnx").write_bytes(frozen(build(graph, **constants)))
    found = case.found(True, False)
    assert "normalize_std = [1]" in found["Normalised twice"]
    assert not case.found(True, False, normalize_mean=[0] * 3, normalize_std=[1] * 3)


def test_an_input_of_integers_is_fed_pixels(case):
    graph = f"""g (uint8[1, 3, {SIDE}, {SIDE}] x) => (float[1, 3, {SIDE}, {SIDE}] y) {{
        y = Cast <to = 1> (x)
    }}"""
    (case.folder / "m.onnx").write_bytes(frozen(build(graph)))
    assert "takes uint8" in case.found(True, False)["Integer input"]
    raw = case.found(True, False, normalize_mean=[0] * 3, normalize_std=[1] * 3)
    assert not raw


def test_every_check_says_what_it_measures_and_from_when_on_it_warns():
    assert len({check.title for check in CHECKS}) == len(CHECKS)
    assert all(check.measures and check.warns for check in CHECKS)
    assert all(check.in_doctor or check.in_conversion for check in CHECKS)


def test_the_command_prints_the_line_to_write(capsys, case):
    case.found(False, True, **WRONG["0..1"])
    result = Command(capsys)(
        "doctor", case.folder / "m.onnx", f"--configFile={case.folder / 'c.cfg'}"
    )
    assert result.code == 0
    assert "    normalize_mean = [123.675, 116.28, 103.53]" in result.lines


def test_a_conversion_warns_and_goes_on(capsys, tmp_path):
    unit = (
        ("normalize_mean = [127.5]", "normalize_mean = [0.5]"),
        (
            "normalize_std = [127.5]",
            "normalize_std = [0.5]",
        ),
    )
    config = changed(tmp_path / "c.cfg", *unit, base=CONFIG)
    result = Command(capsys).convert(config, tmp_path / "out.onnx", MODEL)
    assert result.code == 0 and "multiply both by 255" in result.err
    right = changed(tmp_path / "r.cfg", base=CONFIG)
    assert "WARNING" not in Command(capsys).convert(right, tmp_path / "out.onnx", MODEL).err


def test_findings_are_those_of_all_checks(case):
    config = load_config(changed(case.folder / "r.cfg", base=CONFIG))
    assert findings(examine(Job(MODEL, case.folder / "o.onnx", config), Watch(), cheap=False)) == []


@pytest.mark.parametrize(
    ("mean", "std"), [(MEAN, STD), ((127.5,) * 3, (127.5,) * 3), ((0.0,) * 3, (255.0,) * 3)]
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_what_a_batch_norm_remembers_tells_how_photographs_were_scaled(mean, std, layout):
    # What training on photographs leaves behind a layer of differences and means of colours.
    rng = np.random.default_rng(5)
    light = rng.normal(0, 46, 4000) + rng.normal(0, 30, 4000)
    colours = np.clip(light[:, None] + rng.normal(0, 9, (4000, 3)) + [123.7, 116.3, 103.5], 0, 255)
    weight = rng.normal(size=(16, 3))
    seen = ((colours - mean) / std) @ weight.T
    constants = {
        "weight": weight[:, :, None, None],
        "ones": np.ones(16),
        "mean": seen.mean(0),
        "variance": seen.var(0),
    }
    sides = "1, 3, 64, 64" if layout == "NCHW" else "1, 64, 64, 3"
    moved = "i = Identity (x)" if layout == "NCHW" else "i = Transpose <perm = [0, 3, 1, 2]> (x)"
    graph = f"""g (float[{sides}] x) => (float[1, 16, 64, 64] y) {{
        {moved}
        c = Conv (i, weight)
        y = BatchNormalization (c, ones, mean, mean, variance)
    }}"""
    model = build(graph, **{name: x.astype(np.float32) for name, x in constants.items()})
    way = suited(model, spec_of(model.graph.inputs[0]))
    np.testing.assert_allclose(way.mean, mean, rtol=0.01)
    np.testing.assert_allclose(way.std, std, rtol=0.01)


def test_a_model_without_a_batch_norm_tells_nothing():
    model = classifier(norm=False)
    assert suited(model, spec_of(model.graph.inputs[0])) is None


def test_a_label_file_that_is_missing_ends_a_conversion_before_it_begins(capsys, tmp_path):
    config = changed(
        tmp_path / "c.cfg", ("input_type = IMAGE", "input_type = IMAGE\nlabel_file = no.csv")
    )
    for flags in ((), ("--dry-run",)):
        result = Command(capsys).convert(config, tmp_path / "out.onnx", MODEL, *flags)
        assert result.code == 1 and "no.csv: the label file" in result.err
    assert not (tmp_path / "out.onnx").exists()


def test_right_answers_of_sub_folders_are_counted(capsys, tmp_path):
    for path in sorted((DIGITS / "calib").iterdir()):
        label = LABELS[path.name]
        (tmp_path / "data" / str(label)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / str(label) / path.name).symlink_to(path)
    config = changed(
        tmp_path / "c.cfg",
        (f"{DIGITS / 'calib'}", f"{tmp_path / 'data'}"),
        ("input_type = IMAGE", f"input_type = IMAGE\nlabel_file = {tmp_path / 'data'}"),
        ("calibrate_size = 100", "calibrate_size = 40"),
    )
    result = Command(capsys).convert(config, tmp_path / "out.onnx", MODEL)
    assert result.code == 0 and "right answers 100.0% -> " in result.out


def test_a_check_that_fails_is_said_and_stops_nothing(tmp_path, monkeypatch):
    def failing(job, watch, cheap):
        raise ValueError("odd")

    monkeypatch.setattr("converter.pipeline.convert.examine", failing)
    config = changed(tmp_path / "c.cfg", ("calibrate_size = 100", "calibrate_size = 20"))
    ear = Ear()
    convert(Job(MODEL, tmp_path / "o.onnx", load_config(config)), ear)
    assert any("is not checked: ValueError('odd')" in line for line in ear.warned)


def test_the_doctor_does_not_send_to_the_doctor(capsys, case):
    case.found(False, False, **WRONG["0..1"])
    result = Command(capsys)(
        "doctor", case.folder / "m.onnx", f"--configFile={case.folder / 'c.cfg'}"
    )
    assert "First BatchNorm" in result.out and "qconvert doctor" not in result.out


def test_without_data_the_doctor_says_so(capsys, tmp_path):
    (tmp_path / "c.cfg").write_text("[common_quant_param]\nquant_type = WEIGHT_QUANT\n")
    result = Command(capsys)("doctor", MODEL, f"--configFile={tmp_path / 'c.cfg'}")
    assert result.code == 1 and "calibrate_path: is missing" in result.err


def test_letterboxed_pixels_are_pixels_all_the_same():
    x = np.zeros((1, 224, 224, 3), np.uint8)
    x[:, 60:] = np.random.default_rng(0).integers(0, 256, (1, 164, 224, 3))
    assert Summary.of(x, x).levels == 64
