"""Samples in coordinates in which few steps change what one sees: of pictures the frequencies, high
ones made small, as they are in nature.

Steps in pixels make noise that no picture has. See Olah et al., "Feature Visualization" (Distill,
2017), section "Preconditioning".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from calib.affine import Array

# How a coordinate counts at frequency f, 1 / f, and how the first noise falls off beyond that.
FALL, FURTHER = 1.0, 0.5
# How a coordinate counts that is a value, in reaches: as much as steps in frequencies change one.
ALONE = 0.03


@dataclass(frozen=True)
class Spectrum:
    """Coordinates of an array of `shape`, which is a picture along two `axes`, or along none.

    Values lie around `middle`, mostly not farther than `reach`, never beyond `low` and `high`, all
    of which broadcast to `shape`.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    middle: Array
    reach: Array
    low: Array
    high: Array

    def noise(self, rng: np.random.Generator) -> Array:
        """Where to begin: noise in which neighbours are alike, every channel its own."""
        noise = rng.standard_normal(self.shape)
        if self.axes:
            shaped = np.fft.rfftn(noise, axes=self.axes) * self._weights(FALL + FURTHER)
            noise = self._back(shaped)
            noise /= noise.std(axis=self.axes, keepdims=True)
        return self.inside(self.coordinates(self.middle + self.reach * noise))

    def coordinates(self, values: Array) -> Array:
        """Those of values, float64."""
        return self._forth((values - self.middle) / self.reach, FALL)

    def values(self, coordinates: Array) -> Array:
        """The values of coordinates, float64."""
        if not self.axes:
            return np.asarray(self.middle + self.reach * ALONE * coordinates)
        weighted = coordinates.view(np.complex128) * self._weights(FALL)
        return np.asarray(self.middle + self.reach * self._back(weighted))

    def gradient(self, gradient: Array) -> Array:
        """That of coordinates from that of values, each up to a positive factor."""
        return self._forth(gradient.astype(np.float64), -FALL)

    def inside(self, coordinates: Array) -> Array:
        """The coordinates of the nearest values within the bounds."""
        values = self.values(coordinates)
        bounded = np.clip(values, self.low, self.high)
        return coordinates if np.array_equal(values, bounded) else self.coordinates(bounded)

    def _forth(self, values: Array, fall: float) -> Array:
        if not self.axes:
            return values / ALONE
        found = np.fft.rfftn(values, axes=self.axes) / self._weights(fall)
        return np.ascontiguousarray(found).view(np.float64)

    def _back(self, frequencies: Array) -> Array:
        sizes = [self.shape[axis] for axis in self.axes]
        return np.fft.irfftn(frequencies, sizes, self.axes)

    def _weights(self, fall: float) -> Array:
        sizes = tuple(self.shape[axis] for axis in self.axes)
        return _weights(sizes, self.axes, len(self.shape), fall)


@cache
def _weights(sizes: tuple[int, ...], axes: tuple[int, ...], rank: int, fall: float) -> Array:
    """What a frequency counts: waves in the picture to the power of -`fall`, the mean as the first;
    times the root of the number of places, which makes coordinates of any size alike.
    """
    squared = np.zeros([1] * rank)
    for axis, size in zip(axes, sizes, strict=True):
        waves = (np.fft.rfftfreq if axis == axes[-1] else np.fft.fftfreq)(size) * size
        squared = squared + (waves**2).reshape([-1 if i == axis else 1 for i in range(rank)])
    root = np.sqrt(math.prod(sizes)) ** np.sign(fall)
    return np.asarray(np.maximum(squared, 1.0) ** (-fall / 2) * root)
