"""Trellis codes against all of a group's codes and against what they should gain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib import trellis
from calib.affine import IntFormat, QParams, dequantize


def level(codes, i, bits):
    """What code i of a group stands for, by the definition of Ungerboeck's code."""
    u = [int(code) & 1 for code in codes]
    subset = 2 * (u[i] ^ u[i - 2]) + u[i - 1]
    return trellis.levels(bits)[4 * (int(codes[i]) >> 1) + subset]


@pytest.mark.parametrize("bits", range(2, 8))
def test_levels_rise_and_are_symmetric(bits):
    levels = trellis.levels(bits)
    assert len(levels) == 2 << bits
    assert (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels + levels[::-1], (1 << bits) - 1, atol=0.1)
    np.testing.assert_array_equal(levels.astype(np.float16), levels)


@given(st.integers(2, 7), st.integers(0, 10**6), st.integers(1, 20))
def test_points_follow_the_definition(bits, seed, count):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count)
    filled = np.concatenate([codes, np.zeros(-count % 8, int)]).reshape(-1, 8)
    expected = [level(group, i, bits) for group in filled for i in range(8)][:count]
    np.testing.assert_array_equal(trellis.points(codes, bits), expected)


@pytest.mark.parametrize("count", [8, 3])
def test_the_nearest_codes_are_the_best_of_all(count):
    rng = np.random.default_rng(count)
    candidates = np.array(list(itertools.product(range(4), repeat=count)))
    points = trellis.points(candidates, 2)
    for _ in range(5):
        aims, weights = rng.normal(1.5, 2.0, count), rng.random(count) + 0.1
        found = trellis.points(trellis.nearest(aims, weights, 2), 2)
        best = ((points - aims) ** 2 @ weights).min()
        assert ((found - aims) ** 2) @ weights == pytest.approx(best, rel=1e-4)


@settings(deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**6), st.integers(1, 40))
def test_points_are_their_own_nearest(bits, seed, count):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, count))
    found = trellis.nearest(trellis.points(codes, bits), np.ones(count), bits)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(("bits", "least"), [(2, 9.9), (3, 15.5), (4, 21.3), (5, 27.2), (6, 33.0)])
def test_normal_numbers_gain_two_decibels_and_more(bits, least):
    """The best uniform grids reach 9.25, 14.27, 19.38, 24.57 and 29.83 dB (Jayant and Noll, 1984,
    table 4.3).
    """
    x, middle = np.random.default_rng(0).normal(size=(4000, 8)), ((1 << bits) - 1) / 2
    noise = []
    for reach in np.linspace(1.5, 3.5, 9):
        aims = (x / reach + 1) * middle
        noise.append(
            np.square(
                (trellis.points(trellis.nearest(aims, np.ones(8), bits), bits) - aims)
                * reach
                / middle
            )
        )
    assert -10 * np.log10(min(n.mean() for n in noise)) > least


def test_dequantize_runs_along_the_axis_of_the_scales():
    codes = np.random.default_rng(1).integers(0, 8, (3, 12, 5)).astype(np.uint8)
    scale, zero = np.arange(1, 13, dtype=np.float32), np.linspace(0, 3, 12).astype(np.float32)
    values = dequantize(codes, QParams(scale, zero, IntFormat(3, signed=False, trellis=True), 1))
    for i, j in itertools.product(range(3), range(5)):
        expected = (trellis.points(codes[i, :, j], 3) - zero) * scale
        np.testing.assert_allclose(values[i, :, j], expected, rtol=1e-6)
