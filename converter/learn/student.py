"""What is learned of a plan: the points that codes of weights stand for, their scales and zeros,
the biases, and the scales of activations.

Every learned number is a change in units of what it changes, 0 at first: a scale becomes
scale (1 + u), what the code 0 stands for moves by scale v, a bias by v times the root mean square
of its tensor. Points are rounded from real numbers that start on them, in units of codes; their
gradient takes rounding for the identity (the straight-through estimator, Bengio et al., arXiv
1308.3432). Where all zeros are integers, as DequantizeLinear and pruned weights want them, they
stay, and so do weights that are 0 on purpose and codes of few values, which a table stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calib import trellis
from calib.affine import Array, QParams, along, byte_zeros, dequantize, is_centered, rotated
from calib.workers import over_samples
from converter.emit.planes import half_if_exact
from converter.graph.edit import not_none
from converter.learn.restored import restored, scale_of
from converter.plan.plan import NodePlan, QuantizedWeight, QuantPlan
from converter.plan.units import bias_of, bias_place, planned
from converter.weights.gptq import kept_weights

Arrays = dict[str, Array]
Place = tuple[str, int]
# What is learned, by how a learned array is called.
SCALE, ZERO, POINT = "scale", "zero", "point"


@dataclass(frozen=True)
class _Weight:
    """One stored weight, the places in the plan that share it, and its points: float32 in the
    weight's shape.
    """

    places: tuple[Place, ...]
    stored: QuantizedWeight
    points: Array

    @property
    def grid(self) -> QParams:
        """Its scales and zeros."""
        return self.stored.qparams

    @property
    def zero_moves(self) -> bool:
        """Whether its zeros may be any number: neither integers nor in the middle of all levels."""
        zero = self.grid.zero_point
        return not (is_centered(self.grid) or np.array_equal(zero, np.rint(zero)))

    @property
    def points_move(self) -> bool:
        """Whether its codes are worth learning: not those of few values."""
        return len(np.unique(self.stored.codes)) > (1 << self.grid.format.bits) // 2

    @property
    def span(self) -> tuple[float, float]:
        """The least and the largest point."""
        fmt = self.grid.format
        if fmt.trellis:
            levels = trellis.levels(fmt.bits)
            return float(levels[0]), float(levels[-1])
        return fmt.qmin, fmt.qmax

    def along(self, numbers: Array) -> Array:
        """Numbers a scale, as they stand beside the weights."""
        return along(numbers, self.grid.axis, self.points.shape)

    def rounded(self, aims: Array, scale: Array) -> tuple[Array, Array]:
        """The codes nearest to `aims`, and their points."""
        fmt = self.grid.format
        if not fmt.trellis:
            codes = np.clip(np.rint(aims), fmt.qmin, fmt.qmax)
            return codes.astype(fmt.dtype), codes
        axis = not_none(self.grid.axis)
        last = np.moveaxis(aims, axis, -1)
        codes = trellis.nearest(last, np.square(scale), fmt.bits, fmt.trellis)
        points = trellis.points(codes, fmt.bits, fmt.trellis).astype(np.float32)
        return np.moveaxis(codes, -1, axis), np.moveaxis(points, -1, axis)

    def summed(self, slope: Array) -> Array:
        """The sums over all weights that share a scale, in the scales' shape: float64."""
        q = self.grid
        if q.axis is None or q.scale.ndim == 0:
            return np.asarray(slope.sum(dtype=np.float64))
        if q.scale.ndim == 1:
            axes = tuple(i for i in range(slope.ndim) if i != q.axis % slope.ndim)
            return np.asarray(slope.sum(axis=axes, dtype=np.float64))
        counts = zip(q.scale.shape, slope.shape, strict=True)
        split = slope.reshape([d for n, size in counts for d in (n, size // n)])
        inside = tuple(range(1, 2 * slope.ndim, 2))
        return np.asarray(split.sum(axis=inside, dtype=np.float64))


@dataclass(frozen=True)
class _Bias:
    unit: str
    value: Array

    @property
    def size(self) -> float:
        """The unit of its changes."""
        return float(np.sqrt(np.mean(np.square(self.value)))) or 1.0


@dataclass(frozen=True)
class Rounded:
    """A weight after rounding: its codes and points, and the scales and offsets (float64) of its
    grid; an offset is what the point 0 stands for.
    """

    codes: Array
    points: Array
    scale: Array
    offset: Array


@dataclass(frozen=True)
class Learnable:
    """What may be learned beside the grids and biases of weights: their `points`, and the scales of
    `ranges` of activations.
    """

    points: bool = True
    ranges: bool = False


STORED = Learnable()


class Student:
    """The stored weights, the biases and the ranges of a plan as what can be learned.

    `model` is the model, or a part of it, with them as plain constants, which `constants` names:
    those that gradients are wanted for.
    """

    def __init__(
        self, model: ir.Model, plan: QuantPlan, may: Learnable = STORED, *, threads: int = 1
    ) -> None:
        self.model, self.plan, self._threads = restored(model, plan), plan, threads
        self._weights, self._biases = dict[str, _Weight](), dict[str, _Bias]()
        for node, unit in planned(self.model, plan):
            self._add_weights(node, unit)
            self._add_bias(node, unit)
        self._ranges = self._groups() if may.ranges else {}
        self.constants = (*self._weights, *self._biases, *self._ranges)
        rounds = self._weights if may.points else {}
        self._rounds = {name: w for name, w in rounds.items() if w.points_move}
        self._zeros = {name: _meant_zeros(w) for name, w in self._rounds.items()}

    def _add_weights(self, node: ir.Node, unit: NodePlan) -> None:
        for weight in unit.weights:
            value, place = not_none(node.inputs[weight.index]), (unit.name, weight.index)
            name, stored = value.name or "", self.plan.stored[place]
            if value.graph is not self.model.graph:
                continue  # in a branch, through which no gradient goes
            places = self._weights[name].places if name in self._weights else ()
            self._weights[name] = _Weight((*places, place), stored, _points(stored))

    def _add_bias(self, node: ir.Node, unit: NodePlan) -> None:
        bias = bias_of(node, unit)
        if bias is None or bias.dtype != np.float32:
            return
        owner, index = bias_place(node, unit)
        value = not_none(owner.inputs[index])
        if value.graph is self.model.graph:
            self._biases[value.name or ""] = _Bias(
                unit.name,
                bias.astype(np.float64),
            )

    def _groups(self) -> dict[str, str]:
        """The groups of activations that are all inside, by the constant that is their scale."""
        inside = {value.name for value in (*self.model.graph.inputs, *_made(self.model.graph))}
        whole = {tensor.group for tensor in self.plan.tensors.values()} - {
            tensor.group for name, tensor in self.plan.tensors.items() if name not in inside
        }
        scales = {scale_of(group): group for group in sorted(whole)}
        return {name: g for name, g in scales.items() if name in self.model.graph.initializers}

    def start(self) -> Arrays:
        """All that is learned, as it is in the plan."""
        found: Arrays = {}
        for name, weight in self._weights.items():
            found[f"{name} {SCALE}"] = np.zeros(weight.grid.scale.shape)
            if weight.zero_moves:
                found[f"{name} {ZERO}"] = np.zeros(weight.grid.scale.shape)
        points = {f"{name} {POINT}": w.points.copy() for name, w in self._rounds.items()}
        biases = {name: np.zeros_like(bias.value) for name, bias in self._biases.items()}
        ranges = {name: np.zeros(()) for name in self._ranges}
        return {**found, **points, **biases, **ranges}

    def rounded(
        self, learned: Mapping[str, Array], last: Mapping[str, Rounded] | None = None
    ) -> dict[str, Rounded]:
        """What weights are after rounding; with the codes of the `last` one where it is given."""
        weights = list(self._weights.items())

        def one(index: int) -> Rounded:
            name, weight = weights[index]
            return self._rounded(name, weight, learned, (last or {}).get(name))

        found = over_samples(len(weights), one, self._threads, most=1)
        return {name: now for (name, _), now in zip(weights, found, strict=True)}

    def _rounded(
        self, name: str, weight: _Weight, learned: Mapping[str, Array], last: Rounded | None
    ) -> Rounded:
        old = weight.grid.scale.astype(np.float64)
        scale = old * (1 + learned[f"{name} {SCALE}"])
        offset = -scale * weight.grid.zero_point.astype(np.float64)
        if weight.zero_moves:
            offset = offset + old * learned[f"{name} {ZERO}"]
        if last is not None:
            return replace(last, scale=scale, offset=offset)
        if name not in self._rounds:
            return Rounded(weight.stored.codes, weight.points, scale, offset)
        codes, points = weight.rounded(learned[f"{name} {POINT}"], scale)
        if (zeros := self._zeros[name]) is not None:
            codes, points = (
                np.where(zeros, old, new)
                for old, new in ((weight.stored.codes, codes), (weight.points, points))
            )
        return Rounded(codes, points, scale, offset)

    def values(self, learned: Mapping[str, Array], rounded: Mapping[str, Rounded]) -> Arrays:
        """The constants: float32."""
        found = {}
        for name, weight in self._weights.items():
            now = rounded[name]
            scale, offset = (weight.along(x.astype(np.float32)) for x in (now.scale, now.offset))
            restored = rotated(now.points * scale + offset, weight.grid)
            found[name] = np.ascontiguousarray(restored, dtype=np.float32)
        for name, bias in self._biases.items():
            found[name] = (bias.value + bias.size * learned[name]).astype(np.float32)
        scales = {name: self._scale(name) * (1 + learned[name]) for name in self._ranges}
        return found | {name: np.asarray(scale, np.float32) for name, scale in scales.items()}

    def _scale(self, name: str) -> Array:
        return self.plan.qparams[self._ranges[name]].scale.astype(np.float64)

    def values_of(self, plan: QuantPlan) -> Arrays:
        """The constants (float32) as a plan stores them."""
        stored = {name: plan.stored[w.places[0]] for name, w in self._weights.items()}
        found = {name: dequantize(w.codes, w.qparams) for name, w in stored.items()}
        for name, bias in self._biases.items():
            value = plan.biases.get(bias.unit, bias.value)
            found[name] = value.reshape(bias.value.shape).astype(np.float32)
        return found | {name: plan.qparams[group].scale for name, group in self._ranges.items()}

    def slopes(self, constants: Mapping[str, Array], rounded: Mapping[str, Rounded]) -> Arrays:
        """The gradients of what is learned, from those of the constants."""
        found: Arrays = {}
        for name, weight in self._weights.items():
            now, old = rounded[name], weight.grid.scale.astype(np.float64)
            slope = rotated(constants[name], weight.grid)  # by the same matrix, as it is symmetric
            # What moves with the scale is the distance from the zero.
            zero = weight.along(weight.grid.zero_point.astype(np.float32))
            found[f"{name} {SCALE}"] = old * weight.summed(slope * (now.points - zero))
            if weight.zero_moves:
                found[f"{name} {ZERO}"] = old * weight.summed(slope)
            if name in self._rounds:
                found[f"{name} {POINT}"] = slope * weight.along(now.scale.astype(np.float32))
        for name, bias in self._biases.items():
            found[name] = bias.size * constants[name].astype(np.float64)
        return found | {
            name: np.asarray(self._scale(name) * constants[name]) for name in self._ranges
        }

    def bounded(self, learned: Mapping[str, Array]) -> None:
        """Brings what is rounded back to where the codes are, in place."""
        for name, weight in self._rounds.items():
            low, high = weight.span
            aims = learned[f"{name} {POINT}"]
            np.clip(aims, low, high, out=aims)

    def plan_with(self, learned: Mapping[str, Array]) -> QuantPlan:
        """The plan that stores what is learned, in as many bytes as before."""
        stored, biases = dict(self.plan.stored), dict(self.plan.biases)
        for name, now in self.rounded(learned).items():
            weight = self._weights[name]
            for place in weight.places:
                stored[place] = _stored(weight, now)
        for name, bias in self._biases.items():
            moved = bias.value + bias.size * learned[name]
            biases[bias.unit] = moved.reshape(-1).astype(np.float32)
        learned_plan = replace(self.plan, stored=stored, biases=biases)
        return learned_plan.with_qparams(self._qparams(learned))

    def _qparams(self, learned: Mapping[str, Array]) -> dict[str, QParams]:
        found = {}
        for name, group in self._ranges.items():
            scale = np.asarray(
                self._scale(name) * (1 + learned[name]),
                np.float32,
            )
            found[group] = replace(self.plan.qparams[group], scale=scale)
        return found


def _made(graph: ir.Graph) -> Iterator[ir.Value]:
    return (value for node in graph for value in node.outputs)


def _points(stored: QuantizedWeight) -> Array:
    """What codes stand for on a grid of scale 1 and zero 0, before any rotation."""
    q = stored.qparams
    plain = replace(
        q,
        scale=np.ones_like(q.scale),
        zero_point=np.zeros_like(q.zero_point),
        format=replace(q.format, rotated=False),
    )
    return dequantize(stored.codes, plain)


def _meant_zeros(weight: _Weight) -> Array | None:
    """Where a pruned weight is 0, None where it is not pruned."""
    kept = kept_weights(dequantize(weight.stored.codes, weight.grid))
    return None if kept is None else ~kept


def _stored(weight: _Weight, now: Rounded) -> QuantizedWeight:
    q = weight.grid
    scale = _as(now.scale, q.scale)
    zero = _zero(-now.offset / scale, q) if weight.zero_moves else q.zero_point
    codes = np.ascontiguousarray(now.codes)
    return QuantizedWeight(codes, replace(q, scale=scale, zero_point=zero))


def _zero(zero: Array, q: QParams) -> Array:
    """Zeros in as many bytes as those of `q`."""
    bits, old = q.format.bits, q.zero_point
    in_bytes = np.array_equal(byte_zeros(old, bits), old)
    return _as(byte_zeros(zero, bits) if in_bytes else zero, old)


def _as(numbers: Array, old: Array) -> Array:
    """Numbers in the precision that the old ones are stored in."""
    return numbers.astype(half_if_exact(old).dtype).astype(old.dtype)
