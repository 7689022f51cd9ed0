"""Fine-tuning of what a plan stores: the float model is the teacher, no labels are needed.

Rounding, scales, zeros and biases learn what makes the quantized model's outputs those of the float
model, end to end, or what a block hands on that of the float block, one block after the other. A
part of the samples is held back: it says when the best was reached, and whether that is better than
the start at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnxruntime import InferenceSession

from calib import CalibError
from calib.affine import Array
from calib.session import Sample, open_session, run
from calib.workers import over_samples
from converter.graph.edit import values_by_name
from converter.graph.files import saved, serialized
from converter.job import Watch
from converter.learn.blocked import block_convolutions
from converter.learn.blocks import blocks_of
from converter.learn.checkpoint import Checkpoint, State
from converter.learn.gradients import Gap, Gradients, gradient_model, loss_model
from converter.learn.losses import (
    LOSS,
    TEACHER,
    Loss,
    divergence,
    error,
    is_distribution,
    scaled,
    tells_classes,
    total,
)
from converter.learn.restored import restored
from converter.learn.steps import Adam, cosine
from converter.learn.student import POINT, STORED, Arrays, Learnable, Rounded, Student
from converter.plan.plan import QuantPlan

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Keep = Callable[[QuantPlan], None]
Vary = Callable[[Sample, np.random.Generator], Sample]
# The most samples whose activations are in memory at once.
TOGETHER = 16
# With more grids and biases than this steps get smaller, as the square root of their number: the
# noise of each moves the outputs.
MANY = 2000
# By how much numbers may differ that are the same, as a share of the largest.
CLOSE = 1e-3
# How often the best is looked for at most.
CHECKS = 20
# Steps that weights keep their codes for: few change at any, and to find them takes its time.
ROUNDED = 5
# By how much a loss is more than the least from which on steps lead astray: they begin there again,
# and so much smaller. What starts far from the float model, as 2 bits do, goes up before it goes
# down: an example in 2 bits has 89 % right so, 71 % with 1.2.
ASTRAY, SLOWER = 3.0, 3.0
# Looks that find nothing better before steps begin again at the best, and so much smaller.
PATIENCE = 5
# Points move by the rate times this many codes, as they must go half a code before one changes.
POINT_RATE = 30.0
# The share of a batch that enters a block as the float model hands it on: Wei et al., "QDrop"
# (arXiv 2203.05740).
DROPPED = 0.25
# Steps after which it is known how many fit the time, and the share of it that is kept for looks.
TIMED, SPARE = 4, 0.1
# Losses below this are noise of float32.
QUIET = 1e-6
# How much the error of scores counts beside their divergence, which does not see what all share.
BESIDE = 0.1
# The stage that is about the outputs.
WHOLE = "end to end"


@dataclass(frozen=True)
class Options:
    """How long and how fast is learned.

    `rate` is the first step, relative to what it changes; `seconds` the time after which the best
    so far is taken. Learning goes by `blocks`, then over the `whole`, half of the time each. `may`
    says what of a plan is learned. `vary` makes another view of samples.
    """

    epochs: int = 100
    batch: int = 32
    rate: float = 3e-4
    seconds: float = 900.0
    seed: int = 0
    threads: int = 1
    blocks: bool = True
    whole: bool = True
    may: Learnable = STORED
    vary: Vary | None = None


@dataclass(frozen=True)
class Samples:
    """What is learned from, which rounding may have seen, and what judges, which it has not; `told`
    are the tensors that a teacher tells of them.
    """

    fit: Sequence[Sample]
    held: Sequence[Sample]
    told: Sequence[str]

    def all(self) -> Samples:
        """All of them to learn from and to judge."""
        every = [*self.fit, *self.held]
        return replace(self, fit=every, held=every)


@dataclass(frozen=True)
class Outcome:
    """The plan, and the loss of the outputs on the samples `held` back: before and after. Where
    nothing was gained it is the old plan. `steps` were made of those that were `wanted`; `reached`
    tells after how many each stage that gained was best.
    """

    plan: QuantPlan
    before: float
    after: float
    steps: int = 0
    wanted: int = 0
    held: int = 0
    reached: Mapping[str, int] = field(default_factory=dict)


def outputs_alike(model: ir.Model, told: Sequence[str]) -> Loss:
    """The divergence of tensors that are distributions or scores of classes, and the relative error
    of those that are no distributions.
    """
    values = values_by_name(model.graph)
    floats = [values[name] for name in told]
    losses = [divergence(value.name or "") for value in floats if tells_classes(value)]
    plain = [value.name or "" for value in floats if not is_distribution(value)]
    share = BESIDE if losses else 1.0
    return total([*losses, *([scaled(error(plain), share)] if plain else [])])


class Supply(Protocol):
    """Chunks of samples with what the teacher says: feeds of a lesson."""

    held: list[Arrays]
    batches: int

    def batch(self, rng: np.random.Generator) -> list[Arrays]:
        """The next chunks to learn from."""
        ...


class Lesson:
    """A student with the sessions that compute its loss and the loss's gradients."""

    def __init__(self, student: Student, loss: Loss, threads: int) -> None:
        self.student, self._loss, self._threads = student, loss, threads
        self.gaps = dict[str, Gap]()
        self._gradients = dict[Shapes, tuple[Gradients, InferenceSession]]()
        self._judges = dict[Shapes, InferenceSession]()

    def slopes(
        self, chunks: Sequence[Arrays], learned: Arrays, rounded: Mapping[str, Rounded]
    ) -> Arrays:
        """The gradients of what is learned and `rounded`, the mean over chunks."""
        constants = self.student.values(learned, rounded)
        opened = [self._graded(chunk) for chunk in chunks]

        def graded(index: int) -> Arrays:
            gradients, session = opened[index]
            wanted = list(gradients.outputs.values())
            found = run(session, wanted, {**chunks[index], **constants})
            return {name: found[output] for name, output in gradients.outputs.items()}

        sums = {name: np.zeros_like(x) for name, x in constants.items()}
        for found in over_samples(len(chunks), graded, self._threads):
            for name, slope in found.items():
                sums[name] = sums[name] + slope / len(chunks)
        return self.student.slopes(sums, rounded)

    def judged(self, plan: QuantPlan, chunks: Sequence[Arrays]) -> float:
        """The mean loss of a plan as it would be stored, infinite where it is no number."""
        constants = self.student.values_of(plan)
        opened = [self._judge(chunk) for chunk in chunks]

        def judged(index: int) -> float:
            return float(run(opened[index], [LOSS], {**chunks[index], **constants})[LOSS])

        loss = float(np.mean(list(over_samples(len(chunks), judged, self._threads))))
        return max(loss, 0.0) if math.isfinite(loss) else math.inf

    def _graded(self, chunk: Arrays) -> tuple[Gradients, InferenceSession]:
        shapes = _shapes(chunk)
        if shapes not in self._gradients:
            student = self.student
            found = gradient_model(student.model, self._loss, student.constants, dict(shapes))
            model = block_convolutions(found.model)
            # Of many sizes each session would keep its own memory.
            session = open_session(serialized(model), same_sizes=not self._gradients)
            self._gradients[shapes] = found, session
            self.gaps |= {gap.node: gap for gap in found.gaps}
        return self._gradients[shapes]

    def _judge(self, chunk: Arrays) -> InferenceSession:
        shapes = _shapes(chunk)
        if shapes not in self._judges:
            student = self.student
            model = loss_model(student.model, self._loss, student.constants, dict(shapes))
            self._judges[shapes] = open_session(serialized(model), same_sizes=not self._judges)
        return self._judges[shapes]


