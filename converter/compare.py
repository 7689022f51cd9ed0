"""Float and quantized model side by side: how far each tensor, and the outputs, are from what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib.affine import Array
from calib.samples import Dataset
from calib.session import open_session, over_samples, run


@dataclass(frozen=True)
class TensorError:
    """How a quantized tensor differs from the float one over all samples compared."""

    name: str
    cosine: float
    sqnr_db: float


@dataclass
class _Sums:
    """Inner products of reference x and other y, which cosine and signal-to-noise ratio follow from."""

    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    noise: float = 0.0

    def add(self, x: Array, y: Array) -> None:
        x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
        self.xx += float(x @ x)
        self.yy += float(y @ y)
        self.xy += float(x @ y)
        self.noise += float((x - y) @ (x - y))

    def error(self, name: str) -> TensorError:
        norms = np.sqrt(self.xx * self.yy)
        cosine = self.xy / norms if norms > 0 else float(self.xx == self.yy)
        sqnr = 10 * np.log10(self.xx / self.noise) if self.noise > 0 and self.xx > 0 else np.inf
        return TensorError(name, float(cosine), float(sqnr))


def compare(
    reference: Path, other: Path, tensors: Mapping[str, str], data: Dataset, count: int, threads: int
) -> list[TensorError]:
    """The error of each tensor over the first `count` samples; `tensors` maps names of the one file to the other's."""
    sessions = open_session(reference), open_session(other)
    sums = {name: _Sums() for name in tensors}

    def step(index: int) -> tuple[dict[str, Array], dict[str, Array]]:
        sample = data.sample(index)
        return run(sessions[0], list(tensors), sample), run(sessions[1], list(tensors.values()), sample)

    for left, right in over_samples(min(count, len(data)), step, threads):
        for name, counterpart in tensors.items():
            sums[name].add(left[name], right[counterpart])
    return [found.error(name) for name, found in sums.items()]
