"""Searches the width of every weight by what quantized models lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir

from calib.affine import SMALLEST_SCALE, Array
from calib.samples import Dataset
from calib.search import fewest
from calib.workers import over_samples
from converter.calibrate.runs import opened
from converter.config.keys import MixedBitWeightQuantParam
from converter.emit.stored import as_floats, emit_stored
from converter.graph.edit import constant
from converter.graph.files import model_bytes
from converter.measure.errors import side_by_side
from converter.measure.sensitivity import only, output_drop
from converter.plan.plan import QuantPlan, stored_bytes
from converter.plan.result import Tradeoff
from converter.plan.units import planned
from converter.weights.journal import Journal
from converter.weights.layers import Fitter
from converter.weights.mixed_bits import WIDTHS, Budget, allocation, path

# The width at which sensitivity is measured.
MEASURED_BITS = 4
# Values of init_scale that auto_tune tries by bisection, from the largest.
SCALES = np.geomspace(0.2, 0.002, 24)
# How many allocations are fitted to find one whose file is as large as wanted, or so nearly.
SIZED, CLOSE = 6, 0.998
# How much of the measured sensitivity decides, instead of equal bits for all.
BLENDS = (1.0, 0.5, 0.0)
# One sample in this many, and at most so many, judge allocations; fewer samples than LEAST_SPLIT
# are not parted.
JUDGES, MOST_JUDGES, LEAST_SPLIT = 5, 64, 10


def divergence(reference: Sequence[object], other: Sequence[object]) -> float:
    """How far outputs are from the reference: KL divergence of probabilities, share of other texts,
    else squared error over square; 1 for outputs of another shape.
    """
    pairs = map(side_by_side, reference, other)
    parts = [[1.0] if both is None else [_divergence(x, y) for x, y in both] for both in pairs]
    return max(chain.from_iterable(parts), default=0.0)


def _divergence(x: Array, y: Array) -> float:
    if not x.size:
        return 0.0
    if x.dtype.kind not in "fiub":
        return float(np.mean(x != y))
    finite = np.isfinite(x)
    if np.isfinite(y).all() and _are_probabilities(x):
        x, y = (np.maximum(each.astype(np.float64), 1e-9) for each in (x, y))
        return float((x * np.log(x / y)).sum(axis=-1).mean())
    x, y = (each[finite].astype(np.float64) for each in (x, y))
    error = float(np.square(x - y).sum() / max(np.square(x).sum(), SMALLEST_SCALE))
    return error if np.isfinite(error) else 1.0


def _are_probabilities(x: Array) -> bool:
    if not x.ndim or x.min(initial=0) < 0:
        return False
    return np.allclose(
        x.sum(axis=-1, dtype=np.float64),
        1,
        atol=1e-3,
    )


@dataclass(frozen=True)
class Search:
    """The search that a config wants for the widths of a plan, judged on samples that nothing is
    fitted to; `keep` is handed every plan better than those before.

    `written` makes a plan the model whose file shall be so many times smaller than `before`, in
    bytes; codes of a width take so many bits in it as `held` tells.
    """

    fitter: Fitter
    judges: Dataset
    plan: QuantPlan
    wanted: MixedBitWeightQuantParam
    journal: Journal
    keep: Callable[[QuantPlan], None]
    written: Callable[[QuantPlan], ir.Model]
    before: int
    held: Callable[[int], int]

    def mixed(self) -> tuple[QuantPlan, tuple[Tradeoff, ...]]:
        """The plan with the widths found, and what else could be had."""
        if not self.plan.units():
            return self.plan, ()
        if all(weight.fixed for unit in self.plan.units() for weight in unit.weights):
            return self.fitter.fitted(self.plan), ()
        if self.wanted.search == "SENSITIVITY":
            return self._by_sensitivity()
        if self.wanted.auto_tune:
            return self._least(len(SCALES) - 1, lambda n: self._by_error(float(SCALES[n]))), ()
        return self._by_error(self.wanted.init_scale), ()

    def _by_error(self, bound: float) -> QuantPlan:
        return replace(self.fitter, storage=replace(self.fitter.storage, max_error=bound)).fitted(
            self.plan
        )

    def _least(self, most: int, decide: Callable[[int], QuantPlan]) -> QuantPlan:
        """decide(n) for the least n up to `most` whose outputs keep the cosine, or decide(most)."""
        fitter, reference = self.fitter, opened(self.fitter.model, optimize=True)

        def cosine(n: int) -> float:
            plan = decide(n)
            other = opened(self._restored(plan), optimize=True)
            threads = fitter.resources.threads
            drop = output_drop(reference, other, self.judges, None, threads=threads)
            if 1 - drop >= self.wanted.min_cosine:
                self.keep(plan)
            return 1 - drop

        def attempt(n: int) -> int | None:
            cosine_of_n = self.journal.once(f"cosine of step {n}", lambda: cosine(n))
            self.fitter.watch.say(f"Attempt {n} of {most}: cosine {cosine_of_n:.5f}.")
            return n if cosine_of_n >= self.wanted.min_cosine or n == most else None

        return decide(fewest(most, attempt))

    def _by_sensitivity(self) -> tuple[QuantPlan, tuple[Tradeoff, ...]]:
        fitter, budget = self.fitter, self._budget()
        table = [
            budget.tradeoff(budget.within(ratio)) for ratio in map(budget.ratio, budget.uniform())
        ]
        if self.wanted.target_ratio is None:
            steps = path(budget.worth, budget.sizes)
            narrow = [
                allocation(steps[:n], budget.sizes, budget.cost, np.inf)
                for n in range(len(steps) + 1)
            ]
            return self._least(
                len(steps), lambda n: fitter.fitted(self.plan.with_bits(narrow[n]))
            ), tuple(table)
        most = budget.ratio(dict.fromkeys(budget.sizes, WIDTHS[0]))
        if most < (wanted := self.wanted.target_ratio):
            fitter.watch.warn(
                f"target_ratio = {wanted:g} is out of reach: in {WIDTHS[0]} bits the file is "
                f"{most:.1f} times smaller."
            )
        tried = [budget.within(wanted, blend) for blend in BLENDS]
        measured = [
            self._measured(widths)
            for widths in fitter.watch.track(tried, "Trying bits", len(tried))
        ]
        table += [budget.tradeoff(*pair) for pair in zip(tried, measured, strict=True)]
        best = BLENDS[int(np.argmin(measured))]
        by_size = tuple(sorted(table, key=lambda tradeoff: tradeoff.ratio))
        return self._sized(budget, wanted, best), by_size

    def _sized(self, budget: Budget, ratio: float, blend: float) -> QuantPlan:
        """The plan of an allocation whose file is nearly the largest that is small enough. How
        large one is shows when it is written, as every width has a table of its own, not all zeros
        take a byte and rotated weights have none; then the rest is reckoned anew, between one that
        was too little and one that was enough.
        """
        best, most, found = (False, -np.inf), budget.before / ratio, self.plan
        little, enough, tried = -budget.before, budget.before, list[dict[str, int]]()
        while len(tried) < SIZED and (widths := budget.within(ratio, blend)) not in tried:
            tried.append(widths)
            plan = self.fitter.fitted(self.plan.with_bits(widths))
            size = model_bytes(self.written(plan))
            fits = size <= most
            if (worth := (fits, size if fits else -size)) > best:
                best, found = worth, plan
            if fits and size >= CLOSE * most:
                break
            little, enough = (little, budget.rest) if fits else (budget.rest, enough)
            rest = budget.rest + size - budget.before / budget.ratio(widths)
            if not little < rest < enough:
                rest = (little + enough) / 2
            budget = replace(budget, rest=round(rest))
        return found

    def _budget(self) -> Budget:
        """Sizes, and what every unit alone costs the outputs of samples that it was not fitted
        on.
        """
        arrays = {
            u.name: [x for w in u.weights if (x := constant(n.inputs[w.index])) is not None]
            for n, u in planned(self.fitter.model, self.plan)
            if not u.weights[0].fixed
        }
        sizes = {name: sum(x.size for x in weights) for name, weights in arrays.items()}

        def cost(name: str, bits: int) -> int:
            return sum(stored_bytes(x.size, len(x), self.held(bits)) for x in arrays[name])

        ranked = self.journal.once("ranked", self._ranked)
        rest = ranked["bytes"] - sum(cost(name, MEASURED_BITS) for name in sizes)
        effects = ranked["effects"]
        worth = {name: max(effects[name], SMALLEST_SCALE) * 4.0**MEASURED_BITS for name in sizes}
        return Budget(worth, sizes, cost, self.before, rest)

    def _ranked(self) -> dict[str, Any]:
        """What every unit alone costs the outputs at one width, and the bytes of the file with it
        everywhere.
        """
        plan = self._on_a_part.fitted(
            self.plan.with_bits({u.name: MEASURED_BITS for u in self.plan.units()}),
            alone=True,
        )
        units = self.fitter.watch.track(
            plan.units(),
            "Ranking nodes",
            len(plan.units()),
        )
        effects = {unit.name: self._divergence(only(plan, unit)) for unit in units}
        return {"effects": effects, "bytes": model_bytes(self.written(plan))}

    def _measured(self, widths: Mapping[str, int]) -> float:
        """What the outputs lose with these widths; the plan is kept if no other lost less."""
        key = " ".join(map(str, widths.values()))

        def measure() -> float:
            before = min(
                (v for k, v in self.journal.known.items() if k != "ranked"),
                default=np.inf,
            )
            plan = self._on_a_part.fitted(self.plan.with_bits(widths))
            loss = self._divergence(plan)
            if loss < before:
                self.keep(plan)
            return loss

        loss = self.journal.once(key, measure)
        self.fitter.watch.say(f"{key} bits: divergence {loss:.5f}.")
        return loss

    @cached_property
    def _judges(self) -> int:
        """How many samples, the last, judge fits on the others."""
        count = len(self.fitter.data)
        return min(count // JUDGES, MOST_JUDGES) if count >= LEAST_SPLIT else 0

    @cached_property
    def _on_a_part(self) -> Fitter:
        return replace(
            self.fitter,
            data=self.fitter.data.part(0, len(self.fitter.data) - self._judges),
        )

    @cached_property
    def _reference(self) -> list[list[Array]]:
        return self._outputs(self.fitter.model)

    def _divergence(self, plan: QuantPlan) -> float:
        """Mean over the judging samples."""
        return float(
            np.mean(list(map(divergence, self._reference, self._outputs(self._restored(plan)))))
        )

    def _outputs(self, model: ir.Model) -> list[list[Array]]:
        data, executed = self.fitter.data, opened(model, optimize=True)
        judges = range(len(data))[-self._judges :]

        def outputs(i: int) -> list[Array]:
            return executed.answer(data.sample(judges[i]))

        return list(over_samples(len(judges), outputs, self.fitter.resources.threads))

    def _restored(self, plan: QuantPlan) -> ir.Model:
        quantized = self.fitter.model.clone()
        emit_stored(quantized, plan, as_floats)
        return quantized
