"""Codes and grids of rows against brute force and plain least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib import trellis
from calib.affine import IntFormat
from converter.weights.grids import Grids, fit, with_variance


def grids(bits, **options):
    return Grids(IntFormat(bits, signed=False), **options)


def problem(seed, rows=6, columns=5, samples=40):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, columns)) @ rng.normal(size=(columns, columns)) + rng.normal(
        size=columns
    )
    return rng.normal(size=(1, rows, columns)), (x.T @ x / samples)[None]


def errors(weight, rows, moments):
    difference = rows.values() - weight
    return np.einsum("grk,gkl,grl->gr", difference, moments, difference)


def best_possible(row, moments, levels):
    """Least e' M e over all codes, each with its best scale and zero by plain least squares."""
    root = np.linalg.cholesky(moments).T
    least = np.inf
    for codes in itertools.product(range(levels), repeat=len(row)):
        design = root @ np.stack([codes, np.ones(len(row))], axis=1)
        solution = np.linalg.lstsq(design, root @ row, rcond=None)[0]
        least = min(least, float(np.square(design @ solution - root @ row).sum()))
    return least


@pytest.mark.parametrize("bits", [1, 2])
def test_the_fit_is_near_the_best_of_all_codes(bits):
    found, best = 0.0, 0.0
    for seed in range(6):
        weight, moments = problem(seed, rows=3, columns=4)
        found += errors(weight, fit(weight, moments, grids(bits)), moments).sum()
        best += sum(best_possible(row, moments[0], 1 << bits) for row in weight[0])
    assert best <= found * (1 + 1e-3) <= 1.6 * best


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_moments_lower_the_error_of_the_outputs(bits):
    with_data = without = 0.0
    for seed in range(10):
        weight, moments = problem(seed, columns=16)
        with_data += errors(weight, fit(weight, moments, grids(bits)), moments).sum()
        without += errors(weight, fit(weight, None, grids(bits)), moments).sum()
    assert with_data < 0.6 * without


