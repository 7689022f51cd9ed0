"""What the rounding of each activation costs the outputs, everything else being float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calib.affine import Array, dequantize, quantize
from calib.samples import Dataset
from calib.workers import over_samples
from converter.calibrate.runs import opened
from converter.graph.edit import constant, values_by_name
from converter.measure.sensitivity import injected
from converter.plan.ops import rule
from converter.plan.plan import QuantPlan


def rounding_costs(
    model: ir.Model, plan: QuantPlan, data: Dataset, *, count: int, threads: int
) -> dict[str, float]:
    """By group of tensors, noise over signal power that rounding it alone to the codes of `plan`
    leaves in the outputs, summed over outputs and the first `count` samples.
    """
    leaves = _leaves(model, plan)
    fed = {value.name for value in model.graph.inputs}
    computed = [name for names in leaves.values() for name in names if name not in fed]
    moved, deltas = injected(model, computed)
    floats, runner = opened(model, computed), opened(moved, optimize=True)
    still = dict.fromkeys(
        deltas.values(),
        np.zeros((), np.float32),
    )

    def step(index: int) -> Array:
        sample = data.sample(index)
        known = {**sample, **floats.fetch(computed, sample)}
        before = runner.answer({**sample, **still})
        noises = []
        for names in leaves.values():
            change = {name: _rounding(known[name], plan, name) for name in names}
            added = {deltas[name]: x for name, x in change.items() if name in deltas}
            inputs = {name: known[name] + x for name, x in change.items() if name in fed}
            noises.append(_noise(before, runner.answer({**sample, **still, **added, **inputs})))
        return np.array(noises)

    total = sum(
        over_samples(min(count, len(data)), step, threads),
        np.zeros(len(leaves)),
    )
    return dict(zip(leaves, total.tolist(), strict=True))


def _leaves(model: ir.Model, plan: QuantPlan) -> dict[str, list[str]]:
    """The tensors of each group that are rounded, and not only moved from others of it."""
    values = values_by_name(model.graph)
    repeated = {
        name
        for unit in plan.units()
        if rule(unit.op_type).moves or rule(unit.op_type).joins
        for name in unit.outputs
        if any(_alike(plan, name, other) for other in unit.inputs)
    }
    leaves: dict[str, list[str]] = {}
    for name, tensor in plan.tensors.items():
        if name not in repeated and constant(values[name]) is None:
            leaves.setdefault(tensor.group, []).append(name)
    return leaves


def _alike(plan: QuantPlan, name: str, other: str) -> bool:
    tensors = plan.tensors
    both = name in tensors and other in tensors
    return both and tensors[name].group == tensors[other].group


def _rounding(x: Array, plan: QuantPlan, name: str) -> Array:
    q = plan.params(name)
    return np.where(
        np.isfinite(x),
        dequantize(quantize(x, q), q) - x,
        np.float32(0),
    )


def _noise(before: list[Array], after: list[Array]) -> float:
    """Noise over signal power, summed over the outputs that can be compared."""
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x.shape == y.shape]
    floats = [(x.astype(np.float64), y) for x, y in pairs if x.dtype.kind == "f"]
    noises = (float(np.square(y - x).sum() / max(np.square(x).sum(), 1e-30)) for x, y in floats)
    return sum(noise for noise in noises if np.isfinite(noise))
