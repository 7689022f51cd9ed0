"""Bits by sensitivity against exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from converter.algorithms.bit_search import WIDTHS, pareto


def noise(seed, count=3):
    rng = np.random.default_rng(seed)
    names = [f"w{i}" for i in range(count)]
    falling = rng.uniform(0.1, 9, (count, 1)) * 4.0 ** -np.array(WIDTHS) * rng.uniform(0.5, 2, (count, len(WIDTHS)))
    errors = {name: row.tolist() for name, row in zip(names, falling, strict=True)}
    return errors, dict(zip(names, map(int, rng.integers(1, 500, count)), strict=True))


def total(errors, sizes, bits):
    error = sum(errors[name][WIDTHS.index(bits[name])] for name in errors)
    return sum(sizes[name] * bits[name] for name in errors), error


@pytest.mark.parametrize("seed", range(8))
def test_no_allocation_beats_a_step_of_the_path(seed):
    errors, sizes = noise(seed)
    everything = [
        total(errors, sizes, dict(zip(errors, bits, strict=True))) for bits in itertools.product(WIDTHS, repeat=3)
    ]
    bits = dict.fromkeys(errors, WIDTHS[0])
    for step in pareto(errors, sizes):
        assert step.bits > bits[step.name]
        bits[step.name] = step.bits
        assert (step.size, step.error) == pytest.approx(total(errors, sizes, bits))
        assert not [e for size, e in everything if size <= step.size and e < step.error * (1 - 1e-9)]


def test_bits_that_buy_nothing_are_not_spent():
    worse = [1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert [step.bits for step in pareto({"w": worse}, {"w": 10})] == [3]
    assert pareto({"w": [1.0] * len(WIDTHS)}, {"w": 10}) == []
