"""Weighted operators as matrix products: weights as (groups, rows, columns), inputs as sampled
columns.

Columns stand in the order in which integer kernels sum: spatial positions first, then the input
channels of the group, so that columns 2 i and 2 i + 1 are the pairs a kernel adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from calib.affine import Array


class View(Protocol):
    """A weighted operator as y = M x."""

    def matrix(self, weight: Array) -> Array:
        """(groups, rows, columns) of the operator's weight."""

    def weight(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""

    def columns(self, x: Array, count: int, zero: int, rng: np.random.Generator) -> Array:
        """(groups, count, columns): inputs of `count` outputs (or all, if fewer) drawn at random;
        padding is `zero`.
        """

    def means(self, values: Array) -> Array:
        """(groups, columns): the mean of each column over all outputs, float64; padding is 0."""

    @property
    def input_axis(self) -> int | None:
        """Axis of the input's channels, where every input value enters every output channel's sum
        once; else None.
        """


@dataclass(frozen=True)
class ConvView:
    """A convolution with weight `shape` (out, in / groups, *kernel).

    `pads` (*begins, *ends) count where `auto_pad` is NOTSET.
    """

    shape: tuple[int, ...]
    groups: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str

    def matrix(self, weight: Array) -> Array:
        """Rows are the output channels of a group."""
        return np.moveaxis(weight, 1, -1).reshape(self.groups, self.shape[0] // self.groups, -1)

    def weight(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        out, channels, *kernel = self.shape
        return np.moveaxis(matrix.reshape(out, *kernel, channels), -1, 1)

    def columns(self, x: Array, count: int, zero: int, rng: np.random.Generator) -> Array:
        """Drawn from x (batch, channels, *space)."""
        sizes, begins = zip(*map(self._axis, range(x.ndim - 2), x.shape[2:]), strict=True)
        outputs = (x.shape[0], *sizes)
        batch, *positions = np.unravel_index(_drawn(math.prod(outputs), count, rng), outputs)
        taps = np.indices(self.shape[2:]).reshape(len(sizes), -1)
        inside = np.ones((batch.size, taps.shape[1]), bool)
        index = []
        for axis, (position, size) in enumerate(zip(positions, x.shape[2:], strict=True)):
            at = (
                position[:, None] * self.strides[axis]
                + taps[axis] * self.dilations[axis]
                - begins[axis]
            )
            inside &= (at >= 0) & (at < size)
            index.append(np.clip(at, 0, size - 1))
        # Index arrays on both sides of the channel axis put (drawn, taps) first: the result is
        # (drawn, taps, channels).
        values = x[(batch[:, None], slice(None), *index)]
        values[~inside] = zero
        grouped = values.reshape(*inside.shape, self.groups, -1)
        return grouped.transpose(2, 0, 1, 3).reshape(self.groups, batch.size, -1)

    def means(self, values: Array) -> Array:
        """Of values (batch, channels, *space)."""
        sums, outputs = values.sum(axis=0), values.shape[0]
        # One axis of space after the other turns into one of the kernel, which goes to the front.
        for axis, size in enumerate(values.shape[2:]):
            count, begin = self._axis(axis, size)
            taps = range(self.shape[2 + axis])
            parts = [self._reached(axis, size, count, tap=tap, begin=begin) for tap in taps]
            sums = np.stack([sums[(slice(None),) * (axis + 1) + (p,)].sum(axis + 1) for p in parts])
            sums, outputs = np.moveaxis(sums, 0, axis), outputs * count
        means = np.moveaxis(sums, -1, 0).astype(np.float64) / outputs
        grouped = means.reshape(self.groups, -1, math.prod(self.shape[2:]))
        return np.asarray(grouped.swapaxes(1, 2).reshape(self.groups, -1))

    def _reached(self, axis: int, size: int, count: int, *, tap: int, begin: int) -> slice:
        """The positions along an axis of `size` that a kernel's `tap` meets within it."""
        stride, first = self.strides[axis], tap * self.dilations[axis] - begin
        skipped = max(0, -(first // stride))
        last = min(count - 1, (size - 1 - first) // stride)
        if last < skipped:
            return slice(0, 0)
        return slice(first + skipped * stride, first + last * stride + 1, stride)

    @property
    def input_axis(self) -> int | None:
        """1 for kernels of one position, without strides or padding."""
        pointwise = set(self.shape[2:]) | set(self.strides) <= {1} and not any(self.pads)
        return 1 if pointwise else None

    def _axis(self, axis: int, size: int) -> tuple[int, int]:
        """Output size and begin pad along a spatial axis of `size`."""
        extent = self.dilations[axis] * (self.shape[2 + axis] - 1) + 1
        stride = self.strides[axis]
        if self.auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
            out = -(-size // stride)
            total = max(0, (out - 1) * stride + extent - size)
            return out, total // 2 if self.auto_pad == "SAME_UPPER" else -(-total // 2)
        begin, end = (
            (0, 0)
            if self.auto_pad == "VALID"
            else (self.pads[axis], self.pads[axis + len(self.strides)])
        )
        return (size + begin + end - extent) // stride + 1, begin


@dataclass(frozen=True)
class ProductView:
    """A matrix product x W, or x W' where `transposed`."""

    transposed: bool

    def matrix(self, weight: Array) -> Array:
        """Rows are the output features."""
        return (weight if self.transposed else weight.T)[None]

    def weight(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        return (matrix if self.transposed else matrix.swapaxes(1, 2)).squeeze(0)

    def columns(self, x: Array, count: int, zero: int, rng: np.random.Generator) -> Array:
        """Rows drawn from x (…, features)."""
        flat = x.reshape(1, -1, x.shape[-1])
        return flat.take(_drawn(flat.shape[1], count, rng), axis=1)

    def means(self, values: Array) -> Array:
        """Of values (…, features)."""
        return np.asarray(values.reshape(-1, values.shape[-1]).mean(axis=0, dtype=np.float64)[None])

    @property
    def input_axis(self) -> int | None:
        """The last."""
        return -1


def _drawn(total: int, count: int, rng: np.random.Generator) -> Array:
    """At most `count` different numbers below `total`, in ascending order."""
    return np.sort(rng.choice(total, min(count, total), replace=False, shuffle=False))


def plain_matrix(weight: Array, axis: int | None) -> Array:
    """(1, channels of `axis`, rest) of any weight, or (1, 1, all) where `axis` is None."""
    return (
        weight.reshape(1, 1, -1)
        if axis is None
        else np.moveaxis(weight, axis, 0).reshape(1, weight.shape[axis], -1)
    )


def plain_weight(matrix: Array, shape: Sequence[int], axis: int | None) -> Array:
    """The inverse of plain_matrix for a weight of `shape`."""
    if axis is None:
        return matrix.reshape(shape)
    moved = [
        shape[axis],
        *(size for i, size in enumerate(shape) if i != axis % len(shape)),
    ]
    return np.moveaxis(matrix.reshape(moved), 0, axis)


def conv_view(node: ir.Node, shape: Sequence[int]) -> View:
    """A convolution with a weight of `shape`."""
    spatial = len(shape) - 2
    get = node.attributes.get_ints
    return ConvView(
        tuple(shape),
        node.attributes.get_int("group", 1),
        tuple(get("strides", (1,) * spatial)),
        tuple(get("dilations", (1,) * spatial)),
        tuple(get("pads", (0,) * 2 * spatial)),
        node.attributes.get_string("auto_pad", "NOTSET"),
    )


def product_view(node: ir.Node, shape: Sequence[int]) -> View | None:
    """A product with one matrix."""
    return ProductView(bool(node.attributes.get_int("transB", 0))) if len(shape) == 2 else None


def no_view(node: ir.Node, shape: Sequence[int]) -> None:
    """Of what is not known as a matrix product: its weights are rounded number by number."""


def breaks_bound(codes: Array, limit: int) -> Array:
    """Whether two codes of a row (..., columns) that kernels multiply and add in one go sum up to
    more than `limit`.
    """
    even, odd = (codes[..., start::2].astype(np.int32) for start in (0, 1))
    even = even[..., : odd.shape[-1]]
    broken: Array = ((even * odd > 0) & (np.abs(even + odd) > limit)).any(axis=-1)
    return broken
