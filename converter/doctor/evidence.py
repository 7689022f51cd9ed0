"""What the checks look at: the float model as its file holds it, and samples as calibration feeds
them. Nothing is found out before a check asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.affine import Array
from calib.samples import Dataset
from calib.workers import over_samples
from converter.calibrate.runs import Opened, is_big, opened
from converter.doctor.preprocessing import Change, Way, pixels
from converter.errors import DataError
from converter.graph.edit import constant, not_none, only_consumer, operand
from converter.job import Job
from converter.measure.answers import scores_of
from converter.measure.labels import label_table, read_labels
from converter.plan.ops import rule_of

# Channels whose running variance is so much below the largest are dead: what little passes tells
# nothing.
DEAD = 1e-6
# Where a BatchNorm keeps scale, bias, mean and variance.
MEAN, VARIANCE = 3, 4
# Levels that are counted.
MANY = 64


@dataclass(frozen=True)
class Norm:
    """What a BatchNorm remembers of its input `name` in training, by channel."""

    name: str
    mean: Array
    variance: Array


@dataclass(frozen=True)
class Fit:
    """How inputs of the first BatchNorms compare with training, medians over channels: doublings of
    their variance, as a magnitude, and the distance of their mean in standard deviations.
    """

    doublings: float
    shift: float


@dataclass(frozen=True)
class Seen:
    """What the model makes of samples: the scores of each class (samples, classes), None where its
    first output is no answer, and how the first BatchNorms fit, None where there are none.
    """

    scores: Array | None
    fit: Fit | None

    @property
    def judged(self) -> bool:
        """Whether anything tells one way to feed the model from another."""
        return self.scores is not None or self.fit is not None


@dataclass(frozen=True)
class Summary:
    """One input of one sample in a few numbers: equal `content` means equal arrays, `span` is its
    least and greatest value, `levels` its different values, up to MANY, and `pixels` the span
    before it was normalised, that of the values where it is no picture.
    """

    content: str
    span: tuple[float, float]
    levels: int
    pixels: tuple[float, float]

    @classmethod
    def of(cls, x: Array, pixels: Array) -> Summary:
        """The summary of an array."""
        content = hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()
        some = x.ravel()[:: max(1, x.size // (MANY * MANY))]
        levels = len(np.unique(some))
        return cls(content, _span(x), min(levels, MANY), _span(pixels))


def _span(x: Array) -> tuple[float, float]:
    return (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)


@dataclass(frozen=True)
class Pictures:
    """An input that takes pictures: its name, the axis of its channels, and the way that is
    given.
    """

    name: str
    axis: int
    given: Way
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Evidence:
    """The model, its data and what was asked.

    `data` are some of the samples that calibration takes, spread over them; `pictures` are the
    inputs that are fed any.
    """

    job: Job
    model: ir.Model
    data: Dataset
    pictures: tuple[Pictures, ...]
    threads: int

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """The BatchNorms that no other is in front of."""
        return tuple(_first_norms(self.model))

    @cached_property
    def float_model(self) -> Opened | None:
        """The model, open; None where it is too big to be run in passing or does not run."""
        if is_big(self.model) or not len(self.data):
            return None
        try:
            found = opened(self.model, [norm.name for norm in self.norms])
            found.answer(self.data.sample(0))
        except CalibError:  # whoever converts it will say so
            return None
        return found

    @cached_property
    def seen(self) -> Seen | None:
        """What the model makes of the samples as they are."""
        return self.see({}, len(self.data)) if self.float_model else None

    @cached_property
    def first_steps(self) -> list[tuple[str, float, float]]:
        """For each input that goes with constants alone into one step of its own shape: its name,
        and the least and greatest value that this makes of the samples.
        """
        steps = list(_first_steps(self.model))
        if self.float_model is None or not steps:
            return []
        model = opened(self.model, [made for _, made in steps])
        ends = dict[str, list[float]]()
        for index in range(len(self.data)):
            sample = self.data.sample(index)
            found = model.fetch([made for _, made in steps], sample)
            like = {n: found[made] for n, made in steps if found[made].shape == sample[n].shape}
            for name, made in like.items():
                ends.setdefault(name, []).extend(_span(made))
        return [(name, min(x), max(x)) for name, x in ends.items()]

    @cached_property
    def label_table(self) -> Mapping[str, int]:
        """All that labels say, also of other files; empty without any. Raises DataError."""
        path = self.job.config.preprocess.label_file
        return label_table(path) if path else {}

    @cached_property
    def labels(self) -> Array | None:
        """The class of each sample; None without labels. Raises DataError."""
        path = self.job.config.preprocess.label_file
        if path is None or not len(self.data):
            return None
        found = read_labels(path, self.data)
        return np.array([found[str(self.data.files(k)[0])] for k in range(len(self.data))])

    @cached_property
    def known_labels(self) -> Array | None:
        """`labels`, None also where they cannot be read."""
        try:
            return self.labels
        except DataError:
            return None

    @cached_property
    def summaries(self) -> list[Mapping[str, Summary]]:
        """Of every sample's inputs."""

        def step(index: int) -> Mapping[str, Summary]:
            ways = {picture.name: picture for picture in self.pictures}
            return {
                name: Summary.of(
                    x, pixels(x, ways[name].given, ways[name].axis) if name in ways else x
                )
                for name, x in self.data.sample(index).items()
            }

        return list(over_samples(len(self.data), step, self.threads))

    def see(self, changed: Mapping[str, Change], count: int) -> Seen:
        """What the model makes of the first `count` samples, some of whose inputs are `changed`."""
        model = not_none(self.float_model)

        def step(index: int) -> tuple[object, list[Array]]:
            given = self.data.sample(index)
            sample = {n: changed[n](x) if n in changed else x for n, x in given.items()}
            wanted = [*model.outputs[:1], *(norm.name for norm in self.norms)]
            found = model.fetch(wanted, sample)
            first = found[model.outputs[0]] if model.outputs else None
            return first, [_moments(found[norm.name]) for norm in self.norms]

        rows = list(over_samples(min(count, len(self.data)), step, self.threads))
        scores = scores_of([first for first, _ in rows])
        return Seen(scores, _fit(self.norms, [moments for _, moments in rows]))


