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

    def sides(self, weight: Array) -> tuple[int, ...]:
        """The sizes of the weight's axes that columns run along, in their order."""

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
        rows = self.shape[0] // self.groups
        return np.moveaxis(weight, 1, -1).reshape(
            self.groups,
            rows,
            -1,
        )

    def weight(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        out, channels, *kernel = self.shape
        return np.moveaxis(matrix.reshape(out, *kernel, channels), -1, 1)

    def sides(self, weight: Array) -> tuple[int, ...]:
        """Those of the kernel, then the input channels of a group."""
        return (*weight.shape[2:], weight.shape[1])

    def columns(self, x: Array, count: int, zero: int, rng: np.random.Generator) -> Array:
        """Drawn from x (batch, channels, *space)."""
        batches, _, *space = x.shape
        axes = range(len(space))
        sizes, begins = zip(*map(self._axis, axes, space), strict=True)
        outputs = (batches, *sizes)
        drawn = _drawn(math.prod(outputs), count, rng)
        batch, *positions = np.unravel_index(drawn, outputs)
        taps = np.indices(self.shape[2:]).reshape(
            len(sizes),
            -1,
        )
        inside = np.ones((batch.size, taps.shape[1]), bool)
        index = []
        for axis in axes:
            start = positions[axis][:, None] * self.strides[axis]
            at = start + taps[axis] * self.dilations[axis] - begins[axis]
            inside &= (at >= 0) & (at < space[axis])
            index.append(np.clip(at, 0, space[axis] - 1))
        # Index arrays on both sides of the channel axis put (drawn, taps) first: the result is
        # (drawn, taps, channels).
        values = x[(batch[:, None], slice(None), *index)]
        values[~inside] = zero
        grouped = values.reshape(*inside.shape, self.groups, -1)
        return grouped.transpose(2, 0, 1, 3).reshape(
            self.groups,
            batch.size,
            -1,
        )

    def means(self, values: Array) -> Array:
        """Of values (batch, channels, *space)."""
        sums = values.sum(axis=0)
        outputs = values.shape[0]
        # One axis of space after the other turns into one of the kernel, which goes to the front.
        for axis, size in enumerate(values.shape[2:]):
            count, begin = self._axis(axis, size)
            taps = range(self.shape[2 + axis])
            parts = [self._reached(axis, size, count, tap=tap, begin=begin) for tap in taps]
            before = (slice(None),) * (axis + 1)
            sums = np.stack([sums[(*before, part)].sum(axis + 1) for part in parts])
            sums = np.moveaxis(sums, 0, axis)
            outputs *= count
        means = np.moveaxis(sums, -1, 0).astype(np.float64) / outputs
        taps_of_all = math.prod(self.shape[2:])
        grouped = means.reshape(self.groups, -1, taps_of_all)
        grouped = grouped.swapaxes(1, 2)
        return np.asarray(grouped.reshape(self.groups, -1))

    def _reached(self, axis: int, size: int, count: int, *, tap: int, begin: int) -> slice:
        """The positions along an axis of `size` that a kernel's `tap` meets within it."""
        stride = self.strides[axis]
        first = tap * self.dilations[axis] - begin
        skipped = max(0, -(first // stride))
        last = min(count - 1, (size - 1 - first) // stride)
        if last < skipped:
            return slice(0, 0)
        start = first + skipped * stride
        end = first + last * stride + 1
        return slice(start, end, stride)

    @property
    def input_axis(self) -> int | None:
        """1 for kernels of one position, without strides or padding."""
        sizes = set(self.shape[2:]) | set(self.strides)
        pointwise = sizes <= {1} and not any(self.pads)
        return 1 if pointwise else None

    def _axis(self, axis: int, size: int) -> tuple[int, int]:
        """Output size and begin pad along a spatial axis of `size`."""
        taps = self.shape[2 + axis]
        extent = self.dilations[axis] * (taps - 1) + 1
        stride = self.strides[axis]
        if self.auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
            out = -(-size // stride)
            total = max(0, (out - 1) * stride + extent - size)
            upper = self.auto_pad == "SAME_UPPER"
            return out, total // 2 if upper else -(-total // 2)
        begin = end = 0
        if self.auto_pad != "VALID":
            begin = self.pads[axis]
            end = self.pads[axis + len(self.strides)]
        return (size + begin + end - extent) // stride + 1, begin


@dataclass(frozen=True)
class ProductView:
    """A matrix product x W, or x W' where `transposed`."""

    transposed: bool

    def matrix(self, weight: Array) -> Array:
        """Rows are the output features."""
        rows = weight if self.transposed else weight.T
        return rows[None]

    def weight(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        stored = matrix if self.transposed else matrix.swapaxes(1, 2)
        return stored.squeeze(0)

    def sides(self, weight: Array) -> tuple[int, ...]:
        """The input features."""
        return (weight.shape[1 if self.transposed else 0],)

    def columns(self, x: Array, count: int, zero: int, rng: np.random.Generator) -> Array:
        """Rows drawn from x (…, features)."""
        flat = x.reshape(1, -1, x.shape[-1])
        drawn = _drawn(flat.shape[1], count, rng)
        return flat.take(drawn, axis=1)

    def means(self, values: Array) -> Array:
        """Of values (…, features)."""
        rows = values.reshape(-1, values.shape[-1])
        means = rows.mean(axis=0, dtype=np.float64)
        return np.asarray(means[None])

    @property
    def input_axis(self) -> int | None:
        """The last."""
        return -1


def _drawn(total: int, count: int, rng: np.random.Generator) -> Array:
    """At most `count` different numbers below `total`, in ascending order."""
    return np.sort(rng.choice(total, min(count, total), replace=False, shuffle=False))


def plain_matrix(weight: Array, axis: int | None) -> Array:
    """(1, channels of `axis`, rest) of any weight, or (1, 1, all) where `axis` is None."""
    if axis is None:
        return weight.reshape(1, 1, -1)
    return np.moveaxis(weight, axis, 0).reshape(
        1,
        weight.shape[axis],
        -1,
    )


def plain_weight(matrix: Array, shape: Sequence[int], axis: int | None) -> Array:
    """The inverse of plain_matrix for a weight of `shape`."""
    if axis is None:
        return matrix.reshape(shape)
    others = list(shape)
    channels = others.pop(axis)
    return np.moveaxis(matrix.reshape(channels, *others), 0, axis)


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
    if len(shape) != 2:
        return None
    transposed = node.attributes.get_int("transB", 0)
    return ProductView(bool(transposed))


def no_view(node: ir.Node, shape: Sequence[int]) -> None:
    """Of what is not known as a matrix product: its weights are rounded number by number."""


def breaks_bound(codes: Array, limit: int) -> Array:
    """Whether two codes of a row (..., columns) that kernels multiply and add in one go sum up to
    more than `limit`.
    """
    even = codes[..., ::2].astype(np.int32)
    odd = codes[..., 1::2].astype(np.int32)
    even = even[..., : odd.shape[-1]]
    alike = even * odd > 0
    too_large = np.abs(even + odd) > limit
    broken: Array = (alike & too_large).any(axis=-1)
    return broken
