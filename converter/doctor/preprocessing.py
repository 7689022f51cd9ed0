"""Ways to feed pictures: those that models are commonly trained with, and mistakes around what a
configuration says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from calib.affine import Array, along
from calib.images import FORMAT_CHANNELS, ImageOptions, denormalized

Numbers = tuple[float, ...]
# Constants that differ less are the same: frameworks round them.
SAME = 0.05


@dataclass(frozen=True)
class Scaling:
    """(pixel - mean) / std of the channels red, green and blue, with pixels of 0..255."""

    title: str
    mean: Numbers
    std: Numbers

    def suits(self, channels: int) -> bool:
        """Whether it may be meant for so many channels, 1 or 3."""
        alike = len(set(self.mean)) == len(set(self.std)) == 1
        return alike if channels == 1 else self.title != MNIST


def _alike(title: str, mean: float, std: float) -> Scaling:
    return Scaling(title, (mean,) * 3, (std,) * 3)


MNIST = "MNIST's"
# What frameworks and their published models are trained with.
CONVENTIONS = (
    _alike("-1..1 (TensorFlow)", 127.5, 127.5),
    Scaling("ImageNet's (PyTorch)", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    _alike("0..1", 0.0, 255.0),
    _alike("0..255 as they are", 0.0, 1.0),
    Scaling("ImageNet's mean alone (Caffe)", (123.0, 117.0, 104.0), (1.0,) * 3),
    _alike("-0.5..0.5", 127.5, 255.0),
    _alike(MNIST, 33.32, 78.57),
)


@dataclass(frozen=True)
class Way:
    """One way to feed pictures: the order of the channels, and constants in this order."""

    title: str
    order: str
    mean: Numbers
    std: Numbers

    def same_as(self, other: Way) -> bool:
        """Whether the model would see the same but for rounded constants."""
        if self.order != other.order:
            return False
        steps = np.subtract(self.mean, other.mean) / np.array(other.std)
        factors = np.array(self.std) / np.array(other.std)
        return bool(np.abs(steps).max() < SAME and np.abs(factors - 1).max() < SAME)

    def lines(self, given: Way) -> str:
        """The lines of the configuration in which it differs from the given way."""
        pairs = {
            "image_to_format": (self.order, given.order),
            "normalize_mean": (as_list(self.mean), as_list(given.mean)),
            "normalize_std": (as_list(self.std), as_list(given.std)),
        }
        return "\n".join(f"{key} = {new}" for key, (new, old) in pairs.items() if new != old)


def as_list(numbers: Numbers) -> str:
    """The numbers as the configuration writes them."""
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"


def given_way(options: ImageOptions, channels: int) -> Way:
    """What the configuration says."""
    mean = options.normalize_mean or (0.0,) * channels
    std = options.normalize_std or (1.0,) * channels
    return Way("the given one", options.format_for(channels), mean, std)


def other_ways(given: Way) -> list[Way]:
    """Ways other than the given one: what mistakes it may come from first."""
    ways: list[Way] = []
    for way in (*_corrected(given), *_conventional(given)):
        if not any(way.same_as(known) for known in (given, *ways)):
            ways.append(way)
    return ways


def _corrected(given: Way) -> Iterator[Way]:
    yield from _flipped(given)
    if 0 not in given.mean:
        yield replace(given, title="mean and std exchanged", mean=given.std, std=given.mean)
    if looks_like_unit(given):
        yield times_255(given)


def _flipped(given: Way) -> Iterator[Way]:
    """The other channel order, with the constants in their places and with each channel's own."""
    if FORMAT_CHANNELS[given.order] != 3:
        return
    order = "RGB" if given.order == "BGR" else "BGR"
    yield replace(given, title=f"channel order {order}", order=order)
    mean, std = given.mean[::-1], given.std[::-1]
    yield Way(f"channel order {order}", order, mean, std)
    yield replace(given, title="constants in the other order", mean=mean, std=std)


def _conventional(given: Way) -> Iterator[Way]:
    other = {"RGB": "BGR", "BGR": "RGB"}.get(given.order)
    channels = FORMAT_CHANNELS[given.order]
    for order in filter(None, (given.order, other)):
        for scaling in (each for each in CONVENTIONS if each.suits(channels)):
            also = "" if order == given.order else f" in order {order}"
            title = f"pixels scaled to {scaling.title}{also}"
            step = -1 if order == "BGR" else 1
            mean, std = (v[:channels][::step] for v in (scaling.mean, scaling.std))
            yield Way(title, order, mean, std)


def looks_like_unit(way: Way) -> bool:
    """Whether the constants are meant for pixels of 0..1: a mean that pixels of 0..255 hardly
    have, or a std that stretches them.
    """
    small = max(map(abs, way.mean)) <= 1 and max(map(abs, way.std)) <= 1
    return small and (any(way.mean) or set(way.std) != {1.0})


def times_255(way: Way) -> Way:
    """The way for pixels of 0..255 that is given for those of 0..1."""
    mean, std = (tuple(255 * x for x in numbers) for numbers in (way.mean, way.std))
    return replace(way, title="constants times 255", mean=mean, std=std)


@dataclass(frozen=True)
class Change:
    """Makes of pictures fed in one way what another feeds; `axis` holds the channels."""

    given: Way
    other: Way
    axis: int

    def __call__(self, x: Array) -> Array:
        """The array as the other way feeds it."""
        found = pixels(x, self.given, self.axis)
        if self.given.order != self.other.order:
            found = np.flip(found, self.axis)
        constants = (self.other.mean, self.other.std)
        mean, std = (along(np.array(v), self.axis, x.shape) for v in constants)
        return np.ascontiguousarray((found - mean) / std, dtype=x.dtype)


def pixels(x: Array, given: Way, axis: int) -> Array:
    """The pixels of 0..255, float64, that were fed the given way, with channels along `axis`."""
    return denormalized(x, given.mean, given.std, axis)
