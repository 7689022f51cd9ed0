"""Every tensor of both models, sample by sample: distributions, what is cut off, and how alike they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calib.affine import Array
from calib.samples import Dataset
from calib.workers import over_samples
from converter.calibrate.runs import groups_within
from converter.measure.both import Both
from converter.measure.errors import APART, NOTHING, Tally, error_of, tally
from converter.measure.pairing import Pairing, Place

Summary = tuple[float, ...]
Key = tuple[str, str | int | None]
Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Figures:
    """One tensor in one sample, or in several: `origin` and `dequant` (None where the quantized
    model lacks it) as `summary` has them, the share of float values outside of what the quantized
    tensor holds, and a tally.
    """

    origin: Summary
    dequant: Summary | None
    clip: float
    tally: Tally
    shape: tuple[int, ...] = ()

    @property
    def cosine(self) -> float | None:
        """Cosine similarity of the two, None where nothing can be compared."""
        error = error_of("", self.tally)
        return error.cosine if error.compared else None


@dataclass(frozen=True)
class Round:
    """One sample: the figures of every place, and the tally of every output of the models."""

    figures: Mapping[Key, Figures]
    outputs: Mapping[str, Tally]

    def tally(self, name: str, there: str) -> Tally:
        """That of a float tensor and of what stands for it in the quantized model."""
        measured = self.figures.get((name, there))
        return measured.tally if measured else self.outputs.get(name, NOTHING)


def summary(x: Array) -> Summary:
    """Least, first quartile, median, third quartile, greatest, mean, variance and share of zeros of
    the finite values, in float64; NaN where there are none.

    Quartile k is the value of rank floor(k n / 4); the variance is the population's.
    """
    # Vectorised sorting is up to five times as fast as selection, which many equal values (a
    # Relu's) slow down.
    flat = np.sort(x[np.isfinite(x)], axis=None)
    if not flat.size:
        return (np.nan,) * 8
    ranks = [
        0,
        *(k * flat.size // 4 for k in (1, 2, 3)),
        -1,
    ]
    mean = flat.mean(dtype=np.float64)
    variance = np.square(flat - mean).mean()
    zeros = 1 - np.count_nonzero(flat) / flat.size
    return tuple(map(float, (*flat[ranks], mean, variance, zeros)))


def figures_of(x: Array, y: Array | None) -> Figures:
    """The figures of a tensor and what became of it."""
    origin = summary(x)
    if y is None or y.shape != x.shape:
        return Figures(
            origin,
            None,
            0.0,
            tally(x, x) if y is None else APART,
            x.shape,
        )
    dequant = summary(y)
    outside = np.isfinite(x) & ((x < dequant[0]) | (x > dequant[4]))
    return Figures(
        origin,
        dequant,
        np.count_nonzero(outside) / x.size,
        tally(x, y),
        x.shape,
    )


def key_of(place: Place) -> Key:
    """What places of the same figures share: a tensor and its counterpart, or a constant of one
    node.
    """
    return (place.name, place.counterpart) if place.restored is None else (place.node, place.index)


def rounds(
    both: Both,
    data: Dataset,
    count: int,
    see: Callable[[int, Sequence[str], Tensors, Tensors], None] = lambda *_: None,
) -> Iterator[Round]:
    """The figures of every place, and of the outputs, in each of the first samples; in memory are
    tensors that fit the budget only.

    `see` is told the sample, the names of float tensors, each once, and what both models make, on
    several workers.
    """
    pairing, floats, quantized = both.pairing, both.floats, both.quantized
    constants, parts = _constants(pairing), _parts(both, data)
    given = floats.outputs
    computed = [place.name for place in pairing.places if place.output and place.name in given]
    outputs = list(dict.fromkeys([*computed, *given]))

    def step(index: int) -> Round:
        figures, tallies, sample = dict(constants), dict[str, Tally](), data.sample(index)
        for places in parts:
            wanted = outputs if places is parts[0] else []
            read = dict.fromkeys(place.name for place in places if place.weight is None)
            counterparts = [place.counterpart for place in places if place.counterpart]
            x = floats.fetch([*read, *wanted], sample)
            y = quantized.fetch([*counterparts, *wanted], sample)
            see(index, [*read], x, y)
            for place in places:
                array = x[place.name] if place.weight is None else place.weight
                if _has_figures(array):
                    figures[key_of(place)] = figures_of(array, y.get(place.counterpart or ""))
            for name in wanted:
                measured = figures.get((name, name))
                tallies[name] = measured.tally if measured else tally(x[name], y[name])
        return Round(figures, tallies)

    yield from over_samples(min(count, len(data)), step, both.resources.threads)


def _constants(pairing: Pairing) -> dict[Key, Figures]:
    """What there is of weights in both models before anything runs."""
    return {
        key_of(place): figures_of(place.weight, place.restored)
        for place in pairing.places
        if not place.counterpart and place.weight is not None and place.weight.size
    }


def _parts(both: Both, data: Dataset) -> list[list[Place]]:
    """The other places in parts whose tensors fit the memory together."""
    places, resources = both.pairing.places, both.resources
    tapped = {key_of(p): p for p in places if p.counterpart or p.weight is None}.values()
    names = list(dict.fromkeys(place.name for place in tapped if place.weight is None))
    sizes = both.floats.sizes(names, data.sample(0))
    # Beside a tensor there are its counterpart and temporary float64 arrays.
    groups = list(groups_within(sizes, resources.memory // resources.threads // 8)) or [[]]
    parts = [[place for place in tapped if place.name in group] for group in groups]
    parts[0] += [place for place in tapped if place.weight is not None]
    return parts


def _has_figures(x: object) -> bool:
    """Whether it is a tensor of numbers, and no text, sequence or map."""
    return isinstance(x, np.ndarray) and x.size > 0 and x.dtype.kind in "fiub"
