"""What of an output is judged by itself, on heads as detectors have them: boxes and scores in one
tensor, few answers in a sea of background.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from graphs import build, frozen
from running import Ear, InMemory, resources, write_config

from calib.affine import Array
from calib.samples import Dataset
from converter.config import load_config
from converter.config.rules import DATA_RULES
from converter.job import Job
from converter.measure.both import Both, paired
from converter.measure.results import Verification, figures_of
from converter.measure.slices import few_of, slices_of
from converter.measure.verify import verify
from converter.pipeline.compare import compare
from converter.plan.plan import QuantPlan
from converter.plan.result import Quantized
from converter.report.text import verification_lines

CELLS, CLASSES, SAMPLES = 600, 6, 5


class Calibrated(InMemory):
    """Samples without others behind them."""

    def further(self, size: int) -> Dataset:
        return Dataset((), (), ())


def boxes(rng: np.random.Generator, size: float = 320) -> Array:
    """Corners (cells, 4) of boxes in pictures of so many pixels."""
    return np.sort(rng.random((CELLS, 4)) * size, axis=1)


def scores(rng: np.random.Generator, present: int = CLASSES, hits: int = 5) -> Array:
    """Scores (cells, classes) near 0 but at a few cells, of the first few classes alone."""
    found = np.exp(rng.normal(-9, 1, (CELLS, CLASSES)))
    for cell in rng.integers(CELLS, size=hits):
        found[cell, rng.integers(present)] = 0.6 + 0.4 * rng.random()
    return found


def head(seed: int, size: float = 320, present: int = CLASSES) -> Array:
    """One sample (1, cells, 4 + classes)."""
    rng = np.random.default_rng(seed)
    return np.hstack([boxes(rng, size), scores(rng, present)])[None].astype(np.float32)


HEADS = [head(seed) for seed in range(SAMPLES)]


def cut(samples: list[Array]) -> list[str]:
    return list(map(str, slices_of(samples)))


# --- slices


def test_boxes_and_scores_are_cut_along_the_axis_that_tells_them_apart():
    assert cut(HEADS) == ["slice 0:4 of axis 2", "slice 4:10 of axis 2"]
    turned = [x.transpose(0, 2, 1) for x in HEADS]
    assert cut(turned) == ["slice 0:4 of axis 1", "slice 4:10 of axis 1"]
    maps = [x.transpose(0, 2, 1).reshape(1, 10, 20, 30) for x in HEADS]
    assert cut(maps) == ["slice 0:4 of axis 1", "slice 4:10 of axis 1"]


def test_boxes_relative_to_the_picture_are_cut_from_scores_that_are_rare():
    samples = [head(seed, size=1) for seed in range(SAMPLES)]
    assert cut(samples) == ["slice 0:4 of axis 2", "slice 4:10 of axis 2"]


def test_classes_without_an_object_stay_with_the_others():
    samples = [head(seed, present=2) for seed in range(SAMPLES)]
    assert cut(samples) == ["slice 0:4 of axis 2", "slice 4:10 of axis 2"]
    assert cut([x[..., 4:] for x in samples]) == []


def test_kinds_that_alternate_are_slices_each():
    samples = [np.concatenate([x[..., :6], x[..., :6]], axis=2) for x in HEADS]
    assert cut(samples) == [f"slice {part} of axis 2" for part in ("0:4", "4:6", "6:10", "10:12")]


def likely(rng: np.random.Generator) -> Array:
    """Probabilities of four classes, the last of which there is not, in margins only the first."""
    logits = rng.normal(0, 3, (1, 4, 24, 24)) + np.reshape([4, 0, 0, -12], (1, 4, 1, 1))
    logits[:, 1:, :4] -= 15
    chances = np.exp(logits)
    return chances / chances.sum(axis=1, keepdims=True)


ONE_KIND: dict[str, Callable[[np.random.Generator], Array]] = {
    "numbers": lambda rng: rng.normal(size=(1, 32, 64)),
    "a class for each sample": lambda rng: np.eye(10)[[rng.integers(10)]] + 1e-6,
    "shares": likely,
    "a map of objects here and there": lambda rng: np.exp(
        -np.square(np.add.outer(np.arange(40), -40 * rng.random(40))) / 4
    )[None],
    "a spectrum that fades": lambda rng: (
        rng.normal(size=(1, 64, 20, 2)) * np.geomspace(1, 1e-4, 64)[:, None, None]
    ),
    "many sizes": lambda rng: rng.normal(size=(1, 40, 64)) * np.tile([1, 1e-3], 20)[:, None],
    "a channel that is hardly active": lambda rng: np.maximum(
        rng.normal(size=(1, 16, 200)) - 3.0 * (np.arange(16) == 7)[:, None], 0
    ),
    "channels of all sizes": lambda rng: (
        rng.normal(size=(1, 32, 64)) * np.exp(2 * np.random.default_rng(0).normal(size=(32, 1)))
    ),
    "dead channels": lambda rng: rng.normal(size=(1, 8, 64)) * (np.arange(8) != 3)[:, None],
    "nothing": lambda rng: np.zeros((1, 0, 6)),
}


@pytest.mark.parametrize("kind", ONE_KIND)
def test_what_is_of_one_kind_stays_whole(kind):
    samples = [ONE_KIND[kind](np.random.default_rng(seed)) for seed in range(SAMPLES)]
    assert cut([x.astype(np.float32) for x in samples]) == []


def test_rows_of_any_number_are_cut_and_other_ranks_are_not():
    assert cut([x[0, : 100 + 50 * k] for k, x in enumerate(HEADS)]) == [
        "slice 0:4 of axis 1",
        "slice 4:10 of axis 1",
    ]
    assert cut([HEADS[0], HEADS[1][0]]) == []


# --- the few


@pytest.mark.parametrize("background", [0.0, -6.0, 40.0])
def test_the_few_are_those_farthest_from_the_median(background):
    rng = np.random.default_rng(1)
    x = rng.normal(background, 0.3, (8, 4, 1000))
    x[rng.random(x.shape) < 0.0005] += 9
    y = x + rng.normal(0, 0.5, x.shape)
    found = few_of(list(zip(x.astype(np.float32), y.astype(np.float32), strict=True)))
    middle = np.median([np.median(sample) for sample in x])
    a, b = (z.ravel() - middle for z in (x, y))
    first = np.argsort(-np.maximum(abs(a), abs(b)))[:32]
    noise, signal = np.square(a - b)[first].sum(), np.square(a)[first].sum()
    assert found is not None
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise), rel=1e-3)
    cosine = a[first] @ b[first] / np.sqrt(signal * np.square(b)[first].sum())
    assert found.cosine == pytest.approx(cosine, rel=1e-4)
    assert found.share == pytest.approx(signal / np.square(a).sum(), rel=1e-3)


def test_there_are_no_few_among_a_few_or_where_nothing_stands_out():
    assert few_of([(np.arange(100.0), np.arange(100.0))]) is None
    flat = 5 + 1e-6 * np.random.default_rng(0).normal(size=4000)
    assert few_of([(flat, np.full(4000, 5.0))]) is None
    assert few_of([]) is None
    none = np.full(4000, np.nan)
    assert few_of([(none, none)]) is None


def test_values_that_are_no_numbers_are_lost_where_they_stand_for_answers():
    x = np.random.default_rng(0).normal(size=4000)
    x[:8], x[10] = 50, np.inf
    y = x.copy()
    y[:4] = np.nan
    found = few_of([(x, y)])
    assert found is not None
    assert found.lost


# --- in a verification


def verified(after: Callable[[Array], Array], samples: list[Array]) -> tuple[Verification, Ear]:
    """A model that gives its input beside one that gives what is made of it."""
    shape = ",".join(map(str, samples[0].shape))
    fed = [{"x": x, "z": after(x).astype(np.float32)} for x in samples]
    graphs = (
        f"g (float[{shape}] x, float[{shape}] z) => (float[{shape}] y) "
        f"{{ u = Mul (z, k)  v = Mul (x, o)  y = Add (u, v) }}"
        for _ in range(2)
    )
    ones = [np.float32(0), np.float32(1)]
    models = [build(g, k=k, o=o) for g, k, o in zip(graphs, ones, ones[::-1], strict=True)]
    result = Quantized(*models, QuantPlan({}, {}), Calibrated(fed))
    ear = Ear()
    return verify(Both(result, paired(result, inside=False), resources(), ear), None), ear


def test_a_ruined_head_is_named_beside_boxes_that_are_not():
    def lost(x: Array) -> Array:
        return np.concatenate([x[..., :4] + 0.5, x[..., 4:] * 0.3], axis=-1)

    found, ear = verified(lost, HEADS)
    assert found.outputs[0].cosine > 0.9999
    assert found.worst is not None
    assert found.worst.title == "'y', slice 4:10 of axis 2"
    x = np.concatenate(HEADS).astype(np.float64)[..., 4:]
    assert found.worst.sqnr_db == pytest.approx(-20 * np.log10(0.7), abs=1e-3)
    assert found.worst.compared == x.size
    (warning,) = ear.warned
    assert warning.startswith("Output 'y', slice 4:10 of axis 2 is lost where it matters: ")
    line = next(verification_lines(found))
    assert "3.1 dB ('y', slice 4:10 of axis 2), peaks 3.1 dB" in line


def test_answers_that_are_not_there_are_seen_as_well():
    def ghosts(x: Array) -> Array:
        y = x.copy()
        y[0, ::50, 7] = 0.9
        return y

    found, ear = verified(ghosts, HEADS)
    assert found.worst is not None
    assert found.worst.title == "'y', slice 4:10 of axis 2"
    assert len(ear.warned) == 1


def test_noise_in_the_background_alone_is_no_ruin():
    rng = np.random.default_rng(3)

    def noisy(x: Array) -> Array:
        return x + 0.25 * x * rng.standard_normal(x.shape) + 0.006 * rng.random(x.shape)

    sparse = [x[..., 4:] for x in HEADS]
    found, ear = verified(noisy, sparse)
    assert found.worst is not None
    assert found.worst.cosine < 0.97
    assert found.worst.few is not None
    assert found.worst.few.sqnr_db > 8
    assert ear.warned == []


def test_logits_of_a_head_that_lost_its_answers_are_seen():
    def logits(seed: int) -> Array:
        rng = np.random.default_rng(seed)
        x = rng.normal(-7, 0.6, (1, 3, 40, 40))
        x[0, 0, rng.integers(40, size=4), rng.integers(40, size=4)] = 4
        return x.astype(np.float32)

    found, ear = verified(lambda x: np.minimum(x, -5), [logits(seed) for seed in range(4)])
    assert found.outputs[0].cosine > 0.98
    assert found.slices == ()
    assert len(ear.warned) == 1


def test_gates_see_slices():
    def half(x: Array) -> Array:
        return np.concatenate([x[..., :4], x[..., 4:] + 0.02], axis=-1)

    found, _ = verified(half, HEADS)
    x = np.concatenate(HEADS).astype(np.float64)[..., 4:]
    y = np.concatenate([half(x) for x in HEADS]).astype(np.float64)[..., 4:]
    cosine = np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))
    assert figures_of(2, 1, found).cosine == pytest.approx(cosine, rel=1e-5)
    whole = replace(found, slices=())
    assert figures_of(2, 1, whole).cosine == found.outputs[0].cosine > 0.999


def test_reports_name_the_slice(tmp_path):
    graph = "g (float[1,600,10] x) => (float[1,600,10] y) { y = Mul (x, k) }"
    lost = np.repeat(np.float32([1.001, 0.3]), [4, 6])
    for name, factors in (("float", np.ones(10, np.float32)), ("other", lost)):
        (tmp_path / f"{name}.onnx").write_bytes(frozen(build(graph, k=factors)))
    np.save(tmp_path / "x.npy", np.concatenate(HEADS))
    config = write_config(
        tmp_path / "c.cfg",
        common_quant={"debug_info_save_path": tmp_path / "reports"},
        data_preprocess={
            "calibrate_path": f"x:{tmp_path / 'x.npy'}",
            "calibrate_size": SAMPLES,
            "input_type": "NPY",
        },
    )
    settings = load_config(config, rules=DATA_RULES)
    compare(Job(tmp_path / "float.onnx", tmp_path / "other.onnx", settings), Ear())
    told = json.loads((tmp_path / "reports" / "summary.json").read_text())["verification"]
    assert [part["where"] for part in told["slices"]] == cut(HEADS)
    assert told["slices"][1]["few"]["sqnr_db"] == pytest.approx(-20 * np.log10(0.7), abs=0.01)
    page = (tmp_path / "reports" / "report.html").read_text()
    assert "Output y, slice 4:10 of axis 2" in page
