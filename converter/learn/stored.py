"""What is learned of weights that are stored as codes: their scales and zeros, and the biases; the
codes stay.

Every learned number is a change in units of what it changes, 0 at first, so that one learning rate
serves all: a scale becomes scale (1 + u), what the code 0 stands for moves by scale v, a bias by v
times the root mean square of its tensor. Where all zeros are integers, as DequantizeLinear and
pruned weights want them, they stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, along, dequantize
from converter.emit.planes import half_if_exact
from converter.emit.stored import as_floats, emit_stored
from converter.graph.edit import not_none
from converter.plan.plan import QuantizedWeight, QuantPlan
from converter.plan.units import bias_of, bias_place, planned


@dataclass(frozen=True)
class _Weight:
    """One stored weight: the places in the plan that share it, and its points on a grid of 1."""

    places: tuple[tuple[str, int], ...]
    stored: QuantizedWeight
    points: Array

    @property
    def moves(self) -> bool:
        """Whether its zeros may be any number."""
        zero = self.stored.qparams.zero_point
        return not np.array_equal(zero, np.rint(zero))


@dataclass(frozen=True)
class _Bias:
    unit: str
    value: Array

    @property
    def size(self) -> float:
        """The unit of its changes."""
        return float(np.sqrt(np.mean(np.square(self.value)))) or 1.0


class Stored:
    """The stored weights of a plan as what can be learned.

    `model` is the model with them as plain constants, which `constants` names: those that gradients
    are wanted for.
    """

    def __init__(self, model: ir.Model, plan: QuantPlan) -> None:
        self.model, self.plan = model.clone(), plan
        emit_stored(self.model, plan, as_floats)
        self._weights, self._biases = dict[str, _Weight](), dict[str, _Bias]()
        for node, unit in planned(self.model, plan):
            for weight in unit.weights:
                self._add(not_none(node.inputs[weight.index]), (unit.name, weight.index))
            bias = bias_of(node, unit)
            if bias is not None and bias.dtype == np.float32:
                owner, index = bias_place(node, unit)
                name = not_none(owner.inputs[index]).name or ""
                self._biases[name] = _Bias(unit.name, bias.astype(np.float64))
        self.constants = (*self._weights, *self._biases)

    def _add(self, value: ir.Value, place: tuple[str, int]) -> None:
        name, stored = value.name or "", self.plan.stored[place]
        if value.graph is not self.model.graph:  # in a branch, through which no gradient goes
            return
        if name in self._weights:
            old = self._weights[name]
            self._weights[name] = replace(old, places=(*old.places, place))
            return
        q = stored.qparams
        plain = replace(q, scale=np.ones_like(q.scale), zero_point=np.zeros_like(q.zero_point))
        points = dequantize(stored.codes, plain).astype(np.float64)
        self._weights[name] = _Weight((place,), stored, points)

    def start(self) -> dict[str, Array]:
        """All changes, none yet: float64."""
        found = {f"{name} scale": _zeros(w.stored.qparams) for name, w in self._weights.items()}
        moving = {name: w for name, w in self._weights.items() if w.moves}
        found |= {f"{name} zero": _zeros(w.stored.qparams) for name, w in moving.items()}
        return found | {name: np.zeros_like(bias.value) for name, bias in self._biases.items()}

    def values(self, changes: Mapping[str, Array]) -> dict[str, Array]:
        """The constants (float32) that changes make."""
        found = {}
        for name, weight in self._weights.items():
            q, shape = weight.stored.qparams, weight.points.shape
            scale, offset = _grid(q, changes[f"{name} scale"], changes.get(f"{name} zero"))
            value = along(scale, q.axis, shape) * weight.points + along(offset, q.axis, shape)
            found[name] = value.astype(np.float32)
        for name, bias in self._biases.items():
            found[name] = (bias.value + bias.size * changes[name]).astype(np.float32)
        return found

    def values_of(self, plan: QuantPlan) -> dict[str, Array]:
        """The constants (float32) as a plan stores them."""
        stored = {name: plan.stored[w.places[0]] for name, w in self._weights.items()}
        found = {name: dequantize(w.codes, w.qparams) for name, w in stored.items()}
        for name, bias in self._biases.items():
            value = plan.biases.get(bias.unit, bias.value)
            found[name] = value.reshape(bias.value.shape).astype(np.float32)
        return found

    def gradients(self, constants: Mapping[str, Array]) -> dict[str, Array]:
        """The gradients of changes from those of the constants."""
        found = {}
        for name, weight in self._weights.items():
            q, slope = weight.stored.qparams, constants[name].astype(np.float64)
            # What moves with the scale is the distance from the zero.
            zero = along(q.zero_point.astype(np.float64), q.axis, slope.shape)
            scale = q.scale.astype(np.float64)
            found[f"{name} scale"] = scale * _summed(slope * (weight.points - zero), q)
            if weight.moves:
                found[f"{name} zero"] = scale * _summed(slope, q)
        for name, bias in self._biases.items():
            found[name] = bias.size * constants[name].astype(np.float64)
        return found

    def plan_with(self, changes: Mapping[str, Array]) -> QuantPlan:
        """The plan that stores the changes, in as many bytes as before."""
        stored, biases = dict(self.plan.stored), dict(self.plan.biases)
        for place, weight in self._learned(changes):
            stored[place] = weight
        for name, bias in self._biases.items():
            moved = bias.value + bias.size * changes[name]
            biases[bias.unit] = moved.reshape(-1).astype(np.float32)
        return replace(self.plan, stored=stored, biases=biases)

    def _learned(
        self, changes: Mapping[str, Array]
    ) -> Iterator[tuple[tuple[str, int], QuantizedWeight]]:
        for name, weight in self._weights.items():
            q = weight.stored.qparams
            scale, offset = _grid(q, changes[f"{name} scale"], changes.get(f"{name} zero"))
            scale = _as(scale, q.scale)
            zero = _as(-offset / scale, q.zero_point) if weight.moves else q.zero_point
            learned = replace(weight.stored, qparams=replace(q, scale=scale, zero_point=zero))
            for place in weight.places:
                yield place, learned


def _zeros(q: QParams) -> Array:
    return np.zeros(q.scale.shape)


def _grid(q: QParams, scaled: Array, moved: Array | None) -> tuple[Array, Array]:
    """Scale and what the point 0 stands for, in float64, after relative changes."""
    old = q.scale.astype(np.float64)
    scale = old * (1 + scaled)
    offset = -scale * q.zero_point.astype(np.float64)
    return scale, offset if moved is None else offset + old * moved


def _as(numbers: Array, old: Array) -> Array:
    """Numbers in the precision that the old ones are stored in."""
    return numbers.astype(half_if_exact(old).dtype).astype(old.dtype)


def _summed(slope: Array, q: QParams) -> Array:
    """The sums over all weights that share a scale, in the scales' shape."""
    if q.axis is None or q.scale.ndim == 0:
        return np.asarray(slope.sum())
    if q.scale.ndim == 1:
        axes = tuple(i for i in range(slope.ndim) if i != q.axis % slope.ndim)
        return np.asarray(slope.sum(axis=axes))
    counts = zip(q.scale.shape, slope.shape, strict=True)
    split = slope.reshape([d for n, size in counts for d in (n, size // n)])
    return np.asarray(split.sum(axis=tuple(range(1, 2 * slope.ndim, 2))))