def _first_steps(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Inputs that are changed with constants alone, with what each such step makes of them."""
    for value in model.graph.inputs:
        last = value
        while (node := only_consumer(last)) is not None and _is_step(node, last):
            last = node.outputs[0]
            yield value.name or "", last.name or ""


def _is_step(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node makes floats of `value`, number by number, with one constant or none."""
    others = [constant(other) for other in node.inputs if other is not value]
    known = [other for other in others if other is not None and other.size <= MANY]
    return len(known) == len(others) <= 1 and not rule_of(node).bounds and len(node.outputs) == 1


# --- BatchNorms


def _first_norms(model: ir.Model) -> Iterator[Norm]:
    """The BatchNorms of the main graph that read inputs through no other, nearest first."""
    behind = set[ir.Value]()  # what BatchNorms make, and what is made of it
    fed = {value for value in model.graph.inputs if not value.is_initializer()}
    for node in model.graph:
        read = {value for value in node.inputs if value is not None}
        if read & behind:
            behind |= set(node.outputs)
            continue
        if not read & fed:
            continue
        if rule_of(node).remembers:
            behind |= set(node.outputs)
            mean, variance = operand(node, MEAN), operand(node, VARIANCE)
            if mean is not None and variance is not None:
                yield Norm(not_none(node.inputs[0]).name or "", mean, variance)
        fed |= set(node.outputs)


def _moments(x: Array) -> Array:
    """Mean and mean square of every channel, axis 1: (2, channels)."""
    rest = tuple(axis for axis in range(x.ndim) if axis != 1)
    values = x.astype(np.float64)
    return np.array([values.mean(axis=rest), np.square(values).mean(axis=rest)])


def _fit(norms: Sequence[Norm], samples: Sequence[Sequence[Array]]) -> Fit | None:
    if not norms:
        return None
    doublings, shifts = list[float](), list[float]()
    for number, norm in enumerate(norms):
        mean, square = np.mean([moments[number] for moments in samples], axis=0)
        variance = np.maximum(square - mean**2, 0.0)
        kept, alive = norm.variance.astype(np.float64), norm.variance > DEAD * norm.variance.max()
        tiny = DEAD * float(kept.max())
        doublings += np.abs(np.log2((variance[alive] + tiny) / (kept[alive] + tiny))).tolist()
        shifts += (np.abs(mean - norm.mean)[alive] / np.sqrt(kept[alive])).tolist()
    return Fit(float(np.median(doublings)), float(np.median(shifts))) if shifts else None
