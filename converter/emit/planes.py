"""Weights of any width in standard ONNX: exactly `bits` bits each on disk, floats as soon as a runtime has loaded them.

Bit p of eight consecutive codes makes a byte of plane p. Runtimes fold what follows when they load the model, as it
depends on constants only, so that the operator runs on a plain float weight:

    planes (bytes, bits, 1) uint8 -> Cast -> Mul(2^-k) -> Floor -> MatMul -> Reshape -> Sub(zero) -> Mul(scale)

With F_k = floor(byte / 2^k), bit k is F_k - 2 F_{k+1}; the MatMul takes this difference and sums the planes, times 2^p,
in one go. All its partial sums are integers below 2^24, exact in float32. BitShift and Mod on uint8, the obvious way,
are wrong in OpenVINO. Codes of 8 and 16 bits are stored as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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
# Bytes the file grows by for the nodes of one weight, about.
OVERHEAD = 900


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
        plain = q.format.bits in PLAIN_BITS
        value = self._cast(f"{name}_codes", codes if plain else to_planes(codes, q.format.bits), nodes)
        for op_type, *operands in () if plain else _unpacking(codes, q.format.bits):
            value = self._node(op_type, [value, *(self._store(f"{op_type}_by", x) for x in operands)], name, nodes)
        for op_type, what, numbers in (("Sub", "zero", q.zero_point), ("Mul", "scale", q.scale)):
            operand = half_if_exact(along(numbers, q.axis, codes.shape))
            value = self._node(op_type, [value, self._cast(f"{name}_{what}", operand, nodes)], name, nodes)
        graph.insert_before(graph[0], nodes)
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


def _unpacking(codes: Array, bits: int) -> Iterator[tuple[Any, ...]]:
    """Operators with their constant operands, from the planes to codes in the weight's shape."""
    difference = np.eye(8) - 2 * np.eye(8, k=-1)
    yield "Mul", 0.5 ** np.arange(8, dtype=np.float32)
    yield ("Floor",)
    yield "Reshape", np.array([-1, 8 * bits])
    yield "MatMul", np.kron(2.0 ** np.arange(bits)[:, None], difference).astype(np.float32)
    if codes.size % 8:
        yield "Reshape", np.array([-1])
        yield "Slice", np.array([0]), np.array([codes.size])
    yield "Reshape", np.array(codes.shape)
