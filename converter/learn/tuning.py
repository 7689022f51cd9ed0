"""Fine-tuning as a config asks for it: [fine_tune_param]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calib.samples import Dataset
from calib.session import Sample
from calib.sources import InputSpec, image_axes
from converter.calibrate.cache import fingerprint_of
from converter.calibrate.data import resources_of, spec_of
from converter.config.settings import settings_of
from converter.graph.edit import values_by_name
from converter.graph.files import fed_inputs
from converter.job import Job, Watch
from converter.learn.checkpoint import Checkpoint
from converter.learn.fine_tune import (
    Keep,
    Options,
    Outcome,
    Samples,
    Training,
    Vary,
    are_finite,
    fine_tuned,
    learned_again,
)
from converter.learn.gradients import LEAST_OPSET, Gap
from converter.learn.losses import tells_classes
from converter.learn.pictures import varied
from converter.learn.student import STORED, Learnable
from converter.learn.told import told_by
from converter.plan.plan import QuantPlan
from converter.prepare.opset import raise_opset

# The share of the samples that is held back.
HELD = 0.2


@dataclass(frozen=True)
class Tuning:
    """What a job wants to be learned, of what a plan `may` learn."""

    job: Job
    watch: Watch
    may: Learnable = STORED

    @property
    def wanted(self) -> bool:
        """Whether anything is."""
        return self.job.config.fine_tune.fine_tune != "OFF"

    def parted(self, data: Dataset) -> tuple[Dataset, Dataset]:
        """The samples that rounding may see and is learned from, and those, the last ones, that
        judge what was learned; none where nothing is. Distilled samples judge only where there are
        no others.
        """
        mixed = 0 < data.made < len(data)
        judging = data.real if mixed else data
        size = len(judging)
        count = round(size * HELD) if self.wanted else 0
        fit = size - max(count, int(self.wanted and size > 1))
        learned = judging.part(0, fit)
        if mixed:
            learned = learned.with_made([data.sample(i) for i in range(size, len(data))])
        return learned, judging.part(fit, size)

    def tuned(
        self,
        model: ir.Model,
        plan: QuantPlan,
        parts: tuple[Dataset, Dataset],
        *,
        keep: Keep,
        again: Callable[[], QuantPlan] | None = None,
    ) -> QuantPlan:
        """The plan after learning from two `parted` parts of the data; `keep` is handed every plan
        better than those before.

        What judged knows better than any other sample what is still wrong, so where `again` rounds
        on all, they are learned from as far as was best, or not at all.
        """
        model = raise_opset(model.clone(), LEAST_OPSET)
        given = [[dict(part.sample(i)) for i in range(len(part))] for part in parts]
        told = self._told(model, given) if plan.stored else ()
        fit, held = (self._finite(model, told, some) if told else [] for some in given)
        if not (fit and held):
            return again() if again else plan
        checkpoint = self._checkpoint(model, parts)
        options = self._options(model, told, passes=2 if again else 1)
        training = Training(options, checkpoint, self.watch, keep)
        samples = Samples(fit, held, told)
        found = fine_tuned(model, plan, samples, training)
        self._tell(found, len(fit) + len(held))
        plan = found.plan
        if again:
            plan = again()
            if found.reached:
                repeating = replace(training, repeated=found.reached)
                plan = self._repeated(model, plan, samples, repeating)
        self._tell_of_gaps(training.gaps.values())
        checkpoint.close()
        return plan

    def _told(self, model: ir.Model, parts: Sequence[Sequence[Sample]]) -> tuple[str, ...]:
        """The tensors that are learned by, none where nothing can be learned, which is said."""
        if not all(parts):
            self.watch.warn(
                "Nothing is learned from fewer than two samples, as a part must be held back: give "
                "more, better 100."
            )
            return ()
        told = told_by(model, {name: x.shape for name, x in parts[0][0].items()})
        if not told:
            self.watch.warn(
                "Nothing is learned, as no output is made of float32 numbers whose count follows "
                "from the inputs' sizes."
            )
        return told

    def _finite(
        self, model: ir.Model, told: Sequence[str], samples: Sequence[Sample]
    ) -> list[Sample]:
        """The samples about which the float model tells finite numbers."""
        threads = resources_of(self.job).threads
        finite = are_finite(model, told, samples, threads)
        if odd := finite.count(False):
            self.watch.warn(
                f"{odd} of {len(samples)} samples teach nothing: what the float model makes of "
                "them is not finite."
            )
        return [sample for sample, good in zip(samples, finite, strict=True) if good]

    def _checkpoint(self, model: ir.Model, parts: Iterable[Dataset]) -> Checkpoint:
        known = (fingerprint_of(model, part) for part in parts)
        told = "\n".join([*known, *settings_of(self.job.config)])
        return Checkpoint(self.job.output.with_name(f"{self.job.output.name}.fine_tune"), told)

    def _repeated(
        self, model: ir.Model, plan: QuantPlan, samples: Samples, training: Training
    ) -> QuantPlan:
        """The plan, rounded on all samples, after what was gained is learned from all of them."""
        learned = learned_again(model, plan, samples, training)
        count = len(samples.fit) + len(samples.held)
        if learned is plan:
            self.watch.tell(
                f"Rounding on all {count} samples is better than what was learned: it stays."
            )
        else:
            self.watch.tell(f"What was gained is learned again from all {count} samples.")
        return learned

    def _options(self, model: ir.Model, told: Sequence[str], passes: int) -> Options:
        wanted = self.job.config.fine_tune
        automatic = wanted.fine_tune == "AUTO"
        # What classes are told by says more of what counts than what any block hands on, where the
        # start is near; integers of few bits come near by blocks.
        near = not self.may.ranges
        values = values_by_name(model.graph)
        sure = near and any(tells_classes(values[name]) for name in told)
        return Options(
            epochs=wanted.epochs,
            batch=wanted.batch_size,
            rate=wanted.learning_rate,
            seconds=60 * wanted.time_limit / passes,
            seed=wanted.seed,
            threads=resources_of(self.job).threads,
            blocks=wanted.fine_tune == "BLOCK" or (automatic and not sure),
            whole=wanted.fine_tune == "END_TO_END" or automatic,
            may=self.may,
            vary=self._vary(model),
        )

    def _vary(self, model: ir.Model) -> Vary | None:
        """How other views of a sample are made, None where there are none."""
        config = self.job.config
        pictures = config.preprocess.input_type == "IMAGE"
        asked = config.fine_tune.augment
        if not (pictures if asked is None else asked):
            return None
        specs = [spec_of(value, self.job.input_format) for value in fed_inputs(model)]
        axes = {spec.name: image_axes(spec) for spec in specs if _is_picture(spec)}

        def vary(sample: Sample, rng: np.random.Generator) -> Sample:
            views = {name: varied(sample[name], order, rng) for name, order in axes.items()}
            return {**sample, **views}

        return vary

    def _tell(self, found: Outcome, count: int) -> None:
        wanted = self.job.config.fine_tune
        gained = found.after < found.before
        result = "nothing gained"
        if gained:
            less = 1 - found.after / found.before
            result = f"{found.before:.4g} -> {found.after:.4g}, {less:.1%} less"
        self.watch.tell(
            f"Fine-tuning ({wanted.fine_tune}): the loss of outputs on {found.held} of {count} "
            f"samples that were held back: {result}."
        )
        if found.steps < found.wanted:
            self.watch.warn(
                f"time_limit = {wanted.time_limit:g} ended fine-tuning after {found.steps} of "
                f"{found.wanted} steps: how far it gets depends on this machine; give more minutes "
                "or fewer epochs."
            )

    def _tell_of_gaps(self, gaps: Iterable[Gap]) -> None:
        reasons = dict[str, list[Gap]]()
        for gap in gaps:
            reasons.setdefault(gap.op_type, []).append(gap)
        for op_type, same in reasons.items():
            more = f" and {len(same) - 1} more" if same[1:] else ""
            self.watch.warn(
                f"Nothing is learned through node '{same[0].node}' ({op_type}){more}: "
                f"{same[0].reason}."
            )


def _is_picture(spec: InputSpec) -> bool:
    return len(spec.shape) >= len("NHW") and spec.dtype.kind == "f"
