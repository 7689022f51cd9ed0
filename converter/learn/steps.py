"""Small steps down a gradient: Adam, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from calib.affine import Array

# Shares of the old means of gradients and of their squares that are kept, and what keeps a step
# finite: Kingma and Ba, "Adam" (arXiv 1412.6980), algorithm 1.
KEPT, KEPT_SQUARES, TINY = 0.9, 0.999, 1e-12


@dataclass
class Adam:
    """Moves arrays in place, each in its own precision.

    Those of `alike` share one mean square, so that of many numbers the few that matter most go
    farthest.
    """

    alike: Collection[str] = ()
    done: int = 0
    means: dict[str, Array] = field(default_factory=dict)
    squares: dict[str, Array] = field(default_factory=dict)

    def step(
        self,
        learned: Mapping[str, Array],
        gradients: Mapping[str, Array],
        rates: Mapping[str, float],
    ) -> None:
        """One step for every array that has a gradient, at its own rate."""
        self.done += 1
        for name, gradient in gradients.items():
            now = learned[name]
            mean = _moved(self.means, name, gradient.astype(now.dtype), KEPT)
            energy = np.square(gradient, dtype=now.dtype)
            if name in self.alike:
                energy = energy.mean(keepdims=True)
            square = _moved(self.squares, name, energy, KEPT_SQUARES)
            rate = rates[name] / (1 - KEPT**self.done)
            root = np.sqrt(square / (1 - KEPT_SQUARES**self.done))
            now -= rate * mean / (root + TINY)


def cosine(done: float) -> float:
    """The share of the first rate when a share of all steps is done: Loshchilov and Hutter (arXiv
    1608.03983).
    """
    return (1 + math.cos(math.pi * done)) / 2


def _moved(means: dict[str, Array], name: str, new: Array, kept: float) -> Array:
    mean = means.setdefault(name, np.zeros_like(new))
    mean *= kept
    mean += (1 - kept) * new
    return mean
