"""Calibration files and configs as they come: what a folder holds is used, or one sentence says why
not.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import CONFIG, DIGITS, MODEL, Command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calib import CalibError
from calib.images import ImageOptions, load_image
from calib.samples import Dataset, InputSpec, open_dataset

SUCCESS = "CONVERT RESULT SUCCESS:0"
GREY = InputSpec("image", np.dtype(np.float32), (None, 1, 28, 28))
PIXELS = (np.arange(28)[:, None, None] * 3 + np.arange(28)[:, None] * 5 + np.arange(4) * 9).astype(
    np.uint8
)


def _config(folder: Path, pictures: Path, size: int = 10) -> Path:
    path = folder / "c.cfg"
    path.write_text(
        "[common_quant_param]\nquant_type = FULL_QUANT\nthread_num = 1\n[data_preprocess_param]\n"
        f"calibrate_path = image:{pictures}\ncalibrate_size = {size}\ninput_type = IMAGE\n"
    )
    return path


def _png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of 8-bit grey whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _saved(mode: str, kind: str) -> bytes:
    stream = io.BytesIO()
    _in_mode(mode).save(stream, kind)
    return stream.getvalue()


def _in_mode(mode: str) -> Image.Image:
    if mode in ("I;16", "I"):
        return Image.fromarray(
            (PIXELS[..., 0].astype(np.uint16) * 257)
            if mode == "I;16"
            else PIXELS[..., 0].astype(np.int32)
        )
    if mode == "F":
        return Image.fromarray(PIXELS[..., 0].astype(np.float32))
    return (
        Image.fromarray(PIXELS, "RGBA").convert("RGB").convert(mode)
        if mode != "RGBA"
        else Image.fromarray(PIXELS)
    )


MODES = {
    "1": "PNG", "L": "PNG", "LA": "PNG", "P": "PNG", "PA": "TIFF", "RGB": "PNG", "RGBA": "PNG", "CMYK": "JPEG",
    "YCbCr": "JPEG", "I;16": "PNG", "I": "TIFF",
}  # fmt: skip
WHOLE = _saved("RGB", "PNG")
JPEG = _saved("RGB", "JPEG")

BROKEN: dict[str, Callable[[Path], object]] = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("no picture"),
    "zeros.jpg": lambda path: path.write_bytes(bytes(1000)),
    "truncated.png": lambda path: path.write_bytes(WHOLE[: len(WHOLE) // 2]),
    "truncated.jpg": lambda path: path.write_bytes(JPEG[: len(JPEG) // 2]),
    "header_only.png": lambda path: path.write_bytes(WHOLE[:40]),
    "bomb.png": lambda path: path.write_bytes(_png(60000, 60000, bytes(60000))),
    "enormous.png": lambda path: path.write_bytes(_png(2**31 - 1, 2**31 - 1, b"")),
    "no_size.png": lambda path: path.write_bytes(_png(0, 0, b"")),
    "too_little.png": lambda path: path.write_bytes(_png(28, 28, b"\0")),
    "floats.tiff": lambda path: path.write_bytes(_saved("F", "TIFF")),
    "program.eps": lambda path: path.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\nshowpage\n"
    ),
    "dangling.png": lambda path: path.symlink_to("nowhere.png"),
    "circle.png": lambda path: path.symlink_to(path.name),
    "wrong_size.png": lambda path: Image.new("L", (5, 3)).save(path),
}
IGNORED: dict[str, Callable[[Path], object]] = {
    "folder.png": lambda path: path.mkdir(),
    "pipe.png": lambda path: os.mkfifo(path),
    ".hidden.png": lambda path: path.write_text("no picture"),
}


def test_a_folder_of_everything_is_used_as_far_as_it_can(qconvert: Command, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, file in enumerate(sorted((DIGITS / "calib").iterdir())[:6]):
        shutil.copy(file, pictures / f"z{number}.png")
    for name, make in {**BROKEN, **IGNORED}.items():
        make(pictures / name)
    os.fsencode(pictures)
    shutil.copy(pictures / "z0.png", os.fsencode(pictures) + b"/\xff\xfe not text.png")
    shutil.copy(pictures / "z0.png", pictures / "new\nline =1+1 <b>.png")
    result = qconvert.convert(_config(tmp_path, pictures, 50), tmp_path / "q.onnx")
    assert (result.code, result.lines[-1]) == (0, SUCCESS)
    for name in BROKEN:
        assert len([line for line in result.err.splitlines() if name in line]) == 1, name
    assert not [name for name in IGNORED if name in result.err]
    assert "only 8 sample(s) are usable" in result.err
    assert all(line.startswith("WARNING: ") for line in result.err.splitlines())


@pytest.mark.parametrize("name", BROKEN)
def test_no_usable_file_is_an_error(qconvert: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "pictures").mkdir()
    BROKEN[name](tmp_path / "pictures" / name)
    result = qconvert.convert(_config(tmp_path, tmp_path / "pictures"), tmp_path / "q.onnx")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"ERROR: .+[.]\n", result.err)
    assert name in result.err
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to_format", ["RGB", "GRAY"])
def test_every_mode_of_picture_keeps_its_pixels(tmp_path: Path, mode: str, to_format: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(_saved(mode, MODES[mode]) if mode != "I" else _saved("I;16", "TIFF"))
    found = load_image(
        path, ImageOptions(image_to_format=to_format), 3 if to_format == "RGB" else 1
    )
    plain = _in_mode(mode if mode != "I" else "L")
    wide = plain.mode.startswith("I")
    wanted = (
        np.asarray(plain, np.float64) / 257
        if wide
        else np.asarray(plain.convert("RGB"), np.float64)
    )
    wanted = np.repeat(wanted[..., None], 3, 2) if wanted.ndim == 2 else wanted
    if mode == "I":
        wanted = np.repeat(PIXELS[..., :1].astype(np.float64), 3, 2)
    if to_format == "GRAY":
        wanted = wanted @ [[0.299], [0.587], [0.114]]
    lossy = MODES[mode] == "JPEG"
    assert np.abs(found - wanted).mean() < (8 if lossy else 1.0)
    assert found.shape == wanted.shape


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.integers(0, len(WHOLE) - 1),
    length=st.integers(0, 20),
    new=st.binary(max_size=20),
    jpeg=st.booleans(),
)
def test_damaged_pictures_are_read_or_refused(
    tmp_path: Path, place: int, length: int, new: bytes, jpeg: bool
) -> None:
    whole = JPEG if jpeg else WHOLE
    path = tmp_path / "picture"
    path.write_bytes(whole[:place] + new + whole[place + length :])
    try:
        found = load_image(path, ImageOptions(), 3)
    except CalibError as error:
        assert str(path) in str(error)
    else:
        assert np.isfinite(found).all()


def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.sources.MAX_UNPACKED", 1 << 22)
    np.savez_compressed(tmp_path / "bomb.npz", image=np.zeros(1 << 20, np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 14
    with pytest.raises(CalibError, match=r"bomb\.npz: unpacks to .* more than the"):
        open_dataset([GREY], {"image": tmp_path}, 1, kind="NPY", image=ImageOptions())


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04\x95cos\nsystem\n"]
)
def test_files_that_are_no_arrays_are_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibError, match=rf"{name}"):
            open_dataset([GREY], {"image": tmp_path}, 1, kind="NPY", image=ImageOptions())
        (tmp_path / name).unlink()


def test_pickled_objects_are_never_unpacked(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", image=np.array([Evil()], dtype=object))
    with pytest.raises(CalibError, match=r"a\.npy"):
        open_dataset([GREY], {"image": tmp_path}, 2, kind="NPY", image=ImageOptions())
    assert not (tmp_path / "executed").exists()


def _calls(function: Callable[[], object]) -> int:
    """How many functions it calls, which is its time on no machine in particular."""
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_ten_thousand_files_are_listed_in_no_time(tmp_path: Path) -> None:
    def opened() -> Dataset:
        return open_dataset(
            [GREY], {"image": tmp_path}, 4, kind="IMAGE", image=ImageOptions(), workers=1
        )

    Image.new("L", (28, 28), 7).save(tmp_path / "0.png")
    for number in range(1, 10_000):
        (tmp_path / f"{number}.png").hardlink_to(tmp_path / "0.png")
    many = _calls(opened)
    assert [opened().files(i)[0].name for i in range(4)] == ["0.png", "1.png", "2.png", "3.png"]
    for number in range(1000, 10_000):
        (tmp_path / f"{number}.png").unlink()
    # Ten times the files, not a hundred times the work.
    assert many < 12 * _calls(opened)
    # Pictures that are not used are not opened either.
    for number in range(4, 1000):
        (tmp_path / f"{number}.png").unlink()
        (tmp_path / f"{number}.png").write_text("no picture")
    assert opened().warnings == ()


# --- configs

VALID = CONFIG.read_bytes()


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    place=st.integers(0, len(VALID)),
    length=st.integers(0, 40),
    new=st.binary(max_size=30) | st.just(b"\n[x]\n="),
)
def test_damaged_configs_end_in_a_plan_or_a_sentence(
    qconvert: Command, tmp_path: Path, place: int, length: int, new: bytes
) -> None:
    config = tmp_path / "c.cfg"
    config.write_bytes(VALID[:place] + new + VALID[place + length :])
    result = qconvert(
        f"--modelFile={MODEL}", f"--configFile={config}", "--dry-run", f"--outputFile={tmp_path}/q"
    )
    assert result.code in (0, 1)
    errors = [line for line in result.err.splitlines() if not line.startswith("WARNING: ")]
    assert len(errors) == result.code
    assert "unforeseen" not in result.err


@pytest.mark.parametrize(
    "content", [b"", bytes(100), b"\xff\xfe[\x00", b"[" * 10000, b"=\n" * 1000, b"a" * (2 << 20)]
)
def test_files_that_are_no_configs_are_refused(
    qconvert: Command, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "c.cfg").write_bytes(content)
    result = qconvert.convert(tmp_path / "c.cfg", tmp_path / "q.onnx")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"ERROR: .+[.]\n", result.err)
    assert len(result.err) < 500
