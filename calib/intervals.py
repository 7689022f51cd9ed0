"""How sure a figure is: intervals of shares and ratios, and whether one of two wins by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# The quantile of the normal distribution that leaves 2.5 % at each end.
Z95 = 1.959964
RESAMPLED = 400
Interval = tuple[float, float]


def share_interval(count: int, total: int) -> Interval:
    """The 95 % interval of a share of which `count` of `total` were seen.

    Wilson's score interval: Wilson, "Probable inference", JASA 22 (1927). (0, 1) for no total.
    """
    if not total:
        return 0.0, 1.0
    share, z2 = count / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    half = Z95 * spread / (1 + z2 / total)
    low = 0.0 if count == 0 else centre - half
    return low, 1.0 if count == total else centre + half


def drop_interval(lost: int, won: int, total: int) -> Interval:
    """The 95 % interval of the share that is lost on the whole where, of `total` pairs, `lost`
    turned from right to wrong and `won` the other way.

    Agresti and Min's interval of paired shares, Statistics in Medicine 24 (2005): half a pair is
    added to each of the four cells. (-1, 1) for no total.
    """
    if not total:
        return -1.0, 1.0
    pairs, first, second = total + 2, lost + 0.5, won + 0.5
    centre = (first - second) / pairs
    half = Z95 * math.sqrt(first + second - (first - second) ** 2 / pairs) / pairs
    return centre - half, centre + half


def sign_test(wins: int, losses: int) -> float:
    """The chance of so many wins or more if each side were as likely to win (ties left out)."""
    total = wins + losses
    ways = sum(math.comb(total, k) for k in range(wins, total + 1))
    return float(ways / 2**total)


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The 95 % interval of the ratio of two medians of paired measurements, by the percentiles of
    resampled pairs (Efron's bootstrap); the same for the same numbers.
    """
    pairs = np.array([first, second])
    rng = np.random.default_rng(0)
    drawn = rng.integers(
        0,
        pairs.shape[1],
        (RESAMPLED, pairs.shape[1]),
    )
    over, under = np.median(pairs[:, drawn], axis=2)
    low, high = np.percentile(over / under, [2.5, 97.5])
    return float(low), float(high)
