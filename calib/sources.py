"""One model input's data: pictures, raw buffers or NumPy files, as arrays in the input's shape and
dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from numpy.lib.format import open_memmap
from numpy.lib.npyio import NpzFile

from calib import CalibError
from calib.affine import Array
from calib.images import ImageOptions, load_image, reading

IMAGE_AXES = ("NCHW", "NHWC")
PICTURE_CHANNELS = (1, 3)
PIXEL_DTYPES = ("float32", "float16", "uint8", "int8")
# A small archive may unpack to more than fits into memory.
MAX_UNPACKED = 1 << 30
CLUTTER = ("thumbs.db", "desktop.ini")
# Sub-folders of sub-folders that are looked into: links may go in circles.
DEEPEST = 4


@dataclass(frozen=True)
class InputSpec:
    """A model input: `None` in `shape` is a dynamic dimension; `layout` is NCHW or NHWC where the
    user said so.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    layout: str | None = None

    @property
    def batch(self) -> int:
        """Items in one sample: the first dimension, 1 where it is dynamic or missing."""
        return (self.shape[0] if self.shape else None) or 1

    def __str__(self) -> str:
        sides = ", ".join("?" if side is None else str(side) for side in self.shape)
        return f"'{self.name}' ({self.dtype} [{sides}])"


@dataclass(frozen=True)
class Source:
    """One input's candidates: `files` of each, and `read`, which loads candidate number k or raises
    CalibError.
    """

    spec: InputSpec
    files: Sequence[tuple[Path, ...]]
    read: Callable[[int], Array]
    warnings: tuple[str, ...] = ()


def list_files(folder: Path) -> list[Path]:
    """The folder's visible files in natural order; a dangling link is listed, so that it is named
    when it fails.

    Where there are none but sub-folders, as of classes, their files: the first of each, the second
    of each and so on, so that the first few files are of all.
    """
    try:
        return _files_in(folder)
    except OSError as error:
        msg = (
            f"{folder}: is not a readable folder of calibration data ({error.strerror}); correct "
            "calibrate_path."
        )
        raise CalibError(msg) from error


def _files_in(folder: Path, depth: int = 0) -> list[Path]:
    entries = [entry for entry in folder.iterdir() if _is_visible(entry)]
    files = [path for path in entries if path.is_file() or not path.exists()]
    if files or depth == DEEPEST:
        return sorted(files, key=lambda path: _natural(path.name))
    inner = [_files_in(path, depth + 1) for path in _sorted_folders(entries)]
    turns = zip_longest(*inner)
    return [path for turn in turns for path in turn if path is not None]


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.lower() not in CLUTTER


def _sorted_folders(entries: Iterable[Path]) -> list[Path]:
    folders = (path for path in entries if path.is_dir() and _is_visible(path))
    return sorted(folders, key=lambda path: _natural(path.name))


def class_folders(folder: Path) -> dict[str, int]:
    """The classes that sub-folders are: their numbers where all have numbers for names, else their
    places in natural order.
    """
    names = [path.name for path in _sorted_folders(folder.iterdir())]
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return {name: int(name) if numbers else place for place, name in enumerate(names)}


def _natural(name: str) -> tuple[list[str | int], str]:
    """A sort key that compares digits by value; splitting on a group puts them at the odd
    places.
    """
    parts = re.split("([0-9]+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _from_folder(
    spec: InputSpec,
    folder: Path,
    read: Callable[[Sequence[Path]], Array],
    each: int = 1,
) -> Source:
    """The folder's files in groups of `each`, which `read` makes samples of; those that fill none
    are warned of.
    """
    files = list_files(folder)
    whole = len(files) - len(files) % each
    if not whole:
        msg = (
            f"{folder}: holds {len(files)} file(s) but one sample of input {spec} takes {each}; "
            "add files."
        )
        raise CalibError(msg)
    groups = [tuple(files[i : i + each]) for i in range(0, whole, each)]
    rest = ", ".join(path.name for path in files[whole:])
    note = (f"{folder}: {rest} cannot fill a batch of {each} and are not used.",) if rest else ()
    return Source(spec, groups, lambda k: read(groups[k]), note)


def image_source(spec: InputSpec, folder: Path, image: ImageOptions) -> Source:
    """Pictures, as many a sample as the input's batch."""
    axes = image_axes(spec)
    if spec.dtype.name not in PIXEL_DTYPES:
        msg = (
            f"The model's input {spec} takes no pictures, only {', '.join(PIXEL_DTYPES)} do; "
            "write input_type = NPY."
        )
        raise CalibError(msg)
    image.check(_channels(spec, axes))
    return _from_folder(
        spec, folder, lambda files: _image_batch(spec, axes, files, image), spec.batch
    )


