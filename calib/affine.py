"""Affine (uniform) quantization arithmetic: real = scale * (integer - zero_point).

Formulas: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018), section 2.1; rounding is half to even, as ONNX
QuantizeLinear defines it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib import trellis
from calib.rotation import rotation

Array = NDArray[Any]

# The least scale worth storing: below it 1 / scale and the product of two scales leave float32.
SMALLEST_SCALE = 2.0**-60
# Zeros of codes of up to this many bits are worth no second byte, where they are no fewer than the
# node that this needs takes.
BYTE_ZERO_BITS, LEAST_ZEROS = 5, 64


@dataclass(frozen=True)
class IntFormat:
    """An integer format: `bits` wide; `narrow` gives up the lowest code so that a signed range is
    symmetric.

    Codes of a `trellis` stand for levels that `calib.trellis` tells: its memory, 0 for none; those
    of a `rotated` weight for what `calib.rotation` makes of it.
    """

    bits: int
    signed: bool
    narrow: bool = False
    trellis: int = 0
    rotated: bool = False

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return (-(1 << (self.bits - 1)) if self.signed else 0) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest numpy type that holds every code."""
        width = next(w for w in (8, 16, 32) if self.bits <= w)
        return np.dtype(f"{'int' if self.signed else 'uint'}{width}")

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


UINT8 = IntFormat(8, signed=False)
UINT16 = IntFormat(16, signed=False)
INT8 = IntFormat(8, signed=True)
INT8_NARROW = IntFormat(8, signed=True, narrow=True)
INT32 = IntFormat(32, signed=True)


@dataclass(frozen=True)
class Range:
    """The real interval a tensor is quantized over: float64 arrays of shape () or (channels,)."""

    lo: Array
    hi: Array


@dataclass(frozen=True)
class QParams:
    """scale (float32) and zero_point, both of shape () or (channels,); `axis` is None per tensor.

    The zero point is an integer of the format. Stored weights that are floats again before use may
    have any, and parameters for every block of a channel: an array with as many axes as the weight.
    """

    scale: Array
    zero_point: Array
    format: IntFormat
    axis: int | None = None


def qparams_of(
    span: Range,
    fmt: IntFormat,
    symmetric: bool,
    *,
    axis: int | None = None,
    power_of_two: bool = False,
) -> QParams:
    """The parameters that cover `span`, widened to contain zero so that zero is exactly
    representable.

    Symmetric puts the zero point in the middle of the codes (0 signed, 128 for uint8). A constant
    or empty range gets scale 1. `power_of_two` rounds the scale up to the next power of two.
    """
    lo = np.minimum(np.asarray(span.lo, np.float64), 0.0)
    hi = np.maximum(np.asarray(span.hi, np.float64), 0.0)
    middle = 0 if fmt.signed else 1 << (fmt.bits - 1)
    if symmetric:
        scale = np.maximum(
            -lo / (middle - fmt.qmin),
            hi / (fmt.qmax - middle),
        )
    else:
        scale = (hi - lo) / (fmt.qmax - fmt.qmin)
    scale = np.where(scale < SMALLEST_SCALE, 1.0, scale)
    if power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    scale = scale.astype(np.float32)
    if symmetric:
        zero_point = np.full(scale.shape, middle)
    else:
        scale = scale if power_of_two else _not_beyond(scale, hi - lo, fmt)
        zero_point = np.clip(
            np.rint(fmt.qmin - lo / scale),
            fmt.qmin,
            fmt.qmax,
        )
    return QParams(scale, zero_point.astype(fmt.dtype), fmt, axis)


def _not_beyond(scale: Array, span: Array, fmt: IntFormat) -> Array:
    """`scale` rounded down where float32 rounding would let the codes reach beyond the span.

    Runtimes drop a Clip(0, 6) behind an integer operator only if the largest code is not above 6.
    """
    levels = np.float32(fmt.qmax - fmt.qmin)
    return np.where(
        levels * scale > span.astype(np.float32),
        np.nextafter(scale, np.float32(0)),
        scale,
    )


def zero_step(bits: int) -> float:
    """The step of zeros that are stored in a byte, which spans all codes of `bits`."""
    return 2.0 ** (bits - 8)


def zero_bytes(zero: Array, bits: int) -> Array | None:
    """The nearest bytes to `zero` in steps of `zero_step`; None where they are few, one of them is
    outside of the codes, or these have too many bits.
    """
    if bits > BYTE_ZERO_BITS or zero.size < LEAST_ZEROS:
        return None
    steps = np.rint(zero.astype(np.float64) / zero_step(bits))
    within = steps.min() >= 0 and steps.max() <= np.iinfo(np.uint8).max
    return steps.astype(np.uint8) if within else None


def byte_zeros(zero: Array, bits: int) -> Array:
    """The nearest zeros that bytes hold, or `zero` where they do not."""
    steps = zero_bytes(zero, bits)
    return zero if steps is None else steps * zero_step(bits)


def along(values: Array, axis: int | None, shape: tuple[int, ...]) -> Array:
    """`values` a channel shaped to broadcast along `axis` of a tensor of `shape`, `values` a block
    repeated to it.
    """
    if axis is None or values.ndim == 0:
        return values
    if values.ndim > 1:
        for block_axis, size in enumerate(shape):
            values = np.repeat(values, size // values.shape[block_axis], block_axis)
        return values
    return values.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def quantize(x: Array, q: QParams) -> Array:
    """Integer codes of `x`: rint(x / scale) + zero_point, clipped; same shape as `x`.

    What is no number becomes 0.
    """
    scale = along(q.scale, q.axis, x.shape)
    zero_point = along(q.zero_point, q.axis, x.shape).astype(np.float64)
    codes = np.rint(np.asarray(x, np.float64) / scale) + zero_point
    codes = np.clip(codes, q.format.qmin, q.format.qmax)
    if codes.size and np.isnan(codes.max()):
        codes = np.where(np.isnan(codes), zero_point, codes)
    return codes.astype(q.format.dtype)


def dequantize(codes: Array, q: QParams) -> Array:
    """Real values (float32) of integer `codes`; a trellis runs along the axis of the scales."""
    if q.format.trellis:
        assert q.axis is not None
        codes = np.moveaxis(codes, q.axis, -1)
        codes = np.moveaxis(trellis.points(codes, q.format.bits, q.format.trellis), -1, q.axis)
    scale = along(q.scale, q.axis, codes.shape)
    zero_point = along(q.zero_point, q.axis, codes.shape)
    steps = rotated(codes.astype(np.float64) - zero_point, q)
    return (steps * scale.astype(np.float64)).astype(np.float32)


def rotated(x: Array, q: QParams) -> Array:
    """`x` times the rotation of all its axes but that of the channels, float64; `x` itself where
    nothing is rotated.
    """
    if not q.format.rotated:
        return x
    assert q.axis is not None
    first = np.moveaxis(x, q.axis, 0)
    turned = rotation(first.shape[1:])(first.reshape(len(first), -1))
    return np.moveaxis(turned.reshape(first.shape), 0, q.axis)


def is_centered(q: QParams) -> bool:
    """Whether codes are of a trellis whose levels' middle stands for 0 in every channel."""
    middle = trellis.middle(q.format.bits)
    return q.format.trellis > 0 and bool((q.zero_point == middle).all())
