"""calib.samples: which files become samples, in which order, and what is said of the others."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_files import PLAIN, colour, grey, grey_folder, levels, only, opened, spec

from calib import CalibError, samples
from calib.samples import ImageOptions, open_dataset
from calib.sources import _natural, class_folders, list_files

# Folders


def test_natural_order(tmp_path: Path) -> None:
    for name in ("img10", "img2", "IMG1", "img02", "b", "a 3 x 11", "a 3 x 9", "10", "9"):
        (tmp_path / name).touch()
    found = [path.name for path in list_files(tmp_path)]
    assert found == ["9", "10", "a 3 x 9", "a 3 x 11", "b", "IMG1", "img02", "img2", "img10"]


@given(st.lists(st.text("aB1209 ²٣é._-", min_size=1), unique=True), st.randoms())
def test_any_names_have_one_order(names: list[str], random: Random) -> None:
    shuffled = random.sample(names, len(names))
    assert sorted(shuffled, key=_natural) == sorted(names, key=_natural)


def test_hidden_files_folders_and_clutter_are_ignored(tmp_path: Path) -> None:
    for name in (".hidden", "Thumbs.db", "desktop.ini", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "other").symlink_to(tmp_path / "folder")
    assert [path.name for path in list_files(tmp_path)] == ["a.png", "dangling.png", "link.png"]


def test_sub_folders_alone_are_read_in_turns_so_that_the_first_files_are_of_all(
    tmp_path: Path,
) -> None:
    for name in ("cat/1.png", "cat/2.png", "cat/10.png", "dog/1.png", ".git/x", "deep/a/b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dog" / "round").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path)]
    assert found == ["cat/1.png", "deep/a/b/3.png", "dog/1.png", "cat/2.png", "cat/10.png"]


def test_classes_are_numbers_of_folders_or_their_places(tmp_path: Path) -> None:
    for name in ("n10", "n2", "n1"):
        (tmp_path / "words" / name).mkdir(parents=True)
    for name in ("7", "07", "10"):
        (tmp_path / "numbers" / name).mkdir(parents=True)
    assert class_folders(tmp_path / "words") == {"n1": 0, "n2": 1, "n10": 2}
    assert class_folders(tmp_path / "numbers") == {"7": 7, "07": 7, "10": 10}


def test_listing_ten_thousand_files_asks_for_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10_000):
        (tmp_path / f"img{i}.bin").touch()
    asked, stat = Counter[Path](), os.stat

    def counted(path: Path, **options: Any) -> os.stat_result:
        asked[Path(path)] += 1
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", counted)
    found = list_files(tmp_path)
    assert {asked[path] for path in found} == {1}
    assert found[9_999].name == "img9999.bin" and found[10].name == "img10.bin"


@pytest.mark.parametrize("kind", ["IMAGE", "BIN", "NPY"])
def test_unusable_folders(tmp_path: Path, kind: str) -> None:
    given = spec(1, 1, 2, 2)
    with pytest.raises(CalibError, match=r"gone: is not a readable folder .*No such file"):
        opened(given, tmp_path / "gone", kind)
    with pytest.raises(
        CalibError,
        match=r"holds 0 file\(s\) but one sample of input 'x' \(float32 \[1, 1, 2, 2\]\)",
    ):
        opened(given, tmp_path, kind)


@pytest.mark.parametrize("kind", ["IMAGE", "BIN"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, kind: str) -> None:
    grey(tmp_path / "a.png", 1)
    with pytest.raises(CalibError, match=r"a\.png: is not a readable folder .*Not a directory"):
        opened(spec(1, 1, 2, 2), tmp_path / "a.png", kind)


# Which samples


def test_the_first_files_in_order(tmp_path: Path) -> None:
    dataset = opened(spec(1, 1, 2, 2), grey_folder(tmp_path, range(12)), "IMAGE", 11)
    assert levels(dataset) == list(range(11))
    assert dataset.warnings == () and dataset.files(10) == (tmp_path / "img10.png",)


def test_broken_files_are_named_and_replaced(tmp_path: Path) -> None:
    grey_folder(tmp_path, range(6))
    (tmp_path / "img0.png").write_text("no picture")
    colour(tmp_path / "img2.png", 50, 50)
    (tmp_path / "img2.png").write_bytes((tmp_path / "img2.png").read_bytes()[:1000])
    dataset = opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 3)
    assert levels(dataset) == [1, 3, 4] and dataset.files(1) == (tmp_path / "img3.png",)
    assert (
        dataset.warnings[0]
        == f"{tmp_path / 'img0.png'}: is broken or not a picture of a known format."
    )
    assert dataset.warnings[1].startswith(f"{tmp_path / 'img2.png'}: cannot be read as a picture (")
    assert len(dataset.warnings) == 2


def test_fewer_usable_files_than_asked_for(tmp_path: Path) -> None:
    dataset = opened(spec(1, 1, 2, 2), grey_folder(tmp_path, range(3)), "IMAGE", 100)
    assert levels(dataset) == [0, 1, 2]
    assert dataset.warnings == ("calibrate_size is 100 but only 3 sample(s) are usable.",)


def test_no_usable_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text")
    with pytest.raises(
        CalibError, match=r"none of the 2 sample\(s\) can be used, the first .* .*a\.txt: is broken"
    ):
        opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 5)


@settings(max_examples=15, deadline=None)
@given(
    broken=st.sets(st.integers(0, 29)),
    size=st.integers(1, 30),
    workers=st.integers(1, 4),
    wave=st.integers(1, 40),
)
def test_the_choice_does_not_depend_on_threads_or_waves(
    tmp_path_factory: pytest.TempPathFactory, broken: set[int], size: int, workers: int, wave: int
) -> None:
    folder = tmp_path_factory.mktemp("choice")
    for i in range(30):
        np.full(1 + (i in broken), i, np.float32).tofile(folder / f"{i}.bin")
    good = [i for i in range(30) if i not in broken][:size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "WAVE", wave)
        if not good:
            with pytest.raises(CalibError, match="none of the 30"):
                open_dataset(
                    [spec(1, 1)], {"x": folder}, size, kind="BIN", image=PLAIN, workers=workers
                )
            return
        dataset = open_dataset(
            [spec(1, 1)], {"x": folder}, size, kind="BIN", image=PLAIN, workers=workers
        )
    assert levels(dataset) == good
    tried = range(good[-1] + 1) if len(good) == size else range(30)
    named = [
        i
        for i in range(30)
        if any(w.startswith(f"{folder / f'{i}.bin'}: ") for w in dataset.warnings)
    ]
    assert named == [i for i in tried if i in broken]


def test_samples_are_the_same_with_and_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey_folder(tmp_path, range(8))
    cached = opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 8)
    monkeypatch.setattr(samples, "CACHE_BYTES", 3 * 16)
    partly = opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 8)
    assert cached.sample(7)["x"] is cached.sample(7)["x"]
    assert (
        partly.sample(2)["x"] is partly.sample(2)["x"]
        and partly.sample(3)["x"] is not partly.sample(3)["x"]
    )
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: partly.sample(i % 8)["x"].flat[0], range(64)))
    assert read == list(range(8)) * 8 and levels(cached) == list(range(8))
    assert cached.fingerprint() == partly.fingerprint()


def test_a_file_that_breaks_after_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CACHE_BYTES", 0)
    dataset = opened(spec(1, 1, 2, 2), grey_folder(tmp_path, range(1)), "IMAGE")
    (tmp_path / "img0.png").unlink()
    with pytest.raises(CalibError, match=r"img0\.png: cannot be read as a picture \(No such file"):
        dataset.sample(0)


def test_samples_cannot_be_changed_by_a_reader(tmp_path: Path) -> None:
    array = only(opened(spec(1, 1, 2, 2), grey_folder(tmp_path, range(1)), "IMAGE"))
    with pytest.raises(ValueError, match="read-only"):
        array += 1
    assert array.flags.c_contiguous


def test_fingerprint_follows_content_and_preprocessing_only(tmp_path: Path) -> None:
    given, first, second = spec(1, 1, 2, 2), tmp_path / "a", tmp_path / "b"
    grey_folder(first, range(3))
    second.mkdir()
    for i in range(3):
        grey(second / f"{i}.png", i)
    base = opened(given, first, "IMAGE", 3).fingerprint()
    assert base == opened(given, second, "IMAGE", 3).fingerprint() and len(base) == 64
    assert base != opened(given, first, "IMAGE", 2).fingerprint()
    assert (
        base != opened(given, first, "IMAGE", 3, ImageOptions(normalize_mean=(1.0,))).fingerprint()
    )
    assert (
        base
        != open_dataset(
            [spec(1, 1, 2, 2, name="y")], {"y": first}, 3, kind="IMAGE", image=PLAIN
        ).fingerprint()
    )
    grey(second / "1.png", 9)
    assert base != opened(given, second, "IMAGE", 3).fingerprint()


# Several inputs


def test_inputs_are_paired_by_position(tmp_path: Path) -> None:
    left, right = grey_folder(tmp_path / "l", range(4)), grey_folder(tmp_path / "r", range(10, 14))
    (right / "img11.png").write_text("broken")
    specs = [spec(1, 1, 2, 2, name="a"), spec(1, 2, 2, 1, name="b")]
    dataset = open_dataset(specs, {"b": right, "a": left}, 3, kind="IMAGE", image=PLAIN)
    assert levels(dataset, "a") == [0, 2, 3] and levels(dataset, "b") == [10, 12, 13]
    assert list(dataset.sample(0)) == ["a", "b"] and dataset.sample(1)["b"].shape == (1, 2, 2, 1)
    assert dataset.files(1) == (left / "img2.png", right / "img12.png")
    assert len(dataset.warnings) == 1 and "img11.png" in dataset.warnings[0]


def test_folders_of_different_length(tmp_path: Path) -> None:
    left, right = grey_folder(tmp_path / "l", range(5)), grey_folder(tmp_path / "r", range(2))
    specs = [spec(1, 1, 2, 2, name="a"), spec(1, 1, 2, 2, name="b")]
    dataset = open_dataset(specs, {"a": left, "b": right}, 2, kind="IMAGE", image=PLAIN)
    assert dataset.warnings == (
        (
            "The inputs have different numbers of samples (5 for 'a', 2 for 'b'); the surplus is "
            "not used."
        ),
    )


def test_inputs_and_folders_must_match(tmp_path: Path) -> None:
    specs = [spec(None, 3, 4, 4, name="image"), spec(1, 7, name="state", dtype=np.int64)]
    listed = r"'image' \(float32 \[\?, 3, 4, 4\]\), 'state' \(int64 \[1, 7\]\)"

    def attempt(*names: str) -> None:
        open_dataset(specs, dict.fromkeys(names, tmp_path), 1, kind="BIN", image=PLAIN)

    with pytest.raises(
        CalibError, match=rf"no input 'imge', its inputs are {listed}; write image\."
    ):
        attempt("imge", "state")
    with pytest.raises(
        CalibError, match=rf"no input 'zzz', its inputs are {listed}; write image or state\."
    ):
        attempt("zzz", "state")
    with pytest.raises(
        CalibError, match=r"no folder is given for .* 'state' .*; add state:<folder>\."
    ):
        attempt("image")
