"""Random pictures that are like photographs in what the first layers of a network see of them."""

from __future__ import annotations

import numpy as np

from calib.affine import Array

# Mean of red, green and blue over photographs (ImageNet), how much the pixels of one vary by
# lightness and by colour, and how much photographs differ as a whole.
COLOUR = np.array([123.7, 116.3, 103.5])
LIGHTNESS, TINT, EXPOSURE = 46.0, (12.0, 14.0), 30.0


def scene(rng: np.random.Generator, height: int, width: int) -> Array:
    """One picture (height, width, 3) of pixels from 0 to 255, red first, float64."""
    light, first, second = (_plane(rng, height, width) for _ in range(3))
    tints = (TINT[0] * first, 0.0, TINT[1] * second)
    exposure = EXPOSURE * rng.normal()
    planes = [LIGHTNESS * light + tint + exposure for tint in tints]
    return np.asarray(np.clip(np.stack(planes, axis=2) + COLOUR, 0, 255))


def _plane(rng: np.random.Generator, height: int, width: int) -> Array:
    """Noise of unit variance whose amplitude falls with frequency, as in photographs: Field,
    "Relations between the statistics of natural images", J. Opt. Soc. Am. A 4 (1987).
    """
    rows, columns = np.fft.fftfreq(height) * height, np.fft.fftfreq(width) * width
    frequency = np.hypot(rows[:, None], columns[None, :])
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(rng.normal(size=(height, width))) / frequency
    plane = np.real(np.fft.ifft2(noise))
    return np.asarray(plane / (plane.std() or 1.0))