def channels_of(spec: InputSpec) -> tuple[int, int]:
    """The axis of a picture's channels, and how many there are: the last axis and 1 where it has no
    such axis. Raises CalibError where that is not clear.
    """
    axes = image_axes(spec)
    if "C" not in axes:
        return len(axes) - 1, 1
    axis = axes.index("C")
    return axis, spec.shape[axis] or 1


def image_axes(spec: InputSpec) -> str:
    """The meaning of the axes of an input that takes pictures: NCHW, NHWC or, for grey ones without
    a channel axis, NHW. Raises CalibError where that is not clear.
    """
    if len(spec.shape) == 3 and spec.batch == 1:
        return "NHW"
    fits = layouts(spec)
    if not fits:
        msg = (
            f"The model's input {spec} is not made for pictures of 1 or 3 channels; write "
            "input_type = BIN or NPY, "
            "or fix its open dimensions with --inputShape."
        )
        raise CalibError(msg)
    meant = [axes for axes in fits if spec.layout in (None, axes)]
    if len(meant) == 1:
        return meant[0]
    usable = " or ".join(f"--inputDataFormat={axes}" for axes in fits)
    msg = (
        f"The channel axis of the model's input {spec} is not clear or not where said; write "
        f"{usable}."
    )
    raise CalibError(msg)


def layouts(spec: InputSpec, channels: Collection[int] = PICTURE_CHANNELS) -> list[str]:
    """The layouts in which an input of four dimensions may take pictures of so many channels."""
    four = len(spec.shape) == len("NCHW")
    return [axes for axes in IMAGE_AXES if four and _channels(spec, axes) in channels]


def _channels(spec: InputSpec, axes: str) -> int:
    """The input's channels, 0 where they are dynamic."""
    return 1 if "C" not in axes else spec.shape[axes.index("C")] or 0


def _image_batch(spec: InputSpec, axes: str, files: Sequence[Path], image: ImageOptions) -> Array:
    """The pictures as one array in the input's layout; for integer inputs rounded and clipped to
    the dtype.
    """
    pictures = [load_image(path, image, _channels(spec, axes)) for path in files]
    height, width = (
        spec.shape[axes.index(axis)] or pictures[0].shape["HW".index(axis)] for axis in "HW"
    )
    for path, picture in zip(files, pictures, strict=True):
        if picture.shape[:2] != (height, width):
            msg = (
                f"{path}: the picture is {picture.shape[1]}x{picture.shape[0]} after "
                f"preprocessing but input {spec} "
                f"takes {width}x{height} (width x height); set resize_width and resize_height, or "
                "center_crop_width "
                "and center_crop_height, to that size."
            )
            raise CalibError(msg)
    batch = np.stack(pictures)
    batch = (
        batch[..., 0] if axes == "NHW" else batch.transpose(["NHWC".index(axis) for axis in axes])
    )
    if spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        batch = np.clip(np.rint(batch), limits.min, limits.max)
    return batch.astype(spec.dtype)


def _turn(spec: InputSpec) -> tuple[int, ...] | None:
    """The axes of the data, in the order of the input's, where the user said that data has another
    layout than the input; None where it has the same.

    An input whose channels cannot be told by their number has them where ONNX's convolutions do.
    """
    if spec.layout is None or len(spec.shape) != 4:
        return None
    fits = layouts(spec)
    if len(fits) == 2:
        return None  # which of the two is what the user says
    own = fits[0] if fits else IMAGE_AXES[0]
    return None if own == spec.layout else tuple(spec.layout.index(axis) for axis in own)


def bin_source(spec: InputSpec, folder: Path, _: ImageOptions) -> Source:
    """Raw buffers, one file a sample, in the input's dtype and the layout that the user says, by
    default its own.
    """
    _check_numeric(spec)
    if spec.shape[1:].count(None) > 1:
        msg = (
            f"The model's input {spec} has several open dimensions, which raw files cannot fill; "
            "give --inputShape."
        )
        raise CalibError(msg)
    return _from_folder(spec, folder, lambda files: _read_bin(spec, files[0]))


