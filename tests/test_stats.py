"""Streaming statistics: against plain arithmetic on all values at once, and the same to the bit in
any order.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib import CalibError
from calib.stats import SIDE, TensorStats

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
SAMPLES = st.lists(st.lists(FLOATS, max_size=8), max_size=8)


def stats_of(samples, order=None, histogram=True, per_sample=True):
    stats = TensorStats(histogram, per_sample)
    for i in range(len(samples)) if order is None else order:
        stats.update(np.array(samples[i], np.float32), i)
    return stats


def as_bytes(stats):
    return {name: (array.shape, array.tobytes()) for name, array in stats.to_arrays().items()}


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@given(SAMPLES, st.data())
def test_the_order_of_samples_does_not_matter(samples, data):
    order = data.draw(st.permutations(range(len(samples))))
    assert as_bytes(stats_of(samples, order)) == as_bytes(stats_of(samples))


@given(SAMPLES, st.data())
def test_merging_parts_equals_one_stream(samples, data):
    order = data.draw(st.permutations(range(len(samples))))
    cut = data.draw(st.integers(0, len(samples)))
    merged = stats_of(samples, order[:cut]).merge(stats_of(samples, order[cut:]))
    assert as_bytes(merged) == as_bytes(stats_of(samples))


@given(st.lists(FLOATS, max_size=30), st.data())
def test_the_split_of_a_sample_and_the_order_of_its_values_do_not_matter(values, data):
    shuffled = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    parts = TensorStats(True, True)
    parts.update(np.array(shuffled[:cut], np.float32), 0)
    parts.update(np.array(shuffled[cut:], np.float32), 0)
    assert as_bytes(parts) == as_bytes(stats_of([values]))


def test_order_and_workers_with_growing_magnitudes():
    samples = [normal(1000, seed) * np.float32(2.0 ** (seed - 10)) for seed in range(20)]
    forward, backward = stats_of(samples), stats_of(samples, range(19, -1, -1))
    workers = stats_of(samples, range(0, 20, 2)).merge(stats_of(samples, range(19, 0, -2)))
    assert as_bytes(forward) == as_bytes(backward) == as_bytes(workers)


def test_merge_changes_neither_part():
    a, b = stats_of([[1.0, 2.0]]), stats_of([[], [-300.0]], [1])
    before = as_bytes(a), as_bytes(b)
    a.merge(b)
    assert (as_bytes(a), as_bytes(b)) == before


@given(SAMPLES)
def test_counts_and_extremes(samples):
    stats = stats_of(samples)
    values = [v for sample in samples for v in sample]
    finite = [v for v in values if math.isfinite(v)]
    assert stats.count == len(finite)
    assert stats.nan_count == sum(math.isnan(v) for v in values)
    assert stats.inf_count == sum(math.isinf(v) for v in values)
    assert stats.zero_count == finite.count(0.0)
    assert (stats.lo, stats.hi) == (min(finite, default=0.0), max(finite, default=0.0))


@given(SAMPLES)
def test_extremes_of_each_sample_by_index(samples):
    stats = stats_of(samples)
    finite = [[v for v in sample if math.isfinite(v)] for sample in samples]
    assert stats.sample_extremes.tolist() == [
        [min(sample), max(sample)] for sample in finite if sample
    ]


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_histogram_counts_equal_numpy_on_the_same_edges(values):
    finite = [v for v in values if math.isfinite(v)]
    stats = stats_of([values])
    if not finite:
        with pytest.raises(ValueError, match="finite"):
            stats.histogram()
        return
    histogram = stats.histogram()
    expected = np.searchsorted(np.sort(finite), histogram.edges)
    assert np.array_equal(histogram.counts, np.diff(expected))
    assert histogram.edges[0] <= min(finite) and max(finite) < histogram.edges[-1]
    assert histogram.zeros == finite.count(0.0)


def test_histogram_of_many_values_equals_numpy():
    x = normal(100_003)
    histogram = stats_of([x]).histogram()
    assert np.array_equal(histogram.counts, np.histogram(x.astype(np.float64), histogram.edges)[0])
    assert histogram.counts.sum() == x.size


@given(st.floats(width=32, min_value=2.0**-149, max_value=2.0**127))
def test_the_largest_magnitude_reaches_into_the_upper_half_of_the_bins(top):
    histogram = stats_of([[top, 0.0]]).histogram()
    assert SIDE / 2 < histogram.counts.size <= SIDE
    assert math.frexp(histogram.width)[0] == 0.5


@pytest.mark.parametrize("shift", [0.0, 0.7, 20.0, -20.0])
def test_magnitudes_equal_the_histogram_of_absolute_values(shift):
    x = (normal(5000) + np.float32(shift)).astype(np.float64)
    magnitudes = stats_of([x]).histogram().magnitudes()
    steps = np.abs(x) / magnitudes.width
    expected = np.bincount(np.where(x < 0, np.ceil(steps) - 1, np.floor(steps)).astype(int))
    assert np.array_equal(magnitudes.counts, expected)
    assert magnitudes.edges[0] == 0


def test_nonzero_counts_leave_out_exact_zeros_alone():
    tiny = np.float32(1e-30)
    histogram = stats_of([[0.0, -0.0, tiny, -tiny, 1.0, -1.0]]).histogram()
    assert histogram.counts.sum() - histogram.nonzero_counts.sum() == 2
    assert histogram.nonzero_counts[-histogram.first] == 1
    assert histogram.counts[-histogram.first] == 3


@pytest.mark.parametrize("fraction", [0.0, 1e-4, 0.25, 0.5, 0.9999, 1.0])
def test_quantile_is_right_to_a_bin(fraction):
    x = normal(50_000)
    histogram = stats_of([x]).histogram()
    ordered = np.sort(x)
    below, above = (
        ordered[max(int(fraction * x.size) - 1, 0)],
        ordered[min(int(fraction * x.size), x.size - 1)],
    )
    assert below - histogram.width <= histogram.quantile(fraction) <= above + histogram.width


def test_quantile_by_hand():
    histogram = stats_of([[1.0, 1.0, 1.0, 2.0 - 2**-20]]).histogram()
    width = 2.0**-12
    assert histogram.width == width
    assert histogram.quantile(0.5) == 1 + width * 2 / 3
    assert histogram.quantile(0.75) == 1 + width
    assert histogram.quantile(0.875) == 2 - width / 2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_any_dtype_shape_and_layout(dtype):
    x = (normal((3, 4, 5)) * 20).astype(dtype)
    stats, flat = TensorStats(True), TensorStats(True)
    stats.update(x.transpose(2, 0, 1), 0)
    flat.update(x.astype(np.float32).ravel(), 0)
    assert as_bytes(stats) == as_bytes(flat)
    assert (stats.lo, stats.hi, stats.count) == (float(x.min()), float(x.max()), 60)


def test_a_float64_too_large_for_float32_counts_as_infinite():
    stats = TensorStats(True)
    stats.update(np.array([1e300, -1.0, np.nan]), 0)
    assert (stats.count, stats.inf_count, stats.nan_count, stats.lo, stats.hi) == (
        1,
        1,
        1,
        -1.0,
        -1.0,
    )


def test_scalars_and_empty_arrays():
    stats = TensorStats(True, True)
    stats.update(np.float32(3.0), 4)
    stats.update(np.empty((0, 7), np.float32), 9)
    assert (stats.count, stats.lo, stats.hi, stats.sample_extremes.tolist()) == (
        1,
        3.0,
        3.0,
        [[3.0, 3.0]],
    )


def test_memory_does_not_depend_on_the_number_of_samples():
    def size(samples):
        return sum(
            array.nbytes for array in stats_of(samples, per_sample=False).to_arrays().values()
        )

    assert size([[1.0]]) == size([[float(i), -1e6 * i] for i in range(300)])


@given(SAMPLES, st.booleans(), st.booleans())
def test_arrays_round_trip(samples, histogram, per_sample):
    stats = stats_of(samples, histogram=histogram, per_sample=per_sample)
    back = TensorStats.from_arrays(stats.to_arrays())
    assert as_bytes(back) == as_bytes(stats)
    back.update(np.array([7.0], np.float32), 3)
    stats.update(np.array([7.0], np.float32), 3)
    assert as_bytes(back) == as_bytes(stats)


@pytest.mark.parametrize("name", ["totals", "extremes", "counts", "samples"])
@pytest.mark.parametrize("damage", [lambda a: a[:-1, None], lambda a: a.astype(np.float16)])
def test_damaged_arrays_are_refused(name, damage):
    arrays = stats_of([[1.0, 2.0]]).to_arrays()
    with pytest.raises(CalibError, match=f"no valid '{name}'"):
        TensorStats.from_arrays({**arrays, name: damage(arrays[name])})


@pytest.mark.parametrize("name", ["totals", "extremes"])
def test_missing_arrays_are_refused(name):
    arrays = stats_of([[1.0, 2.0]]).to_arrays()
    del arrays[name]
    with pytest.raises(CalibError, match=f"no valid '{name}'"):
        TensorStats.from_arrays(arrays)


def test_what_was_not_kept_is_not_given():
    plain = TensorStats(False)
    plain.update(np.ones(3), 0)
    with pytest.raises(ValueError, match="without a histogram"):
        plain.histogram()
    with pytest.raises(ValueError, match="without the extremes of each sample"):
        _ = plain.sample_extremes
    with pytest.raises(ValueError, match="different things"):
        plain.merge(TensorStats(True))
