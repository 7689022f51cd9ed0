"""Weights of any width in standard ONNX: exactly `bits` bits each on disk, floats as soon as a runtime has loaded them.

Bit p of eight consecutive codes makes a byte of plane p. Runtimes fold what follows when they load the model, as it
depends on constants only, so that the operator runs on a plain float weight:

    planes (bytes, bits, 1) uint8 -> Cast -> Mul(2^-k) -> Floor -> MatMul -> Reshape -> Sub(zero) -> Mul(scale)

With F_k = floor(byte / 2^k), bit k is F_k - 2 F_{k+1}; the MatMul takes this difference and sums the planes, times 2^p,
in one go. All its partial sums are integers below 2^24, exact in float32. BitShift and Mod on uint8, the obvious way,
are wrong in OpenVINO. Codes of 8 and 16 bits are stored as they are.

Where it makes the file smaller, codes are thinned out first. A weight of many zeros is a mask of one bit a weight and
the other codes alone, put back by a Gather; codes of few distinct values are indices into a table. Both fold as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from calib.affine import Array, along
from converter.model import Names, add_constant
from converter.plan import QuantizedWeight

# Widths that integer types of ONNX hold as they are.
PLAIN_BITS = (8, 16)
# Codes of up to this many bits are worth scales and zeros of float16.
HALF_BITS = 8
# Bytes the file grows by for the nodes of one weight, about, and for those of a mask and of a table.
OVERHEAD, MASK_OVERHEAD, TABLE_OVERHEAD = 900, 2400, 300
# Bytes of a mask that count their positions from one stored number.
GROUP = 32


def to_planes(codes: Array, bits: int) -> Array:
    """The planes of unsigned `codes`: uint8 of shape (ceil(codes / 8), bits, 1)."""
    flat = codes.reshape(-1)
    planes = [np.packbits((flat >> p).astype(np.uint8) & 1, bitorder="little") for p in range(bits)]
    return np.stack(planes, axis=1)[..., None]


def stored_bytes(size: int, channels: int, bits: int) -> int:
    """Bytes that `size` weights with a scale and a zero point for each of `channels` take in the file."""
    return -(-size * bits // 8) + channels * (4 if bits <= HALF_BITS else 8) + OVERHEAD


def half_if_exact(array: Array) -> Array:
    """`array` as float16 if that loses nothing."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array


