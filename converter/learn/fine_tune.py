"""Fine-tuning of stored weights: the float model is the teacher, no labels are needed.

Scales, zeros and biases learn what makes the quantized model's outputs, or the tensors between its
blocks, those of the float model. A part of the samples is held back: it says when the best was
reached, and whether that is better than the start at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.samples import Dataset
from calib.session import open_session, run
from converter.graph.edit import not_none
from converter.graph.files import saved, serialized
from converter.job import Watch
from converter.learn.blocked import block_convolutions
from converter.learn.gradients import gradient_model, loss_model
from converter.learn.losses import Loss, divergence, error
from converter.learn.steps import Adam
from converter.learn.stored import Stored
from converter.plan.plan import QuantPlan
from converter.plan.units import planned

Changes = dict[str, Array]
Vary = Callable[[Array, np.random.Generator], Array]
# The most samples whose activations are in memory at once.
TOGETHER = 16


@dataclass(frozen=True)
class Options:
    """How long and how fast is learned.

    `rate` is the first step, relative to what it changes; `held` the share of the samples, the last
    ones, that judge; `seconds` the time after which the best so far is taken. `vary` makes other
    views of samples that are pictures.
    """

    epochs: int = 40
    batch: int = 32
    rate: float = 3e-4
    held: float = 0.2
    seconds: float = 600.0
    seed: int = 0
    vary: Vary | None = None


@dataclass(frozen=True)
class Outcome:
    """The plan, and the loss on what was held back: before and after. Where nothing was gained it
    is the old plan.
    """

    plan: QuantPlan
    before: float
    after: float


def end_to_end(model: ir.Model) -> tuple[Loss, tuple[str, ...]]:
    """The divergence of the first output's distribution, and the tensors that a teacher tells."""
    name = model.graph.outputs[0].name or ""
    return divergence(name), (name,)


def between_blocks(model: ir.Model, plan: QuantPlan) -> tuple[Loss, tuple[str, ...]]:
    """The relative error of what blocks hand on and of the outputs, and the tensors' names."""
    cuts = _cuts(model)
    read = [name for _, unit in planned(model, plan) for name in unit.inputs if name in cuts]
    outputs = [value.name or "" for value in model.graph.outputs]
    names = tuple(dict.fromkeys([*read, *outputs]))
    return error(names), names


def _cuts(model: ir.Model) -> set[str]:
    """Computed tensors that all behind them depend on through them alone."""
    place = {node: i for i, node in enumerate(model.graph)}
    found = set()
    inputs = [use.node for value in model.graph.inputs for use in value.uses()]
    last = max((place.get(node, len(place)) for node in inputs), default=0)
    for node, i in place.items():
        crossed = last > i  # something from before is still to be read
        ends = [place.get(use.node, len(place)) for out in node.outputs for use in out.uses()]
        if not crossed and len(node.outputs) == 1 and not node.outputs[0].is_graph_output():
            found.add(node.outputs[0].name or "")
        last = max([last, *ends])
    return found


def fine_tuned(
    model: ir.Model,
    plan: QuantPlan,
    data: Dataset,
    aim: tuple[Loss, Sequence[str]],
    options: Options,
    watch: Watch,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """The plan with learned scales, zeros and biases; `model` is the float one."""
    learner = _Learner(model, plan, data, aim, options)
    for gap in learner.gradients.gaps:
        watch.warn(f"Nothing is learned through node '{gap.node}' ({gap.op_type}): {gap.reason}.")
    changes, end = learner.stored.start(), clock() + options.seconds
    before = best = learner.judged(plan)
    chosen = plan
    adam = Adam(options.rate, options.epochs * learner.batches)
    for _ in watch.track(range(options.epochs), "Fine-tuning", options.epochs):
        learner.epoch(adam, changes)
        found = learner.stored.plan_with(changes)
        loss = learner.judged(found)
        if loss < best:
            best, chosen = loss, found
        if clock() > end:
            watch.tell("Fine-tuning ended after its time limit, with the best so far.")
            break
    return Outcome(chosen, before, best)


class _Learner:
    """The two models and the samples that one fine-tuning takes."""

    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        data: Dataset,
        aim: tuple[Loss, Sequence[str]],
        options: Options,
    ) -> None:
        self.stored, self.options = Stored(model, plan), options
        loss, self._names = aim
        held = max(1, round(len(data) * options.held))
        self._samples = [dict(data.sample(i)) for i in range(len(data))]
        self._fit, self._held = self._samples[:-held], self._samples[-held:]
        dynamic = all(_is_dynamic(value) for value in model.graph.inputs)
        self._batch = min(options.batch, len(self._fit))
        self._width = self._batch // -(-self._batch // TOGETHER) if dynamic else 1
        self._rng = np.random.default_rng(options.seed)
        with saved(model, self._names) as path:
            self._teacher = open_session(path, same_sizes=True)
        shapes = {name: x.shape for name, x in self._joined(self._fit[: self._width]).items()}
        self.gradients = gradient_model(self.stored.model, loss, self.stored.constants, shapes)
        self._session = open_session(
            serialized(block_convolutions(self.gradients.model)), same_sizes=True
        )
        one = {name: x.shape for name, x in self._joined(self._held[:1]).items()}
        judge = loss_model(self.stored.model, loss, self.stored.constants, one)
        self._judge = open_session(serialized(judge), same_sizes=True)

    @property
    def batches(self) -> int:
        """Steps of an epoch."""
        return len(self._fit) // self._batch

    def epoch(self, adam: Adam, changes: Changes) -> None:
        """Every sample once, the last few left out that make no batch."""
        order, size = self._rng.permutation(len(self._fit)), self._batch
        for start in range(0, self.batches * size, size):
            adam.step(changes, self._slopes(order[start : start + size], changes))

    def _slopes(self, chosen: Array, changes: Changes) -> Changes:
        """The gradients of changes, the mean over samples."""
        constants, sums = self.stored.values(changes), dict[str, Array]()
        parts = [chosen[i : i + self._width] for i in range(0, len(chosen), self._width)]
        whole = [part for part in parts if len(part) == self._width]
        for part in whole:
            feeds = self._varied(self._joined([self._fit[i] for i in part]))
            names = list(self.gradients.outputs.values())
            found = run(self._session, names, {**feeds, **self._taught(feeds), **constants})
            for name, output in self.gradients.outputs.items():
                sums[name] = sums.get(name, 0.0) + found[output] / len(whole)
        known = {name: sums.get(name, np.zeros_like(x)) for name, x in constants.items()}
        return self.stored.gradients(known)

    def _varied(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        vary = self.options.vary
        return {k: x if vary is None else vary(x, self._rng) for k, x in feeds.items()}

    def _taught(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = run(self._teacher, list(self._names), feeds)
        return {f"{name}_teacher": array for name, array in found.items()}

    def judged(self, plan: QuantPlan) -> float:
        """The loss of a plan on what is held back, as it would be stored."""
        constants = self.stored.values_of(plan)
        losses = []
        for sample in self._held:
            feeds = {**sample, **self._taught(sample), **constants}
            losses.append(float(run(self._judge, ["loss"], feeds)["loss"]))
        return float(np.mean(losses))

    def _joined(self, samples: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        return {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}


def _is_dynamic(value: ir.Value) -> bool:
    """Whether a model takes any number of samples at once."""
    return bool(value.shape) and not isinstance(not_none(value.shape)[0], int)
