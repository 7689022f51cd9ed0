"""Affine arithmetic against hand-computed cases, float64 bounds and ONNX Runtime's own
QuantizeLinear.
"""

from __future__ import annotations

import numpy as np
import pytest
from graphs import build, run
from hypothesis import given
from hypothesis import strategies as st

from calib.affine import (
    INT8,
    INT8_NARROW,
    INT32,
    UINT8,
    IntFormat,
    QParams,
    Range,
    dequantize,
    qparams_of,
    quantize,
    zero_bytes,
)

FORMATS = [
    UINT8,
    INT8,
    INT8_NARROW,
    IntFormat(4, True),
    IntFormat(7, True, True),
    IntFormat(16, False),
]
ENDS = st.floats(-(2.0**60), 2.0**60, width=32)


def span(lo, hi):
    return Range(np.array(lo, np.float64), np.array(hi, np.float64))


@pytest.mark.parametrize(
    ("fmt", "qmin", "qmax", "dtype", "text"),
    [
        (UINT8, 0, 255, "uint8", "uint8"),
        (INT8, -128, 127, "int8", "int8"),
        (INT8_NARROW, -127, 127, "int8", "int8"),
        (IntFormat(1, True), -1, 0, "int8", "int1"),
        (IntFormat(3, True, True), -3, 3, "int8", "int3"),
        (IntFormat(4, False), 0, 15, "uint8", "uint4"),
        (IntFormat(9, True), -256, 255, "int16", "int9"),
        (IntFormat(16, False), 0, 65535, "uint16", "uint16"),
        (INT32, -(2**31), 2**31 - 1, "int32", "int32"),
    ],
)
def test_codes_and_storage_of_formats(fmt, qmin, qmax, dtype, text):
    assert (fmt.qmin, fmt.qmax, fmt.dtype, str(fmt)) == (qmin, qmax, np.dtype(dtype), text)


@pytest.mark.parametrize(
    ("lo", "hi", "fmt", "symmetric", "scale", "zero_point"),
    [
        (0.0, 6.0, UINT8, False, 6 / 255, 0),
        (-1.0, 3.0, UINT8, False, 4 / 255, 64),
        (-1.0, 3.0, INT8, False, 4 / 255, -64),
        (2.0, 6.0, UINT8, False, 6 / 255, 0),  # widened to zero
        (-6.0, -2.0, UINT8, False, 6 / 255, 255),
        (-1.0, 2.0, UINT8, True, 2 / 127, 128),
        (-4.0, 2.0, UINT8, True, 4 / 128, 128),
        (-1.0, 2.0, INT8_NARROW, True, 2 / 127, 0),
        (-2.0, 1.0, INT8_NARROW, True, 2 / 127, 0),
        (-128.0, 1.0, INT8, True, 1.0, 0),
        (-7.0, 7.0, IntFormat(4, True, True), True, 1.0, 0),
        (0.0, 0.0, UINT8, False, 1.0, 0),
        (0.0, 1e-30, INT8_NARROW, True, 1.0, 0),
    ],
)
def test_parameters_of_ranges_by_hand(lo, hi, fmt, symmetric, scale, zero_point):
    q = qparams_of(span(lo, hi), fmt, symmetric)
    assert q.scale == pytest.approx(scale, rel=2e-7)
    assert (q.zero_point, q.scale.dtype, q.zero_point.dtype) == (zero_point, np.float32, fmt.dtype)


@given(st.integers(2, 5), st.lists(st.floats(-0.001, 3.98), min_size=64, max_size=80))
def test_a_byte_holds_a_zero_as_near_as_its_steps_are_small(bits, drawn):
    zero = np.array(drawn) * 2.0 ** (bits - 2)
    steps = zero_bytes(zero, bits)
    assert steps.dtype == np.uint8
    np.testing.assert_allclose(steps / 2.0 ** (8 - bits), zero, rtol=0, atol=2.0 ** (bits - 9))


def test_zeros_that_no_byte_is_for():
    inside = np.full(64, 1.5)
    assert zero_bytes(inside, 6) is None
    assert zero_bytes(inside[1:], 4) is None
    assert zero_bytes(np.append(inside, -0.5), 4) is None
    assert zero_bytes(np.append(inside, 16.0), 4) is None


@pytest.mark.parametrize(
    ("hi", "scale"), [(127 * 0.25, 0.25), (127 * 0.26, 0.5), (0.9, 2.0**-7), (127.0, 1.0)]
)
def test_power_of_two_scales_are_rounded_up(hi, scale):
    assert qparams_of(span(-hi, hi), INT8_NARROW, True, power_of_two=True).scale == scale


