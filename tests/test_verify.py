"""What running both models tells, on models whose figures are known by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import build, normal
from running import Ear, InMemory, job, resources

from calib.affine import Array
from calib.images import ImageOptions
from calib.intervals import drop_interval
from calib.samples import Dataset, InputSpec, open_dataset
from converter.calibrate.data import synthetic_data
from converter.calibrate.exact import saturating
from converter.config import load_config
from converter.measure.both import Both, paired
from converter.measure.errors import Few, TensorError
from converter.measure.results import Verification
from converter.measure.verify import _difference, _warn, verify
from converter.pipeline.convert import convert
from converter.plan.plan import QuantPlan
from converter.plan.result import Quantized
from converter.report.text import verification_lines

ROWS = "g (float[1,3] x) => (float[1,3] y) { y = Add (x, k) }"


class Split(InMemory):
    """Calibration samples with others behind them."""

    def __init__(
        self, samples: list[Array], behind: list[Array], names: list[str] | None = None
    ) -> None:
        super().__init__([{"x": x} for x in samples], names or [])
        self.behind = behind
        self.behind_names = names or []

    def further(self, size: int) -> Dataset:
        return InMemory([{"x": x} for x in self.behind[:size]], self.behind_names)


def rows(*values: list[float]) -> list[Array]:
    return [np.array([value], np.float32) for value in values]


SCORES = rows([3, 1, 0], [0, 2, 1], [1, 0, 4], [5, 4, 0])


def both(result: Quantized, ear: Ear) -> Both:
    return Both(result, paired(result, inside=False), resources(), ear)


def checked(
    shift: list[float], data: Dataset, labels: Path | None = None, ear: Ear | None = None
) -> Verification:
    """A model that adds nothing beside one that adds `shift`."""
    models = (build(ROWS, k=np.array([k], np.float32)) for k in ([0.0, 0, 0], shift))
    found = verify(both(Quantized(*models, QuantPlan({}, {}), data), ear or Ear()), labels)
    assert found is not None
    return found


def test_errors_and_answers():
    found = checked([0, 1.5, 0], Split(SCORES, []))
    x = np.concatenate(SCORES).astype(np.float64)
    y = x + np.array([0, 1.5, 0])
    (error,) = found.outputs
    assert error.name == "y"
    assert error.cosine == pytest.approx(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)))
    assert error.sqnr_db == pytest.approx(10 * np.log10(np.sum(x * x) / (4 * 1.5**2)))
    assert found.agreement == np.mean(x.argmax(1) == y.argmax(1)) == 3 / 4
    assert found.fused_difference == 0
    assert (found.samples, found.held_back, found.top1) == (4, False, None)


def test_samples_behind_the_calibration_are_taken():
    found = checked([0, 1.5, 0], Split(SCORES, SCORES[2:] * 10))
    assert (found.samples, found.held_back, found.agreement) == (20, True, 0.5)
    many = checked([0, 1.5, 0], Split(SCORES, SCORES * 40))
    assert many.samples == 100


def test_without_data_random_samples_are_taken():
    found = checked([0, 0, 0], Dataset((), (), ()), ear=(ear := Ear()))
    assert (found.agreement, found.random, found.held_back) == (None, True, False)
    verified, misled = list(verification_lines(found))[:2]
    assert verified.startswith("Verified on 8 random samples: ")
    assert misled.startswith("Random samples mislead")
    assert found.outputs[0].sqnr_db == np.inf
    assert ear.said == ["There is no data: the outputs are compared on random samples."]


def test_random_samples_that_bits_were_chosen_on_are_called_so():
    model = build(ROWS, k=np.zeros((1, 3), np.float32))
    found = checked([0, 1, 0], synthetic_data(model), ear=(ear := Ear()))
    assert found.where == "8 random samples"
    assert found.random
    assert ear.said == []


def test_right_answers(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\na.png,0\nb.png,1\nc.png,2\nd.png,1\n")
    data = Split(SCORES, [], ["a.png", "b.png", "c.png", "d.png"])
    found = checked([0, 1.5, 0], data, tmp_path / "labels.csv")
    assert found.top1 == (3 / 4, 1)
    assert found.drop == drop_interval(0, 1, 4)
    line = next(verification_lines(found))
    assert "same answer on 75.0% (95%: 30.1% to 95.4%)" in line
    assert "right answers 75.0% -> 100.0% (loss, 95%: -" in line


def test_all_labelled_samples_behind_the_calibration_are_counted(tmp_path):
    names = [f"{number}.png" for number in range(240)]
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{n},0\n" for n in names))
    data = Split(SCORES, SCORES * 60, names)
    assert checked([0, 0, 0], data, tmp_path / "labels.csv").samples == 240


def test_missing_labels_are_no_error(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\na.png,0\n")
    data = Split(SCORES, [], ["a.png", "b.png", "c.png", "d.png"])
    assert checked([0, 1.5, 0], data, tmp_path / "labels.csv", ear := Ear()).top1 is None
    assert "Right answers are not counted: " in ear.warned[0]
    assert "there is no label for b.png" in ear.warned[0]


@pytest.mark.parametrize("shape", ["[2,3]", "[1,3,2]", "[1,1]", "[1,384]"])
def test_what_is_no_classifier_has_no_answers(shape):
    graph = f"g (float{shape} x) => (float[] y) {{ y = Abs (x) }}"
    data = Split([normal(*map(int, shape[1:-1].split(",")))], [])
    result = Quantized(build(graph), build(graph), QuantPlan({}, {}), data)
    found = verify(both(result, Ear()), None)
    assert found is not None
    assert found.agreement is None


def test_a_loss_is_warned_of():
    checked([0, 30, 0], Split(SCORES, []), ear=(ear := Ear()))
    assert any(
        line.startswith("Output 'y' is only 0.") and "debug_info_save_path" in line
        for line in ear.warned
    )


@pytest.mark.parametrize(
    ("fused", "plain", "warns"),
    [(140, np.inf, False), (140, 150, False), (90, np.inf, True), (20, 24, True)],
)
def test_last_bits_are_no_disagreement(fused, plain, warns):
    errors = [(TensorError("y", 1.0, fused), TensorError("y", 1.0, plain))]
    same = build(ROWS, k=np.zeros((1, 3), np.float32))
    data = Split(SCORES, [])
    found = checked([0, 0, 0], data)
    _warn(found, errors, Quantized(same, same, QuantPlan({}, {}), data), ear := Ear())
    assert any("integer kernels disagree" in line for line in ear.warned) == warns


def test_differences_of_integers_do_not_wrap():
    # With optimizations a code may be another one, here as if: 3 and 5 of at most 200.
    plain, after = ([np.array(codes, np.uint8)] for codes in ([3, 200], [5, 200]))
    assert _difference([plain], [after]) == 2 / 200
    assert _difference([], [after]) == 0


# --- saturation


def products(codes: list[int], node: str, kind: type = np.int8, zero: type = np.uint8) -> list[str]:
    """Which nodes of a model with one Q/DQ product of these weights can saturate."""
    graph = f"""g (float[1,4,5,5] x) => (float[] y) {{
        q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)
          v = DequantizeLinear (w, s, wz)
        [product] y = {node} (d, v)
    }}"""
    shape = (-1, 1, 1, 1) if "group" in node else (1, 4, 1, -1)
    weight = np.array(codes, kind).reshape(shape)
    return list(saturating(build(graph, w=weight, s=np.float32(1), z=zero(0), wz=kind(0))))


@pytest.mark.parametrize(
    ("codes", "saturates"),
    [
        ([64, 64, 1, 1], False),
        ([65, 64, 1, 1], True),
        ([-64, -65, 0, 0], True),
        ([1, 127, 2, 0], False),
        # Columns 1 and 2 are not added in one go; codes of opposite signs make up for each other.
        ([0, 127, 127, 0], False),
        ([127, -127, 0, 0], False),
        ([0, 0, 2, 127], True),
    ],
)
def test_pairs_of_columns(codes, saturates):
    assert products(codes, "Conv") == (["product"] if saturates else [])


def test_signed_data_saturates_as_runtimes_make_it_unsigned():
    assert products([65, 64, 1, 1], "Conv", zero=np.int8) == ["product"]


def test_depthwise_convolutions_and_other_types_do_not_saturate():
    assert products([127, 127, 127, 127], "Conv <group = 4>") == []
    assert products([255, 255, 255, 255], "Conv", kind=np.uint8) == []


@pytest.mark.parametrize("safe", ["true", "false"])
def test_a_conversion_says_when_it_saturates(tmp_path, safe):
    weight = np.repeat(np.abs(normal(4, 4, 1, 1)) + 3, 2, axis=1)[:, :4]
    graph = "g (float[1,4,5,5] x) => (float[1,4,5,5] y) { [conv] y = Conv (x, w) }"
    task = job(
        tmp_path, build(graph, w=weight), {"x": np.abs(normal(4, 4, 5, 5))}, overflow_safe=safe
    )
    outcome = convert(task, ear := Ear())
    assert outcome.verification is not None
    assert outcome.verification.saturated == (("conv",) if safe == "false" else ())
    assert any("overflow 16-bit sums" in line for line in ear.warned) == (safe == "false")


@pytest.mark.parametrize("target", ["ARM", "CPU_VNNI", "DSP", "NVGPU"])
def test_targets_with_exact_kernels_are_not_warned_of(tmp_path, target):
    graph = "g (float[1,4,5,5] x) => (float[1,4,5,5] y) { [conv] y = Conv (x, w) }"
    model = build(graph, w=np.abs(normal(4, 4, 1, 1)) + 3)
    task = job(tmp_path, model, {"x": np.abs(normal(4, 4, 5, 5))}, target_device=target)
    outcome = convert(task, ear := Ear())
    assert outcome.verification is not None
    assert outcome.verification.saturated == ()
    assert not any("overflow 16-bit sums" in line for line in ear.warned)


def test_what_this_processor_makes_of_the_file_is_a_line_of_its_own(monkeypatch):
    # As on a processor where the middle of the row is lost.
    whole = build(ROWS, k=np.zeros((1, 3), np.float32))
    monkeypatch.setattr("converter.calibrate.runs.exact_here", lambda model: whole)
    found = checked([0, -2, 0], Split(SCORES, []))
    assert found.outputs[0].sqnr_db == np.inf
    assert found.agreement == 1
    assert found.here is not None
    x = np.concatenate(SCORES).astype(np.float64)
    assert found.here.worst.sqnr_db == pytest.approx(10 * np.log10(np.sum(x * x) / (4 * 2**2)))
    assert found.here.agreement == np.mean(x.argmax(1) == (x - [0, 2, 0]).argmax(1)) == 3 / 4
    first, second = list(verification_lines(found))[:2]
    assert first.startswith("Verified on 4 calibration samples: cosine 1.00000")
    assert second.startswith("On this processor, whose kernels lose bits, the file gives other")
    assert second.endswith(f"{found.here.worst.sqnr_db:.1f} dB, same answer on 75.0%.")


def test_a_processor_that_agrees_is_not_mentioned():
    found = checked([0, 1.5, 0], Split(SCORES, []))
    assert found.here is None
    assert not any("this processor" in line for line in verification_lines(found))


# --- in a conversion


def converted(folder: Path, samples: int, **flags: object) -> Verification | None:
    graph = (
        "g (float[1,4,8,8] x) => (float[1,6,8,8] y) { [conv] c = Conv <pads = [1,1,1,1]> (x, w)  "
        "y = Relu (c) }"
    )
    data = np.concatenate([normal(1, 4, 8, 8, seed=seed) for seed in range(6)])
    task = job(folder, build(graph, w=normal(6, 4, 3, 3)), {"x": data})
    text = task.config.path.read_text().replace("calibrate_size = 6", f"calibrate_size = {samples}")
    task.config.path.write_text(text)
    return convert(replace(task, config=load_config(task.config.path), **flags)).verification


def test_a_conversion_is_verified(tmp_path):
    found = converted(tmp_path, samples=4)
    assert found is not None
    assert (found.samples, found.held_back) == (2, True)
    assert 0.99 < found.outputs[0].cosine < 1
    assert found.fused_difference < 0.02
    # Beside them there are what this processor wants: transpositions.
    assert (
        found.kernels.items()
        >= {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1}.items()
    )
    assert "Conv" not in found.kernels
    written = {node.name for node in onnx.load(tmp_path / "quantized.onnx").graph.node}
    assert len(written & set(found.conversions)) == 2
    (line, executed) = verification_lines(found)
    assert line.startswith("Verified on 2 samples held back from calibration: cosine 0.99")
    assert executed.startswith("ONNX Runtime executes ")
    assert "1 QLinearConv" in executed


def test_all_samples_calibrate(tmp_path):
    found = converted(tmp_path, samples=6)
    assert found is not None
    assert (found.samples, found.held_back) == (6, False)


def test_verification_is_left_out(tmp_path):
    assert converted(tmp_path, samples=4, verify=False) is None


def test_further_samples_of_a_dataset(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(7, dtype=np.float32)[:, None])
    spec = InputSpec("x", np.dtype(np.float32), (1, 1))
    first = open_dataset([spec], {"x": tmp_path / "x.npy"}, 3, kind="NPY", image=ImageOptions())
    behind = first.further(3)
    assert [float(behind.sample(i)["x"][0, 0]) for i in range(len(behind))] == [3, 4, 5]
    assert [float(behind.further(9).sample(0)["x"][0, 0]), len(behind.further(9))] == [6, 1]
    assert len(behind.further(9).further(9)) == 0
    assert len(Dataset((), (), ()).further(5)) == 0


def test_random_pictures_are_like_photographs():
    graph = "g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Neg (x) }"
    x = synthetic_data(build(graph), 1, length=16).sample(0)["x"].astype(np.float64)
    assert x.shape == (1, 3, 224, 224) and np.abs(x).max() <= 1
    beside = np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1]
    assert beside > 0.7  # neighbours are alike, as in no noise
    last = "g (float[1,H,W,3] x) => (float[1,H,W,3] y) { y = Neg (x) }"
    assert synthetic_data(build(last), 1, length=16).sample(0)["x"].shape == (1, 224, 224, 3)


@pytest.mark.parametrize(
    ("cosine", "few", "random", "warns"),
    [
        (-0.73, Few(0.9, 9.0, 0.8), False, True),
        (0.9, Few(0.9, 9.0, 0.8), False, False),
        (0.999, Few(0.9, 3.0, 0.8), False, True),
        (-0.73, Few(0.9, 9.0, 0.8), True, True),
        (0.999, Few(0.9, 3.0, 0.8), True, False),  # what stands out of noise is no answer
        (0.9, None, True, True),
    ],
)
def test_a_bad_figure_is_warned_of_with_data_and_without(cosine, few, random, warns):
    same = build(ROWS, k=np.zeros((1, 3), np.float32))
    data = Split(SCORES, [])
    error = TensorError("y", cosine, 20.0, few=few)
    found = replace(checked([0, 0, 0], data), outputs=(error,), random=random)
    _warn(found, [], Quantized(same, same, QuantPlan({}, {}), data), ear := Ear())
    assert any(line.startswith("Output 'y' is ") for line in ear.warned) == warns


def test_samples_whose_answer_changed_are_kept_with_the_likeliest_classes(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\na.png,0\nb.png,1\nc.png,2\nd.png,1\n")
    data = Split(SCORES, [], ["a.png", "b.png", "c.png", "d.png"])
    (changed,) = checked([0, 1.5, 0], data, tmp_path / "labels.csv").changed
    assert (changed.file, changed.label) == ("d.png", 1)
    assert changed.before == ((0, 5.0), (1, 4.0), (2, 0.0))
    assert changed.after == ((1, 5.5), (0, 5.0), (2, 0.0))
