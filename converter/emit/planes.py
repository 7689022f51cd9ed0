"""Weights of any width in standard ONNX: exactly `bits` bits each on disk, floats as soon as a
runtime has loaded them.

Bit p of eight consecutive codes makes a byte of plane p. Runtimes fold what follows when they load
the model, as it depends on constants only, so that the operator runs on a plain float weight:

    planes (bytes, bits, 1) uint8 -> Cast -> Mul(2^-k) -> Floor -> MatMul -> Reshape -> Sub(zero) ->
    Mul(scale)

With F_k = floor(byte / 2^k), bit k is F_k - 2 F_{k+1}; the MatMul takes this difference and sums
the planes, times 2^p, in one go. All its partial sums are integers below 2^24, exact in float32.
BitShift and Mod on uint8, the obvious way, are wrong in OpenVINO. Codes of 8 and 16 bits are stored
as they are.

Where it makes the file smaller, codes are thinned out first. A weight of many zeros is a mask of
one bit a weight and the other codes alone, put back by a Gather; codes of few distinct values are
indices into a table. Both fold as well. Codes of a trellis stand with the channels last; the MatMul
makes windows of them, of a long memory with the byte before, whose levels a Gather looks up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

from calib import trellis
from calib.affine import Array, QParams, along, byte_zeros, is_centered, zero_bytes, zero_step
from calib.rotation import rotation
from converter.graph.edit import Names, add_constant, constant
from converter.plan.plan import QuantizedWeight

# Widths that integer types of ONNX hold as they are.
PLAIN_BITS = (8, 16)
# Bytes the file grows by, about, for the nodes of a mask and for those of a table.
MASK_OVERHEAD = 2400
TABLE_OVERHEAD = 300
# Numbers of an operand from which float16 takes fewer bytes, although several weights have it.
LEAST_HALVED = 256
# Bytes of a mask that count their positions from one stored number.
GROUP = 32
# Types that codes of a byte are stored in.
BYTES = (ir.DataType.INT8, ir.DataType.UINT8)

# An operator and its constant operands.
Step = tuple[Any, ...]
# What tells two constants apart: type, shape and a digest of the numbers.
Content = tuple[str, tuple[int, ...], bytes]


def to_planes(codes: Array, bits: int) -> Array:
    """The planes of unsigned `codes`: uint8 of shape (ceil(codes / 8), bits, 1)."""
    flat = codes.reshape(-1)
    planes = []
    for p in range(bits):
        bit = (flat >> p).astype(np.uint8) & 1
        planes.append(np.packbits(bit, bitorder="little"))
    return np.stack(planes, axis=1)[..., None]


def half_if_exact(array: Array) -> Array:
    """`array` as float16 if that loses nothing."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array