class PlaneWriter:
    """Writes weights into the graphs of one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.names = model, Names(model)
        self._stored: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
        """The value of the weight `name` as floats, unpacked from its codes by nodes at the start of `graph`."""
        codes, q, nodes = weight.codes, weight.qparams, list[ir.Node]()
        mask = codes != along(q.zero_point, q.axis, codes.shape)
        thin = _mask_pays(mask, q.format.bits)
        value = self._floats(name, codes[mask] if thin else codes, q.format.bits, nodes)
        bits, positions = self._mask(name, mask, nodes) if thin else (None, None)
        value = value if positions is None else self._node("Gather", [value, positions], name, nodes)
        for op_type, what, numbers in (("Sub", "zero", q.zero_point), ("Mul", "scale", q.scale)):
            operand = half_if_exact(along(numbers, q.axis, codes.shape))
            value = self._node(op_type, [value, self._cast(f"{name}_{what}", operand, nodes)], name, nodes)
        value = value if bits is None else self._node("Mul", [value, bits], name, nodes)
        graph.insert_before(graph[0], nodes)
        return value

    def _floats(self, name: str, codes: Array, bits: int, nodes: list[ir.Node]) -> ir.Value:
        """The codes in their shape as float32."""
        levels, indices = np.unique(codes, return_inverse=True)
        narrow = max(1, int(len(levels) - 1).bit_length())
        if codes.size * (bits - narrow) / 8 <= levels.nbytes + TABLE_OVERHEAD:
            return self._unpacked(name, codes, bits, nodes)
        indices = indices.reshape(codes.shape).astype(np.uint8 if narrow <= 8 else np.uint16)
        found = self._unpacked(name, indices, narrow, nodes)
        found = self._node("Cast", [found], name, nodes, ir.DataType.INT32)
        return self._node("Gather", [self._cast(f"{name}_table", levels, nodes), found], name, nodes)

    def _unpacked(self, name: str, codes: Array, bits: int, nodes: list[ir.Node]) -> ir.Value:
        if bits in PLAIN_BITS:
            return self._cast(f"{name}_codes", codes, nodes)
        value = self._cast(f"{name}_codes", to_planes(codes, bits), nodes)
        return self._chain(name, value, (*_unpacking(bits), *_shaping(codes.size, 8, codes.shape)), nodes)

    def _mask(self, name: str, mask: Array, nodes: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
        """The mask as ones and zeros, and for every one which of the kept codes is its, both in the weight's shape."""
        padded = np.zeros(-(-mask.size // (8 * GROUP)) * 8 * GROUP, np.uint8)
        padded[: mask.size] = mask.reshape(-1)
        counted = padded.reshape(-1, GROUP * 8).sum(axis=1, dtype=np.int32)
        # Positions start at 0, so one less than the ones up to here; before the first one Gather takes the last code.
        start = (np.cumsum(counted) - counted - 1).astype(np.int32).reshape(-1, 1, 1)
        bits = self._cast(f"{name}_mask", to_planes(padded, 1), nodes)
        bits = self._chain(name, bits, (*_unpacking(1), ("Reshape", np.array([-1, GROUP, 8]))), nodes)
        in_byte = self._chain(name, bits, [("MatMul", np.triu(np.ones((8, 8), np.float32)))], nodes)
        before = [("MatMul", np.ones((8, 1), np.float32)), ("Reshape", np.array([-1, GROUP]))]
        earlier = self._chain(name, bits, before, nodes)
        strict = np.triu(np.ones((GROUP, GROUP), np.float32), 1)
        earlier = self._chain(name, earlier, [("MatMul", strict), ("Reshape", np.array([-1, GROUP, 1]))], nodes)
        where = self._node("Add", [in_byte, earlier], name, nodes)
        where = self._node("Cast", [where], name, nodes, ir.DataType.INT32)
        shaping = tuple(_shaping(mask.size, 8 * GROUP, mask.shape))
        positions = self._chain(name, where, (("Add", start), *shaping), nodes)
        return self._chain(name, bits, shaping, nodes), positions

    def _chain(self, name: str, value: ir.Value, steps: Iterable[tuple[Any, ...]], nodes: list[ir.Node]) -> ir.Value:
        """Operators with their constant operands, one behind the other."""
        for op_type, *operands in steps:
            value = self._node(op_type, [value, *(self._store(f"{op_type}_by", x) for x in operands)], name, nodes)
        return value

    def _cast(self, name: str, array: Array, nodes: list[ir.Node]) -> ir.Value:
        """The constant `array` as float32, stored in its own type."""
        value = self._store(name, array)
        return value if array.dtype == np.float32 else self._node("Cast", [value], name, nodes, ir.DataType.FLOAT)

    def _store(self, name: str, array: Array) -> ir.Value:
        """A constant of the main graph; equal ones, as in the branches of an If, are stored once."""
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._stored:
            self._stored[key] = add_constant(self.model.graph, self.names.fresh(name), array)
        return self._stored[key]

    def _node(
        self, op_type: str, inputs: list[ir.Value], name: str, nodes: list[ir.Node], to: ir.DataType | None = None
    ) -> ir.Value:
        name = self.names.fresh(f"{name}_{op_type}")
        attributes = {} if to is None else {"to": to}
        nodes.append(ir.node(op_type, inputs, attributes, name=name, outputs=[ir.Value(name=name)]))
        return nodes[-1].outputs[0]


def _mask_pays(mask: Array, bits: int) -> bool:
    """Whether a mask and the codes under it take fewer bytes than all codes."""
    kept = int(mask.sum())
    with_mask = mask.size * (1 + 4 / GROUP) / 8 + kept * bits / 8 + MASK_OVERHEAD
    return kept > 0 and with_mask < mask.size * bits / 8


def _unpacking(bits: int) -> Iterator[tuple[Any, ...]]:
    """Operators with their constant operands, from planes to codes, eight a row."""
    difference = np.eye(8) - 2 * np.eye(8, k=-1)
    yield "Mul", 0.5 ** np.arange(8, dtype=np.float32)
    yield ("Floor",)
    yield "Reshape", np.array([-1, 8 * bits])
    yield "MatMul", np.kron(2.0 ** np.arange(bits)[:, None], difference).astype(np.float32)


def _shaping(size: int, multiple: int, shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Operators that bring `size` numbers, padded to a multiple, into `shape`."""
    if size % multiple:
        yield "Reshape", np.array([-1])
        yield "Slice", np.array([0]), np.array([size])
    yield "Reshape", np.array(shape)
