"""Outputs that can be looked at beside the picture they come from: pictures, masks and boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from calib.affine import Array
from calib.images import denormalized
from calib.samples import Dataset, Sample
from calib.sources import PICTURE_CHANNELS
from converter.config import DataPreprocessParam
from converter.measure.boxes import boxes, found_again
from converter.measure.results import View, Views

# Samples that are shown, those whose answers changed most.
SHOWN = 6
# A map has so many pixels at least, is so much smaller than the picture at most, and tells so many
# classes.
LEAST_SIDE, SMALLER, MOST_CLASSES = 16, 4, 256
# How far two aspect ratios may differ, and how far rounding leads out of a range.
ASPECT, ROUNDED = 0.05, 0.1
# One channel of shares is a mask where it is more than this.
LIKELY = 0.5
# The full height of a picture: of shares, of values around zero, of pixels.
PEAKS = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
Outputs = Sequence[Sequence[Array]]


def views(
    names: Sequence[str],
    before: Outputs,
    after: Outputs,
    data: Dataset,
    *,
    wanted: DataPreprocessParam,
) -> Iterator[Views]:
    """What can be looked at of the outputs of both models for the samples of `data`."""
    size = _size(data.sample(0))
    if size is None or not all(isinstance(x, np.ndarray) for row in before for x in row):
        return
    if len({tuple(x.shape for x in row) for row in (*before, *after)}) > 1:
        return
    if detected := _detected(before, after, size):
        yield _compared("", "boxes", *detected, data=data, wanted=wanted)
        return
    for number, name in enumerate(names):
        sides = [[row[number] for row in side] for side in (before, after)]
        kind = _kind(sides[0], size, _channels(data.sample(0)))
        if kind:
            shown = [[_map(x, kind, size) for x in side] for side in sides]
            yield _compared(name, kind, *shown, data=data, wanted=wanted)


def _detected(
    before: Outputs, after: Outputs, size: tuple[int, int]
) -> tuple[list[Array], list[Array]] | None:
    """The boxes of both models for every sample, None where some have no known form."""
    first, second = ([boxes(list(row), size) for row in side] for side in (before, after))
    known = [[x for x in found if x is not None] for found in (first, second)]
    if len(known[0]) < len(before) or len(known[1]) < len(after):
        return None
    return known[0], known[1]


def _compared(
    name: str,
    kind: str,
    before: Sequence[Array],
    after: Sequence[Array],
    *,
    data: Dataset,
    wanted: DataPreprocessParam,
) -> Views:
    """The samples that changed most, and how much all did."""
    peak = _peak(before) if kind == "picture" else (0.0, 1.0)
    figures = [MEASURES[kind](x, y, peak) for x, y in zip(before, after, strict=True)]
    order = np.argsort(figures, kind="stable")[:SHOWN].tolist()
    shown = []
    for index in order:
        files, pixels = data.files(index), pixels_of(data.sample(index), wanted)
        pair = before[index], after[index]
        if kind == "picture":
            pair = _scaled(pair[0], peak), _scaled(pair[1], peak)
        said = WORDS[kind](figures[index])
        shown.append(View(files[0].name if files else str(index), pixels, *pair, said))
    overall = WORDS[kind](float(np.mean(figures)))
    least = WORDS[kind](float(np.min(figures)))
    return Views(
        name,
        kind,
        f"{overall} on average of {len(figures)} samples, {least} at least",
        tuple(shown),
    )


# --- what a picture is


def _picture(sample: Sample) -> tuple[Array, int] | None:
    """The one input that is a picture, and the axis of its channels; None without one."""
    found = [
        (x, axis)
        for x in sample.values()
        if x.ndim == 4 and len(x) == 1
        for axis in (1, 3)
        if x.shape[axis] in PICTURE_CHANNELS and min(_sides(x, axis)) >= LEAST_SIDE
    ]
    return found[0] if found else None


def _sides(x: Array, axis: int) -> tuple[int, int]:
    """Width and height."""
    height, width = (x.shape[k] for k in range(1, 4) if k != axis)
    return width, height


def _size(sample: Sample) -> tuple[int, int] | None:
    found = _picture(sample)
    return _sides(*found) if found else None


def _channels(sample: Sample) -> int:
    found = _picture(sample)
    return found[0].shape[found[1]] if found else 0


def pixels_of(sample: Sample, wanted: DataPreprocessParam) -> Array:
    """The picture that the model is fed, as uint8 (height, width, 1 or 3) in RGB."""
    x, axis = _picture(sample) or (np.zeros((1, 1, 1, 1)), 1)
    pixels = np.moveaxis(x[0], axis - 1, -1).astype(np.float32)
    if x.dtype.kind == "f" and wanted.input_type == "IMAGE":
        pixels = denormalized(pixels, wanted.normalize_mean, wanted.normalize_std, axis=-1)
    elif x.dtype.kind == "f":
        least = float(pixels.min())
        pixels = (pixels - least) * np.float32(255 / max(float(pixels.max()) - least, 1e-9))
    if wanted.image_to_format == "BGR":
        pixels = pixels[..., ::-1]
    return _bytes(pixels)


def _bytes(pixels: Array) -> Array:
    return np.nan_to_num(pixels).round().clip(0, 255).astype(np.uint8)


# --- what an output is


def _kind(samples: Sequence[Array], size: tuple[int, int], channels: int) -> str:
    """How an output is looked at: as a picture or a mask; empty where it is neither."""
    axes = {_axis(x, size) for x in samples}
    if len(axes) > 1 or None in axes:
        return ""
    (axis,) = axes
    first = samples[0]
    if axis == 0 or first.dtype.kind != "f":
        return "mask" if first.dtype.kind in "iu" else ""
    count = first.shape[axis or 1]
    shares = all(x.min() >= 0 and x.max() <= 1 for x in samples)
    if count == 1:
        return "mask" if shares and channels != 1 else "picture"
    return "picture" if count == channels else "mask"


def _axis(x: Array, size: tuple[int, int]) -> int | None:
    """The axis of an output's channels, 0 if it has none; None where it is no map."""
    if len(x) != 1 or x.ndim not in (3, 4):
        return None
    for axis in (1, 3) if x.ndim == 4 else (0,):
        height, width = (x.shape[k] for k in range(1, x.ndim) if k != axis)
        alike = abs(width * size[1] / (height * size[0]) - 1) < ASPECT
        large = min(width, height) >= LEAST_SIDE and width * SMALLER >= size[0]
        if alike and large and (axis == 0 or x.shape[axis] <= MOST_CLASSES):
            return axis
    return None


