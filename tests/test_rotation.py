"""Rotations of weights: what they are, that float32 holds their sums, and what they are for."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib import trellis
from calib.affine import IntFormat, QParams, dequantize
from calib.rotation import rotation
from converter.plan.matrices import ConvView, ProductView
from converter.plan.plan import PerAxis, WeightPlan
from converter.weights import stored

SIDES = st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 9, 12, 13, 16, 20, 44]), min_size=1, max_size=3)
TWO = np.array([[1, 1], [1, -1]])
FOUR = np.array([[1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, 1, -1], [-1, -1, -1, 1]])
THREE = np.array([[1, -2, -2], [-2, 1, -2], [-2, -2, 1]])


def as_matrix(*sides):
    return rotation(sides)(np.eye(math.prod(sides)))


def heavy(*shape, seed=0):
    """Numbers of which a few are large."""
    return np.random.default_rng(seed).standard_t(3, shape)


@pytest.mark.parametrize(
    ("sides", "factors", "power"),
    [
        ((8,), [FOUR, TWO], 2),
        ((12,), [FOUR, THREE], 3),
        ((3, 4), [THREE, FOUR], 3),
        ((16, 1, 3), [FOUR, FOUR, THREE], 4),
        ((13,), [np.eye(13)], 0),
        ((26, 2), [np.eye(13), TWO, TWO], 1),
    ],
)
def test_it_is_a_product_of_small_integers(sides, factors, power):
    expected = reduce(np.kron, factors)
    found = as_matrix(*sides)
    scaled = found * np.abs(expected).max() / np.abs(found).max()
    np.testing.assert_array_equal(scaled, expected)
    assert np.log2(np.abs(expected).max() / np.abs(found).max()) == power


@given(SIDES)
def test_it_is_its_own_inverse_but_for_a_factor_near_one(sides):
    turn, rows = rotation(tuple(sides)), heavy(3, math.prod(sides))
    np.testing.assert_allclose(turn(turn(rows)), turn.square * rows, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(turn.inverse(turn(rows)), rows, rtol=1e-9, atol=1e-9)
    assert 0.5 <= turn.square <= 2


@given(SIDES)
def test_its_sums_are_exact_in_float32(sides):
    columns = math.prod(sides)
    codes = np.random.default_rng(columns).integers(0, 16, (64, columns))
    steps = trellis.points(codes, 4, trellis.LONG) - trellis.middle(4)
    turn = rotation(tuple(sides))
    single = steps.astype(np.float32)
    for before, matrix in turn.steps:
        some = single.reshape(-1, len(matrix), columns // (before * len(matrix)))
        single = np.matmul(matrix.astype(np.float16).astype(np.float32), some)
    np.testing.assert_array_equal(single.reshape(steps.shape), turn(steps))


@pytest.mark.parametrize("sides", [(4096,), (512, 3, 3), (5120,), (7, 7, 128), (11008,)])
def test_no_sum_is_too_large(sides):
    turn = rotation(sides)
    row = turn(np.eye(1, math.prod(sides)))
    assert np.abs(row).sum() / np.abs(row[row != 0]).min() <= 1 << 13
    assert turn.mixed >= 128


def test_moments_turn_with_their_inputs():
    turn, x = rotation((6, 4)), heavy(100, 24)
    expected = turn(x).T @ turn(x)
    np.testing.assert_allclose(turn.moments((x.T @ x)[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_the_order_of_sides_does_not_matter():
    kernels = heavy(2, 24, 3, 5)
    one = rotation((24, 3, 5))(kernels.reshape(2, -1)).reshape(kernels.shape)
    moved = np.moveaxis(kernels, 1, -1)
    other = rotation((3, 5, 24))(moved.reshape(2, -1)).reshape(moved.shape)
    np.testing.assert_allclose(np.moveaxis(other, -1, 1), one, rtol=1e-9, atol=1e-9)


def test_any_numbers_become_normal_ones():
    def fourth(rows):
        squares = np.square(rows - rows.mean())
        return np.square(squares).mean() / np.square(squares.mean())

    for rows in (heavy(1, 384), np.full((1, 384), 0.3), np.eye(1, 384)):
        turned = rotation((384,))(rows + 0.01 * heavy(1, 384, seed=1))
        assert fourth(turned) < 3.6


# --- in the fit of weights

CASES = {
    "1x1": (ConvView((48, 384, 1, 1), 1, (1, 1), (1, 1), (0, 0, 0, 0), "NOTSET"), 0),
    "3x3": (ConvView((32, 64, 3, 3), 1, (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET"), 0),
    "groups": (ConvView((64, 32, 3, 3), 4, (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET"), 0),
    "product": (ProductView(transposed=False), 1),
    "transposed": (ProductView(transposed=True), 0),
}


def fitted(view, axis, weight, bits=3, sides=None):
    """What a weight becomes that is fitted to normal inputs."""
    matrix = view.matrix(weight)
    x = heavy(len(matrix), 4096, matrix.shape[2], seed=7).astype(np.float32)
    wanted = WeightPlan("w", 1, IntFormat(bits, signed=False), PerAxis(axis))
    sides = view.sides(weight) if sides is None else sides
    pair = stored.Inputs(x, x, centered=False)
    rows = stored.fitted_to_outputs(
        matrix, pair, wanted, stored.Storage(True), sides=sides, threads=1
    )
    return stored.packed(rows, view.weight(rows.codes()), wanted)


def error(weight, found):
    rest = dequantize(found.codes, found.qparams) - weight
    return float(np.square(rest).sum() / np.square(weight).sum())


@pytest.mark.parametrize("case", CASES)
def test_weights_of_which_few_are_large_lose_less(case):
    view, axis = CASES[case]
    shape = view.shape if isinstance(view, ConvView) else (192, 128)
    weight = heavy(*shape, seed=3)
    rotated, plain = fitted(view, axis, weight), fitted(view, axis, weight, sides=())
    assert rotated.qparams.format.rotated
    assert not plain.qparams.format.rotated
    assert error(weight, rotated) < 0.8 * error(weight, plain)


def test_a_rotation_is_to_pay_for_its_nodes():
    view, axis = CASES["product"]
    rng = np.random.default_rng(0)

    def rotates(weight, bits=3):
        return fitted(view, axis, weight, bits).qparams.format.rotated

    assert rotates(rng.laplace(size=(192, 128)))
    assert not rotates(rng.standard_normal((192, 128)))
    assert not rotates(rng.laplace(size=(64, 64)))
    assert not rotates(rng.laplace(size=(191, 128)))  # a prime mixes nothing
    assert not rotates(rng.laplace(size=(192, 128)), bits=8)


@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 3), 0), ((4, 3, 6), 2), ((12, 6), 1)])
def test_codes_stand_for_what_the_definition_says(shape, axis):
    codes = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    fmt = IntFormat(4, signed=False, trellis=trellis.LONG, rotated=True)
    scale = np.arange(1.0, 7.0, dtype=np.float32)
    found = dequantize(codes, QParams(scale, np.full(6, 7.5, np.float32), fmt, axis))
    points = trellis.points(np.moveaxis(codes, axis, -1), 4, trellis.LONG)  # (4, 3, 6) or (12, 6)
    turned = np.kron(FOUR, THREE) / 8 @ (points.reshape(12, 6) - 7.5) * scale
    expected = np.moveaxis(turned.reshape(points.shape), -1, axis)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_without_data_weights_are_rotated_as_well_and_keep_their_energy():
    def found(columns):
        weight = np.random.default_rng(0).laplace(size=(columns, 128)).astype(np.float32)
        wanted = WeightPlan("w", 1, IntFormat(3, signed=False), PerAxis(1))
        return weight, stored.fitted_alone(weight, wanted, stored.Storage())

    (weight, rotated), (other, plain) = found(192), found(191)
    assert rotated.qparams.format.rotated
    assert not plain.qparams.format.rotated
    assert error(weight, rotated) < 0.8 * error(other, plain)
    energy = [
        np.square(x).sum(axis=0) for x in (weight, dequantize(rotated.codes, rotated.qparams))
    ]
    np.testing.assert_allclose(*energy, rtol=0.05)