def test_power_of_two_scale_with_a_zero_point():
    q = qparams_of(span(-1.0, 3.0), UINT8, False, power_of_two=True)
    assert (q.scale, q.zero_point) == (
        2.0**-5,
        32,
    )  # 4 / 255 = 0.0157 is a little more than 2 ** -6


def test_each_channel_has_its_own_parameters():
    q = qparams_of(span([-1.0, -127.0, 0.0], [0.5, 3.0, 0.0]), INT8_NARROW, True, axis=1)
    np.testing.assert_allclose(q.scale, [1 / 127, 1.0, 1.0], rtol=1e-7)
    x = np.array([[1.0, 64.4, 0.0], [-1.0, -500.0, 0.0]])
    np.testing.assert_array_equal(quantize(x, q), [[127, 64, 0], [-127, -127, 0]])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_axis_says_which_dimension_the_channels_are(axis):
    shape = (2, 3, 4)
    scale = np.float32(2.0) ** np.arange(shape[axis])
    q = QParams(scale.astype(np.float32), np.zeros(len(scale), np.int8), INT8, axis)
    x = np.full(shape, 64.0)
    expected = np.moveaxis(np.broadcast_to(64.0 / scale, np.moveaxis(x, axis, -1).shape), -1, axis)
    np.testing.assert_array_equal(quantize(x, q), expected)
    np.testing.assert_array_equal(dequantize(quantize(x, q), q), x)


def test_halves_round_to_even_and_the_rest_saturates():
    q = QParams(np.float32(0.5), np.uint8(10), UINT8)
    x = np.array([0.25, 0.75, 1.25, -0.25, -0.75, 1e9, -1e9, np.inf, -np.inf])
    np.testing.assert_array_equal(quantize(x, q), [10, 12, 12, 10, 8, 255, 0, 255, 0])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_survives_a_round_trip(fmt, symmetric):
    q = qparams_of(span(-1.7, 2.9), fmt, symmetric)
    codes = np.arange(fmt.qmin, fmt.qmax + 1).astype(fmt.dtype)
    np.testing.assert_array_equal(quantize(dequantize(codes, q), q), codes)


@given(
    ENDS,
    ENDS,
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
    st.sampled_from(FORMATS),
    st.booleans(),
)
def test_the_error_inside_the_range_is_bounded_by_the_scale(a, b, where, fmt, symmetric):
    lo, hi = min(a, b), max(a, b)
    q = qparams_of(span(lo, hi), fmt, symmetric)
    x = lo + (hi - lo) * np.array(where)
    # Half a step of rounding, and at the ends up to half a step by which the zero point was
    # rounded.
    bound = float(q.scale) * (0.5 if symmetric else 1.0) * (1 + 1e-4)
    assert np.abs(dequantize(quantize(x, q), q).astype(np.float64) - x).max() <= bound


@given(ENDS, ENDS, st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_zero_is_exact(a, b, fmt, symmetric, power_of_two):
    q = qparams_of(span(min(a, b), max(a, b)), fmt, symmetric, power_of_two=power_of_two)
    assert dequantize(quantize(np.zeros(1), q), q) == 0.0


@given(
    st.floats(2.0**-40, 2.0**40, width=32),
    st.sampled_from([UINT8, IntFormat(16, False), IntFormat(4, False)]),
)
def test_no_code_exceeds_the_clip_that_gave_the_range(hi, fmt):
    scale = qparams_of(span(0.0, hi), fmt, symmetric=False).scale
    assert np.float32(fmt.qmax) * scale <= np.float32(hi)


@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 3.0), (0.0, 4.0), (-2.0, 0.0), (-0.3, 0.7)])
def test_codes_are_those_of_the_runtime(lo, hi):
    q = qparams_of(
        span(lo, hi), UINT8, symmetric=False, power_of_two=True
    )  # exact in float32: halves are halves
    x = np.concatenate(
        [np.linspace(1.2 * lo - 0.1, 1.2 * hi, 997), (np.arange(-300, 300) + 0.5) * q.scale]
    )
    model = build(
        "g (float[N] x) => (uint8[N] codes, float[N] y) "
        "{ codes = QuantizeLinear(x, s, z)  y = DequantizeLinear(codes, s, z) }",
        s=q.scale,
        z=q.zero_point,
    )
    found = run(model, {"x": x.astype(np.float32)})
    np.testing.assert_array_equal(quantize(x.astype(np.float32), q), found["codes"])
    np.testing.assert_array_equal(dequantize(quantize(x.astype(np.float32), q), q), found["y"])