def _shapes(chunk: Sample) -> Shapes:
    return tuple((name, x.shape) for name, x in chunk.items())


@dataclass(frozen=True)
class Training:
    """What one stage of learning shares: how it is named, kept, shown and ended.

    `repeated` tells how far each stage goes where it has been found, `gaps` where no gradient went.
    """

    options: Options
    checkpoint: Checkpoint
    watch: Watch
    keep: Keep = lambda plan: None
    clock: Callable[[], float] = time.monotonic
    repeated: Mapping[str, int] | None = None
    gaps: dict[str, Gap] = field(default_factory=dict)

    def learned(
        self,
        lesson: Lesson,
        supply: Supply,
        stage: str,
        *,
        seconds: float,
        keep: Keep | None = None,
    ) -> Outcome:
        """The best that a lesson's student reaches within its steps and its time; `keep` is handed
        every plan better than those before.
        """
        if self.repeated is not None and stage not in self.repeated:
            return Outcome(lesson.student.plan, math.nan, math.nan)
        course = _Course(self, lesson, supply, stage=stage, seconds=seconds, keep=keep)
        for _ in self.watch.track(course.steps(), f"Fine-tuning {stage}", course.total):
            course.step()
        self.gaps.update(lesson.gaps)
        return course.outcome()


class _Course:
    """One student's way, step by step, and the best on it."""

    def __init__(
        self,
        training: Training,
        lesson: Lesson,
        supply: Supply,
        *,
        stage: str,
        seconds: float,
        keep: Keep | None,
    ) -> None:
        self._keep_plan = keep
        self._training, self._lesson, self._supply = training, lesson, supply
        self._seconds, self._options = seconds, training.options
        goal = (training.repeated or {}).get(stage)
        self._stage = f"{stage}, all samples" if goal else stage
        self.total = goal or self._options.epochs * supply.batches
        self._rng = np.random.default_rng(self._options.seed)
        self._learned = lesson.student.start()
        points = {name for name in self._learned if name.endswith(POINT)}
        self._adam = Adam(points)
        many = sum(x.size for name, x in self._learned.items() if name not in points)
        self._rate = self._options.rate * min(1.0, (MANY / max(1, many)) ** 0.5)
        self._rounded = dict[str, Rounded]()
        self._best: Arrays | None = None
        self._before, self._least, self._reached = math.nan, math.nan, 0
        # Seconds of all, and of the steps alone.
        self._spent, self._stepping, self._looks = 0.0, 0.0, CHECKS
        self._vain = 0
        if not self._resumed():
            start = training.clock()
            self._before = self._least = lesson.judged(lesson.student.plan, supply.held)
            self._spent = training.clock() - start
            fit = int(SPARE * seconds / max(self._spent, 1e-9))
            self._looks = max(1, min(CHECKS, fit))

    def steps(self) -> Iterator[int]:
        """The steps that are left, until the time is over."""
        while self._goes_on():
            yield self._adam.done

    def step(self) -> None:
        """One step, and now and then a look at what it has brought."""
        start = self._training.clock()
        chunks = self._supply.batch(self._rng)
        student = self._lesson.student
        last = self._rounded if self._adam.done % ROUNDED else None
        self._rounded = student.rounded(self._learned, last)
        slopes = self._lesson.slopes(chunks, self._learned, self._rounded)
        if all(np.isfinite(slope).all() for slope in slopes.values()):
            self._adam.step(self._learned, slopes, self._rates())
            student.bounded(self._learned)
        else:
            self._adam.done += 1
            self._back()
        stepped = self._training.clock()
        self._stepping += stepped - start
        self._spent += stepped - start
        self._plan_ahead()
        if self._adam.done % max(1, self.total // self._looks) == 0 or not self._goes_on():
            self._look()
            self._spent += self._training.clock() - stepped

    def _goes_on(self) -> bool:
        return self._adam.done < self.total and self._spent < self._seconds

    def _plan_ahead(self) -> None:
        """Fewer steps where not all fit the time, so that the last ones are small all the same."""
        if self._adam.done == TIMED:
            left = max(0.0, self._seconds * (1 - SPARE) - self._spent)
            fit = TIMED + int(left * TIMED / max(self._stepping, 1e-9))
            self.total = min(self.total, fit)

    def _rates(self) -> dict[str, float]:
        rate = self._rate * cosine(min(1.0, self._adam.done / self.total))
        return {
            name: rate * (POINT_RATE if name.endswith(POINT) else 1.0) for name in self._learned
        }

    def _look(self) -> None:
        plan = self._lesson.student.plan_with(self._learned)
        loss = self._lesson.judged(plan, self._supply.held)
        told = f"{self._stage}, step {self._adam.done} of {self.total}: {loss:.4g}"
        self._training.watch.say(f"Fine-tuning {told} on samples held back.")
        self._vain += 1
        if loss < self._least:
            self._least, self._vain = loss, 0
            self._best = {name: x.copy() for name, x in self._learned.items()}
            self._reached = self._adam.done
            if self._keep_plan is not None:
                self._keep_plan(plan)
        elif loss > ASTRAY * self._least or self._vain == PATIENCE:
            self._back()
        self._rounded = {}  # as if the course went on from what is kept
        self._keep()

    def _back(self) -> None:
        """To the best so far, and from there with smaller steps."""
        best = self._best or self._lesson.student.start()
        self._learned = {name: x.copy() for name, x in best.items()}
        self._adam.means.clear()
        self._rate /= SLOWER
        self._vain = 0

    def _keep(self) -> None:
        groups = {
            "learned": self._learned,
            "mean": self._adam.means,
            "square": self._adam.squares,
            "best": self._best or {},
        }
        arrays = {f"{group}/{k}": x for group, some in groups.items() for k, x in some.items()}
        numbers = {
            "done": self._adam.done,
            "total": self.total,
            "before": self._before,
            "least": self._least,
            "spent": self._spent,
            "looks": self._looks,
            "vain": self._vain,
            "rate": self._rate,
            "reached": self._reached,
            "random": self._rng.bit_generator.state,
        }
        self._training.checkpoint.save(self._stage, State(numbers, arrays))

    def _resumed(self) -> bool:
        """Whether an earlier run left a state, which is taken over."""
        state = self._training.checkpoint.load(self._stage)
        if state is None:
            return False
        known = state.numbers
        self.total, self._spent, self._looks = known["total"], known["spent"], known["looks"]
        self._rate, self._reached, self._vain = known["rate"], known["reached"], known["vain"]
        self._before, self._least = known["before"], known["least"]
        self._rng.bit_generator.state = known["random"]
        self._learned = state.group("learned")
        self._adam = replace(
            self._adam,
            done=known["done"],
            means=state.group("mean"),
            squares=state.group("square"),
        )
        self._best = state.group("best") or None
        return True

    def outcome(self) -> Outcome:
        """The best plan, and what it is worth."""
        student = self._lesson.student
        plan = student.plan if self._best is None else student.plan_with(self._best)
        wanted = self._options.epochs * self._supply.batches
        reached = {self._stage: self._reached} if self._reached else {}
        return Outcome(plan, self._before, self._least, self._adam.done, wanted, reached=reached)


# --- what is learned from


def batch_of(samples: Sequence[Sample], size: int, rng: np.random.Generator) -> list[Sample]:
    """Some of the samples, each once."""
    chosen = rng.permutation(len(samples))[:size]
    return [samples[i] for i in chosen]


def joined(samples: Sequence[Sample], width: int) -> list[Arrays]:
    """Samples one behind the other, `width` at a time; the last few that fill none are left out,
    but for a first.
    """
    if width == 1:
        return [dict(sample) for sample in samples]
    starts = range(0, max(1, len(samples) - width + 1), width)
    parts = [samples[start : start + width] for start in starts]
    return [{name: np.concatenate([s[name] for s in part]) for name in part[0]} for part in parts]


class WholeSupply:
    """Views of samples, with the outputs of the float model."""

    def __init__(self, model: ir.Model, samples: Samples, options: Options) -> None:
        self._options, self._taught, self._fit = options, samples.told, samples.fit
        self._size = min(options.batch, len(samples.fit))
        self._width = width_of(model, samples.told, samples.fit, self._size)
        self.batches = max(1, len(samples.fit) // self._size)
        with saved(model, samples.told) as path:
            self._teacher = open_session(path, same_sizes=_are_alike(samples.fit))
        self.held = [self._told(chunk) for chunk in joined(samples.held, 1)]

    def batch(self, rng: np.random.Generator) -> list[Arrays]:
        """Other views of some of the samples."""
        samples = batch_of(self._fit, self._size, rng)
        vary = self._options.vary
        chunks = joined(samples, self._width)
        seen = chunks if vary is None else [dict(vary(chunk, rng)) for chunk in chunks]
        threads = self._options.threads
        return list(over_samples(len(seen), lambda i: self._told(seen[i]), threads))

    def _told(self, chunk: Arrays) -> Arrays:
        found = run(self._teacher, self._taught, chunk)
        return {**chunk, **_named(found)}


def width_of(model: ir.Model, names: Sequence[str], samples: Sequence[Sample], size: int) -> int:
    """How many samples go through the model at once to compute tensors: one where that is not the
    same as one by one, as they differ in size or their first axis counts something else.
    """
    alike = _are_alike(samples) and all(_takes_more(value) for value in model.graph.inputs)
    width = -(-size // -(-size // TOGETHER)) if alike else 1
    return width if width > 1 and _same_together(model, names, samples[:2]) else 1


def _are_alike(samples: Sequence[Sample]) -> bool:
    return len({_shapes(sample) for sample in samples}) == 1


def _takes_more(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and len(shape) > 0 and not isinstance(shape[0], int)


def _same_together(model: ir.Model, names: Sequence[str], samples: Sequence[Sample]) -> bool:
    alone = _run_all(model, names, samples, 1)
    try:
        (together,) = _run_all(model, names, joined(samples, len(samples)), 1)
    except CalibError:
        return False
    if any(not together[name].shape for name in names):
        return False
    pairs = [(np.concatenate([one[name] for one in alone]), together[name]) for name in names]
    return all(a.shape == b.shape and _are_close(a, b) for a, b in pairs)


def _are_close(a: Array, b: Array) -> bool:
    return bool(np.abs(a - b).max(initial=0) <= CLOSE * np.abs(b).max(initial=0))


@dataclass(frozen=True)
class _Inside:
    """A sample inside: what enters a block, of both models, what the float block makes of it, and
    what else it reads.
    """

    own: Sample
    reference: Sample
    taught: Sample
    beside: Sample

    def feeds(self) -> Arrays:
        """All of it, as the layers before hand it on."""
        return {**self.beside, **self.own, **self.taught}

    def dropped(self, rng: np.random.Generator) -> Arrays:
        """The same with some numbers of the float model's."""
        mixed = {
            name: np.where(rng.random(x.shape, np.float32) < DROPPED, self.reference[name], x)
            for name, x in self.own.items()
        }
        return {**self.beside, **mixed, **self.taught}


class InsideSupply:
    """What enters a block, as the quantized layers before hand it on, and what the float block
    makes of what the float layers do; the last samples, `held`, judge.
    """

    def __init__(self, samples: Sequence[_Inside], held: int, width: int, options: Options) -> None:
        self._fit = samples[:-held]
        self._size = min(options.batch, len(self._fit))
        self._width = min(width, self._size)
        self.batches = max(1, len(self._fit) // self._size)
        self.held = joined(
            [sample.feeds() for sample in samples[-held:]],
            1,
        )

    def batch(self, rng: np.random.Generator) -> list[Arrays]:
        """Some of the samples; a few numbers of each are the float model's."""
        chosen = rng.permutation(len(self._fit))[: self._size]
        return joined(
            [self._fit[i].dropped(rng) for i in chosen],
            self._width,
        )


# --- what is learned


def fine_tuned(model: ir.Model, plan: QuantPlan, samples: Samples, training: Training) -> Outcome:
    """The plan after learning as the options say; `model` is the float one, of the opset that
    gradients need.
    """
    options, aim = training.options, outputs_alike(model, samples.told)
    supply = WholeSupply(model, samples, options)

    def lesson(plan: QuantPlan) -> Lesson:
        return _lesson(model, plan, options, aim)

    before = least = lesson(plan).judged(plan, supply.held)
    if before < QUIET:
        return Outcome(plan, before, before, held=len(supply.held))
    steps, wanted, reached = 0, 0, dict[str, int]()
    if options.blocks:
        found, by_stage = by_blocks(model, plan, samples, training)
        loss = lesson(found).judged(found, supply.held)
        training.watch.say(
            f"Fine-tuning by blocks: {before:.4g} -> {loss:.4g} on samples held back."
        )
        if loss < least:
            plan, least, reached = found, loss, by_stage
            training.keep(plan)
    if options.whole:
        seconds = options.seconds / 2 if options.blocks else options.seconds
        result = training.learned(lesson(plan), supply, WHOLE, seconds=seconds, keep=training.keep)
        plan, least, steps, wanted = result.plan, result.after, result.steps, result.wanted
        reached = {**reached, **result.reached}
    return Outcome(plan, before, least, steps, wanted, len(supply.held), reached)


def _lesson(model: ir.Model, plan: QuantPlan, options: Options, loss: Loss) -> Lesson:
    student = Student(model, plan, options.may, threads=options.threads)
    return Lesson(student, loss, options.threads)


def learned_again(
    model: ir.Model, plan: QuantPlan, samples: Samples, training: Training
) -> QuantPlan:
    """The plan after as many steps as were best before, from all samples, which judge as well: they
    tell no more than whether learning went astray.
    """
    options, every = training.options, samples.all()
    if set(training.repeated or {}) - {WHOLE}:
        plan, _ = by_blocks(model, plan, every, training)
    supply = WholeSupply(model, every, options)
    lesson = _lesson(model, plan, options, outputs_alike(model, samples.told))
    return training.learned(lesson, supply, WHOLE, seconds=options.seconds).plan


def by_blocks(
    model: ir.Model, plan: QuantPlan, samples: Samples, training: Training
) -> tuple[QuantPlan, dict[str, int]]:
    """The plan whose blocks were learned one after the other, where each was best; each hands on
    what it then makes.
    """
    blocks, options = blocks_of(model, plan, samples.told), training.options
    threads = options.threads
    views, held = _views(samples, options), len(samples.held)
    end = training.clock() + options.seconds / (2 if options.whole else 1)
    own: list[Sample] = [{} for _ in views]
    reference, reached = own, dict[str, int]()
    for number, block in enumerate(blocks, 1):
        if training.clock() > end:
            break
        beside = _tapped(model, block.beside, views, threads)
        taught = _run_all(block.model, block.ends, _with(reference, beside), threads)
        named = [_named(some) for some in taught]
        inside = [_Inside(*four) for four in zip(own, reference, named, beside, strict=True)]
        lesson = _lesson(block.model, plan, options, error(block.ends))
        entering = _with(own, beside)
        width = width_of(block.model, block.ends, entering, options.batch)
        supply = InsideSupply(inside, held, width, options)
        seconds = (end - training.clock()) / (len(blocks) - number + 1)
        stage = f"block {number} of {len(blocks)}"
        found = training.learned(lesson, supply, stage, seconds=seconds)
        plan = found.plan
        reached.update(found.reached)
        if number < len(blocks):
            quantized = restored(block.model, plan)
            own = _run_all(quantized, block.ends, entering, threads)
            reference = taught
    return plan, reached


def _views(samples: Samples, options: Options) -> list[Sample]:
    """The samples, behind those to learn from other views of them, the held ones last."""
    rng, vary = np.random.default_rng(options.seed), options.vary
    others = [] if vary is None else [vary(sample, rng) for sample in samples.fit]
    return [*samples.fit, *others, *samples.held]


def _named(taught: Sample) -> Sample:
    return {TEACHER.format(name): x for name, x in taught.items()}


def _with(some: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    return [{**a, **b} for a, b in zip(some, others, strict=True)]


def _tapped(
    model: ir.Model, names: Sequence[str], samples: Sequence[Sample], threads: int
) -> list[Sample]:
    """Tensors of a model, its inputs among them."""
    given = {value.name for value in model.graph.inputs}
    made = _run_all(model, [name for name in names if name not in given], samples, threads)
    fed = [{name: x for name, x in sample.items() if name in names} for sample in samples]
    return _with(fed, made)


def are_finite(
    model: ir.Model, names: Sequence[str], samples: Sequence[Sample], threads: int
) -> list[bool]:
    """Whether a model makes finite numbers of each sample."""
    made = _made(model, names, samples, threads)
    return [all(np.isfinite(x).all() for x in found.values()) for found in made]


def _run_all(
    model: ir.Model, names: Sequence[str], samples: Sequence[Sample], threads: int
) -> list[Sample]:
    """Tensors of a model for every sample."""
    return list(_made(model, names, samples, threads)) if names else [{} for _ in samples]


def _made(
    model: ir.Model, names: Sequence[str], samples: Sequence[Sample], threads: int
) -> Iterator[Sample]:
    with saved(model, names) as path:
        session = open_session(path)
    yield from over_samples(len(samples), lambda i: run(session, names, samples[i]), threads)
