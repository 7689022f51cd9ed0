"""calib.sources: what pictures, raw buffers and NumPy files become for inputs of every shape and
dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_files import colour, grey, grey_folder, levels, only, opened, spec

from calib import CalibError
from calib.samples import ImageOptions

# Pictures


@pytest.mark.parametrize("batch", [1, None])
def test_layouts_of_a_colour_picture(tmp_path: Path, batch: int | None) -> None:
    pixels = colour(tmp_path / "a.png")
    nchw = only(opened(spec(batch, 3, None, 4), tmp_path, "IMAGE"))
    assert np.array_equal(nchw, pixels.transpose(2, 0, 1)[None]) and nchw.flags.c_contiguous
    assert np.array_equal(only(opened(spec(batch, None, 4, 3), tmp_path, "IMAGE")), pixels[None])


def test_the_flag_decides_an_ambiguous_layout(tmp_path: Path) -> None:
    pixels = colour(tmp_path / "a.png", 3, 3)
    with pytest.raises(
        CalibError, match=r"write --inputDataFormat=NCHW or --inputDataFormat=NHWC\."
    ):
        opened(spec(1, 3, 3, 3), tmp_path, "IMAGE")
    assert np.array_equal(
        only(opened(spec(1, 3, 3, 3, layout="NHWC"), tmp_path, "IMAGE")), pixels[None]
    )
    nchw = only(opened(spec(1, 3, 3, 3, layout="NCHW"), tmp_path, "IMAGE"))
    assert np.array_equal(nchw, pixels.transpose(2, 0, 1)[None])


def test_a_flag_that_contradicts_the_shape(tmp_path: Path) -> None:
    with pytest.raises(CalibError, match=r"not where said; write --inputDataFormat=NCHW\."):
        opened(spec(1, 3, 8, 8, layout="NHWC"), tmp_path, "IMAGE")


@pytest.mark.parametrize(
    "shape", [(1, 8, 8, 4), (1, None, 8, None), (1, 10), (3, 8, 8), (1, 1, 3, 8, 8), ()]
)
def test_inputs_that_are_no_pictures(tmp_path: Path, shape: tuple[int | None, ...]) -> None:
    with pytest.raises(
        CalibError, match=r"'x' .* not made for pictures .* input_type = BIN or NPY.*--inputShape"
    ):
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
    assert dataset.warnings == (
        f"{tmp_path}: img9.png, img10.png cannot fill a batch of 3 and are not used.",
    )
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
        r"wide\.png: the picture is 5x4 after preprocessing but input 'x' \(float32 \[1, 1, 8, "
        r"9\]\) takes 9x8 .*"
        r"set resize_width and resize_height, or center_crop_width and center_crop_height"
    )
    with pytest.raises(CalibError, match=expected):
        opened(spec(1, 1, 8, 9), tmp_path, "IMAGE")
    resized = opened(
        spec(1, 1, 8, 9), tmp_path, "IMAGE", 1, ImageOptions(resize_width=9, resize_height=8)
    )
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
        ("float32", [-50, -0.5, 0.5, 1.5, 77.5]),
        ("float16", [-50, -0.5, 0.5, 1.5, 77.5]),
        ("uint8", [0, 0, 0, 2, 78]),
        ("int8", [-50, 0, 0, 2, 78]),
    ],
)
def test_input_dtypes(tmp_path: Path, dtype: str, expected: list[float]) -> None:
    Image.fromarray(np.array([[0, 99, 101, 103, 255]], np.uint8)).save(tmp_path / "a.png")
    image = ImageOptions(normalize_mean=(100.0,), normalize_std=(2.0,))
    array = only(opened(spec(1, 1, 1, 5, dtype=dtype), tmp_path, "IMAGE", 1, image))
    assert array.dtype == dtype and array.ravel().tolist() == expected


@pytest.mark.parametrize(("dtype", "expected"), [("uint8", [0, 255]), ("int8", [-128, 127])])
def test_integer_inputs_are_clipped(tmp_path: Path, dtype: str, expected: list[int]) -> None:
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "a.png")
    image = ImageOptions(normalize_mean=(100.0,), normalize_std=(0.5,))
    assert (
        only(opened(spec(1, 1, 1, 2, dtype=dtype), tmp_path, "IMAGE", 1, image)).ravel().tolist()
        == expected
    )


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
    with pytest.raises(
        CalibError, match=rf"a\.bin: holds {stored} bytes but input .* takes {wanted}; write all"
    ):
        opened(spec(*shape, dtype=dtype), tmp_path, "BIN")


def test_several_open_dimensions_need_the_flag(tmp_path: Path) -> None:
    with pytest.raises(
        CalibError, match=r"\[\?, 3, \?, \?\].* several open dimensions.*--inputShape"
    ):
        opened(spec(None, 3, None, None), tmp_path, "BIN")


@pytest.mark.parametrize("kind", ["BIN", "NPY"])
def test_text_inputs_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CalibError, match=r"'x' .* does not take numbers"):
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
        f"{tmp_path / '3.npz'}: holds no array named 'x', only y, z; name it so or keep a "
        "single array."
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
    with pytest.raises(
        CalibError,
        match=r"scalar\.npy: its array has shape \[\]; its first axis must run over 1 item",
    ):
        opened(spec(1, 3), tmp_path / "scalar.npy", "NPY")


def test_a_row_of_the_wrong_shape_names_the_row(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, 5), np.float32))
    with pytest.raises(
        CalibError,
        match=r"rows\.npy, row 0: the array has shape \[1, 5\], but input 'x' .*\[\?, 3\]",
    ):
        opened(spec(None, 3), tmp_path / "rows.npy", "NPY")


@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 3), (3,), (1, 1, 2, 3)])
def test_npy_of_the_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    with pytest.raises(
        CalibError,
        match=r"a\.npy: the array has shape \[.*\], but input 'x' \(float32 \[1, 2, 3\]\)",
    ):
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
    message = (
        rf"a\.npy: its {values.dtype} values do not fit input .*; save them as {np.dtype(wanted)}\."
    )
    with pytest.raises(CalibError, match=message):
        opened(spec(1, dtype=wanted), tmp_path, "NPY")


def test_not_a_number_passes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([np.nan, np.inf, 1.0]))
    np.testing.assert_array_equal(
        only(opened(spec(3), tmp_path, "NPY")), np.float32([np.nan, np.inf, 1])
    )


def _pickled(path: Path) -> None:
    np.save(path, np.array([{}], object), allow_pickle=True)


def _text(path: Path) -> None:
    path.write_text("hello")


def _cut(path: Path) -> None:
    np.save(path, np.zeros((1, 100), np.float32))
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("write", [_pickled, _text, _cut, Path.touch])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_broken_numpy_files(tmp_path: Path, write: Callable[[Path], None], suffix: str) -> None:
    write(tmp_path / "a.npy")
    (tmp_path / "a.npy").rename(tmp_path / f"a.{suffix}")
    with pytest.raises(CalibError, match=rf"a\.{suffix}: cannot be read as a NumPy file \("):
        opened(spec(1, 100), tmp_path, "NPY")


def test_pickles_in_an_archive_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}], object))
    with pytest.raises(
        CalibError, match=r"a\.npz: cannot be read as a NumPy file \(Object arrays cannot be loaded"
    ):
        opened(spec(1), tmp_path, "NPY")


def test_a_damaged_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 100), np.float32))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content.replace(bytes(40), b"\1" * 40, 1))
    with pytest.raises(CalibError, match=r"a\.npz: cannot be read as a NumPy file \(Bad CRC"):
        opened(spec(1, 100), tmp_path, "NPY")


@pytest.mark.parametrize("kind", ["BIN", "NPY"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (None, 3, 4, 5), (1, 8, 4, 5)])
def test_data_of_another_layout_is_turned(
    tmp_path: Path, kind: str, shape: tuple[int, ...]
) -> None:
    array = np.arange(shape[1] * 20, dtype=np.float32).reshape(4, 5, shape[1])  # height first
    if kind == "BIN":
        array.tofile(tmp_path / "a.bin")
    else:
        np.save(tmp_path / "a.npy", array)
    turned = only(opened(spec(*shape, layout="NHWC"), tmp_path, kind))
    np.testing.assert_array_equal(turned, array.transpose(2, 0, 1)[None])


def test_data_of_the_inputs_own_layout_stays(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(1, 4, 5, 3)
    array.tofile(tmp_path / "a.bin")
    for layout in (None, "NHWC"):
        found = only(opened(spec(1, 4, 5, 3, layout=layout), tmp_path, "BIN"))
        np.testing.assert_array_equal(found, array)
    other = only(opened(spec(1, 4, 5, 3, layout="NCHW"), tmp_path, "BIN"))
    np.testing.assert_array_equal(other, array.reshape(1, 3, 4, 5).transpose(0, 2, 3, 1))
