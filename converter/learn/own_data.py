"""Calibration samples where there are no data, or few: distilled from the model itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.samples import Dataset, Sample
from calib.sources import InputSpec, layouts
from converter.calibrate.data import resources_of, spec_of, synthetic_data
from converter.calibrate.states import growing_axes
from converter.config import DataPreprocessParam
from converter.errors import DataError, ModelError
from converter.graph.edit import is_float, values_by_name
from converter.graph.files import fed_inputs
from converter.job import Job, Watch
from converter.learn.distil import Distiller, Place, Task, only_noise
from converter.learn.likeness import Likeness, scores_of
from converter.prepare.fold_affine import Moments

# What a pixel can be.
LEAST_PIXEL, LARGEST_PIXEL = 0.0, 255.0
# Real samples whose least and largest values bound those that are made beside them.
SEEN = 8
# Tokens of a random sample, where a model takes any number.
LENGTH = 32
# Arrays as large as a sample, in float64, that one takes while it is distilled.
HELD, BYTES = 6, 8


def with_distilled(
    data: Dataset,
    model: ir.Model,
    moments: Mapping[str, Moments],
    job: Job,
    *,
    watch: Watch,
    wanted: DataPreprocessParam | None = None,
) -> Dataset:
    """The data, and behind it as many samples as the config asks to distil from a prepared model.

    `wanted` is what preprocessing the model leaves to do, that of the config if it is None. Says
    what the samples are made of, and warns where that is little. Raises DataError where only real
    samples will do, ModelError for inputs of an open size.
    """
    count = job.config.distilled
    if not count:
        return data
    if not fed_inputs(model):
        where = job.config.at("data_preprocess_param", "calibrate_path")
        msg = f"{where}: a model without inputs has no samples; write quant_type = WEIGHT_QUANT."
        raise DataError(msg)
    learned = [value for value in fed_inputs(model) if _may_learn(value)]
    if not learned and not len(data):
        watch.warn(
            "No sample can be distilled, as the model's inputs take no floats: random ones stand "
            "in, which mislead; give calibrate_path."
        )
        return synthetic_data(model, count, LENGTH)
    if data.states or not learned:
        where = job.config.at("data_preprocess_param", "synthetic_size")
        why = "with states" if data.states else "of integers"
        msg = f"{where}: samples {why} cannot be distilled; remove the line."
        raise DataError(msg)
    source = _Source(model, moments, job, watch, wanted or job.config.preprocess, data)
    made = source.samples(learned, count)
    return data.with_made(made) if made else data


def _may_learn(value: ir.Value) -> bool:
    """Whether samples of an input can follow a gradient: floats, not a cache, which is empty."""
    return is_float(value) and not growing_axes(value)


@dataclass(frozen=True)
class _Source:
    """All that samples are made of."""

    model: ir.Model
    moments: Mapping[str, Moments]
    job: Job
    watch: Watch
    wanted: DataPreprocessParam
    real: Dataset

    def samples(self, learned: Sequence[ir.Value], count: int) -> list[Sample]:
        """Whole feeds, read-only; none where they would mislead and are not needed."""
        places = {value.name or "": self._place(value) for value in learned}
        fixed = self._fixed(places, count)
        known = values_by_name(self.model.graph)
        moments = {name: m for name, m in self.moments.items() if name in known}
        knowledge = Likeness(moments, scores_of(self.model))
        if not moments:
            self._require_bounds(places)
        guessed = [name for name, place in places.items() if place.bounds is None]
        if guessed and not (moments or knowledge.scores) and self.job.mode == "WEIGHT_QUANT":
            self.watch.warn(
                f"Nothing says which values input '{guessed[0]}' takes, and noise of a wrong size "
                "misleads: weights are rounded without samples; give calibrate_path."
            )
            return []
        self._tell(knowledge, places, count)
        made = self._made(Task(knowledge, places, fixed))
        return [_whole(x, sample) for x, sample in zip(made, fixed, strict=True)]

    def _made(self, task: Task) -> Iterator[dict[str, Array]]:
        """Sample by sample, so many together as fit the memory."""
        knowledge, resources = task.knowledge, resources_of(self.job)
        size = sum(math.prod(place.shape) for place in task.places.values())
        together = max(1, resources.memory // (HELD * BYTES * size))
        parts = -(-len(task.fixed) // together)
        bounds = [len(task.fixed) * part // parts for part in range(parts + 1)]
        for first, end in itertools.pairwise(bounds):
            part = replace(task, fixed=task.fixed[first:end], first=first)
            if knowledge.moments or knowledge.scores:
                yield from self._distilled(part, resources.threads)
            else:
                yield from only_noise(part)

    def _distilled(self, task: Task, threads: int) -> list[dict[str, Array]]:
        distiller = Distiller(self.model, task)
        for gap in distiller.gaps if not task.first else ():
            self.watch.warn(
                f"Samples are distilled without what lies behind node '{gap.node}' "
                f"({gap.op_type}): {gap.reason}."
            )
        return distiller.samples(threads, self.watch)

    def _place(self, value: ir.Value) -> Place:
        """Where the samples of an input lie; raises ModelError for one of an open size."""
        spec = spec_of(value, self.job.input_format)
        seen = self._seen(spec.name)
        sizes = seen[0].shape if seen else (spec.batch, *spec.shape[1:])[: len(spec.shape)]
        shape = tuple(size for size in sizes if size is not None)
        if len(shape) < len(sizes):
            msg = (
                f"No sample can be distilled for the model's input {spec}, whose size is open; "
                "give --inputShape, or calibrate_path."
            )
            raise ModelError(msg)
        layout = _layout(spec)
        axes = (layout.index("H"), layout.index("W")) if layout else ()
        return Place(shape, axes, self._bounds(spec.shape, layout, seen))

    def _seen(self, name: str) -> list[Array]:
        """What the first real samples hold for an input."""
        count = min(len(self.real), SEEN)
        return [self.real.sample(i)[name] for i in range(count)]

    def _bounds(
        self, shape: Sequence[int | None], layout: str, seen: Sequence[Array]
    ) -> tuple[Array, Array] | None:
        """The least and the largest values of an input, as far as they are known."""
        mean, std = self.wanted.normalize_mean, self.wanted.normalize_std
        if layout and self._takes_pixels() and len(mean) in {0, 1, shape[layout.index("C")]}:
            axes = [-1 if axis == "C" else 1 for axis in layout]
            shift, scale = (np.array(x).reshape(axes) for x in (mean or [0.0], std or [1.0]))
            ends = [(pixel - shift) / scale for pixel in (LEAST_PIXEL, LARGEST_PIXEL)]
            return np.minimum(*ends), np.maximum(*ends)
        if not seen:
            return None
        low, high = min(x.min() for x in seen), max(x.max() for x in seen)
        return (np.array(low, np.float64), np.array(high, np.float64)) if low < high else None

    def _takes_pixels(self) -> bool:
        """Whether it is known how pixels enter the model."""
        asked = self.job.config.preprocess
        return asked.input_type == "IMAGE" or bool(asked.normalize_mean)

    def _fixed(self, places: Mapping[str, Place], count: int) -> list[Sample]:
        """What is fed beside what is distilled: as in real samples or, without any, random."""
        others = self.real if len(self.real) else synthetic_data(self.model, count, LENGTH)
        samples = [others.sample(i % len(others)) for i in range(count)]
        return [{name: x for name, x in s.items() if name not in places} for s in samples]

    def _require_bounds(self, places: Mapping[str, Place]) -> None:
        """Raises DataError for pictures of unknown size, where the model does not know it either:
        a guess would ruin it.
        """
        for name, place in places.items():
            if place.axes and place.bounds is None:
                where = self.job.config.at("data_preprocess_param", "normalize_mean")
                msg = (
                    f"{where}: without BatchNormalization in the model nothing says how pixels "
                    f"enter input '{name}', for which pictures are distilled; give normalize_mean "
                    "and normalize_std, or calibrate_path."
                )
                raise DataError(msg)

    def _tell(self, knowledge: Likeness, places: Mapping[str, Place], count: int) -> None:
        norms, sure = len(knowledge.moments), bool(knowledge.scores)
        kept = [f"what {norms} BatchNormalizations have kept of the training data"] * bool(norms)
        source = " and ".join([*kept, *["outputs that are sure"] * sure]) or "noise"
        real = f"beside {len(self.real)} real ones" if len(self.real) else "no real data was seen"
        self.watch.tell(f"{count} samples are distilled from {source}; {real}.")
        if norms:
            return
        self.watch.warn(
            "The model has no BatchNormalization, or its exporter folded it away: ranges follow "
            f"from {source} alone; give calibrate_path, a few real samples help most."
        )
        if guessed := [name for name, place in places.items() if place.bounds is None]:
            self.watch.warn(
                f"Nothing says which values input '{guessed[0]}' takes: some from -2 to 2 are "
                "assumed; give calibrate_path."
            )


def _whole(learned: Mapping[str, Array], fixed: Sample) -> Sample:
    sample = {**fixed, **{name: x.astype(np.float32) for name, x in learned.items()}}
    for array in sample.values():
        array.flags.writeable = False
    return sample


def _layout(spec: InputSpec) -> str:
    """The meaning of the axes of an input that takes pictures; empty for others."""
    return spec.layout or next(iter(layouts(spec)), "")
