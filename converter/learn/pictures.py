"""Other views of the same pictures, as there are never many to learn from."""

from __future__ import annotations

import numpy as np

from calib.affine import Array

# How far a picture is moved at most, as a share of its sides.
MOST_MOVED = 1 / 8


def varied(pictures: Array, axes: tuple[int, int], rng: np.random.Generator) -> Array:
    """A batch in which every picture may be mirrored and is moved a little, its own edge reflected.

    `axes` are those of height and width.
    """
    return np.stack([_varied(picture, axes, rng) for picture in pictures])


def _varied(picture: Array, axes: tuple[int, int], rng: np.random.Generator) -> Array:
    height, width = (axis - 1 for axis in axes)
    picture = np.flip(picture, width) if rng.integers(2) else picture
    for axis in (height, width):
        size = picture.shape[axis]
        reach = int(size * MOST_MOVED)
        around = [(reach, reach) if i == axis else (0, 0) for i in range(picture.ndim)]
        start = rng.integers(2 * reach + 1)
        wide = np.pad(picture, around, mode="reflect")
        picture = np.take(wide, range(start, start + size), axis)
    return picture