def _map(x: Array, kind: str, size: tuple[int, int]) -> Array:
    """Pixels (height, width, channels) of a picture, or classes (height, width) of a mask."""
    axis = _axis(x, size)
    if axis == 0:
        return np.asarray(x[0])
    pixels = np.moveaxis(x[0], (axis or 1) - 1, -1)
    if kind == "picture":
        return np.asarray(pixels, np.float32)
    if pixels.shape[-1] == 1:
        x0 = pixels[..., 0]
        return np.asarray(x0 > LIKELY if x.dtype.kind == "f" else x0, np.int64)
    return np.asarray(pixels.argmax(axis=-1))


def _peak(pictures: Sequence[Array]) -> tuple[float, float]:
    """Black and white of the float model's pictures."""
    least, most = (f([f(x) for x in pictures]) for f in (np.min, np.max))
    for low, high in PEAKS:
        room = ROUNDED * (high - low)
        if low - room <= least and most <= high + room:
            return low, high
    return float(least), float(most)


def _scaled(pixels: Array, peak: tuple[float, float]) -> Array:
    low, high = peak
    return _bytes((pixels - low) * (255 / max(high - low, 1e-9)))


# --- how much they differ


def _psnr(x: Array, y: Array, peak: tuple[float, float]) -> float:
    """Peak signal to noise ratio in dB, MAX² over the mean squared error."""
    if x.shape != y.shape:
        return 0.0
    noise = float(np.square(np.subtract(x, y, dtype=np.float64)).mean())
    return float(10 * np.log10((peak[1] - peak[0]) ** 2 / noise)) if noise else np.inf


def _iou(x: Array, y: Array, _: tuple[float, float]) -> float:
    """Intersection over union of what is not class 0, class by class counted together."""
    if x.shape != y.shape:
        return 0.0
    either = np.count_nonzero((x != 0) | (y != 0))
    return float(np.count_nonzero((x == y) & (x != 0)) / either) if either else 1.0


def _f1(x: Array, y: Array, _: tuple[float, float]) -> float:
    """Harmonic mean of precision and recall of the float model's boxes; 1 where there are none."""
    both = len(x) + len(y)
    return 2 * found_again(x, y) / both if both else 1.0


MEASURES = {"picture": _psnr, "mask": _iou, "boxes": _f1}
WORDS = {
    "picture": lambda figure: f"PSNR {figure:.1f} dB",
    "mask": lambda figure: f"mask IoU {figure:.3f}",
    "boxes": lambda figure: f"boxes F1 {figure:.3f}",
}
