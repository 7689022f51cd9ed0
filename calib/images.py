"""One picture file to one float32 array (height, width, channels) of preprocessed pixels.

The order is fixed: decode, turn as the EXIF orientation says, convert the channels, go to float32
in 0..255, resize, crop the centre, normalise to (x - mean) / std. Nothing is rounded or clipped
after decoding, so normalising before the resize would give the same pixels; CUBIC may overshoot
0..255 a little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import DecompressionBombError, DecompressionBombWarning, Resampling

from calib import CalibError
from calib.affine import Array, along

Pixels = NDArray[np.float32]

FORMAT_CHANNELS = {"RGB": 3, "BGR": 3, "GRAY": 1}
RESIZE_METHODS = {
    "NEAREST": Resampling.NEAREST,
    "LINEAR": Resampling.BILINEAR,
    "CUBIC": Resampling.BICUBIC,
}
# ITU-R BT.601 luma of red, green and blue.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Pillow knows more, some of which start other programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# A larger picture, or resize, is refused: 89 million pixels are a gigabyte of float32 RGB.
MAX_PIXELS = 1024**3 // 12


@dataclass(frozen=True)
class ImageOptions:
    """How a picture becomes model input; the fields follow the `[data_preprocess_param]` keys.

    `image_to_format` is RGB, BGR or GRAY; None means RGB for a model with 3 channels and GRAY for
    one with 1. `normalize_mean` and `normalize_std` hold one number a channel, in that order, for
    pixels of 0..255; empty means 0 and 1. Sizes are in pixels; a missing width or height keeps the
    picture's own.
    """

    image_to_format: str | None = None
    normalize_mean: tuple[float, ...] = ()
    normalize_std: tuple[float, ...] = ()
    resize_width: int | None = None
    resize_height: int | None = None
    resize_short_side: int | None = None
    resize_method: str = "LINEAR"
    center_crop_width: int | None = None
    center_crop_height: int | None = None

    def format_for(self, channels: int) -> str:
        """The channel order given or, without one, the usual order for this number of channels."""
        return self.image_to_format or ("GRAY" if channels == 1 else "RGB")

    def check(self, channels: int) -> None:
        """Raise CalibError if the format, mean or std does not suit a model input of 1 or 3
        channels.
        """
        given = self.format_for(channels)
        if FORMAT_CHANNELS[given] != channels:
            usable = " or ".join(
                name for name, count in FORMAT_CHANNELS.items() if count == channels
            )
            msg = (
                f"image_to_format = {given} does not suit a model input of {channels} "
                f"channel(s); write {usable}."
            )
            raise CalibError(msg)
        for key in ("normalize_mean", "normalize_std"):
            if len(values := getattr(self, key)) not in (0, channels):
                msg = (
                    f"{key} has {len(values)} number(s) for a model input of {channels} "
                    f"channel(s); write {channels}."
                )
                raise CalibError(msg)
        if 0 in self.normalize_std:
            msg = "normalize_std must not hold 0; write 1 for a channel that is not to be scaled."
            raise CalibError(msg)


def load_image(path: Path, options: ImageOptions, channels: int) -> Pixels:
    """The picture as C-contiguous float32 (height, width, `channels`), preprocessed; of several
    frames the first.

    Shrinking with LINEAR or CUBIC averages over every pixel it covers, as pillow does and OpenCV
    does not. Transparency is dropped and the colours beneath it kept; 16-bit grey is scaled to
    0..255. Raises CalibError naming the file if it is broken, too large, or smaller than the crop.
    """
    options.check(channels)
    pixels = _convert(_decode(path), options.format_for(channels))
    pixels = np.array(
        _crop(_resize(pixels, options, path), options, path),
        order="C",
    )
    if options.normalize_mean:
        pixels -= np.asarray(options.normalize_mean, np.float32)
    if options.normalize_std:
        pixels /= np.asarray(options.normalize_std, np.float32)
    return pixels


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file in pixels, as it is stored; CalibError if it is broken."""
    with reading(path, "a picture"), Image.open(path, formats=FORMATS) as image:
        return image.size


