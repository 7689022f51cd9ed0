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
from converter.algorithms.stored_weights import Fitter
from converter.config.keys import MixedBitWeightQuantParam
from converter.emit.planes import stored_bytes
from converter.emit.stored import as_floats, emit_stored, planned
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
    """The search that a config wants for the widths of a plan."""

    fitter: Fitter
    plan: QuantPlan
    wanted: MixedBitWeightQuantParam

    def mixed(self) -> QuantPlan:
        """The plan with the widths found."""
        if self.wanted.search == "SENSITIVITY":
            return self._by_sensitivity()
        if self.wanted.auto_tune:
            return self._least(len(SCALES) - 1, lambda n: self._by_error(float(SCALES[n])))
        return self._by_error(self.wanted.init_scale)

    def _by_error(self, bound: float) -> QuantPlan:
        return replace(self.fitter, options=replace(self.fitter.options, max_error=bound)).fitted(self.plan)

    def _least(self, most: int, decide: Callable[[int], QuantPlan]) -> QuantPlan:
        """decide(n) for the least n up to `most` whose outputs keep the cosine, or decide(most)."""

        def attempt(n: int) -> QuantPlan | None:
            plan, quantized = decide(n), self.fitter.model.clone()
            emit_stored(quantized, plan, as_floats)
            cosine = 1 - output_drop(self.fitter.model, quantized, self.fitter.data, None, self.fitter.resources)
            self.fitter.watch.say(f"Attempt {n} of {most}: cosine {cosine:.5f}.")
            return plan if cosine >= self.wanted.min_cosine or n == most else None

        return fewest(most, attempt)

    def _by_sensitivity(self) -> QuantPlan:
        floats = {unit.name: _arrays(node, unit) for node, unit in planned(self.fitter.model, self.plan)}
        sizes = {name: sum(array.size for array in arrays) for name, arrays in floats.items()}
        path = pareto(self._effects(floats), sizes)
        before = weight_bytes(self.fitter.model)
        overhead = sum(stored_bytes(0, len(array), WIDTHS[0]) for arrays in floats.values() for array in arrays)

        def ratio(bits: int) -> float:
            return before / (before - 4 * sum(sizes.values()) + bits / 8 + overhead)

        for step in path[:: max(1, len(path) // 10)]:
            noise = -10 * np.log10(step.error)
            self.fitter.watch.say(f"{ratio(step.size):.2f} times smaller: signal to noise {noise:.1f} dB expected.")
        widths = dict.fromkeys(floats, WIDTHS[0])
        if self.wanted.target_ratio is None:
            narrow = list(accumulate(({step.name: step.bits} for step in path), operator.or_, initial=widths))
            return self._least(len(path), lambda n: self.fitter.fitted(self.plan.with_bits(narrow[n])))
        for step in path:
            wider = widths | {step.name: step.bits}
            if ratio(sum(sizes[name] * bits for name, bits in wider.items())) >= self.wanted.target_ratio:
                widths = wider
        return self.fitter.fitted(self.plan.with_bits(widths))

    def _effects(self, floats: Mapping[str, list[Array]]) -> dict[str, list[float]]:
        """The outputs' relative squared error that each unit alone causes in each of WIDTHS, from a few samples."""
        plans = [self.plan.with_bits(dict.fromkeys(floats, bits)) for bits in WIDTHS]
        stored, at = [self.fitter.by_weights(plan) for plan in plans], WIDTHS.index(MEASURED_BITS)
        own = {name: [_squared_error(arrays, name, plan) for plan in stored] for name, arrays in floats.items()}
        measured, fitter = self.fitter.fitted(plans[at], alone=True), self.fitter
        write = partial(emit_stored, write=as_floats)
        found = sensitivities(fitter.model, measured, fitter.data, fitter.resources, fitter.watch, write)
        noise = {s.node.name: 10 ** (-s.sqnr_db / 10) / own[s.node.name][at] for s in found}
        return {name: [noise[name] * error for error in errors] for name, errors in own.items()}


def _arrays(node: ir.Node, unit: NodePlan) -> list[Array]:
    return [array for weight in unit.weights if (array := constant(node.inputs[weight.index])) is not None]


def _squared_error(arrays: list[Array], name: str, plan: QuantPlan) -> float:
    stored = [plan.stored[name, weight.index] for weight in plan.nodes[name].weights]
    errors = [w - dequantize(s.codes, s.qparams) for w, s in zip(arrays, stored, strict=True)]
    return max(sum(float(np.vdot(e, e)) for e in errors), SMALLEST_SCALE)
