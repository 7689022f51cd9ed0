"""Trellis codes against all of a group's codes and against what they should gain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib import trellis
from calib.affine import IntFormat, QParams, dequantize

MEMORIES = st.sampled_from([trellis.SHORT, trellis.LONG])


def level(window, bits, memory):
    """What the last code of a window stands for, by the definition of Ungerboeck's codes."""
    u = [code & 1 for code in window]
    if memory == trellis.SHORT:
        subset = 2 * (u[2] ^ u[0]) + u[1]
    else:
        subset = 2 * (u[3] ^ u[2] ^ u[0]) + u[1]
    return trellis.levels(bits)[4 * (window[-1] >> 1) + subset]


def levels_around(ring, bits, memory):
    """What the codes of a ring stand for."""
    codes = [int(code) for code in (*ring[-memory:], *ring)]
    return [level(codes[i : i + memory + 1], bits, memory) for i in range(len(ring))]


@pytest.mark.parametrize("bits", range(2, 8))
def test_levels_rise_and_are_symmetric(bits):
    levels = trellis.levels(bits)
    assert len(levels) == 2 << bits
    assert (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels + levels[::-1], (1 << bits) - 1, atol=0.1)
    np.testing.assert_array_equal(levels.astype(np.float16), levels)


@given(st.integers(2, 7), MEMORIES, st.integers(0, 10**6), st.integers(1, 20))
def test_points_follow_the_definition(bits, memory, seed, count):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, count)
    filled = np.concatenate([codes, np.zeros(-count % 8, int)])
    rings = filled.reshape(-1, 8) if memory == trellis.SHORT else [filled]
    expected = [x for ring in rings for x in levels_around(ring, bits, memory)]
    np.testing.assert_array_equal(trellis.points(codes, bits, memory), expected[:count])


def best_around(aims, weights, memory):
    """The least weighted squared error of numbers in 2 bits that end with their ring, by Viterbi's
    algorithm from every state (1967), one number at a time.
    """
    ends = []
    for start in itertools.product([0, 1], repeat=memory):
        costs = {start: 0.0}
        for aim, weight in zip(aims, weights, strict=True):
            reached = {}
            for before, cost in costs.items():
                for code in range(4):
                    total = cost + weight * (aim - level([*before, code], 2, memory)) ** 2
                    after = (*before[1:], code & 1)
                    reached[after] = min(total, reached.get(after, np.inf))
            costs = reached
        ends.append(costs[start])
    return min(ends)


@pytest.mark.parametrize(
    ("memory", "count"),
    [(trellis.SHORT, 8), (trellis.LONG, 8), (trellis.LONG, 24), (trellis.LONG, 40)],
)
def test_no_path_around_a_ring_is_cheaper(memory, count):
    rng = np.random.default_rng(count)
    for _ in range(5):
        aims, weights = rng.normal(1.5, 2.0, count), rng.random(count) + 0.1
        found = trellis.points(trellis.nearest(aims, weights, 2, memory), 2, memory)
        best = best_around(aims, weights, memory)
        assert ((found - aims) ** 2) @ weights == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("memory", [trellis.SHORT, trellis.LONG])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_nearest_codes_are_the_best_of_all(count, memory):
    rng = np.random.default_rng(count)
    candidates = np.array(list(itertools.product(range(4), repeat=count)))
    points = trellis.points(candidates, 2, memory)
    for _ in range(5):
        aims, weights = rng.normal(1.5, 2.0, count), rng.random(count) + 0.1
        found = trellis.points(trellis.nearest(aims, weights, 2, memory), 2, memory)
        best = ((points - aims) ** 2 @ weights).min()
        assert ((found - aims) ** 2) @ weights == pytest.approx(best, rel=1e-4)


@settings(deadline=None)
@given(st.integers(2, 7), MEMORIES, st.integers(0, 10**6), st.integers(1, 40))
def test_points_are_their_own_nearest(bits, memory, seed, count):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, count))
    points = trellis.points(codes, bits, memory)
    found = trellis.nearest(points, np.ones(count), bits, memory)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize(
    ("memory", "count", "least"),
    [
        (trellis.SHORT, 8, {2: 9.9, 3: 15.5, 4: 21.3, 5: 27.2, 6: 33.0}),
        (trellis.LONG, 160, {2: 10.5, 3: 16.1, 4: 21.9, 5: 27.7, 6: 33.5}),
    ],
)
def test_normal_numbers_gain_two_decibels_and_more(memory, count, least):
    """The best uniform grids reach 9.25, 14.27, 19.38, 24.57 and 29.83 dB (Jayant and Noll, 1984,
    table 4.3).
    """
    x = np.random.default_rng(0).normal(size=(32000 // count, count))
    for bits, decibels in least.items():
        middle = ((1 << bits) - 1) / 2
        noise = []
        for reach in np.linspace(1.5, 3.5, 9):
            aims = (x / reach + 1) * middle
            codes = trellis.nearest(aims, np.ones(count), bits, memory)
            error = (trellis.points(codes, bits, memory) - aims) * reach / middle
            noise.append(np.square(error).mean())
        assert -10 * np.log10(min(noise)) > decibels


@pytest.mark.parametrize("memory", [trellis.SHORT, trellis.LONG])
def test_dequantize_runs_along_the_axis_of_the_scales(memory):
    codes = np.random.default_rng(1).integers(0, 8, (3, 12, 5)).astype(np.uint8)
    scale, zero = np.arange(1, 13, dtype=np.float32), np.linspace(0, 3, 12).astype(np.float32)
    fmt = IntFormat(3, signed=False, trellis=memory)
    values = dequantize(codes, QParams(scale, zero, fmt, 1))
    for i, j in itertools.product(range(3), range(5)):
        expected = (trellis.points(codes[i, :, j], 3, memory) - zero) * scale
        np.testing.assert_allclose(values[i, :, j], expected, rtol=1e-6)
