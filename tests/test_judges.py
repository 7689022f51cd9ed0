"""What a search is fitted to, and what it is judged on."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import build
from running import Ear

from calib.images import ImageOptions
from calib.samples import InputSpec, open_dataset
from converter.calibrate.data import synthetic_data
from converter.calibrate.judges import parted, tells


def opened(folder, count, size):
    np.save(folder / "x.npy", np.arange(count, dtype=np.float32)[:, None])
    spec = InputSpec("x", np.dtype(np.float32), (1, 1))
    return open_dataset([spec], {"x": folder / "x.npy"}, size, kind="NPY", image=ImageOptions())


def numbers(data):
    return [int(data.sample(k)["x"][0, 0]) for k in range(len(data))]


def test_half_of_the_samples_behind_judge_and_the_others_verify(tmp_path):
    found = parted(opened(tmp_path, 60, 20), False, ear := Ear())
    assert numbers(found.fitted) == list(range(20))
    assert numbers(found.judges) == list(range(20, 40))
    assert numbers(found.last.further(99)) == list(range(40, 60))
    assert not ear.warned


def test_without_samples_behind_the_last_of_the_calibration_judge(tmp_path):
    found = parted(opened(tmp_path, 40, 40), False, ear := Ear())
    assert numbers(found.fitted) == list(range(30))
    assert numbers(found.judges) == list(range(30, 40))
    assert not ear.warned


def test_too_few_samples_judge_themselves_and_are_said_to(tmp_path):
    found = parted(opened(tmp_path, 12, 12), False, ear := Ear())
    assert numbers(found.fitted) == numbers(found.judges) == list(range(12))
    assert "flatters it" in ear.warned[0]


def test_random_samples_judge_without_a_word():
    data = synthetic_data(build("g (float[1,3] x) => (float[1,3] y) { y = Neg (x) }"))
    assert parted(data, False, ear := Ear()).judges is data
    assert not ear.warned


@pytest.mark.parametrize(
    ("count", "bound", "enough"), [(48, 0.01, False), (300, 0.01, True), (48, 0.1, True)]
)
def test_a_loss_is_told_where_several_samples_may_change(count, bound, enough):
    assert tells(count, bound) == enough
