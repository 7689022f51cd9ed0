"""Mixed bits: every weight in the width it is worth.

By error: the fewest bits that keep each layer's relative error, `init_scale`, below a bound. By sensitivity: what each
weight alone costs the outputs is measured at one width, carried over to the others by the weight's own error there, and
bits go where they buy the most for their bytes (the lower convex hull of every weight's error over its size, steepest
steps first: an optimal allocation wherever a step ends).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np
import onnx_ir as ir

from calib.affine import SMALLEST_SCALE, Array, dequantize
from calib.samples import Dataset
from converter.algorithms.stored_weights import Options, store_by_outputs, store_by_weights
from converter.config.keys import MixedBitWeightQuantParam
from converter.emit.planes import stored_bytes
from converter.emit.stored import as_floats, emit_stored, planned
from converter.job import Resources, Watch
from converter.model import constant, weight_bytes
from converter.plan import NodePlan, QuantPlan
from converter.sensitivity import fewest, output_drop, sensitivities

# Widths that a search by sensitivity may choose, and the one it measures.
WIDTHS = range(2, 9)
MEASURED_BITS = 4
# Values of init_scale that auto_tune tries by bisection, from the largest.
SCALES = np.geomspace(0.2, 0.002, 24)


@dataclass(frozen=True)
class Step:
    """One weight gets `bits`: the path of allocations from the smallest file on."""

    name: str
    bits: int
    size: int
    error: float


def pareto(errors: Mapping[str, Sequence[float]], sizes: Mapping[str, int]) -> list[Step]:
    """The steps from the fewest bits to the most, steepest first; `size` in bits and `error` are totals after each.

    `errors` are a weight's for every width of WIDTHS, `sizes` the numbers of its elements.
    """
    steps = [(name, *step) for name, row in errors.items() for step in _hull(row, sizes[name])]
    size, error = sum(sizes.values()) * WIDTHS[0], sum(row[0] for row in errors.values())
    path = []
    for name, bits, more, less in sorted(steps, key=lambda step: (-step[3] / step[2], step[0], step[1])):
        size, error = size + more, error - less
        path.append(Step(name, bits, size, error))
    return path


def _hull(errors: Sequence[float], size: int) -> Iterator[tuple[int, int, float]]:
    """The widths on the lower convex hull of error over size: bits, size more and error less than the one before."""
    at = 0
    while at < len(WIDTHS) - 1:
        gains = [(errors[at] - errors[i]) / (i - at) for i in range(at + 1, len(WIDTHS))]
        best = at + 1 + int(np.argmax(gains))
        if errors[best] >= errors[at]:
            return
        yield WIDTHS[best], (best - at) * size, errors[at] - errors[best]
        at = best


@dataclass(frozen=True)
class Search:
    """One model, its plan and data, and how weights are fitted."""

    model: ir.Model
    plan: QuantPlan
    data: Dataset
    by_outputs: bool
    options: Options
    resources: Resources
    watch: Watch

    def decided(self, plan: QuantPlan | None = None, max_error: float | None = None) -> QuantPlan:
        """`plan`, or the search's own, with all weights in its widths or in the fewest bits that keep `max_error`."""
        plan, options = plan or self.plan, replace(self.options, max_error=max_error)
        if self.by_outputs:
            return store_by_outputs(self.model, plan, self.data, self.resources, options, self.watch)
        return store_by_weights(self.model, plan, options, self.watch)

    def mixed(self, wanted: MixedBitWeightQuantParam) -> QuantPlan:
        """The plan with the widths that the config's search finds."""
        if wanted.search == "SENSITIVITY":
            return self._by_sensitivity(wanted)
        if wanted.auto_tune:
            return self._least(len(SCALES) - 1, wanted, lambda i: self.decided(max_error=float(SCALES[i])))
        return self.decided(max_error=wanted.init_scale)

    def _least(self, most: int, wanted: MixedBitWeightQuantParam, decide: Callable[[int], QuantPlan]) -> QuantPlan:
        """decide(n) for the least n up to `most` whose outputs keep the cosine, or decide(most)."""

        def attempt(n: int) -> QuantPlan | None:
            plan, quantized = decide(n), self.model.clone()
            emit_stored(quantized, plan, as_floats)
            cosine = 1 - output_drop(self.model, quantized, self.data, None, self.resources)
            self.watch.say(f"Attempt {n}: cosine {cosine:.5f}.")
            return plan if cosine >= wanted.min_cosine or n == most else None

        return fewest(most, attempt)

    def _by_sensitivity(self, wanted: MixedBitWeightQuantParam) -> QuantPlan:
        floats = {unit.name: _arrays(node, unit) for node, unit in planned(self.model, self.plan)}
        sizes = {name: sum(array.size for array in arrays) for name, arrays in floats.items()}
        path = pareto(self._effects(floats), sizes)
        ratios = [self._ratio(step.size, sizes, floats) for step in path]
        for step, ratio in list(zip(path, ratios, strict=True))[:: max(1, len(path) // 10)]:
            self.watch.say(f"{ratio:.2f} times smaller: {-10 * np.log10(step.error):.1f} dB expected.")

        narrow = dict.fromkeys(floats, WIDTHS[0])
        if wanted.target_ratio is None:
            steps = [{step.name: step.bits} for step in path]
            widths = list(accumulate(steps, operator.or_, initial=narrow))
            return self._least(len(path), wanted, lambda n: self.decided(self.plan.with_bits(widths[n])))
        for step in path:
            wider = narrow | {step.name: step.bits}
            if (
                self._ratio(sum(sizes[name] * bits for name, bits in wider.items()), sizes, floats)
                >= wanted.target_ratio
            ):
                narrow = wider
        return self.decided(self.plan.with_bits(narrow))

    def _ratio(self, bits: int, sizes: Mapping[str, int], floats: Mapping[str, list[Array]]) -> float:
        """How many times smaller the model's constants get where the units' weights take `bits` in all."""
        before = weight_bytes(self.model)
        overheads = (stored_bytes(0, len(array), WIDTHS[0]) for arrays in floats.values() for array in arrays)
        return before / (before - 4 * sum(sizes.values()) + bits / 8 + sum(overheads))

    def _effects(self, floats: Mapping[str, list[Array]]) -> dict[str, list[float]]:
        """The outputs' relative squared error that each unit alone causes in each of WIDTHS, from a few samples."""

        def in_bits(bits: int) -> QuantPlan:
            plan = self.plan.with_bits(dict.fromkeys(floats, bits))
            return store_by_weights(self.model, plan, self.options, self.watch)

        plans = {bits: in_bits(bits) for bits in WIDTHS}
        own = {name: [_squared_error(arrays, name, plan) for plan in plans.values()] for name, arrays in floats.items()}
        plan, write = plans[MEASURED_BITS], partial(emit_stored, write=as_floats)
        if self.by_outputs:
            plan = store_by_outputs(self.model, plan, self.data, self.resources, self.options, self.watch, alone=True)
        found = sensitivities(self.model, plan, self.data, self.resources, self.watch, write)
        noise = {s.node.name: 10 ** (-s.sqnr_db / 10) / own[s.node.name][WIDTHS.index(MEASURED_BITS)] for s in found}
        return {name: [noise[name] * error for error in errors] for name, errors in own.items()}


def _arrays(node: ir.Node, unit: NodePlan) -> list[Array]:
    return [array for weight in unit.weights if (array := constant(node.inputs[weight.index])) is not None]


def _squared_error(arrays: list[Array], name: str, plan: QuantPlan) -> float:
    stored = [plan.stored[name, weight.index] for weight in plan.nodes[name].weights]
    errors = [w - dequantize(s.codes, s.qparams) for w, s in zip(arrays, stored, strict=True)]
    return max(sum(float(np.vdot(e, e)) for e in errors), SMALLEST_SCALE)