def thumbnail(path: Path, side: int) -> bytes | None:
    """A picture file as a PNG that fits a square of `side` pixels; None where it is no picture."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            _limit(path, image.size, "has")
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((side, side))
            small.save(stream := BytesIO(), "PNG")
    except Exception:  # decoders raise almost any type on broken bytes
        return None
    return stream.getvalue()


def denormalized(x: Array, mean: Sequence[float], std: Sequence[float], axis: int) -> Array:
    """The pixels of 0..255, float64, that were normalized to `x`, with channels along `axis`; no
    mean or no std changed nothing.
    """
    scale, shift = (along(np.array(v), axis, x.shape) for v in (std or (1.0,), mean or (0.0,)))
    return np.asarray(x.astype(np.float64) * scale + shift)


def enlarged(options: ImageOptions, width: int, height: int) -> float:
    """How many times a picture of this size is enlarged, in the direction where it is more."""
    if options.resize_short_side:
        return options.resize_short_side / min(width, height)
    return max((options.resize_width or width) / width, (options.resize_height or height) / height)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever goes wrong while reading `path` as `what` ("a picture") into a CalibError that
    names it.
    """
    try:
        yield
    except CalibError:
        raise
    except Exception as error:  # decoders raise almost any type on broken bytes
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        msg = f"{path}: cannot be read as {what} ({' '.join(reason.split())})."
        raise CalibError(msg) from error


def _decode(path: Path) -> Pixels:
    """Upright float32 pixels of 0..255: (height, width, 1) of a grey file, else (height, width, 3)
    in RGB.
    """
    with reading(path, "a picture"):
        try:
            with Image.open(path, formats=FORMATS) as image:
                # Pillow only warns up to twice its limit.
                if math.prod(image.size) > (Image.MAX_IMAGE_PIXELS or math.inf):
                    raise DecompressionBombError
                _limit(path, image.size, "has")
                return _pixels(ImageOps.exif_transpose(image))
        except UnidentifiedImageError as error:
            msg = f"{path}: is broken or not a picture of a known format."
            raise CalibError(msg) from error
        except (DecompressionBombError, DecompressionBombWarning) as error:
            msg = (
                f"{path}: has more than the {MAX_PIXELS:,} pixels allowed; make the picture "
                "smaller."
            )
            raise CalibError(msg) from error


def _pixels(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _wide_grey(np.asarray(image))[..., None]
    if image.mode == "F":
        msg = "its pixels are floats of unknown scale; save it with 8 or 16 bits a channel"
        raise ValueError(msg)
    # Pillow would warn of a transparency that the conversion loses; losing it is meant.
    image.info.pop("transparency", None)
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"), np.float32)[..., None]
    return np.asarray(image.convert("RGB"), np.float32)


def _wide_grey(values: NDArray[Any]) -> Pixels:
    """16-bit grey scaled so that 65535 becomes 255."""
    if values.min() < 0 or values.max() > 65535:
        msg = "its pixels need more than 16 bits; save it with 8 or 16 bits a channel"
        raise ValueError(msg)
    return values.astype(np.float32) / np.float32(257)


def _convert(pixels: Pixels, to_format: str) -> Pixels:
    """Grey (1 channel) or RGB (3) pixels in the channels of `to_format`."""
    grey = pixels.shape[2] == 1
    if to_format == "GRAY":
        return pixels if grey else (pixels @ LUMA)[..., None]
    if grey:
        return np.repeat(pixels, 3, axis=2)
    return pixels[..., ::-1] if to_format == "BGR" else pixels


def _resize(pixels: Pixels, options: ImageOptions, path: Path) -> Pixels:
    height, width = pixels.shape[:2]
    size = (options.resize_width or width, options.resize_height or height)
    if short := options.resize_short_side:
        factor = short / min(width, height)
        size = (max(short, round(width * factor)), max(short, round(height * factor)))
    if size == (width, height):
        return pixels
    _limit(path, size, "would be resized to")
    method = RESIZE_METHODS[options.resize_method]
    planes = [Image.fromarray(plane).resize(size, method) for plane in np.moveaxis(pixels, 2, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def _crop(pixels: Pixels, options: ImageOptions, path: Path) -> Pixels:
    """The centre; an odd margin leaves its smaller half at the top and left."""
    height, width = pixels.shape[:2]
    crop_width = options.center_crop_width or width
    crop_height = options.center_crop_height or height
    if crop_width > width or crop_height > height:
        msg = (
            f"{path}: the picture is {width}x{height} before the crop, smaller than "
            "center_crop_width x "
            f"center_crop_height = {crop_width}x{crop_height}; crop less or resize to more."
        )
        raise CalibError(msg)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return pixels[top : top + crop_height, left : left + crop_width]


def _limit(path: Path, size: tuple[int, int], verb: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        msg = (
            f"{path}: {verb} {size[0]}x{size[1]} pixels, more than the {MAX_PIXELS:,} allowed; "
            "make it smaller."
        )
        raise CalibError(msg)