def _read_bin(spec: InputSpec, path: Path) -> Array:
    """A little-endian buffer of the input's dtype; a float16 input also takes the same values
    stored as float32.
    """
    sides, turn = (spec.batch, *spec.shape[1:]) if spec.shape else (), _turn(spec)
    sides = tuple(sides[place] for place in np.argsort(turn)) if turn else sides
    known = prod(side for side in sides if side is not None)
    stored = [spec.dtype, np.dtype(np.float32)] if spec.dtype == np.float16 else [spec.dtype]
    with reading(path, "a raw buffer"):
        size = path.stat().st_size
        for dtype in stored:
            unit = known * dtype.itemsize
            if size == unit or (None in sides and size and size % unit == 0):
                shape = [size // unit if side is None else side for side in sides]
                array = np.fromfile(path, dtype.newbyteorder("<")).reshape(shape)
                return (array.transpose(turn) if turn else array).astype(spec.dtype)
    wanted = f"{'a multiple of ' if None in sides else ''}{known * spec.dtype.itemsize}"
    msg = (
        f"{path}: holds {size} bytes but input {spec} takes {wanted}; write all its values as "
        f"{spec.dtype}."
    )
    raise CalibError(msg)


def npy_source(spec: InputSpec, path: Path, _: ImageOptions) -> Source:
    """A folder of .npy or .npz files, one a sample, or one such file whose first axis runs over the
    items.
    """
    _check_numeric(spec)
    if path.is_file():
        return _row_source(spec, path)
    return _from_folder(
        spec, path, lambda files: _fit(_read_npy(spec, files[0]), spec, str(files[0]))
    )


def _row_source(spec: InputSpec, path: Path) -> Source:
    rows, batch = _read_npy(spec, path), spec.batch
    count = len(rows) // batch if rows.ndim else 0
    if not count:
        msg = (
            f"{path}: its array has shape {list(rows.shape)}; its first axis must run over "
            f"{batch} item(s) or more."
        )
        raise CalibError(msg)
    rest = len(rows) - count * batch
    note = (
        (f"{path}: the last {rest} row(s) cannot fill a batch of {batch} and are not used.",)
        if rest
        else ()
    )
    files = [(path,)] * count
    return Source(
        spec,
        files,
        lambda k: _fit(rows[k * batch :][:batch], spec, f"{path}, row {k * batch}"),
        note,
    )


def _read_npy(spec: InputSpec, path: Path) -> Array:
    """The array of an .npy file, mapped, not read; of an .npz the one named as the input, else its
    only one.
    """
    with reading(path, "a NumPy file"):
        if path.suffix.lower() != ".npz":
            return np.asarray(open_memmap(path, mode="r"))
        with (
            path.open("rb") as file,
            ZipFile(file) as entries,
            NpzFile(file, allow_pickle=False) as archive,
        ):
            names = archive.files
            name = names[0] if len(names) == 1 else spec.name
            if name in names:
                unpacked = sum(entry.file_size for entry in entries.infolist())
                if unpacked > MAX_UNPACKED:
                    msg = (
                        f"{path}: unpacks to {unpacked:,} bytes, more than the {MAX_UNPACKED:,} "
                        "allowed; save .npy."
                    )
                    raise CalibError(msg)
                return np.asarray(archive[name])
    held = ", ".join(names) or "none"
    msg = (
        f"{path}: holds no array named '{spec.name}', only {held}; name it so or keep a single "
        "array."
    )
    raise CalibError(msg)


def _fit(array: Array, spec: InputSpec, where: str) -> Array:
    """A copy of `array` in the input's dtype, with the batch axis added where it lacks one."""
    batched, turn = array[None] if array.ndim == len(spec.shape) - 1 else array, _turn(spec)
    if turn and batched.ndim == len(turn):
        batched = batched.transpose(turn)
    same_rank = batched.ndim == len(spec.shape)
    if not same_rank or any(
        want not in (None, got) for want, got in zip(spec.shape, batched.shape, strict=True)
    ):
        msg = (
            f"{where}: the array has shape {list(array.shape)}, but input {spec} takes another; "
            "save it so."
        )
        raise CalibError(msg)
    return _cast(batched, spec, where)


def _cast(array: Array, spec: InputSpec, where: str) -> Array:
    """Integers become any number type that holds them, floats any float type that does not
    overflow.
    """
    integers = array.dtype.kind in "iu" and spec.dtype.kind in "iu"
    if integers or np.can_cast(array.dtype, spec.dtype, "same_kind"):
        with np.errstate(over="ignore"):
            cast = array.astype(spec.dtype)
        kept = np.isfinite(cast) == np.isfinite(array) if cast.dtype.kind == "f" else cast == array
        if kept.all():
            return cast
    msg = f"{where}: its {array.dtype} values do not fit input {spec}; save them as {spec.dtype}."
    raise CalibError(msg)


def _check_numeric(spec: InputSpec) -> None:
    if spec.dtype.kind not in "biuf":
        msg = f"The model's input {spec} does not take numbers, so it cannot be fed from files."
        raise CalibError(msg)


def as_item(name: str) -> str | None:
    """A name as an item of a list in the configuration: in quotes where it must be; None where no
    quotes can hold it.
    """
    if re.fullmatch(r"[\w./:-]+", name):
        return name
    quote = next((quote for quote in "\"'" if quote not in name), None)
    return f"{quote}{name}{quote}" if quote and name.isprintable() else None


# input_type → how the files of one input are read.
KINDS: dict[str, Callable[[InputSpec, Path, ImageOptions], Source]] = {
    "IMAGE": image_source,
    "BIN": bin_source,
    "NPY": npy_source,
}
