"""Intervals and tests of shares and ratios, against tables and exact sums."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calib.intervals import drop_interval, ratio_interval, share_interval, sign_test


# Wilson's interval as printed in textbooks: 81 of 263 (Newcombe 1998, table I), and the ends.
@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_shares_have_the_intervals_of_the_literature(count, total, low, high):
    assert share_interval(count, total) == pytest.approx((low, high), abs=1e-4)


def test_all_and_none_reach_the_ends():
    assert share_interval(0, 7)[0] == 0 and share_interval(7, 7)[1] == 1
    assert share_interval(0, 0) == (0.0, 1.0)


def test_an_interval_narrows_with_the_root_of_the_count():
    widths = [np.ptp(share_interval(n // 2, n)) for n in (100, 10_000)]
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.05)


def test_the_sign_test_counts_coin_throws():
    for wins, losses in [(0, 0), (3, 0), (10, 2), (5, 5), (1, 9)]:
        total = wins + losses
        throws = [bin(x).count("1") >= wins for x in range(2**total)]
        assert sign_test(wins, losses) == pytest.approx(np.mean(throws))


def test_a_drop_of_pairs_covers_the_true_one_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    lost, won, total = 0.06, 0.03, 200
    for _ in range(2000):
        drawn = rng.multinomial(total, [lost, won, 1 - lost - won])
        low, high = drop_interval(int(drawn[0]), int(drawn[1]), total)
        covered += low <= lost - won <= high
    assert 0.93 < covered / 2000 < 0.98


def test_no_pair_says_nothing():
    assert drop_interval(0, 0, 0) == (-1.0, 1.0)
    low, high = drop_interval(0, 0, 48)
    assert low < 0 < high and high > 0.02  # 48 samples cannot show a loss of 1 %


def test_a_ratio_of_times_lies_in_its_interval():
    rng = np.random.default_rng(1)
    first, second = 2 + rng.random(60), 1 + rng.random(60)
    low, high = ratio_interval(first.tolist(), second.tolist())
    assert low < 2.5 / 1.5 < high and high - low < 0.6
    assert ratio_interval(first.tolist(), second.tolist()) == (low, high)
    assert ratio_interval([3.0] * 9, [2.0] * 9) == (1.5, 1.5)
    assert math.isfinite(low)
