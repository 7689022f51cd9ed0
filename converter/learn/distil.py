"""Samples distilled from a model: what it knows of the data it was trained on is made visible by
steps down the gradient to its inputs.

All samples step at once, each on its own loss with what the others were before. So the moments
agree over all of them, as they did in training, while each may differ, and no result depends on the
number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.samples import Sample
from calib.session import open_session, run
from calib.workers import over_samples
from converter.errors import ModelError
from converter.graph.edit import values_by_name
from converter.graph.files import serialized
from converter.job import Watch
from converter.learn.blocked import block_convolutions
from converter.learn.gradients import Gap, gradient_model
from converter.learn.likeness import OTHERS, OWN, TARGET, Likeness, targets
from converter.learn.spectrum import Spectrum
from converter.learn.steps import Adam, cosine
from converter.learn.terms import NoGradientError, shape_of

# Steps for every sample, and the first one in coordinates.
STEPS, RATE = 30, 2.0
# Reaches that are tried, and middles as so many of them, where nothing says what is fed.
REACHES, MIDDLES = 4.0 ** np.arange(-2, 5), (0.0, 2.0)


@dataclass(frozen=True)
class Place:
    """Where samples of an input are looked for: its shape, the axes of a picture, and the least
    and the largest values, None where nothing says them.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    bounds: tuple[Array, Array] | None = None

    def spectrum(self, reach: float = 1.0, middle: float = 0.0) -> Spectrum:
        """Its coordinates; `reach` and `middle` count where there are no bounds."""
        if self.bounds is None:
            ends = np.array(-np.inf), np.array(np.inf)
            return Spectrum(
                self.shape,
                self.axes,
                np.array(middle),
                np.array(reach),
                *ends,
            )
        low, high = self.bounds
        # Pictures vary by about a quarter of what they can hold.
        return Spectrum(
            self.shape,
            self.axes,
            (low + high) / 2,
            (high - low) / 4,
            low,
            high,
        )


def noise(spectra: Mapping[str, Spectrum], number: int) -> dict[str, Array]:
    """The coordinates that sample `number` begins with."""
    rng = np.random.default_rng(number)
    return {name: spectrum.noise(rng) for name, spectrum in spectra.items()}


@dataclass(frozen=True)
class Task:
    """Samples to make: what is known of them, where the inputs to distil lie, what the others are
    fed in each sample, and the number of the first, of which its noise and class follow.
    """

    knowledge: Likeness
    places: Mapping[str, Place]
    fixed: Sequence[Sample]
    first: int = 0


def only_noise(task: Task) -> list[dict[str, Array]]:
    """What samples begin with, where nothing is known that they could become."""
    spectra = {name: place.spectrum() for name, place in task.places.items()}
    numbers = range(task.first, task.first + len(task.fixed))
    return [values_of(spectra, noise(spectra, number)) for number in numbers]


class Distiller:
    """A model with the loss of its samples; raises ModelError where that has no gradient."""

    def __init__(self, model: ir.Model, task: Task) -> None:
        self._task, self._count = task, len(task.fixed)
        self._own = [OWN] if task.knowledge.moments else []
        shapes = {name: x.shape for name, x in task.fixed[0].items()}
        shapes |= {name: place.shape for name, place in task.places.items()}
        loss = task.knowledge.loss(self._count)
        try:
            made = gradient_model(model, loss, list(task.places), shapes, keep=self._own)
        except NoGradientError as error:
            msg = f"No sample can be distilled, as {error}; give calibrate_path."
            raise ModelError(msg) from error
        self.gaps: tuple[Gap, ...] = made.gaps
        self._gradients, self._loss = made.outputs, made.loss
        values = values_by_name(made.model.graph)
        names = [TARGET.format(i) for i in range(len(task.knowledge.scores))]
        self._targets = {name: shape_of(values[name]) for name in names}
        blocked = block_convolutions(made.model)
        self._session = open_session(serialized(blocked), same_sizes=True)

    def samples(self, threads: int, watch: Watch) -> list[dict[str, Array]]:
        """The distilled inputs of every sample, float64."""
        spectra = self._spectra()
        learned = [noise(spectra, self._task.first + i) for i in range(self._count)]
        own = np.stack([self._moments(i, spectra, x) for i, x in enumerate(learned)])

        def step(number: int) -> tuple[dict[str, Array], Array]:
            others = (own.sum(0) - own[number]) / self._count
            found = self._run(number, values_of(spectra, learned[number]), others)
            slopes = {name: found[output] for name, output in self._gradients.items()}
            gradients = {name: spectra[name].gradient(slope) for name, slope in slopes.items()}
            return gradients, found.get(OWN, own[number])

        adams = [Adam() for _ in learned]
        for done in watch.track(range(STEPS), "Distilling samples", STEPS):
            rates = dict.fromkeys(spectra, RATE * cosine((done + 1) / STEPS))
            # All before any is moved.
            steps = list(over_samples(self._count, step, threads))
            for i, (gradients, moments) in enumerate(steps):
                adams[i].step(learned[i], gradients, rates)
                learned[i] = {name: spectra[name].inside(x) for name, x in learned[i].items()}
                own[i] = moments
        made = [values_of(spectra, x) for x in learned]
        if not all(np.isfinite(array).all() for sample in made for array in sample.values()):
            msg = "No sample can be distilled: gradients are not finite; give calibrate_path."
            raise ModelError(msg)
        return made

    def _spectra(self) -> dict[str, Spectrum]:
        """The coordinates of the inputs, those without bounds where the first noise is most like
        the data of training.
        """
        places = self._task.places.values()
        known = not self._own or all(place.bounds is not None for place in places)
        tried = [(1.0, 0.0)] if known else [(r, r * m) for r in REACHES for m in MIDDLES]
        found = [self._with(*where) for where in tried]
        return found[0] if known else min(found, key=self._unlike)

    def _with(self, reach: float, middle: float) -> dict[str, Spectrum]:
        return {n: place.spectrum(reach, middle) for n, place in self._task.places.items()}

    def _unlike(self, spectra: Mapping[str, Spectrum]) -> float:
        """The loss of the first noise, were all samples alike."""
        start = noise(spectra, self._task.first)
        others = self._moments(0, spectra, start) * ((self._count - 1) / self._count)
        loss = self._run(0, values_of(spectra, start), others)[self._loss]
        return float(loss) if np.isfinite(loss) else math.inf

    def _moments(
        self, number: int, spectra: Mapping[str, Spectrum], learned: Mapping[str, Array]
    ) -> Array:
        """The moments of a sample, float64; zeros where none are known."""
        nothing = np.zeros((2, self._task.knowledge.channels))
        if not self._own:
            return nothing
        found = self._run(number, values_of(spectra, learned), nothing)
        return found[OWN].astype(np.float64)

    def _run(self, number: int, values: Mapping[str, Array], others: Array) -> dict[str, Array]:
        """The loss, its gradients and the moments of a sample beside what the others have."""
        feeds = dict(self._task.fixed[number])
        feeds |= {name: x.astype(np.float32) for name, x in values.items()}
        feeds |= {n: targets(s, self._task.first + number) for n, s in self._targets.items()}
        if self._own:
            feeds[OTHERS] = others.astype(np.float32)
        return run(
            self._session,
            [self._loss, *self._gradients.values(), *self._own],
            feeds,
        )


def values_of(spectra: Mapping[str, Spectrum], learned: Mapping[str, Array]) -> dict[str, Array]:
    """The values of coordinates, by input."""
    return {name: spectra[name].values(x) for name, x in learned.items()}
