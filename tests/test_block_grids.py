"""Grids for blocks and channels of a weight, against arithmetic in float64: which they are, what
they lose, which weights keep their codes.
"""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal

from calib.affine import IntFormat, dequantize
from converter.plan.plan import PerAxis, PerBlock, WeightPlan
from converter.weights import block_grids
from converter.weights.block_grids import fitted

BLOCK = 32


def wanted(bits, axis=1, size=BLOCK):
    granularity = PerBlock(axis, size) if size else PerAxis(axis)
    return WeightPlan("w", 1, IntFormat(bits, signed=False), granularity)


def restored(weight):
    return dequantize(weight.codes, weight.qparams).astype(np.float64)


def blocks(weight):
    """The weight of a product (columns, channels) as (blocks, size, channels)."""
    return weight.astype(np.float64).reshape(-1, BLOCK, weight.shape[1])


def errors(weight, other, counts=None):
    """Squared, of every block."""
    columns = np.ones(len(weight)) if counts is None else counts
    square = np.square(blocks(weight) - blocks(other))
    return (square * columns.reshape(-1, BLOCK, 1)).sum(axis=1)


def covering(weight, bits):
    """Every block on the grid that covers it, as min-max quantization does: float64."""
    parts, levels = blocks(weight), 2**bits - 1
    low = np.minimum(parts.min(axis=1, keepdims=True), 0)
    high = np.maximum(parts.max(axis=1, keepdims=True), 0)
    scale = (high - low) / levels
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(parts / scale) + zero, 0, levels)
    return ((codes - zero) * scale).reshape(weight.shape)


def k_quants(weight, bits):
    """As llama.cpp searches scale and minimum (make_qkx2_quants), all weights counting alike, with
    the minimum rounded to a whole zero: float64.
    """
    parts, levels = blocks(weight), 2**bits - 1
    low = np.minimum(parts.min(axis=1, keepdims=True), 0)
    span, best = parts.max(axis=1, keepdims=True) - low, None
    for wish in [levels, *(levels - 1 + 0.1 * np.arange(20))]:
        codes = np.clip(np.rint((parts - low) * wish / span), 0, levels)
        mean, code_mean = (x.mean(axis=1, keepdims=True) for x in (parts, codes))
        scale = ((codes - code_mean) * (parts - mean)).sum(axis=1, keepdims=True)
        scale /= np.square(codes - code_mean).sum(axis=1, keepdims=True)
        zero = np.clip(np.rint(code_mean - mean / scale), 0, levels)
        steps = np.clip(np.rint(parts / scale + zero), 0, levels) - zero
        scale = (steps * parts).sum(axis=1, keepdims=True)
        scale /= np.square(steps).sum(axis=1, keepdims=True)
        error = np.square(steps * scale - parts).sum(axis=1, keepdims=True)
        better = best is None or error < best[0]
        best = [
            np.where(better, x, y)
            for x, y in zip((error, steps * scale), best or (error, parts), strict=True)
        ]
    return best[1].reshape(weight.shape)


def half_quadratic(weight, bits, rounds=20, power=0.7):
    """Badri and Shaji, "Half-Quadratic Quantization" (2023): the zero that makes the sum of |error|
    to the `power` least, then whole; scales as they cover a block: float64.
    """
    parts, levels, beta = blocks(weight), 2**bits - 1, 10.0
    low, high = (f(parts, axis=1, keepdims=True) for f in (np.min, np.max))
    scale = (high - low) / levels
    zero = -low / scale
    for _ in range(rounds):
        codes = np.clip(np.rint(parts / scale + zero), 0, levels)
        error = parts - (codes - zero) * scale
        size = np.maximum(np.abs(error), 1e-12)
        error = np.sign(error) * np.maximum(0, size - size ** (power - 1) / beta)
        zero = (codes - (parts - error) / scale).mean(axis=1, keepdims=True)
        beta *= 1.01
    zero = np.clip(np.rint(zero), 0, levels)
    codes = np.clip(np.rint(parts / scale + zero), 0, levels)
    return ((codes - zero) * scale).reshape(weight.shape)


KINDS = {
    "normal": normal(512, 96),
    "heavy": np.random.default_rng(0).standard_t(4, (512, 96)).astype(np.float32),
    "even": np.random.default_rng(1).uniform(-1, 1, (512, 96)).astype(np.float32),
    "to one side": normal(512, 96, seed=1) + np.float32(0.7),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peer", [covering, k_quants, half_quadratic])
def test_blocks_in_4_bits_lose_no_more_than_by_known_ways(kind, peer):
    weight = KINDS[kind]
    own = errors(weight, restored(fitted(weight, wanted(4), None))).sum()
    assert own < errors(weight, peer(weight, 4)).sum()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.9), (4, 0.92)])
