"""Outputs to look at: what is a picture, a mask or a box, held against arithmetic done here."""

from __future__ import annotations

import numpy as np
import pytest
from running import InMemory

from calib.affine import Array
from converter.config import DataPreprocessParam
from converter.measure.boxes import boxes, found_again
from converter.measure.results import View, Views
from converter.measure.views import pixels_of, views
from converter.report.drawn import drawn

SIZE = 32, 24
PICTURE = np.random.default_rng(1).uniform(0, 255, (1, 3, 24, 32)).astype(np.float32)


def seen(
    before: list[list[Array]], after: list[list[Array]], picture: Array = PICTURE
) -> list[Views]:
    data = InMemory([{"x": picture}] * len(before), [f"{i}.png" for i, _ in enumerate(before)])
    names = [f"out{i}" for i, _ in enumerate(before[0])]
    return list(views(names, before, after, data, wanted=DataPreprocessParam()))


def test_pictures_have_the_noise_that_their_pixels_tell() -> None:
    rng = np.random.default_rng(2)
    x = [rng.uniform(0, 1, (1, 3, 48, 64)).astype(np.float32) for _ in range(8)]
    y = [a + np.float32(0.001 * (i + 1)) for i, a in enumerate(x)]
    (found,) = seen([[a] for a in x], [[b] for b in y])
    assert (found.kind, found.output) == ("picture", "out0")
    # The eighth differs by .008 everywhere: 20 log10(1 / .008) = 41.94 dB; those that differ most.
    assert [view.name for view in found.shown] == [f"{i}.png" for i in (7, 6, 5, 4, 3, 2)]
    assert found.shown[0].figure == "PSNR 41.9 dB"
    np.testing.assert_array_equal(
        found.shown[0].before, np.round(np.moveaxis(x[7][0], 0, -1) * np.float32(255))
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_masks_are_the_best_classes(layout: str) -> None:
    scores = np.zeros((1, 4, 24, 32), np.float32)
    scores[0, 2, :, :8] = 1  # 24 x 8 pixels of class 2
    other = scores.copy()
    other[0, 3, :6, :8] = 2  # a quarter of them becomes class 3
    turned = [np.moveaxis(s, 1, 3) if layout == "NHWC" else s for s in (scores, other)]
    (found,) = seen([[turned[0]]], [[turned[1]]])
    assert found.kind == "mask"
    (view,) = found.shown
    assert view.figure == "mask IoU 0.750"
    assert (view.before == 2).sum() == 24 * 8 and (view.after == 3).sum() == 6 * 8


def test_one_channel_of_shares_is_a_mask_of_what_is_likely() -> None:
    x = np.zeros((1, 1, 24, 32), np.float32)
    x[..., :4] = 0.9
    (found,) = seen([[x]], [[x * 0.5]])
    assert (found.kind, found.shown[0].figure) == ("mask", "mask IoU 0.000")
    grey = PICTURE[:, :1]
    assert [each.kind for each in seen([[x]], [[x]], grey)] == ["picture"]


@pytest.mark.parametrize(
    "shape", [(1, 85, 3, 4), (1, 1000), (1, 8, 24, 24), (1, 300, 24, 32), (2, 3, 24, 32)]
)
def test_other_outputs_are_not_looked_at(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert seen([[x]], [[x]]) == []


def test_without_a_picture_there_is_nothing_to_look_at() -> None:
    x = np.zeros((1, 3, 24, 32), np.float32)
    assert seen([[x]], [[x]], np.zeros((1, 7), np.float32)) == []


CORNERS = np.float32([[0.1, 0.1, 0.3, 0.5], [0.12, 0.1, 0.3, 0.5], [0.6, 0.2, 0.9, 0.8]])
SURE = np.float32([0.9, 0.7, 0.6])


def test_boxes_beside_scores() -> None:
    scores = np.stack([1 - SURE, SURE], axis=1)[None]
    for outputs in ([scores, CORNERS[None]], [CORNERS[None], scores]):
        found = boxes(outputs, SIZE)
        assert found is not None
        # The second overlaps the first by .18 * .4 / (.2 * .4) = .9 and is less sure.
        np.testing.assert_allclose(found[:, :4], CORNERS[[0, 2]])
        np.testing.assert_allclose(found[:, 4:], [[0.9, 0], [0.6, 0]], rtol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_boxes_and_scores_in_one_output(turned: bool) -> None:
    rows = np.zeros((40, 6), np.float32)
    rows[:, :4] = 16, 12, 2, 2
    rows[0] = 8, 12, 8, 12, 0.1, 0.8  # of class 1, from 4 to 12 and from 6 to 18
    found = boxes([(rows if turned else rows.T)[None]], SIZE)
    assert found is not None
    np.testing.assert_allclose(found, [[4 / 32, 6 / 24, 12 / 32, 18 / 24, 0.8, 1]], rtol=1e-6)


def test_other_forms_are_no_boxes() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (1, 50, 3)).astype(np.float32)
    offsets = rng.normal(0, 1, (1, 50, 4)).astype(np.float32)
    assert boxes([logits, offsets], SIZE) is None
    assert boxes([rng.normal(size=(1, 10)).astype(np.float32)], SIZE) is None
    assert boxes([rng.uniform(0, 1, (1, 50, 8)).astype(np.float32)], SIZE) is None


def test_boxes_found_again_are_counted_once() -> None:
    wanted = np.array([[0, 0, 0.2, 0.2, 0.9, 0], [0.5, 0.5, 0.9, 0.9, 0.8, 1]])
    given = np.array([[0, 0, 0.2, 0.25, 0.9, 0], [0.5, 0.5, 0.9, 0.9, 0.8, 2]])
    assert found_again(wanted, given) == 1  # the other is of another class
    assert found_again(wanted, given[:0]) == 0


def test_what_the_model_is_fed_is_shown_as_it_was() -> None:
    pixels = np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3)
    fed = (pixels[..., ::-1].astype(np.float32) - [1, 2, 3]) / [4, 5, 6]
    settings = DataPreprocessParam(
        input_type="IMAGE",
        image_to_format="BGR",
        normalize_mean=(1.0, 2.0, 3.0),
        normalize_std=(4.0, 5.0, 6.0),
    )
    sample = {"x": np.moveaxis(fed, -1, 0)[None].astype(np.float32)}
    np.testing.assert_array_equal(pixels_of(sample, settings), pixels)


@pytest.mark.parametrize(("kind", "count"), [("picture", 3), ("mask", 3), ("boxes", 1)])
def test_all_kinds_are_drawn(kind: str, count: int) -> None:
    source = np.full((24, 32, 1), 99, np.uint8)
    made = {
        "picture": source,
        "mask": np.eye(24, 32, dtype=np.int64),
        "boxes": np.array([[0.1, 0.1, 0.5, 0.5, 0.9, 0]]),
    }[kind]
    pictures = list(drawn(kind, View("a", source, made, made, "")))
    assert len(pictures) == count
    assert all(data.startswith("data:image/jpeg;base64,") for _, data in pictures)
