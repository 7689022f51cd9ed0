"""Scales of long rows, against the error that every one of many scales leaves in float64."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal

from calib.affine import INT8_NARROW
from converter.plan.matrices import breaks_bound
from converter.plan.targets import PAIR_LIMIT
from converter.weights import long_rows
from converter.weights.gptq import Grid, nearest
from converter.weights.long_rows import rounded_to_nearest

PLAIN, PAIRED = Grid(INT8_NARROW), Grid(INT8_NARROW, PAIR_LIMIT)
KINDS = {
    "normal": normal(1, 40, 768),
    "heavy": np.random.default_rng(0).standard_t(4, (1, 40, 768)).astype(np.float32),
    "one loud": normal(1, 40, 768) * np.where(np.arange(768) == 5, 30, 1).astype(np.float32),
}


def energy(matrix, codes, scale):
    """Of what rounding leaves of each row."""
    return np.square(codes * scale[..., None] - matrix.astype(np.float64)).sum(axis=2)


def least(matrix, grid):
    """With the best of two hundred scales a row."""
    widest = np.abs(matrix.astype(np.float64)).max(axis=2) / grid.format.qmax
    tried = [widest * share for share in np.geomspace(0.6, 2.2, 200)]
    codes = [nearest(matrix / scale[..., None], grid) for scale in tried]
    return np.min([energy(matrix, c, s) for c, s in zip(codes, tried, strict=True)], axis=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [PLAIN, PAIRED])
def test_long_rows_lose_next_to_no_more_than_with_the_best_scale(kind, grid):
    matrix = KINDS[kind]
    codes, scale = rounded_to_nearest(matrix, grid)
    assert energy(matrix, codes, scale).sum() < 1.12 * least(matrix, grid).sum()


def test_no_pair_breaks_the_bound():
    codes, _ = rounded_to_nearest(KINDS["heavy"], PAIRED)
    assert codes.dtype == np.int8
    assert not breaks_bound(codes, PAIR_LIMIT).any()


def test_rows_do_not_know_of_each_other(monkeypatch):
    whole = rounded_to_nearest(KINDS["normal"], PAIRED)
    monkeypatch.setattr(long_rows, "PART", 9 * 768)
    for found, wanted in zip(rounded_to_nearest(KINDS["normal"], PAIRED), whole, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_rows_of_zeros_have_the_scale_1():
    codes, scale = rounded_to_nearest(np.zeros((1, 3, 600), np.float32), PAIRED)
    assert not codes.any()
    assert (scale == 1).all()