def test_blocks_lose_less_than_on_the_grids_that_cover_them(bits, share):
    weight = KINDS["normal"]
    own = errors(weight, restored(fitted(weight, wanted(bits), None))).sum()
    assert own < share * errors(weight, covering(weight, bits)).sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_is_the_nearest_of_its_grid(bits):
    weight = normal(96, 40)
    found = fitted(weight, wanted(bits), None)
    scale, zero = found.qparams.scale.astype(np.float64), found.qparams.zero_point
    assert found.codes.dtype == np.uint8
    assert found.codes.max() < 2**bits
    assert np.array_equal(zero, np.rint(zero)) and zero.min() >= 0 and zero.max() < 2**bits
    levels = (np.arange(2**bits)[:, None, None] - zero) * scale
    nearest = np.abs(blocks(weight)[None] - levels[:, :, None]).min(axis=0)
    own = np.abs(blocks(weight) - blocks(restored(found)))
    np.testing.assert_allclose(own, nearest, atol=1e-6 * np.abs(weight).max())


def test_the_scale_is_the_best_for_the_codes():
    weight = normal(64, 50)
    found = fitted(weight, wanted(4), None)
    steps = found.codes.reshape(-1, BLOCK, 50) - found.qparams.zero_point[:, None].astype(float)
    best = (steps * blocks(weight)).sum(axis=1) / np.square(steps).sum(axis=1)
    # Codes are chosen once more for the scale, which moves few of them.
    assert np.median(np.abs(found.qparams.scale / best - 1)) < 0.005


def test_columns_that_count_lose_less():
    weight, counts = normal(128, 60), np.where(np.arange(128) % 8 == 0, 100.0, 1.0)
    alike, own = (restored(fitted(weight, wanted(4), c)) for c in (None, counts))
    assert errors(weight, own, counts).sum() < 0.6 * errors(weight, alike, counts).sum()


@pytest.mark.parametrize("counts", [np.zeros(64), np.full(64, np.nan), np.ones(3)])
def test_what_tells_nothing_changes_nothing(counts):
    weight = normal(64, 20)
    own, alike = (fitted(weight, wanted(4), c) for c in (counts, None))
    np.testing.assert_array_equal(own.codes, alike.codes)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [BLOCK, None])
def test_a_weight_and_its_transposed_get_the_same(axis, size):
    weight = normal(64, 48) if axis else normal(48, 64)
    own = fitted(weight, wanted(4, axis, size), None)
    other = fitted(np.ascontiguousarray(weight.T), wanted(4, 1 - axis, size), None)
    np.testing.assert_array_equal(own.codes, other.codes.T)
    np.testing.assert_array_equal(own.qparams.scale, other.qparams.scale.T)


def test_parts_do_not_show(monkeypatch):
    weight, counts = normal(160, 70), np.arange(1.0, 161)
    whole = fitted(weight, wanted(4), counts)
    monkeypatch.setattr(block_grids, "PART", 7 * BLOCK)
    parts = fitted(weight, wanted(4), counts)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.qparams.scale, parts.qparams.scale)


@pytest.mark.parametrize("kernel", [(3, 3), (5,)])
def test_a_convolution_has_a_grid_for_every_channel(kernel):
    weight = normal(6, 4, *kernel)
    found = fitted(weight, wanted(8, 0, None), None)
    assert found.codes.shape == weight.shape
    assert found.qparams.scale.shape == (6,)
    assert np.abs(restored(found) - weight).max() < np.abs(weight).max() / 100


# --- weights that were quantized before


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("middle", [True, False])
def test_codes_of_an_earlier_quantization_are_found_again(bits, middle):
    rng = np.random.default_rng(bits)
    zero = np.full((3, 1, 40), 2 ** (bits - 1)) if middle else rng.integers(0, 2**bits, (3, 1, 40))
    codes = rng.integers(0, 2**bits, (3, BLOCK, 40))
    scale = rng.uniform(0.5, 2, (3, 1, 40)).astype(np.float16).astype(np.float32)
    weight = ((codes - zero) * scale).astype(np.float32).reshape(96, 40)
    found = fitted(weight, wanted(bits), np.arange(1.0, 97))
    np.testing.assert_array_equal(restored(found).astype(np.float32), weight)


def test_symmetric_codes_of_8_bits_are_found_again():
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (4, BLOCK, 30))
    codes[:, 0] = 127
    scale = rng.uniform(0.5, 2, (4, 1, 30)).astype(np.float16).astype(np.float32)
    weight = (codes * scale).astype(np.float32).reshape(-1, 30)
    found = fitted(weight, wanted(8), None)
    np.testing.assert_array_equal(restored(found).astype(np.float32), weight)


def test_a_weight_of_zeros_stays_one():
    found = fitted(np.zeros((64, 8), np.float32), wanted(4), None)
    assert not restored(found).any()
    assert np.isfinite(found.qparams.scale).all()


def test_the_smallest_numbers_do_not_divide_by_zero():
    weight = normal(64, 8) * np.float32(1e-30)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(restored(fitted(weight, wanted(4), None))).all()