@settings(deadline=None)
@given(
    st.integers(1, 16),
    st.integers(0, 1000),
    st.sampled_from([1e-12, 1e-5, 1.0, 1e6]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_weight_gets_codes_of_the_format(bits, seed, size, per_row, integer_zero, data):
    weight, moments = problem(seed)
    weight = weight * size
    weight[0, 0], weight[0, 1] = 0.0, size
    wanted = grids(bits, per_row=per_row, integer_zero=integer_zero)
    rows = fit(weight, moments if data else None, wanted)
    assert (rows.codes() == np.rint(rows.codes())).all()
    assert rows.codes().min() >= 0
    assert rows.codes().max() < 1 << bits
    assert np.isfinite(rows.values()).all()
    assert (rows.scale > 0).all()
    if integer_zero:
        assert set(rows.zero.ravel()) <= set(range(1 << bits))
    if not per_row:
        assert len({*rows.scale.ravel()}) == len({*rows.zero.ravel()}) == 1
    elif not data and not integer_zero:
        half_steps = np.abs(rows.values() - weight) / rows.scale[..., None]
        inner = (rows.codes() > 0) & (rows.codes() < (1 << bits) - 1)
        assert half_steps[inner].max(initial=0) <= 0.5 + 1e-6


def test_a_constant_row_is_kept():
    weight = np.full((1, 1, 9), -0.375)
    np.testing.assert_allclose(fit(weight, None, grids(3)).values(), weight, rtol=1e-3)


@pytest.mark.parametrize("bits", range(2, 12))
def test_every_bit_halves_the_error(bits):
    weight = np.random.default_rng(1).normal(size=(1, 4, 4096))
    narrow, wide = (
        fit(weight, None, grids(b)).relative_error(weight, None) for b in (bits, bits + 1)
    )
    assert 0.4 < wide / narrow < 0.65


def test_relative_error_is_that_of_the_outputs():
    weight, moments = problem(3)
    rows = fit(weight, moments, grids(3))
    root = np.linalg.cholesky(moments[0])
    expected = np.linalg.norm((rows.values() - weight)[0] @ root) / np.linalg.norm(weight[0] @ root)
    assert rows.relative_error(weight, moments) == pytest.approx(expected)


def test_variance_correction_gives_mean_and_deviation_back():
    weight = np.random.default_rng(2).normal(0.3, 1.0, size=(1, 5, 500))
    rows = with_variance(weight, fit(weight, None, grids(2)), grids(2))
    np.testing.assert_allclose(rows.values().mean(axis=2), weight.mean(axis=2), atol=2e-3)
    np.testing.assert_allclose(rows.values().std(axis=2), weight.std(axis=2), rtol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("memory", [trellis.SHORT, trellis.LONG])
@pytest.mark.parametrize("data", [True, False])
def test_a_trellis_lowers_the_error(bits, data, memory):
    with_trellis = without = 0.0
    for seed in range(4):
        weight, moments = problem(seed, rows=24, columns=200, samples=400)
        for coded in (memory, 0):
            wanted = Grids(IntFormat(bits, signed=False, trellis=coded))
            rows = fit(weight, moments if data else None, wanted)
            found = errors(weight, rows, moments if data else np.eye(200)[None]).sum()
            with_trellis, without = (
                (with_trellis + found, without) if coded else (with_trellis, without + found)
            )
    assert with_trellis < 0.9 * without


def test_short_rows_keep_a_uniform_grid():
    weight = np.random.default_rng(0).normal(size=(16, 1, 9))
    fmt = IntFormat(4, signed=False, trellis=trellis.SHORT)
    assert not fit(weight, None, Grids(fmt)).format.trellis


@pytest.mark.parametrize("memory", [trellis.SHORT, trellis.LONG])
def test_codes_of_a_trellis_stand_for_its_points(memory):
    weight, moments = problem(3, rows=13, columns=64)
    rows = fit(weight, moments, Grids(IntFormat(3, signed=False, trellis=memory)))
    np.testing.assert_array_equal(trellis.points(rows.codes()[0].T, 3, memory).T, rows.points[0])


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pruned_weights_stay_zeros_and_the_others_make_up_for_it(bits, data):
    found = nearest = 0.0
    for seed in range(5):
        weight, moments = problem(seed, columns=16)
        kept = np.random.default_rng(seed).random(weight.shape) > 0.6
        pruned = np.where(kept, weight, 0.0)
        rows = fit(pruned, moments if data else None, grids(bits, integer_zero=True), kept)
        assert (rows.values()[~kept] == 0).all()
        found += errors(pruned, rows, moments).sum()
        step = np.abs(pruned).max(axis=2, keepdims=True) / ((1 << bits) // 2 - 0.5)
        rounded = np.rint(pruned / step) * step - pruned
        nearest += np.einsum("grk,gkl,grl->gr", rounded, moments, rounded).sum()
    assert found < (0.6 if data else 1.0) * nearest


@pytest.mark.parametrize("data", [False, True])
def test_a_silent_row_does_not_take_float32_for_all(data):
    weight, moments = problem(0, rows=24, columns=200, samples=400)
    weight[:, 5] *= 1e-12
    rows = fit(weight, moments if data else None, Grids(IntFormat(2, signed=False)))
    np.testing.assert_array_equal(rows.scale.astype(np.float16), rows.scale)
    np.testing.assert_array_equal(rows.zero.astype(np.float16), rows.zero)
    assert np.abs(rows.values()[:, 5]).max() < 1e-3 * np.abs(weight).max()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_scales_of_quiet_rows_are_float16_where_that_costs_next_to_nothing(bits):
    weight, _ = problem(0, rows=24, columns=200, samples=400)
    weight[:, 5] *= 2e-5 / np.abs(weight[:, 5]).max() * 2**bits
    rows = fit(weight, None, Grids(IntFormat(bits, signed=False)))
    np.testing.assert_array_equal(rows.scale.astype(np.float16), rows.scale)
    assert (rows.scale[:, 5] < np.finfo(np.float16).smallest_normal).all()
    # The others tell what codes of so many bits lose.
    noise = np.linalg.norm(rows.values() - weight, axis=2) / np.linalg.norm(weight, axis=2)
    assert (noise[:, 5] < 1.1 * np.delete(noise, 5, axis=1).max(axis=1)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("share", [1e-4, 1e-6, 1e-8])
def test_rows_of_other_units_keep_their_numbers(bits, share):
    weight, _ = problem(0, rows=24, columns=200, samples=400)
    weight[:, 5] *= share
    rows = fit(weight, None, Grids(IntFormat(bits, signed=False)))
    noise = np.linalg.norm(rows.values() - weight, axis=2) / np.linalg.norm(weight, axis=2)
    assert (noise[:, 5] < 1.1 * np.delete(noise, 5, axis=1).max(axis=1)).all()


def test_rows_of_zeros_silence_no_quiet_ones():
    weight, _ = problem(0, rows=24, columns=200, samples=400)
    weight *= 1e-7
    weight[:, 5] = 0
    rows = fit(weight, None, Grids(IntFormat(4, signed=False)))
    assert (rows.values()[:, 5] == 0).all()
    assert np.linalg.norm(rows.values() - weight) < 0.1 * np.linalg.norm(weight)


@pytest.mark.parametrize("memory", [trellis.SHORT, trellis.LONG])
def test_levels_stay_about_their_middle_in_silent_rows_too(memory):
    weight, moments = problem(0, rows=24, columns=200, samples=400)
    weight[:, 5] *= 1e-12
    fmt = IntFormat(4, signed=False, trellis=memory)
    rows = fit(weight, moments, Grids(fmt, symmetric=True))
    assert set(rows.zero.flat) == {7.5}
    assert np.abs(rows.values()[:, 5]).max() < 1e-3 * np.abs(weight).max()


def test_quiet_rows_beside_quiet_ones_keep_their_scales():
    weight, _ = problem(0, rows=24, columns=200, samples=400)
    weight *= 1e-9
    weight[:, 5] *= 1e-3
    rows = fit(weight, None, Grids(IntFormat(4, signed=False)))
    noise = np.linalg.norm(rows.values()[:, 5] - weight[:, 5])
    assert noise < 0.3 * np.linalg.norm(weight[:, 5])
