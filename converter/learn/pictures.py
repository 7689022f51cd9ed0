"""Other views of the same pictures, as there are never many to learn from: mirrored, cut out, and
mixed with one another. The teacher says what each is, so that none needs to look real.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from calib.affine import Array

# The least share of a picture's area that a view shows, and how much its sides' ratio changes at
# most: Szegedy et al., "Going Deeper with Convolutions" (2014), who go down to 0.08 with millions
# of pictures.
LEAST_AREA, RATIO = 0.5, 4 / 3
# The share of a batch that is mixed: Zhang et al., "mixup" (2017).
MIXED = 0.5


def varied(pictures: Array, axes: str, rng: np.random.Generator) -> Array:
    """A batch of other views of `pictures`, whose `axes` are NCHW, NHWC or NHW."""
    views = np.stack([_view(picture, axes[1:], rng) for picture in pictures])
    count = int(len(views) * MIXED)
    share = rng.uniform(size=(count, *[1] * (views.ndim - 1))).astype(views.dtype)
    others = views[rng.permutation(len(views))[:count]]
    views[:count] = share * views[:count] + (1 - share) * others
    return views


def _view(picture: Array, axes: str, rng: np.random.Generator) -> Array:
    """A part of the picture in its own size, mirrored every other time."""
    height, width = axes.index("H"), axes.index("W")
    sides = picture.shape[height], picture.shape[width]
    area = rng.uniform(LEAST_AREA, 1)
    ratio = RATIO ** rng.uniform(-1, 1)
    parts = [min(1.0, (area * r) ** 0.5) for r in (ratio, 1 / ratio)]
    sizes = [max(1, round(part * side)) for part, side in zip(parts, sides, strict=True)]
    top, left = (rng.integers(s - size + 1) for s, size in zip(sides, sizes, strict=True))
    box = (left, top, left + sizes[1], top + sizes[0])
    if rng.integers(2):
        picture = np.flip(picture, width)
    planes = picture.reshape(1, *sides) if "C" not in axes else picture
    depth = axes.index("C") if "C" in axes else 0
    seen = [_resized(np.take(planes, i, depth), box) for i in range(planes.shape[depth])]
    return np.stack(seen, depth).reshape(picture.shape)


def _resized(plane: Array, box: tuple[int, int, int, int]) -> Array:
    """What lies in a box (left, top, right, bottom) of a plane, as large as the plane."""
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    shape = (plane.shape[1], plane.shape[0])
    return np.asarray(image.resize(shape, Resampling.BILINEAR, box)).astype(plane.dtype)
