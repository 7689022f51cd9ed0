"""Small steps down a gradient: Adam with a cosine schedule, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from calib.affine import Array

# Shares of the old means of gradients and of their squares that are kept, and what keeps a step
# finite: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1.
KEPT, KEPT_SQUARES, TINY = 0.9, 0.999, 1e-12


@dataclass
class Adam:
    """Moves arrays, which are float64 and changed in place; `steps` in all."""

    rate: float
    steps: int
    _done: int = 0
    _means: dict[str, Array] = field(default_factory=dict)
    _squares: dict[str, Array] = field(default_factory=dict)

    def step(self, learned: Mapping[str, Array], gradients: Mapping[str, Array]) -> None:
        """One step for every array that has a gradient."""
        self._done += 1
        rate = self.rate * (1 + math.cos(math.pi * self._done / self.steps)) / 2
        for name, gradient in gradients.items():
            mean = _moved(self._means, name, gradient, KEPT)
            square = _moved(self._squares, name, gradient**2, KEPT_SQUARES)
            mean = mean / (1 - KEPT**self._done)
            square = square / (1 - KEPT_SQUARES**self._done)
            learned[name][...] -= rate * mean / (np.sqrt(square) + TINY)


def _moved(means: dict[str, Array], name: str, new: Array, kept: float) -> Array:
    means[name] = kept * means.get(name, np.zeros_like(new)) + (1 - kept) * new
    return means[name]
