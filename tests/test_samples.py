"""calib.samples: tiny files whose content says which file they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calib import CalibError, samples
from calib.samples import Dataset, Folder, ImageOptions, InputSpec, open_dataset
from calib.sources import _natural, list_files

PLAIN = ImageOptions()


def spec(*shape: int | None, name: str = "x", dtype: Any = np.float32, layout: str | None = None) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape, layout)


def opened(given: InputSpec, path: Path, kind: str, size: int = 1, image: ImageOptions = PLAIN) -> Dataset:
    return open_dataset([given], [Folder(given.name, path)], size, kind, image)


def only(dataset: Dataset, name: str = "x") -> np.ndarray:
    assert len(dataset) == 1
    return dataset.sample(0)[name]


def grey(path: Path, level: int, width: int = 2, height: int = 2) -> None:
    Image.new("L", (width, height), level).save(path)


def grey_folder(folder: Path, levels: range) -> Path:
    folder.mkdir(exist_ok=True)
    for level in levels:
        grey(folder / f"img{level}.png", level)
    return folder


def levels(dataset: Dataset, name: str = "x") -> list[float]:
    return [float(dataset.sample(i)[name].flat[0]) for i in range(len(dataset))]


def colour(path: Path, height: int = 3, width: int = 4) -> np.ndarray:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


# Folders


def test_natural_order(tmp_path: Path) -> None:
    for name in ("img10", "img2", "IMG1", "img02", "b", "a 3 x 11", "a 3 x 9", "10", "9"):
        (tmp_path / name).touch()
    found = [path.name for path in list_files(tmp_path)]
    assert found == ["9", "10", "a 3 x 9", "a 3 x 11", "b", "IMG1", "img02", "img2", "img10"]


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), unique=True))
def test_any_two_names_compare(names: list[str]) -> None:
    assert sorted(names, key=_natural) == sorted(reversed(names), key=_natural)


def test_hidden_files_folders_and_clutter_are_ignored(tmp_path: Path) -> None:
    for name in (".hidden", "Thumbs.db", "desktop.ini", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "other").symlink_to(tmp_path / "folder")
    assert [path.name for path in list_files(tmp_path)] == ["a.png", "dangling.png", "link.png"]


def test_listing_ten_thousand_files_is_fast(tmp_path: Path) -> None:
    for i in range(10_000):
        (tmp_path / f"img{i}.bin").touch()
    started = time.perf_counter()
    found = list_files(tmp_path)
    assert time.perf_counter() - started < 1
    assert found[9_999].name == "img9999.bin" and found[10].name == "img10.bin"


@pytest.mark.parametrize("kind", ["IMAGE", "BIN", "NPY"])
def test_unusable_folders(tmp_path: Path, kind: str) -> None:
    given = spec(1, 1, 2, 2)
    with pytest.raises(CalibError, match=r"gone: is not a readable folder .*No such file"):
        opened(given, tmp_path / "gone", kind)
    with pytest.raises(CalibError, match=r"holds 0 file\(s\) but one sample of input 'x' \(float32 \[1, 1, 2, 2\]\)"):
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
    (tmp_path / "img2.png").write_bytes((tmp_path / "img2.png").read_bytes()[:40])
    dataset = opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 3)
    assert levels(dataset) == [1, 3, 4] and dataset.files(1) == (tmp_path / "img3.png",)
    assert dataset.warnings[0] == f"{tmp_path / 'img0.png'}: is not a picture of a known format."
    assert dataset.warnings[1].startswith(f"{tmp_path / 'img2.png'}: cannot be read as a picture (")
    assert len(dataset.warnings) == 2


def test_fewer_usable_files_than_asked_for(tmp_path: Path) -> None:
    dataset = opened(spec(1, 1, 2, 2), grey_folder(tmp_path, range(3)), "IMAGE", 100)
    assert levels(dataset) == [0, 1, 2]
    assert dataset.warnings == ("calibrate_size is 100 but only 3 sample(s) are usable.",)


def test_no_usable_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text")
    with pytest.raises(CalibError, match=r"none of the 2 sample\(s\) can be used, the first .* .*a\.txt: is not a pic"):
        opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 5)


@settings(max_examples=15, deadline=None)
@given(broken=st.sets(st.integers(0, 29)), size=st.integers(1, 30), workers=st.integers(1, 4), wave=st.integers(1, 40))
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
                open_dataset([spec(1, 1)], [Folder("x", folder)], size, "BIN", PLAIN, workers)
            return
        dataset = open_dataset([spec(1, 1)], [Folder("x", folder)], size, "BIN", PLAIN, workers)
    assert levels(dataset) == good
    tried = range(good[-1] + 1) if len(good) == size else range(30)
    named = [i for i in range(30) if any(w.startswith(f"{folder / f'{i}.bin'}: ") for w in dataset.warnings)]
    assert named == [i for i in tried if i in broken]


def test_samples_are_the_same_with_and_without_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey_folder(tmp_path, range(8))
    cached = opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 8)
    monkeypatch.setattr(samples, "CACHE_BYTES", 3 * 16)
    partly = opened(spec(1, 1, 2, 2), tmp_path, "IMAGE", 8)
    assert cached.sample(7)["x"] is cached.sample(7)["x"]
    assert partly.sample(2)["x"] is partly.sample(2)["x"] and partly.sample(3)["x"] is not partly.sample(3)["x"]
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
    assert base != opened(given, first, "IMAGE", 3, ImageOptions(mean=(1.0,))).fingerprint()
    assert base != open_dataset([spec(1, 1, 2, 2, name="y")], [Folder("y", first)], 3, "IMAGE", PLAIN).fingerprint()
    grey(second / "1.png", 9)
    assert base != opened(given, second, "IMAGE", 3).fingerprint()


# Several inputs


def test_inputs_are_paired_by_position(tmp_path: Path) -> None:
    left, right = grey_folder(tmp_path / "l", range(4)), grey_folder(tmp_path / "r", range(10, 14))
    (right / "img11.png").write_text("broken")
    specs = [spec(1, 1, 2, 2, name="a"), spec(1, 2, 2, 1, name="b")]
    dataset = open_dataset(specs, [Folder("b", right), Folder("a", left)], 3, "IMAGE", PLAIN)
    assert levels(dataset, "a") == [0, 2, 3] and levels(dataset, "b") == [10, 12, 13]
    assert list(dataset.sample(0)) == ["a", "b"] and dataset.sample(1)["b"].shape == (1, 2, 2, 1)
    assert dataset.files(1) == (left / "img2.png", right / "img12.png")
    assert len(dataset.warnings) == 1 and "img11.png" in dataset.warnings[0]


def test_folders_of_different_length(tmp_path: Path) -> None:
    left, right = grey_folder(tmp_path / "l", range(5)), grey_folder(tmp_path / "r", range(2))
    specs = [spec(1, 1, 2, 2, name="a"), spec(1, 1, 2, 2, name="b")]
    dataset = open_dataset(specs, [Folder("a", left), Folder("b", right)], 2, "IMAGE", PLAIN)
    assert dataset.warnings == (
        "The inputs have different numbers of samples (5 for 'a', 2 for 'b'); the surplus is not used.",
    )


def test_inputs_and_folders_must_match(tmp_path: Path) -> None:
    specs = [spec(None, 3, 4, 4, name="image"), spec(1, 7, name="state", dtype=np.int64)]
    listed = r"'image' \(float32 \[\?, 3, 4, 4\]\), 'state' \(int64 \[1, 7\]\)"

    def attempt(*names: str) -> None:
        open_dataset(specs, [Folder(name, tmp_path) for name in names], 1, "BIN", PLAIN)

    with pytest.raises(CalibError, match=rf"no input 'imge', its inputs are {listed}; write image\."):
        attempt("imge", "state")
    with pytest.raises(CalibError, match=rf"no input 'zzz', its inputs are {listed}; write image or state\."):
        attempt("zzz", "state")
    with pytest.raises(CalibError, match="input 'image' is named 2 times"):
        attempt("image", "image")
    with pytest.raises(CalibError, match=r"no folder is given for .* 'state' .*; add state:<folder>\."):
        attempt("image")


# Pictures


@pytest.mark.parametrize("batch", [1, None])
def test_layouts_of_a_colour_picture(tmp_path: Path, batch: int | None) -> None:
    pixels = colour(tmp_path / "a.png")
    assert np.array_equal(only(opened(spec(batch, 3, None, 4), tmp_path, "IMAGE")), pixels.transpose(2, 0, 1)[None])
    assert np.array_equal(only(opened(spec(batch, None, 4, 3), tmp_path, "IMAGE")), pixels[None])


def test_the_flag_decides_an_ambiguous_layout(tmp_path: Path) -> None:
    pixels = colour(tmp_path / "a.png", 3, 3)
    with pytest.raises(CalibError, match=r"write --inputDataFormat=NCHW or --inputDataFormat=NHWC\."):
        opened(spec(1, 3, 3, 3), tmp_path, "IMAGE")
    assert np.array_equal(only(opened(spec(1, 3, 3, 3, layout="NHWC"), tmp_path, "IMAGE")), pixels[None])
    nchw = only(opened(spec(1, 3, 3, 3, layout="NCHW"), tmp_path, "IMAGE"))
    assert np.array_equal(nchw, pixels.transpose(2, 0, 1)[None])


def test_a_flag_that_contradicts_the_shape(tmp_path: Path) -> None:
    with pytest.raises(CalibError, match=r"not where said; write --inputDataFormat=NCHW\."):
        opened(spec(1, 3, 8, 8, layout="NHWC"), tmp_path, "IMAGE")


@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (1, None, 8, None), (1, 10), (3, 8, 8), (1, 1, 3, 8, 8), ()])
def test_inputs_that_are_no_pictures(tmp_path: Path, shape: tuple[int | None, ...]) -> None:
    with pytest.raises(CalibError, match=r"'x' .* not made for pictures .* input_type = BIN or NPY.*--inputShape"):
        opened(spec(*shape), tmp_path, "IMAGE")


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (None, 3, 4, 1), (1, 3, 4), (None, None, None)])
def test_grey_inputs(tmp_path: Path, shape: tuple[int | None, ...]) -> None:
    pixels = colour(tmp_path / "a.png").astype(np.float64)
    layout = "NHWC" if shape == (None, 3, 4, 1) else None
    array = only(opened(spec(*shape, layout=layout), tmp_path, "IMAGE"))
    assert array.ndim == len(shape)
    np.testing.assert_allclose(array.ravel(), (pixels @ [0.299, 0.587, 0.114]).ravel(), rtol=1e-6)


def test_a_fixed_batch_takes_consecutive_files(tmp_path: Path) -> None:
    dataset = opened(spec(3, 1, 2, 2), grey_folder(tmp_path, range(11)), "IMAGE", 3)
    assert dataset.sample(1)["x"].shape == (3, 1, 2, 2)
    assert dataset.sample(1)["x"][:, 0, 0, 0].tolist() == [3, 4, 5]
    assert dataset.files(2) == tuple(tmp_path / f"img{i}.png" for i in (6, 7, 8))
    assert dataset.warnings == (f"{tmp_path}: img9.png, img10.png cannot fill a batch of 3 and are not used.",)
    with pytest.raises(CalibError, match=r"holds 11 file\(s\) but one sample of input .* takes 12"):
        opened(spec(12, 1, 2, 2), tmp_path, "IMAGE")


def test_one_broken_file_takes_its_batch_along(tmp_path: Path) -> None:
    grey_folder(tmp_path, range(6))
    (tmp_path / "img1.png").write_text("broken")
    dataset = opened(spec(2, 1, 2, 2), tmp_path, "IMAGE", 3)
    assert levels(dataset) == [2, 4]
    assert "img1.png" in dataset.warnings[0] and "only 2 sample(s)" in dataset.warnings[1]


def test_a_picture_of_the_wrong_size(tmp_path: Path) -> None:
    grey(tmp_path / "wide.png", 1, 5, 4)
    expected = (
        r"wide\.png: the picture is 5x4 after preprocessing but input 'x' \(float32 \[1, 1, 8, 9\]\) takes 9x8 .*"
        r"set resize_width and resize_height, or center_crop_width and center_crop_height"
    )
    with pytest.raises(CalibError, match=expected):
        opened(spec(1, 1, 8, 9), tmp_path, "IMAGE")
    resized = opened(spec(1, 1, 8, 9), tmp_path, "IMAGE", 1, ImageOptions(resize_width=9, resize_height=8))
    assert only(resized).shape == (1, 1, 8, 9)
    assert only(opened(spec(1, 1, None, None), tmp_path, "IMAGE")).shape == (1, 1, 4, 5)


def test_pictures_of_one_batch_must_agree(tmp_path: Path) -> None:
    grey(tmp_path / "1.png", 1, 5, 4)
    grey(tmp_path / "2.png", 1, 4, 5)
    with pytest.raises(CalibError, match=r"2\.png: the picture is 4x5 after .* takes 5x4"):
        opened(spec(2, 1, None, None), tmp_path, "IMAGE")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", [-150, -0.5, 0.5, 2.25, 105]),
        ("float16", [-150, -0.5, 0.5, 2.25, 105]),
        ("uint8", [0, 0, 0, 2, 105]),
        ("int8", [-128, 0, 0, 2, 105]),
    ],
)
def test_input_dtypes(tmp_path: Path, dtype: str, expected: list[float]) -> None:
    Image.fromarray(np.array([[0, 598, 602, 609, 1020]], np.uint16)).save(tmp_path / "a.png")
    # A 16-bit level v is loaded as v / 257; mean and std turn it into (v - 600) / 4.
    image = ImageOptions(mean=(600 / 257,), std=(4 / 257,))
    array = only(opened(spec(1, 1, 1, 5, dtype=dtype), tmp_path, "IMAGE", 1, image))
    assert array.dtype == dtype
    np.testing.assert_allclose(array.ravel().astype(float), expected, rtol=1e-3)


def test_integer_inputs_are_clipped_at_the_top(tmp_path: Path) -> None:
    grey(tmp_path / "a.png", 200)
    assert set(only(opened(spec(1, 1, 2, 2, dtype=np.int8), tmp_path, "IMAGE")).flat) == {127}
    doubled = opened(spec(1, 1, 2, 2, dtype=np.uint8), tmp_path, "IMAGE", 1, ImageOptions(std=(0.5,)))
    assert set(only(doubled).flat) == {255}


def test_input_dtypes_that_take_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(CalibError, match=r"'x' \(int64 .*\) takes no pictures.*input_type = NPY"):
        opened(spec(1, 1, 2, 2, dtype=np.int64), tmp_path, "IMAGE")


def test_options_are_checked_before_any_file(tmp_path: Path) -> None:
    with pytest.raises(CalibError, match=r"^image_to_format = GRAY"):
        opened(spec(1, 3, 2, 2), tmp_path / "gone", "IMAGE", 1, ImageOptions("GRAY"))


# Raw buffers


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool", "float64"])
def test_raw_buffers(tmp_path: Path, dtype: str) -> None:
    values = (np.arange(6) % 2 if dtype == "bool" else np.arange(6)).astype(dtype).reshape(1, 2, 3)
    (tmp_path / "a.bin").write_bytes(values.tobytes())
    array = only(opened(spec(1, 2, 3, dtype=dtype), tmp_path, "BIN"))
    assert array.dtype == dtype and np.array_equal(array, values)


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((None, 4), 4, (1, 4)),
        ((1, None, 4), 12, (1, 3, 4)),
        ((None, None, 4), 12, (1, 3, 4)),
        ((2, None), 6, (2, 3)),
        ((5,), 5, (5,)),
        ((), 1, ()),
    ],
)
def test_open_dimensions_of_raw_buffers(
    tmp_path: Path, shape: tuple[int | None, ...], count: int, expected: tuple[int, ...]
) -> None:
    np.arange(count, dtype=np.float32).tofile(tmp_path / "a.bin")
    array = only(opened(spec(*shape), tmp_path, "BIN"))
    assert array.shape == expected and array.ravel().tolist() == list(range(count))


def test_a_float16_input_takes_float32_buffers(tmp_path: Path) -> None:
    np.float32([1.5, -2, 0.1]).tofile(tmp_path / "a.bin")
    array = only(opened(spec(1, 3, dtype=np.float16), tmp_path, "BIN"))
    assert array.tolist() == [[1.5, -2, float(np.float16(0.1))]]


@pytest.mark.parametrize(
    ("shape", "dtype", "stored", "wanted"),
    [
        ((1, 3), np.float32, 11, "12"),
        ((1, 3), np.float32, 24, "12"),
        ((1, 3), np.int64, 12, "24"),
        ((None, None, 4), np.float32, 20, "a multiple of 16"),
        ((None, None, 4), np.float32, 0, "a multiple of 16"),
    ],
)
def test_raw_buffers_of_the_wrong_size(
    tmp_path: Path, shape: tuple[int | None, ...], dtype: type, stored: int, wanted: str
) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(stored))
    with pytest.raises(CalibError, match=rf"a\.bin: holds {stored} bytes but input .* takes {wanted}; write all"):
        opened(spec(*shape, dtype=dtype), tmp_path, "BIN")


def test_several_open_dimensions_need_the_flag(tmp_path: Path) -> None:
    with pytest.raises(CalibError, match=r"\[\?, 3, \?, \?\].* several open dimensions.*--inputShape"):
        opened(spec(None, 3, None, None), tmp_path, "BIN")


@pytest.mark.parametrize("kind", ["BIN", "NPY"])
def test_text_inputs_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CalibError, match="'x' .* does not take numbers"):
        opened(spec(1, dtype=object), tmp_path, kind)


# NumPy files


def test_npy_folder_with_and_without_the_batch_axis(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values[None] + 10)
    dataset = opened(spec(None, 2, 3), tmp_path, "NPY", 2)
    assert np.array_equal(dataset.sample(0)["x"], values[None])
    assert np.array_equal(dataset.sample(1)["x"], values[None] + 10)


def test_npz_takes_the_named_array_or_the_only_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "1.npz", y=np.float32([9]), x=np.float32([1]))
    np.savez(tmp_path / "2.npz", other=np.float32([2]))
    np.savez(tmp_path / "3.npz", y=np.float32([9]), z=np.float32([3]))
    dataset = opened(spec(1), tmp_path, "NPY", 3)
    assert levels(dataset) == [1, 2]
    assert dataset.warnings[0] == (
        f"{tmp_path / '3.npz'}: holds no array named 'x', only y, z; name it so or keep a single array."
    )


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_one_file_of_rows(tmp_path: Path, suffix: str) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "npy":
        np.save(path, rows)
    else:
        np.savez(path, x=rows)
    dataset = opened(spec(None, 3), path, "NPY", 4)
    assert [dataset.sample(i)["x"].tolist() for i in range(4)] == rows[:, None].tolist()
    assert dataset.files(2) == (path,)


def test_rows_fill_a_fixed_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(7, dtype=np.float32)[:, None])
    dataset = opened(spec(3, 1), tmp_path / "rows.npy", "NPY", 2)
    assert dataset.sample(1)["x"].ravel().tolist() == [3, 4, 5]
    assert dataset.warnings == (
        f"{tmp_path / 'rows.npy'}: the last 1 row(s) cannot fill a batch of 3 and are not used.",
    )


def test_rows_of_no_length(tmp_path: Path) -> None:
    np.save(tmp_path / "scalar.npy", np.float32(1))
    with pytest.raises(CalibError, match=r"scalar\.npy: its array has shape \[\]; its first axis must run over 1 item"):
        opened(spec(1, 3), tmp_path / "scalar.npy", "NPY")


def test_a_row_of_the_wrong_shape_names_the_row(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, 5), np.float32))
    with pytest.raises(CalibError, match=r"rows\.npy, row 0: the array has shape \[1, 5\] but input 'x' .*\[\?, 3\]"):
        opened(spec(None, 3), tmp_path / "rows.npy", "NPY")


@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 3), (3,), (1, 1, 2, 3)])
def test_npy_of_the_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    with pytest.raises(CalibError, match=r"a\.npy: the array has shape \[.*\] but input 'x' \(float32 \[1, 2, 3\]\)"):
        opened(spec(1, 2, 3), tmp_path, "NPY")


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("f8", "f4"),
        ("f2", "f4"),
        ("f4", "f2"),
        (">f4", "f4"),
        ("i8", "f4"),
        ("u1", "f4"),
        ("i8", "i4"),
        ("i8", "u1"),
        ("u1", "i8"),
        ("?", "f4"),
        ("?", "i4"),
        ("?", "?"),
    ],
)
def test_safe_conversions(tmp_path: Path, stored: str, wanted: str) -> None:
    np.save(tmp_path / "a.npy", np.array([[0, 1]], stored))
    array = only(opened(spec(1, 2, dtype=wanted), tmp_path, "NPY"))
    assert array.dtype == np.dtype(wanted) and array.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([1.0], "f4"), "i4"),
        (np.array([300], "i8"), "u1"),
        (np.array([-1], "i8"), "u1"),
        (np.array([200], "u1"), "i1"),
        (np.array([1e39], "f8"), "f4"),
        (np.array([70000], "i8"), "f2"),
        (np.array([1j], "c8"), "f4"),
        (np.array([1], "i8"), "?"),
        (np.array(["1"]), "f4"),
    ],
)
def test_unsafe_conversions(tmp_path: Path, values: np.ndarray, wanted: str) -> None:
    np.save(tmp_path / "a.npy", values)
    message = rf"a\.npy: its {values.dtype} values do not fit input .*; save them as {np.dtype(wanted)}\."
    with pytest.raises(CalibError, match=message):
        opened(spec(1, dtype=wanted), tmp_path, "NPY")


def test_not_a_number_passes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([np.nan, np.inf, 1.0]))
    np.testing.assert_array_equal(only(opened(spec(3), tmp_path, "NPY")), np.float32([np.nan, np.inf, 1]))


def _pickled(path: Path) -> None:
    np.save(path, np.array([{}], object), allow_pickle=True)


def _text(path: Path) -> None:
    path.write_text("hello")


def _cut(path: Path) -> None:
    np.save(path, np.zeros((1, 100), np.float32))
    path.write_bytes(path.read_bytes()[:200])


def _cut_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.zeros((1, 100), np.float32))
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("write", [_pickled, _text, _cut, _cut_npz, Path.touch])
def test_broken_numpy_files(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "a.npy")
    with pytest.raises(CalibError, match=r"a\.npy: cannot be read as a NumPy file \("):
        opened(spec(1, 100), tmp_path, "NPY")
