"""Weights of any width in standard ONNX: exactly `bits` bits each on disk, floats as soon as a runtime has loaded them.

Bit p of eight consecutive codes makes a byte of plane p. Runtimes fold what follows when they load the model, as it
depends on constants only, so that the operator runs on a plain float weight:

    planes (bytes, bits, 1) uint8 -> Cast -> Mul(2^-k) -> Floor -> MatMul -> Reshape -> Sub(zero) -> Mul(scale)

With F_k = floor(byte / 2^k), bit k is F_k - 2 F_{k+1}; the MatMul takes this difference and sums the planes, times 2^p,
in one go. All its partial sums are integers below 2^24, exact in float32. BitShift and Mod on uint8, the obvious way,
are wrong in OpenVINO. Codes of 8 and 16 bits are stored as they are.
"""

from __future__ import annotations

from collections.abc import Callable

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


class PlaneWriter:
    """Writes weights into the graphs of one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.names = model, Names(model)
        self._shared: dict[tuple[int, str], ir.Value] = {}
        self._stored: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
        """The value of the weight `name` as floats, unpacked from its codes by nodes at the start of `graph`."""
        chain = _Chain(graph, name, self.names, self._store)
        codes, bits = weight.codes, weight.qparams.format.bits
        if bits in PLAIN_BITS:
            chain.start(codes)
        else:
            self._unpack(chain, codes, bits)
        q = weight.qparams
        chain.add("Sub", chain.cast("zero", along(q.zero_point, q.axis, codes.shape)))
        chain.add("Mul", chain.cast("scale", along(q.scale, q.axis, codes.shape)))
        return chain.finish()

    def _unpack(self, chain: _Chain, codes: Array, bits: int) -> None:
        chain.start(to_planes(codes, bits))
        chain.add("Mul", self._constant(chain.graph, "bit_shifts", 0.5 ** np.arange(8, dtype=np.float32)))
        chain.add("Floor")
        chain.add("Reshape", self._constant(chain.graph, f"planes_{bits}", np.array([-1, 8 * bits])))
        chain.add("MatMul", self._constant(chain.graph, f"sum_planes_{bits}", _sums(bits)))
        if codes.size % 8:
            chain.add("Reshape", self._constant(chain.graph, "flat", np.array([-1])))
            bounds = (self._constant(chain.graph, f"to_{end}", np.array([end])) for end in (0, codes.size))
            chain.add("Slice", *bounds)
        chain.add("Reshape", self._constant(chain.graph, f"shape_{codes.shape}", np.array(codes.shape)))

    def _store(self, name: str, array: Array) -> ir.Value:
        """A constant of the main graph; equal ones, as in the branches of an If, are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored:
            self._stored[key] = add_constant(self.model.graph, self.names.fresh(name), array)
        return self._stored[key]

    def _constant(self, graph: ir.Graph, name: str, array: Array) -> ir.Value:
        """A constant that all weights of a graph share."""
        if (id(graph), name) not in self._shared:
            self._shared[id(graph), name] = add_constant(graph, self.names.fresh(name), array)
        return self._shared[id(graph), name]


def _sums(bits: int) -> Array:
    """(8 bits, 8): from F_k of every plane to the code of every bit position."""
    difference = np.eye(8) - 2 * np.eye(8, k=-1)
    return np.kron(2.0 ** np.arange(bits)[:, None], difference).astype(np.float32)


def half_if_exact(array: Array) -> Array:
    """`array` as float16 if that loses nothing."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array


class _Chain:
    """Nodes one behind the other."""

    def __init__(self, graph: ir.Graph, name: str, names: Names, store: Callable[[str, Array], ir.Value]) -> None:
        self.graph, self.name, self.names, self.store = graph, name, names, store
        self.nodes: list[ir.Node] = []
        self.value: ir.Value

    def start(self, codes: Array) -> None:
        self.value = self.cast("codes", codes)

    def cast(self, what: str, array: Array) -> ir.Value:
        """The constant `array` as float32, stored in the narrower type it has, or in float16 if that loses nothing."""
        narrow = half_if_exact(array) if array.dtype == np.float32 else array
        value = self.store(f"{self.name}_{what}", narrow)
        return value if narrow.dtype == np.float32 else self._node("Cast", [value], {"to": ir.DataType.FLOAT})

    def add(self, op_type: str, *operands: ir.Value) -> None:
        self.value = self._node(op_type, [self.value, *operands], {})

    def _node(self, op_type: str, inputs: list[ir.Value], attributes: dict[str, int]) -> ir.Value:
        name = self.names.fresh(f"{self.name}_{op_type}")
        self.nodes.append(ir.node(op_type, inputs, attributes, name=name, outputs=[ir.Value(name=name)]))
        return self.nodes[-1].outputs[0]

    def finish(self) -> ir.Value:
        self.graph.insert_before(self.graph[0], self.nodes)
        return self.value
