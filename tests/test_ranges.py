"""Range methods: against brute force on the raw data, hand-made cases, and what must hold for any
data.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.affine import INT8, INT8_NARROW, UINT8, IntFormat, QParams
from calib.ranges import RANGE_METHODS, RangeMethod, RangeSpec, range_of, squared_error
from calib.ranges.kl import divergences
from calib.stats import Histogram, TensorStats

ASYMMETRIC = RangeSpec(UINT8, symmetric=False)
SYMMETRIC = RangeSpec(INT8_NARROW, symmetric=True)
SPECS = [
    ASYMMETRIC,
    SYMMETRIC,
    RangeSpec(INT8, symmetric=True, power_of_two=True),
    RangeSpec(IntFormat(4, signed=False), symmetric=False),
    RangeSpec(IntFormat(16, signed=True), symmetric=True),
]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Within float32 the difference of the ends stays finite too.
ANY = st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126) | st.sampled_from(
    [math.nan, math.inf, -math.inf]
)


def stats_of(samples):
    stats = TensorStats(histogram=True, samples=True)
    for i, sample in enumerate(samples):
        stats.update(np.array(sample, np.float32), i)
    return stats


def chosen(name, samples, spec=ASYMMETRIC):
    span = range_of(RANGE_METHODS[name], stats_of(samples), spec)
    return float(span.lo), float(span.hi)


def data(name, size=20_000):
    rng = np.random.default_rng(1)
    made = {
        "normal": rng.standard_normal(size),
        "relu": np.maximum(rng.standard_normal(size), 0),
        "negative": -np.abs(rng.laplace(size=size)),
        "laplace": rng.laplace(size=size),
        "swish": (x := rng.standard_normal(size) * 3) / (1 + np.exp(-x)),
        "outlier": np.append(rng.standard_normal(size - 1), 30.0),
        "skewed": np.concatenate(
            [rng.standard_normal(size // 2) * 0.1, rng.gamma(2, 2, size // 2) - 0.5]
        ),
    }
    return made[name].astype(np.float32)


NAMES = ["normal", "relu", "negative", "laplace", "swish", "outlier", "skewed"]


@pytest.mark.parametrize("method", RANGE_METHODS.values(), ids=RANGE_METHODS.keys())
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format}-{s.symmetric}")
@settings(max_examples=12)
@given(samples=st.lists(st.lists(ANY, max_size=6), max_size=4))
def test_a_range_is_finite_within_the_data_and_contains_zero(method: RangeMethod, spec, samples):
    stats = method.new_stats()
    for i, sample in enumerate(samples):
        stats.update(np.array(sample, np.float32), i)
    span = range_of(method, stats, spec)
    assert span.lo.dtype == span.hi.dtype == np.float64
    assert span.lo.shape == span.hi.shape == ()
    assert min(stats.lo, 0.0) <= span.lo <= 0.0 <= span.hi <= max(stats.hi, 0.0)
    q = spec.qparams(span)
    assert np.isfinite(q.scale) and q.scale > 0
    assert spec.format.qmin <= q.zero_point <= spec.format.qmax


@pytest.mark.parametrize("name", RANGE_METHODS)
@pytest.mark.parametrize(
    "samples", [[], [[]], [[math.nan] * 3], [[0.0] * 5], [[math.inf, -math.inf], [0.0]]]
)
def test_nothing_to_cover_gives_zero(name, samples):
    assert chosen(name, samples) == (0.0, 0.0)


@pytest.mark.parametrize("name", RANGE_METHODS)
@pytest.mark.parametrize("value", [2.5, -1e30, 1e-30, 3.4e38])
def test_a_constant_is_covered(name, value):
    lo, hi = chosen(name, [[value] * 10] * 3)
    value = float(np.float32(value))
    # The largest error that counting the constant as spread over its bin can lead to.
    assert (lo, hi) == pytest.approx((min(value, 0), max(value, 0)), rel=0.01, abs=0)


@pytest.mark.parametrize("name", RANGE_METHODS)
def test_the_data_mirrored_gives_the_range_mirrored(name):
    x = data("skewed", 20_010)
    lo, hi = chosen(name, np.split(x, 10), RangeSpec(INT8, symmetric=False))
    mirrored = chosen(name, np.split(-x, 10), RangeSpec(INT8, symmetric=False))
    assert mirrored == pytest.approx((-hi, -lo), rel=0.05)


def test_max_min_is_the_extremes_with_zero():
    assert chosen("MAX_MIN", [[1.0, -2.0], [5.0, math.nan]]) == (-2.0, 5.0)
    assert chosen("MAX_MIN", [[3.0, 4.0]]) == (0.0, 4.0)


def test_moving_average_by_hand():
    spec = RangeSpec(UINT8, symmetric=False, averaging_constant=0.5)
    samples = [[-1.0, 1.0], [-3.0, 2.0], [0.0, 8.0]]
    assert chosen("MOVING_AVERAGE", samples, spec) == (-1.0, 4.75)
    assert chosen("MOVING_AVERAGE", samples[::-1], spec) == (-1.25, 3.0)


def test_moving_average_follows_the_recurrence_by_index():
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((50, 30)).astype(np.float32)
    stats = TensorStats(histogram=False, samples=True)
    for i in rng.permutation(50):
        stats.update(samples[i], int(i))
    lo, hi = float(samples[0].min()), float(samples[0].max())
    for sample in samples[1:]:
        lo, hi = lo + 0.01 * (float(sample.min()) - lo), hi + 0.01 * (float(sample.max()) - hi)
    span = range_of(RANGE_METHODS["MOVING_AVERAGE"], stats, ASYMMETRIC)
    assert (float(span.lo), float(span.hi)) == pytest.approx((lo, hi), rel=1e-12)


def test_range_abs_max_by_hand():
    spec = RangeSpec(UINT8, symmetric=False, window=2)
    assert chosen("RANGE_ABS_MAX", [[-9.0, 9.0], [-5.0, 1.0], [0.0, 3.0]], spec) == (-5.0, 5.0)
    assert chosen("RANGE_ABS_MAX", [[-9.0, 9.0], [-5.0, 1.0], [0.0, 3.0]]) == (-9.0, 9.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [1e-4, 1e-2])
def test_removal_outlier_is_the_pooled_quantiles(name, ratio):
    x = data(name)
    lo, hi = chosen(
        "REMOVAL_OUTLIER", np.split(x, 10), RangeSpec(UINT8, symmetric=False, outlier_ratio=ratio)
    )
    removed_below, removed_above = np.count_nonzero(x < lo), np.count_nonzero(x > hi)
    width = np.abs(x).max() / 4096
    assert np.count_nonzero(x < lo - width) <= ratio * x.size + 1
    assert np.count_nonzero(x > hi + width) <= ratio * x.size + 1
    assert lo == 0 or removed_below >= ratio * x.size - 1 or lo == x.min()
    assert hi == 0 or removed_above >= ratio * x.size - 1 - np.count_nonzero(
        np.abs(x - hi) <= width
    )


def test_removal_outlier_works_on_small_tensors():
    rng = np.random.default_rng(0)
    samples = rng.uniform(-1, 1, (200, 100))
    samples[7, 3] = 1000.0
    lo, hi = chosen("REMOVAL_OUTLIER", samples)
    assert lo == pytest.approx(-1, abs=0.3)
    assert hi == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile_is_of_the_magnitudes(percentile):
    x = data("skewed")
    lo, hi = chosen(
        "PERCENTILE", np.split(x, 10), RangeSpec(UINT8, symmetric=False, percentile=percentile)
    )
    width = np.abs(x).max() / 4096
    beyond = (1 - percentile / 100) * x.size
    assert (
        np.count_nonzero(np.abs(x) > hi + width)
        <= beyond
        <= np.count_nonzero(np.abs(x) > hi - width) + 1
    )
    assert lo == x.min()


def brute_divergence(counts, cut, levels):
    """KL(P || Q) with one loop over bins, one over levels, in the words of the definition."""
    p = [float(c) for c in counts[:cut]]
    p[-1] += float(sum(counts[cut:]))
    q = [0.0] * cut
    for level in range(levels):
        members = [k for k in range(cut) if k * levels // cut == level]
        filled = [k for k in members if p[k] > 0]
        for k in filled:
            q[k] = sum(float(counts[m]) for m in members) / len(filled)
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return math.inf
    return sum(
        a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a
    )


@given(
    st.lists(st.integers(0, 30).map(lambda n: max(n - 8, 0)), min_size=12, max_size=40),
    st.integers(1, 12),
)
def test_divergences_equal_brute_force(counts, levels):
    if not any(counts):
        counts[0] = 1
    found = divergences(np.array(counts, np.float64), levels)
    expected = [brute_divergence(counts, cut, levels) for cut in range(levels, len(counts) + 1)]
    assert found == pytest.approx(expected, abs=1e-9)


def numpy_divergence(counts, cut, levels):
    level = np.arange(cut) * levels // cut
    p = counts[:cut].astype(np.float64)
    p[-1] += counts[cut:].sum()
    filled = p > 0
    q = (np.bincount(level, counts[:cut]) / np.maximum(np.bincount(level, filled), 1))[
        level
    ] * filled
    with np.errstate(divide="ignore"):
        return float(
            np.sum(p[filled] / p.sum() * np.log(p[filled] / p.sum() / (q[filled] / q.sum())))
        )


@pytest.mark.parametrize(
    ("name", "spec", "levels"),
    [
        ("laplace", SYMMETRIC, 128),
        ("outlier", SYMMETRIC, 128),
        ("relu", ASYMMETRIC, 256),
        ("relu", SYMMETRIC, 128),
    ],
)
def test_kl_is_the_least_divergence_over_2048_bins_of_the_raw_magnitudes(name, spec, levels):
    x = np.abs(data(name, 200_000).astype(np.float64))
    counts, edges = np.histogram(x[x > 0], 2048, (0, x.max()))
    expected = {cut: numpy_divergence(counts, cut, levels) for cut in range(levels, 2049)}
    lo, hi = chosen("KL", [data(name, 200_000)], spec)
    cut = min(round(max(-lo, hi) / edges[1] - 0.5), 2048)
    # Where a bin of the statistics lies across an edge it is shared out, so that the least may be a
    # bin or two away.
    near = [expected[i] for i in range(cut - 2, cut + 3) if i in expected]
    assert min(near) <= min(expected.values()) * 1.05


def test_kl_clips_an_outlier_but_not_a_uniform_distribution():
    assert max(chosen("KL", [data("outlier")])) < 8
    x = np.random.default_rng(0).uniform(-2, 2, 100_000)
    assert chosen("KL", [x]) == pytest.approx((-2, 2), rel=0.01)


def test_kl_counts_all_codes_for_data_of_one_sign():
    x = np.abs(np.random.default_rng(0).standard_t(2, 200_000))
    nine_bits = RangeSpec(IntFormat(9, signed=True, narrow=True), symmetric=True)
    # 256 codes above zero either way, against the 128 of a symmetric 8-bit range.
    assert chosen("KL", [x], ASYMMETRIC) == chosen("KL", [x], nine_bits)
    assert chosen("KL", [-x], ASYMMETRIC)[0] == pytest.approx(
        -chosen("KL", [x], nine_bits)[1], rel=0.01
    )
    assert chosen("KL", [x], ASYMMETRIC)[1] > 1.1 * chosen("KL", [x], SYMMETRIC)[1]


def test_kl_wastes_no_codes_beyond_the_data():
    x = data("swish", 200_000)
    lo, hi = chosen("KL", [x])
    assert lo == x.min()
    assert hi > -10 * lo


def test_kl_does_not_clip_when_there_are_as_many_codes_as_bins():
    x = data("outlier")
    assert chosen("KL", [x], RangeSpec(IntFormat(16, signed=True), symmetric=False)) == (
        x.min(),
        x.max(),
    )


def raw_error(x, lo, hi, spec):
    """The mean squared error of the raw values, with a quantizer of its own."""
    fmt = spec.format
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if spec.symmetric:
        scale, zero = max(-lo, hi) / fmt.qmax, 0
    else:
        scale = (hi - lo) / (fmt.qmax - fmt.qmin)
        zero = round(fmt.qmin - lo / scale)
    codes = np.clip(np.rint(x / scale) + zero, fmt.qmin, fmt.qmax)
    return float(np.mean(((codes - zero) * scale - x) ** 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_within_two_percent_of_brute_force(name, bits, symmetric):
    x = data(name, 4000).astype(np.float64)
    spec = RangeSpec(IntFormat(bits, signed=symmetric, narrow=symmetric), symmetric)
    ends = np.concatenate([np.linspace(0.02, 1, 40), [0.0]])
    if symmetric:
        pairs = [(-t, t) for t in np.abs(x).max() * np.linspace(0.02, 1, 200)]
    else:
        pairs = [(min(x.min(), 0) * a, max(x.max(), 0) * b) for a in ends for b in ends if a + b]
    best = min(raw_error(x, lo, hi, spec) for lo, hi in pairs if lo < hi)
    assert raw_error(x, *chosen("MSE", [x], spec), spec) <= 1.02 * best


@pytest.mark.parametrize("name", NAMES)
def test_squared_error_is_that_of_the_raw_values(name):
    x = data(name, 100_000)
    histogram = stats_of([x]).histogram()
    for spec in (ASYMMETRIC, SYMMETRIC):
        for lo, hi in ((x.min(), x.max()), (x.min() / 3, x.max() / 3)):
            lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
            span = range_of(RANGE_METHODS["MAX_MIN"], stats_of([[lo, hi]]), spec)
            found = squared_error(histogram, spec.qparams(span))
            assert float(found) == pytest.approx(
                raw_error(x.astype(np.float64), lo, hi, spec), rel=0.02
            )


def one_bin(first):
    return Histogram(np.array([10]), first, 1.0, 0)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (0, 1 / 12),  # evenly over [0, 1): rounded
        (7, 1 / 12),
        (255, 1 / 3),  # over [255, 256): clipped to 255
        (300, (46**3 - 45**3) / 3),  # over [300, 301): clipped to 255
        (-3, (3**3 - 2**3) / 3),  # over [-3, -2): clipped to 0
    ],
)
def test_squared_error_by_hand(first, expected):
    q = QParams(np.array(1, np.float32), np.array(0, np.uint8), UINT8)
    assert float(squared_error(one_bin(first), q)) == pytest.approx(expected, rel=1e-12)


def test_squared_error_of_a_step_far_wider_and_far_finer_than_a_bin():
    wide = QParams(np.array(1024, np.float32), np.array(0, np.uint8), UINT8)
    assert float(squared_error(one_bin(1), wide)) == pytest.approx((2**3 - 1) / 3, rel=1e-12)
    fine = QParams(np.array(2**-7, np.float32), np.array(0, np.uint8), UINT8)
    assert float(squared_error(one_bin(0), fine)) == pytest.approx(2**-14 / 12, rel=1e-9)


def test_exact_zeros_have_no_error():
    some, diluted = data("normal", 1000), np.append(data("normal", 1000), np.zeros(3000))
    q = SYMMETRIC.qparams(range_of(RANGE_METHODS["MAX_MIN"], stats_of([some]), SYMMETRIC))
    alone = float(squared_error(stats_of([some]).histogram(), q))
    assert float(squared_error(stats_of([diluted]).histogram(), q)) == pytest.approx(
        alone / 4, rel=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_auto_has_the_least_error_of_all(name, spec):
    x = data(name)
    stats = stats_of([x])
    error = {
        method: float(
            squared_error(
                stats.histogram(), spec.qparams(range_of(RANGE_METHODS[method], stats, spec))
            )
        )
        for method in ("MAX_MIN", "KL", "REMOVAL_OUTLIER", "PERCENTILE", "MSE", "AUTO")
    }
    assert error["AUTO"] == min(error.values())
    assert error["AUTO"] <= 1.001 * error["MAX_MIN"]


def test_auto_prefers_max_min_where_no_method_is_better():
    # So small that every range gets the same scale.
    values = np.linspace(1e-32, 1e-30, 5000)
    spec = RangeSpec(UINT8, symmetric=False, percentile=90, outlier_ratio=0.1)
    assert chosen("AUTO", [values], spec) == chosen("MAX_MIN", [values], spec)
    assert chosen("PERCENTILE", [values], spec) != chosen("MAX_MIN", [values], spec)


@given(st.lists(st.lists(FINITE, min_size=1, max_size=5), min_size=1, max_size=5), st.data())
def test_every_method_gives_the_same_range_for_any_order(samples, draw):
    order = draw.draw(st.permutations(range(len(samples))))
    shuffled = TensorStats(histogram=True, samples=True)
    for i in order:
        shuffled.update(np.array(samples[i], np.float32), i)
    for method in RANGE_METHODS.values():
        assert range_of(method, shuffled, SYMMETRIC) == range_of(
            method, stats_of(samples), SYMMETRIC
        )


def test_methods_refuse_statistics_without_what_they_need():
    bare = TensorStats(histogram=False)
    bare.update(np.ones(3), 0)
    for method in RANGE_METHODS.values():
        if method.needs_histogram or method.needs_samples:
            with pytest.raises(ValueError, match="made without"):
                range_of(method, bare, ASYMMETRIC)
