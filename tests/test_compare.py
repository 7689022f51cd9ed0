"""Comparing two models: the numbers are what a hand computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphs import build, normal
from hypothesis import given
from hypothesis import strategies as st
from running import InMemory

from converter.calibrate.runs import opened
from converter.measure.errors import (
    TensorError,
    error_of,
    errors_between,
    extent,
    speedup,
    tally,
    worst_of,
)

FLOAT = build("g (float[N,4] x) => (float[N,4] y) { h = Abs (x)  y = Neg (x) }")


def compared(left, right, samples, tensors=None, count=99, threads=1):
    data = InMemory(samples)
    return errors_between(opened(left), opened(right), data, threads, tensors=tensors, count=count)


def times(factor, name="y"):
    return build(
        f"g (float[N] x) => (float[N] {name}) {{ {name} = Mul (x, k) }}", k=np.float32(factor)
    )


def plus(addend):
    return build(
        "g (float[N] x) => (float[N] y) { y = Add (x, k) }", k=np.asarray(addend, np.float32)
    )


def samples(*rows):
    return [{"x": np.array(row, np.float32)} for row in rows]


def test_by_hand():
    # x = (3, 4), y = (3, 4) + (0, 5): x.y = 9 + 36, |x| = 5, |y| = sqrt(90), noise 25 against a
    # signal of 25.
    (error,) = compared(times(1), plus([0, 5]), samples([3, 4]))
    assert error.name == "y"
    assert error.cosine == pytest.approx(45 / (5 * math.sqrt(90)), rel=1e-12)
    assert error.sqnr_db == pytest.approx(0, abs=1e-12)


def test_samples_add_up_before_the_quotient():
    # Signal 1 + 400, noise 1 + 1.
    (error,) = compared(times(1), plus([1]), samples([1], [20]))
    assert error.sqnr_db == pytest.approx(10 * math.log10(401 / 2), rel=1e-12)
    assert error.cosine == pytest.approx((2 + 420) / math.sqrt(401 * (4 + 441)), rel=1e-12)


def test_only_the_first_samples_count():
    (error,) = compared(times(1), plus([1]), samples([1], [20]), count=1)
    assert error.sqnr_db == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("factor", "cosine", "sqnr"), [(1, 1, math.inf), (-1, -1, 10 * math.log10(1 / 4)), (0, 0, 0)]
)
def test_multiples(factor, cosine, sqnr):
    (error,) = compared(times(1), times(factor), samples([1, 2, 3]))
    assert (error.cosine, error.sqnr_db) == (pytest.approx(cosine), pytest.approx(sqnr))


@pytest.mark.parametrize("noise", [1.0, math.nan])
def test_noise_where_there_was_nothing_is_the_worst(noise):
    (error,) = compared(times(1), plus([noise]), samples([0, 0]))
    assert (error.cosine, error.sqnr_db) == (0, -math.inf)


def test_numbers_lost_are_the_worst():
    (error,) = compared(times(1), plus([math.nan]), samples([1, 2]))
    assert error.sqnr_db == -math.inf


def test_two_silent_tensors_are_equal():
    (error,) = compared(times(1), times(1), samples([0, 0]))
    assert (error.cosine, error.sqnr_db) == (1, math.inf)


def test_tensors_go_by_their_names_in_each_model():
    left = build("g (float[N] x) => (float[N] a, float[N] b) { a = Neg (x)  b = Abs (x) }")
    right = build("g (float[N] x) => (float[N] b, float[N] c) { b = Neg (x)  c = Abs (x) }")
    found = compared(left, right, samples([-1, 2]), {"a": "b", "b": "c"})
    assert found == [TensorError("a", 1.0, math.inf, 2), TensorError("b", 1.0, math.inf, 2)]


def test_workers_do_not_change_a_bit():
    data = [{"x": normal(7, seed=i)} for i in range(50)]
    results = [compared(times(1), plus([0.1]), data, threads=threads) for threads in (1, 2, 3)]
    assert results[0] == results[1] == results[2]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8), st.floats(-3, 3, width=32))
def test_any_difference(row, addend):
    x = np.array(row, np.float32).astype(np.float64)
    y = (x.astype(np.float32) + np.float32(addend)).astype(np.float64)
    (error,) = compared(times(1), plus([addend]), samples(row))
    signal, noise = np.sum(x**2), np.sum((x - y) ** 2)
    if signal and noise:
        assert error.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-9)
    if signal and y.any():
        assert error.cosine == pytest.approx(
            np.dot(x, y) / np.sqrt(signal * np.dot(y, y)), abs=1e-9
        )


def timed(monkeypatch, cost):
    """`speedup` by a clock that stands still but for the runs, which take cost(model, number)."""
    both = opened(FLOAT), opened(FLOAT)
    clock, runs = [0.0], [0, 0]

    def tick(session, outputs, sample):
        which = int(session is not both[0].session)
        clock[0] += cost(which, runs[which])
        runs[which] += 1

    monkeypatch.setattr("converter.measure.errors.run", tick)
    monkeypatch.setattr("time.thread_time", lambda: clock[0])
    return speedup(*both, {}), runs


@pytest.mark.parametrize(("each", "expected"), [(0.02, 2.0), (0.0002, None)])
def test_speed_is_the_ratio_of_medians_of_processor_time(monkeypatch, each, expected):
    """The float model takes two units, the other one."""
    found, _ = timed(monkeypatch, lambda which, number: each * (2 - which))
    assert (found and found.ratio) == (expected and pytest.approx(expected))
    assert found is None or ((found.low, found.high) == pytest.approx((2, 2)) and found.sure)


def test_a_noisy_machine_is_timed_until_the_interval_is_narrow_and_says_how_wide_it_is(monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.9, 1.1, (2, 1000)) * [[0.002], [0.001]]
    found, runs = timed(monkeypatch, lambda which, number: noise[which, number])
    assert found.low < 2 < found.high and found.high < 1.06 * found.low
    assert 8 < runs[0] < 400
    wild = rng.exponential(size=(2, 1000)) * [[0.02], [0.01]]
    found, _ = timed(monkeypatch, lambda which, number: 0.001 + wild[which, number])
    assert found.low < 1 < found.high or not found.sure


def test_values_that_are_not_finite_are_counted_and_left_out():
    x, y = np.array([1, -np.inf, np.nan, 2]), np.array([1, -np.inf, 7, 4])
    error = error_of("y", tally(x, y))
    assert (error.compared, error.left_out, error.apart) == (2, 2, 0)
    assert error.cosine == pytest.approx(9 / math.sqrt(5 * 17))
    assert error.sqnr_db == pytest.approx(10 * math.log10(5 / 4))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([4, 2, np.nan], [4, np.nan, 1]),
        ([4, 2, np.nan], [4, -np.inf, 1]),
        ([4, np.inf, np.nan], [4, -np.inf, np.nan]),
        ([4, -np.inf, np.nan], [4, 2, np.nan]),
    ],
)
def test_a_value_that_only_one_model_has_is_an_average_one_lost(x, y):
    error = error_of("y", tally(np.array(x), np.array(y)))
    assert (error.compared, error.lost, error.left_out) == (2, 1, 1)
    # The value lost is half of the signal, and all of the noise.
    assert error.cosine == 1 / 2
    assert error.sqnr_db == 0


def test_numbers_without_squares_are_compared():
    x, y = np.array([3e300, 4e300]), np.array([3e300, 9e300])
    error = error_of("y", tally(x, y))
    assert error.cosine == pytest.approx((9 + 36) / (5 * math.sqrt(90)))
    assert error.sqnr_db == pytest.approx(0)


def test_the_same_infinities_are_as_good_as_equal_values():
    x, y = np.array([np.inf, -np.inf, 3, np.inf]), np.array([np.inf, -np.inf, 3, -np.inf])
    error = error_of("y", tally(x, y))
    assert (error.compared, error.lost, error.infinite) == (2, 1, 2)
    assert error.cosine == 3 / 4


def test_all_values_lost_are_the_worst_there_is():
    for x in ([1.0, 2.0], [0.0, 0.0]):
        error = error_of("y", tally(np.array(x), np.full(2, np.nan)))
        assert (error.cosine, error.sqnr_db) == (0, -math.inf)
        assert worst_of([error]) is error


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((3, 2)), np.zeros((2, 2))),
        ([np.zeros(2)], [np.zeros(2), np.zeros(2)]),
        ([np.zeros(2), np.zeros(2)], [np.zeros(2)]),
        ([np.zeros(2), np.zeros(3)], [np.zeros(2), np.zeros(2)]),
        ([{0: 0.5}], [{1: 0.5}]),
        (None, np.zeros(2)),
        (np.zeros(1), np.array(["a"], object)),
    ],
)
def test_what_is_built_otherwise_is_only_counted(x, y):
    error = error_of("y", tally(x, y))
    assert (error.compared, error.apart) == (0, 1)
    assert worst_of([error]) is None
    assert extent(x, y) == (0, np.inf)


@pytest.mark.parametrize("empty", [np.zeros((0, 3)), [], [np.zeros(0)], None])
def test_two_outputs_without_values_say_nothing(empty):
    error = error_of("y", tally(empty, empty))
    assert (error.compared, error.apart) == (0, 0)
    assert worst_of([error]) is None
    assert extent(empty, empty) == (0, 0)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([np.array([3.0]), np.array([4.0])], [np.array([3.0]), np.array([9.0])]),
        ([{"a": 3.0, "b": 4.0}], [{"a": 3.0, "b": 9.0}]),
        ([{0: 3.0}, {0: 4.0}], [{0: 3.0}, {0: 9.0}]),
        ({0: 3.0, 1: 4.0}, {1: 9.0, 0: 3.0}),
    ],
)
def test_sequences_and_maps_are_compared_by_their_numbers(x, y):
    error = error_of("y", tally(x, y))
    assert (error.compared, error.apart) == (2, 0)
    assert error.cosine == pytest.approx((9 + 36) / (5 * math.sqrt(90)))
    assert error.sqnr_db == pytest.approx(0)
    assert extent(x, y) == (4, 5)


def test_texts_count_as_vectors_with_a_one_for_each():
    x, y = (np.array(texts, object) for texts in (["a", "b", "c", "c"], ["a", "b", "c", "a"]))
    codes = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
    left, right = (np.array([codes[text] for text in each]).ravel() for each in (x, y))
    error = error_of("y", tally(x, y))
    assert error.compared == 4
    assert error.cosine == left @ right / np.sqrt((left @ left) * (right @ right)) == 3 / 4
    noise = np.sum((left - right) ** 2)
    assert error.sqnr_db == pytest.approx(10 * math.log10((left @ left) / noise))
    assert extent(x, x) == (0, 0)
    assert extent(x, y) == (0, np.inf)


def test_extents_know_infinities_that_agree():
    assert extent(np.array([np.inf, 2.0]), np.array([np.inf, 1.0])) == (2, 1)
    assert extent(np.array([np.nan, 2.0]), np.array([np.nan, 2.0])) == (2, 0)
    assert extent(np.array([np.inf, 2.0]), np.array([-np.inf, 2.0])) == (0, np.inf)
    assert extent(np.zeros(2), np.zeros(3)) == (0, np.inf)