class PlaneWriter:
    """Writes weights into the graphs of one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.names = Names(model)
        self._graph = model.graph
        # What stood first in a graph, behind all that is written, and constants as floats.
        self._firsts: dict[ir.Graph, ir.Node] = {}
        self._cast_in: dict[tuple[ir.Graph, ir.Value], ir.Value] = {}
        self._numbers = count()
        self._stored: dict[Content, ir.Value] = {}
        # Codes that the model holds already serve here too: those of a table that a product
        # multiplies with.
        held = [value for value in model.graph.initializers.values() if value.dtype in BYTES]
        for value in held:
            array = constant(value)
            if array is not None:
                self._stored[_content(array)] = value

    def __call__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
        """The value of the weight `name` as floats, unpacked from its codes by nodes at the start
        of `graph`.
        """
        self._graph = graph
        self._firsts.setdefault(graph, graph[0])
        restore = self._levels if weight.qparams.format.trellis else self._restored
        return restore(name, weight.codes, weight.qparams)

    def _restored(self, name: str, codes: Array, q: QParams) -> ir.Value:
        shape = codes.shape
        mask = codes != along(q.zero_point, q.axis, shape)
        if not _mask_pays(mask, q.format.bits):
            value = self._floats(name, codes, q.format.bits)
            return self._scaled(value, q, axis=q.axis, shape=shape)
        value = self._floats(name, codes[mask], q.format.bits)
        bits, positions = self._mask(mask)
        value = self._node("Gather", [value, positions])
        value = self._scaled(value, q, axis=q.axis, shape=shape)
        return self._node("Mul", [value, bits])

    def _levels(self, name: str, codes: Array, q: QParams) -> ir.Value:
        bits = q.format.bits
        axis = q.axis or 0
        last = codes.ndim - 1
        memory = q.format.trellis
        codes = np.moveaxis(codes, axis, -1)
        channels = codes.shape[-1]
        missing = -channels % trellis.GROUP
        filled = np.pad(
            codes,
            [(0, 0)] * last + [(0, missing)],
        )
        planes = to_planes(filled, bits)
        if memory == trellis.LONG:
            value = self._with_bytes_before(name, planes, filled.shape[-1] // 8)
        else:
            value = self._cast(f"{name}_codes", planes)
        value = self._chain(value, _unpacking(_windows(bits, memory)))
        value = self._node("Cast", [value], to=ir.DataType.INT32)
        levels, centered = trellis.table(bits, memory), is_centered(q)
        assert centered or not q.format.rotated, "zeros would have to be taken off before"
        if centered:
            levels = levels - trellis.middle(bits)
        table = self._cast(f"levels_{bits}", levels.astype(np.float16))
        value = self._node("Gather", [table, value])
        if q.format.rotated:
            value = self._rotated(value, codes.shape[:-1])
        value = self._chain(value, [("Reshape", np.array(filled.shape))])
        if missing:
            begin = np.array([0])
            end = np.array([channels])
            along_last = np.array([last])
            value = self._chain(value, [("Slice", begin, end, along_last)])
        if centered:
            value = self._times(value, along(q.scale, last, codes.shape))
        else:
            value = self._scaled(value, q, axis=last, shape=codes.shape)
        if axis == last:
            return value
        order = [*range(axis), last, *range(axis, last)]
        return self._node("Transpose", [value], perm=order)

    def _with_bytes_before(self, name: str, planes: Array, ring: int) -> ir.Value:
        """Behind the planes of every byte those of the byte before it in its ring."""
        bits = planes.shape[1]
        value = self._cast(f"{name}_codes", planes.reshape(-1, ring, bits))
        before = self._store("before", np.roll(np.arange(ring, dtype=np.int32), 1))
        others = self._node("Gather", [value, before], axis=1)
        both = self._node("Concat", [value, others], axis=2)
        return self._chain(both, [("Reshape", np.array([-1, 2 * bits, 1]))])

    def _rotated(self, value: ir.Value, sides: tuple[int, ...]) -> ir.Value:
        """What a rotation of all axes but the last makes of it."""
        for before, matrix in rotation(sides).steps:
            value = self._chain(value, [("Reshape", np.array([before, len(matrix), -1]))])
            mixing = self._cast("rotation", matrix.astype(np.float16))
            value = self._node("MatMul", [mixing, value])
        return value

    def _scaled(
        self,
        value: ir.Value,
        q: QParams,
        *,
        axis: int | None,
        shape: tuple[int, ...],
    ) -> ir.Value:
        zero = self._zero(along(q.zero_point, axis, shape), q.format.bits)
        return self._times(self._node("Sub", [value, zero]), along(q.scale, axis, shape))

    def _times(self, value: ir.Value, scale: Array) -> ir.Value:
        return self._node("Mul", [value, self._cast("scale", half_if_exact(scale))])

    def _zero(self, zero: Array, bits: int) -> ir.Value:
        stored = zero_bytes(zero, bits)
        if stored is None or (byte_zeros(zero, bits) != zero).any():
            return self._cast("zero", half_if_exact(zero))
        return self._chain(self._cast("zero", stored), [("Mul", np.float32(zero_step(bits)))])

    def _floats(self, name: str, codes: Array, bits: int) -> ir.Value:
        """The codes in their shape as float32."""
        levels, indices = np.unique(codes, return_inverse=True)
        narrow = max(1, int(len(levels) - 1).bit_length())
        saved = codes.size * (bits - narrow) / 8
        if saved <= levels.nbytes + TABLE_OVERHEAD:
            return self._unpacked(name, codes, bits)
        dtype = np.uint8 if narrow <= 8 else np.uint16
        indices = indices.reshape(codes.shape).astype(dtype)
        index = self._unpacked(name, indices, narrow)
        index = self._node("Cast", [index], to=ir.DataType.INT32)
        table = self._cast("table", levels)
        return self._node("Gather", [table, index])

    def _unpacked(self, name: str, codes: Array, bits: int) -> ir.Value:
        if bits in PLAIN_BITS:
            return self._cast(f"{name}_codes", codes)
        value = self._cast(f"{name}_codes", to_planes(codes, bits))
        value = self._chain(value, _unpacking(_sums(bits)))
        return self._chain(value, _shaping(codes.size, 8, codes.shape))

    def _mask(self, mask: Array) -> tuple[ir.Value, ir.Value]:
        """The mask as ones and zeros, and for every one which of the kept codes is its, both in the
        weight's shape.
        """
        group = 8 * GROUP
        padded = np.zeros(-(-mask.size // group) * group, np.uint8)
        padded[: mask.size] = mask.reshape(-1)
        counted = padded.reshape(-1, group).sum(
            axis=1,
            dtype=np.int32,
        )
        # Positions start at 0, so one less than the ones up to here; before the first one Gather
        # takes the last code.
        start = np.cumsum(counted) - counted - 1
        start = start.astype(np.int32).reshape(-1, 1, 1)
        bits = self._cast("mask", to_planes(padded, 1))
        bits = self._chain(bits, _unpacking(_sums(1)))
        bits = self._chain(
            bits,
            [("Reshape", np.array([-1, GROUP, 8]))],
        )
        where = self._node("Add", [*self._ones_before(bits)])
        where = self._node("Cast", [where], to=ir.DataType.INT32)
        shaping = tuple(_shaping(mask.size, group, mask.shape))
        positions = self._chain(where, [("Add", start), *shaping])
        return self._chain(bits, shaping), positions

    def _ones_before(self, bits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Of `bits` (groups, GROUP, 8): the ones of the byte up to each, and those of the bytes
        before it in the group.
        """
        up_to = np.triu(np.ones((8, 8), np.float32))
        in_byte = self._chain(bits, [("MatMul", up_to)])
        each = np.ones((8, 1), np.float32)
        before = np.triu(np.ones((GROUP, GROUP), np.float32), 1)
        steps = [
            ("MatMul", each),
            ("Reshape", np.array([-1, GROUP])),
            ("MatMul", before),
            ("Reshape", np.array([-1, GROUP, 1])),
        ]
        return in_byte, self._chain(bits, steps)

    def _chain(self, value: ir.Value, steps: Iterable[Step]) -> ir.Value:
        """Operators with their constant operands, one behind the other."""
        for op_type, *operands in steps:
            constants = [self._operand(x) for x in operands]
            value = self._node(op_type, [value, *constants])
        return value

    def _operand(self, array: Array) -> ir.Value:
        """A constant operand, in half the bytes where these are more than a Cast takes."""
        if array.dtype == np.float32 and array.size >= LEAST_HALVED:
            return self._cast("c", half_if_exact(array))
        return self._store("c", array)

    def _cast(self, name: str, array: Array) -> ir.Value:
        """The constant `array` as float32, stored in its own type."""
        value = self._store(name, array)
        if array.dtype == np.float32:
            return value
        place = self._graph, value
        if place not in self._cast_in:
            self._cast_in[place] = self._node("Cast", [value], to=ir.DataType.FLOAT)
        return self._cast_in[place]

    def _store(self, name: str, array: Array) -> ir.Value:
        """A constant of the main graph; equal ones, as in the branches of an If, are stored
        once.
        """
        key = _content(array)
        if key not in self._stored:
            name = self.names.fresh(name)
            self._stored[key] = add_constant(self.model.graph, name, array)
        return self._stored[key]

    def _node(self, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        # Short names of values, as of constants but codes, and none of nodes: a file of few bits is
        # small, and they stand in it again and again.
        output = ir.Value(name=self.names.fresh(f"u{next(self._numbers)}"))
        node = ir.node(op_type, inputs, attributes, name="", outputs=[output])
        self._graph.insert_before(self._firsts[self._graph], node)
        return output


def _mask_pays(mask: Array, bits: int) -> bool:
    """Whether a mask and the codes under it take fewer bytes than all codes."""
    kept = int(mask.sum())
    ones = mask.size * (1 + 4 / GROUP) / 8
    with_mask = ones + kept * bits / 8 + MASK_OVERHEAD
    return kept > 0 and with_mask < mask.size * bits / 8


def _content(array: Array) -> Content:
    digest = hashlib.sha256(array.tobytes()).digest()
    return array.dtype.str, array.shape, digest


def _unpacking(weights: Array) -> Iterator[Step]:
    """Operators with their constant operands from planes to eight sums a row, where bit i of plane
    p counts `weights[p, i]` (planes, 8, 8).
    """
    difference = np.eye(8) - 2 * np.eye(8, k=-1)
    yield "Mul", 0.5 ** np.arange(8, dtype=np.float32)
    yield ("Floor",)
    yield "Reshape", np.array([-1, 8 * len(weights)])
    yield "MatMul", (difference @ weights).reshape(-1, 8).astype(np.float32)


def _sums(bits: int) -> Array:
    """What makes codes of their planes."""
    return 2.0 ** np.arange(bits)[:, None, None] * np.eye(8)


def _windows(bits: int, memory: int) -> Array:
    """What makes windows of the planes of a byte and, with a long memory, of the byte before it."""
    weights = np.concatenate([_sums(bits), np.zeros((bits, 8, 8))])
    for i in range(1, memory + 1):
        weights[0] += 2.0 ** (bits + i - 1) * np.eye(8, k=i)
        weights[bits] += 2.0 ** (bits + i - 1) * np.eye(8, k=i - 8)
    if memory == trellis.SHORT:
        # The byte is its own ring.
        weights[0] += weights[bits]
        return weights[:bits]
    return weights


def _shaping(size: int, multiple: int, shape: tuple[int, ...]) -> Iterator[Step]:
    """Operators that bring `size` numbers, padded to a multiple, into `shape`."""
    if size % multiple:
        yield "Reshape", np.array([-1])
        yield "Slice", np.array([0]), np.array([size])
    yield "Reshape", np.array(shape)
