"""Arithmetic that writes itself into a graph as ONNX nodes; all shapes are known while it is
written.

Only operators and attributes are written that have not changed since opset 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import Names, not_none, values_by_name

Shape = tuple[int, ...]


class NoGradientError(Exception):
    """Says why a gradient ends at a node; never leaves this package."""


def shape_of(value: ir.Value) -> Shape:
    """The static shape of a value; raises NoGradientError where it is not known."""
    dims = tuple(value.shape or ())
    if value.shape is None or not all(isinstance(d, int) for d in dims):
        msg = f"the shape of '{value.name}' is not known"
        raise NoGradientError(msg)
    return tuple(int(d) for d in dims if isinstance(d, int))


def normal_axes(axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Axes counted from the front, ascending."""
    return tuple(sorted(axis % rank for axis in axes))


class Scribe:
    """Appends nodes to the main graph of a model; a node equal to one before is not written
    again.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._names, self._written = Names(model), dict[tuple[Any, ...], Term]()
        self._values, self._fed = values_by_name(model.graph), dict[str, Term]()

    def read(self, value: ir.Value) -> Term:
        """The term of a value of the graph; raises NoGradientError where its shape is not known."""
        return Term(value, self, shape_of(value))

    def of(self, name: str) -> Term:
        """The term of a tensor that the model had before."""
        return self.read(self._values[name])

    def constant(self, array: Array) -> Term:
        """A constant; equal ones are stored once."""
        value = self._names.constant("learn", array)
        return Term(value, self, array.shape)

    def ints(self, numbers: Iterable[int]) -> Term:
        """A constant list of integers."""
        return self.constant(np.array(list(numbers), np.int64))

    def op(
        self,
        op_type: str,
        inputs: Sequence[Term | None],
        shape: Shape,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> Term:
        """The one output of a node, of the type `dtype`, by default that of the first input."""
        values = [term.value if term else None for term in inputs]
        key = (op_type, *map(id, values), repr(sorted(attributes.items())))
        if key not in self._written:
            kind = ir.TensorType(dtype or not_none(inputs[0]).dtype)
            name = self._names.fresh(f"learn_{op_type}_{len(self._written)}")
            out = ir.Value(name=name, shape=ir.Shape(shape), type=kind)
            self.model.graph.append(ir.node(op_type, values, attributes, name=name, outputs=[out]))
            self._written[key] = Term(out, self, shape)
        return self._written[key]

    def named(self, term: Term, wish: str) -> ir.Value:
        """A value of its own, named `wish` where that is free, that equals a term."""
        name = self._names.fresh(wish)
        kind = ir.TensorType(term.dtype)
        out = ir.Value(
            name=name,
            shape=ir.Shape(term.shape),
            type=kind,
        )
        self.model.graph.append(ir.node("Identity", [term.value], name=name, outputs=[out]))
        return out

    def fed(self, wish: str, shape: Shape, dtype: ir.DataType) -> Term:
        """An input of the graph; one of each wish."""
        if wish not in self._fed:
            kind = ir.TensorType(dtype)
            value = ir.Value(
                name=self._names.fresh(wish),
                shape=ir.Shape(shape),
                type=kind,
            )
            self.model.graph.inputs.append(value)
            self._fed[wish] = Term(value, self, shape)
        return self._fed[wish]

    def concat(self, terms: Sequence[Term], axis: int) -> Term:
        """Terms one behind the other."""
        if len(terms) == 1:
            return terms[0]
        shape = list(terms[0].shape)
        axis %= len(shape)
        shape[axis] = sum(term.shape[axis] for term in terms)
        return self.op("Concat", terms, tuple(shape), axis=axis)


@dataclass(frozen=True, eq=False)
class Term:
    """A tensor of a graph under construction."""

    value: ir.Value
    scribe: Scribe = field(repr=False)
    shape: Shape

    @property
    def dtype(self) -> ir.DataType:
        """The type of its numbers; what exporters leave out is float."""
        return self.value.dtype or ir.DataType.FLOAT

    @property
    def rank(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of its numbers."""
        return math.prod(self.shape)

    def like(self, number: float | Array) -> Term:
        """A constant of the same type."""
        return self.scribe.constant(np.asarray(number, self.dtype.numpy()))

    def op(self, op_type: str, *others: Term, **attributes: Any) -> Term:
        """An operator that keeps shape and type."""
        return self.scribe.op(op_type, [self, *others], self.shape, **attributes)

    def _with(self, op_type: str, other: Term | float, swap: bool = False) -> Term:
        other = self._operand(other)
        shape = np.broadcast_shapes(self.shape, other.shape)
        operands = [other, self] if swap else [self, other]
        return self.scribe.op(op_type, operands, shape)

    def _operand(self, other: Term | float) -> Term:
        if not isinstance(other, Term):
            return self.like(other)
        return other.cast(self.dtype) if other.dtype == ir.DataType.BOOL else other

    def __add__(self, other: Term | float) -> Term:
        return self._with("Add", other)

    def __radd__(self, other: float) -> Term:
        return self._with("Add", other)

    def __sub__(self, other: Term | float) -> Term:
        return self._with("Sub", other)

    def __rsub__(self, other: float) -> Term:
        return self._with("Sub", other, swap=True)

    def __mul__(self, other: Term | float) -> Term:
        return self._with("Mul", other)

    def __rmul__(self, other: float) -> Term:
        return self._with("Mul", other)

    def __truediv__(self, other: Term | float) -> Term:
        return self._with("Div", other)

    def __rtruediv__(self, other: float) -> Term:
        return self._with("Div", other, swap=True)

    def power(self, exponent: Term) -> Term:
        """This to the power of another."""
        return self._with("Pow", exponent)

    def __neg__(self) -> Term:
        return self.op("Neg")

    def _compared(self, op_type: str, other: Term | float) -> Term:
        other = self._operand(other)
        shape = np.broadcast_shapes(self.shape, other.shape)
        return self.scribe.op(op_type, [self, other], shape, ir.DataType.BOOL)

    def __gt__(self, other: Term | float) -> Term:
        return self._compared("Greater", other)

    def __lt__(self, other: Term | float) -> Term:
        return self._compared("Less", other)

    def equals(self, other: Term | float) -> Term:
        """Truth values; they count as 1 and 0 in products."""
        return self._compared("Equal", other)

    def __and__(self, other: Term) -> Term:
        shape = np.broadcast_shapes(self.shape, other.shape)
        return self.scribe.op("And", [self, other], shape)

    def chosen(self, yes: Term, no: Term) -> Term:
        """`yes` where these truth values hold, else `no`."""
        shape = np.broadcast_shapes(self.shape, np.broadcast_shapes(yes.shape, no.shape))
        return self.scribe.op("Where", [self, yes, no], shape, yes.dtype)

    def cast(self, dtype: ir.DataType) -> Term:
        """The same numbers in another type."""
        if dtype == self.dtype:
            return self
        return self.scribe.op("Cast", [self], self.shape, dtype, to=dtype)

    def matmul(self, other: Term) -> Term:
        """Products of matrices, at least two axes each."""
        batch = np.broadcast_shapes(
            self.shape[:-2],
            other.shape[:-2],
        )
        shape = (*batch, self.shape[-2], other.shape[-1])
        return self.scribe.op("MatMul", [self, other], shape)

    def reshape(self, *shape: int) -> Term:
        """The same numbers in another shape; one size may be -1."""
        if -1 in shape:
            rest = math.prod(d for d in shape if d != -1)
            shape = tuple(self.size // rest if d == -1 else d for d in shape)
        if shape == self.shape:
            return self
        return self.scribe.op(
            "Reshape",
            [self, self.scribe.ints(shape)],
            shape,
        )

    def transpose(self, *order: int) -> Term:
        """The axes in another order."""
        if order == tuple(range(self.rank)):
            return self
        shape = tuple(self.shape[axis] for axis in order)
        return self.scribe.op("Transpose", [self], shape, perm=list(order))

    def swapped(self) -> Term:
        """The last two axes swapped."""
        return self.transpose(
            *range(self.rank - 2),
            self.rank - 1,
            self.rank - 2,
        )

    def sum(self, axes: Iterable[int], keep: bool = False) -> Term:
        """The sum over axes."""
        axes = normal_axes(axes, self.rank)
        kept = tuple(1 if i in axes else d for i, d in enumerate(self.shape))
        shape = kept if keep else tuple(d for i, d in enumerate(self.shape) if i not in axes)
        if kept == self.shape:
            return self.reshape(*shape)
        return self.scribe.op(
            "ReduceSum", [self, self.scribe.ints(axes)], shape, keepdims=int(keep)
        )

    def mean(self, axes: Iterable[int]) -> Term:
        """The mean over axes, which stay as 1."""
        total = self.sum(axes, keep=True)
        return total * (total.size / self.size)

    def sum_to(self, shape: Shape) -> Term:
        """Summed over the axes along which `shape` was broadcast to this one."""
        wide = (1,) * (self.rank - len(shape)) + shape
        axes = [i for i, d in enumerate(wide) if d == 1 and self.shape[i] != 1]
        return (self.sum(axes, keep=True) if axes else self).reshape(*shape)

    def expand(self, *shape: int) -> Term:
        """Repeated along axes of size 1."""
        if shape == self.shape:
            return self
        return self.scribe.op(
            "Expand",
            [self, self.scribe.ints(shape)],
            shape,
        )

    def slice(self, ranges: dict[int, tuple[int, int, int]]) -> Term:
        """Along each axis named: `count` numbers from `start` on, `step` apart: (start, count,
        step).
        """
        shape = list(self.shape)
        for axis, (_, count, _) in ranges.items():
            shape[axis] = count
        starts = [start for start, _, _ in ranges.values()]
        ends = [_end(*part) for part in ranges.values()]
        steps = [step for _, _, step in ranges.values()]
        numbers = [self.scribe.ints(x) for x in (starts, ends, list(ranges), steps)]
        return self.scribe.op("Slice", [self, *numbers], tuple(shape))

    def pad(self, before: Sequence[int], after: Sequence[int]) -> Term:
        """With zeros around; negative numbers cut off."""
        if not any(before) and not any(after):
            return self
        shape = tuple(b + d + a for b, d, a in zip(before, self.shape, after, strict=True))
        return self.scribe.op(
            "Pad",
            [self, self.scribe.ints([*before, *after])],
            shape,
        )

    def along(self, axis: int, matrix: Array) -> Term:
        """Every line along an axis multiplied by a constant matrix from the left."""
        axis %= self.rank
        order = [i for i in range(self.rank) if i != axis] + [axis]
        last = self.transpose(*order).matmul(self.like(np.ascontiguousarray(matrix.T)))
        return last.transpose(*(order.index(i) for i in range(self.rank)))


def _end(start: int, count: int, step: int) -> int:
    end = start + (count - 1) * step + (1 if step > 0 else -1)
    # Before the first one is not -1, which would count from the end.
    return end if end >= 0 else -(2**31)
