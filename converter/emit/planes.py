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
makes windows of them, whose levels a Gather looks up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

from calib import trellis
from calib.affine import Array, QParams, along
from converter.graph.edit import Names, add_constant, constant
from converter.plan.plan import QuantizedWeight

# Widths that integer types of ONNX hold as they are.
PLAIN_BITS = (8, 16)
# Bytes the file grows by, about, for the nodes of a mask and for those of a table.
MASK_OVERHEAD, TABLE_OVERHEAD = 2400, 300
# Bytes of a mask that count their positions from one stored number.
GROUP = 32


def to_planes(codes: Array, bits: int) -> Array:
    """The planes of unsigned `codes`: uint8 of shape (ceil(codes / 8), bits, 1)."""
    flat = codes.reshape(-1)
    planes = [np.packbits((flat >> p).astype(np.uint8) & 1, bitorder="little") for p in range(bits)]
    return np.stack(planes, axis=1)[..., None]


def half_if_exact(array: Array) -> Array:
    """`array` as float16 if that loses nothing."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array


class PlaneWriter:
    """Writes weights into the graphs of one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.names = model, Names(model)
        self._nodes, self._numbers = list[ir.Node](), count()
        # Codes that the model holds already serve here too: those of a table that a product
        # multiplies with.
        held = [
            v
            for v in model.graph.initializers.values()
            if v.dtype in {ir.DataType.INT8, ir.DataType.UINT8}
        ]
        self._stored = {_content(array): v for v in held if (array := constant(v)) is not None}

    def __call__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
        """The value of the weight `name` as floats, unpacked from its codes by nodes at the start
        of `graph`.
        """
        self._nodes = []
        restore = self._levels if weight.qparams.format.trellis else self._restored
        value = restore(name, weight.codes, weight.qparams)
        graph.insert_before(graph[0], self._nodes)
        value.name = self.names.fresh(f"{name}_restored")
        return value

    def _restored(self, name: str, codes: Array, q: QParams) -> ir.Value:
        mask = codes != along(q.zero_point, q.axis, codes.shape)
        thin = _mask_pays(mask, q.format.bits)
        value = self._floats(name, codes[mask] if thin else codes, q.format.bits)
        bits, positions = self._mask(name, mask) if thin else (None, None)
        value = value if positions is None else self._node("Gather", [value, positions])
        value = self._scaled(name, value, q, axis=q.axis, shape=codes.shape)
        return value if bits is None else self._node("Mul", [value, bits])

    def _levels(self, name: str, codes: Array, q: QParams) -> ir.Value:
        bits, axis, last = q.format.bits, q.axis or 0, codes.ndim - 1
        codes = np.moveaxis(codes, axis, -1)
        filled = np.pad(codes, [(0, 0)] * last + [(0, -codes.shape[-1] % trellis.GROUP)])
        value = self._cast(f"{name}_codes", to_planes(filled, bits))
        value = self._chain(value, _unpacking(bits, trellis.window_weights(bits)))
        value = self._node("Cast", [value], to=ir.DataType.INT32)
        table = self._cast(f"levels_{bits}", trellis.table(bits).astype(np.float16))
        value = self._node("Gather", [table, value])
        value = self._chain(value, [("Reshape", np.array(filled.shape))])
        if filled.shape != codes.shape:
            cut = ("Slice", np.array([0]), np.array(codes.shape[-1:]), np.array([last]))
            value = self._chain(value, [cut])
        value = self._scaled(name, value, q, axis=last, shape=codes.shape)
        order = [*range(axis), last, *range(axis, last)]
        return value if axis == last else self._node("Transpose", [value], perm=order)

    def _scaled(
        self,
        name: str,
        value: ir.Value,
        q: QParams,
        *,
        axis: int | None,
        shape: tuple[int, ...],
    ) -> ir.Value:
        for op_type, what, numbers in (
            ("Sub", "zero", q.zero_point),
            ("Mul", "scale", q.scale),
        ):
            operand = half_if_exact(along(numbers, axis, shape))
            value = self._node(op_type, [value, self._cast(f"{name}_{what}", operand)])
        return value

    def _floats(self, name: str, codes: Array, bits: int) -> ir.Value:
        """The codes in their shape as float32."""
        levels, indices = np.unique(codes, return_inverse=True)
        narrow = max(1, int(len(levels) - 1).bit_length())
        if codes.size * (bits - narrow) / 8 <= levels.nbytes + TABLE_OVERHEAD:
            return self._unpacked(name, codes, bits)
        indices = indices.reshape(codes.shape).astype(np.uint8 if narrow <= 8 else np.uint16)
        index = self._unpacked(name, indices, narrow)
        index = self._node("Cast", [index], to=ir.DataType.INT32)
        return self._node("Gather", [self._cast(f"{name}_table", levels), index])

    def _unpacked(self, name: str, codes: Array, bits: int) -> ir.Value:
        if bits in PLAIN_BITS:
            return self._cast(f"{name}_codes", codes)
        value = self._cast(f"{name}_codes", to_planes(codes, bits))
        return self._chain(value, (*_unpacking(bits), *_shaping(codes.size, 8, codes.shape)))

    def _mask(self, name: str, mask: Array) -> tuple[ir.Value, ir.Value]:
        """The mask as ones and zeros, and for every one which of the kept codes is its, both in the
        weight's shape.
        """
        padded = np.zeros(-(-mask.size // (8 * GROUP)) * 8 * GROUP, np.uint8)
        padded[: mask.size] = mask.reshape(-1)
        counted = padded.reshape(-1, GROUP * 8).sum(axis=1, dtype=np.int32)
        # Positions start at 0, so one less than the ones up to here; before the first one Gather
        # takes the last code.
        start = (np.cumsum(counted) - counted - 1).astype(np.int32).reshape(-1, 1, 1)
        bits = self._cast(f"{name}_mask", to_planes(padded, 1))
        bits = self._chain(bits, (*_unpacking(1), ("Reshape", np.array([-1, GROUP, 8]))))
        in_byte = self._chain(bits, [("MatMul", np.triu(np.ones((8, 8), np.float32)))])
        before = [
            ("MatMul", np.ones((8, 1), np.float32)),
            ("Reshape", np.array([-1, GROUP])),
        ]
        earlier = self._chain(bits, before)
        strict = np.triu(np.ones((GROUP, GROUP), np.float32), 1)
        earlier = self._chain(earlier, [("MatMul", strict), ("Reshape", np.array([-1, GROUP, 1]))])
        where = self._node("Add", [in_byte, earlier])
        where = self._node("Cast", [where], to=ir.DataType.INT32)
        shaping = tuple(_shaping(mask.size, 8 * GROUP, mask.shape))
        positions = self._chain(where, (("Add", start), *shaping))
        return self._chain(bits, shaping), positions

    def _chain(self, value: ir.Value, steps: Iterable[tuple[Any, ...]]) -> ir.Value:
        """Operators with their constant operands, one behind the other."""
        for op_type, *operands in steps:
            value = self._node(
                op_type, [value, *(self._store(f"{op_type}_by", x) for x in operands)]
            )
        return value

    def _cast(self, name: str, array: Array) -> ir.Value:
        """The constant `array` as float32, stored in its own type."""
        value = self._store(name, array)
        return (
            value
            if array.dtype == np.float32
            else self._node("Cast", [value], to=ir.DataType.FLOAT)
        )

    def _store(self, name: str, array: Array) -> ir.Value:
        """A constant of the main graph; equal ones, as in the branches of an If, are stored
        once.
        """
        key = _content(array)
        if key not in self._stored:
            self._stored[key] = add_constant(self.model.graph, self.names.fresh(name), array)
        return self._stored[key]

    def _node(self, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        # Short names: a file of few bits is small, and they stand in it three times.
        name = self.names.fresh(f"unpack{next(self._numbers)}")
        self._nodes.append(
            ir.node(op_type, inputs, attributes, name=name, outputs=[ir.Value(name=name)])
        )
        return self._nodes[-1].outputs[0]


def _mask_pays(mask: Array, bits: int) -> bool:
    """Whether a mask and the codes under it take fewer bytes than all codes."""
    kept = int(mask.sum())
    with_mask = mask.size * (1 + 4 / GROUP) / 8 + kept * bits / 8 + MASK_OVERHEAD
    return kept > 0 and with_mask < mask.size * bits / 8


def _content(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest()


def _unpacking(bits: int, before: Array | float = 0.0) -> Iterator[tuple[Any, ...]]:
    """Operators with their constant operands, from planes to codes, eight a row; plus `before`
    times lowest bits.
    """
    difference = np.eye(8) - 2 * np.eye(8, k=-1)
    yield "Mul", 0.5 ** np.arange(8, dtype=np.float32)
    yield ("Floor",)
    yield "Reshape", np.array([-1, 8 * bits])
    weights = np.kron(2.0 ** np.arange(bits)[:, None], difference)
    weights[:8] += difference @ (before * np.ones((8, 8)))
    yield "MatMul", weights.astype(np.float32)


def _shaping(size: int, multiple: int, shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Operators that bring `size` numbers, padded to a multiple, into `shape`."""
    if size % multiple:
        yield "Reshape", np.array([-1])
        yield "Slice", np.array([0]), np.array([size])
    yield "Reshape", np.array(shape)
