"""Outputs that can be looked at as small pictures: what both models make of the same one."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from calib.affine import Array
from converter.measure.results import View

# The longer side in pixels, and how good a JPEG is.
SIDE, QUALITY = 224, 82
# Float and quantized boxes; classes of a mask, from 1 on, and where two differ.
FLOAT, QUANTIZED = (79, 134, 247), (239, 138, 76)
CLASSES = np.array(
    [(79, 134, 247), (239, 138, 76), (60, 180, 110), (190, 90, 210), (220, 190, 40), (40, 190, 200)]
)
DIFFERENT = (229, 72, 77)
# How much of a mask lies over the picture; how many times a difference is enlarged at most, and the
# share of its values that become no more than white.
OVER, ENLARGED, LOUD = 0.55, 64, 0.999


def drawn(kind: str, view: View) -> Iterator[tuple[str, str]]:
    """Titles, and pictures as data for a page."""
    for title, pixels in _PICTURES[kind](view):
        yield title, _data(pixels)


def _data(pixels: Array) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    image.save(stream := BytesIO(), "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _rgb(pixels: Array) -> Array:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _as_pictures(view: View) -> Iterator[tuple[str, Array]]:
    yield "Float", _rgb(view.before)
    yield "Quantized", _rgb(view.after)
    if view.before.shape == view.after.shape:
        error = np.abs(np.subtract(view.before, view.after, dtype=np.int32))
        times = int(np.clip(255 / max(np.quantile(error, LOUD), 1), 1, ENLARGED))
        yield f"Difference, {times} times", _rgb((error * times).clip(0, 255).astype(np.uint8))


def _as_masks(view: View) -> Iterator[tuple[str, Array]]:
    yield "Float", _over(view.source, view.before, CLASSES)
    yield "Quantized", _over(view.source, view.after, CLASSES)
    if view.before.shape == view.after.shape:
        different = (view.before != view.after).astype(np.int64)
        yield "Where they differ", _over(view.source, different, np.array([DIFFERENT]))


def _over(source: Array, mask: Array, colors: Array) -> Array:
    """The picture, darker, with the mask's classes but 0 over it."""
    size = mask.shape[1], mask.shape[0]
    below = np.asarray(
        Image.fromarray(_rgb(source)).resize(size),
        np.float32,
    )
    above = colors[(mask - 1) % len(colors)]
    share = np.where(mask != 0, OVER, 0.0)[..., None]
    return np.asarray(below * (1 - share) + above * share).astype(np.uint8)


def _as_boxes(view: View) -> Iterator[tuple[str, Array]]:
    image = Image.fromarray(_rgb(view.source))
    image.thumbnail((2 * SIDE, 2 * SIDE))
    draw, size = ImageDraw.Draw(image), np.array([*image.size, *image.size])
    for found, color, width in ((view.before, FLOAT, 5), (view.after, QUANTIZED, 2)):
        for left, top, right, bottom in (found[:, :4] * size).tolist():
            corners = min(left, right), min(top, bottom), max(left, right), max(top, bottom)
            draw.rectangle(corners, outline=color, width=width)
    yield "Float blue, quantized orange", np.asarray(image)


_PICTURES = {"picture": _as_pictures, "mask": _as_masks, "boxes": _as_boxes}
