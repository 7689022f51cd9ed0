"""Which outputs choose a class, and what their choices say."""

from __future__ import annotations

import numpy as np
import pytest

from converter.measure.answers import are_answers, information, probabilities, scores_of

RNG = np.random.default_rng(0)


def rows(x):
    return [row[None].astype(np.float32) for row in np.asarray(x)]


@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 7, 1, 1), (1, 1, 7)])
def test_a_row_may_have_axes_of_one(shape):
    given = [RNG.normal(size=shape).astype(np.float32) for _ in range(3)]
    np.testing.assert_array_equal(scores_of(given), [x.ravel() for x in given])


@pytest.mark.parametrize(
    "output",
    [
        np.zeros((2, 7), np.float32),
        np.zeros((1, 4, 7), np.float32),
        np.zeros((1, 1), np.float32),
        np.zeros((1, 7), np.int64),
        ["text"],
        None,
    ],
)
def test_what_has_no_row_of_floats_a_sample_has_no_scores(output):
    assert scores_of([output, output]) is None


def test_rows_of_several_sizes_have_none():
    assert scores_of([np.zeros((1, 3), np.float32), np.zeros((1, 4), np.float32)]) is None


def peaked(classes, samples=12, height=6.0):
    x = RNG.normal(size=(samples, classes))
    x[np.arange(samples), np.arange(samples) % classes] += height
    return x


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_probabilities_their_logarithms_and_logits_are_answers(classes):
    logits = peaked(classes, height=12.0)
    assert are_answers(logits)
    assert are_answers(softmax(logits))
    assert are_answers(np.log(softmax(logits)))


def test_embeddings_and_coordinates_are_none():
    embedding = RNG.normal(size=(12, 384))
    assert not are_answers(embedding)
    assert not are_answers(embedding / np.linalg.norm(embedding, axis=1, keepdims=True))
    assert not are_answers(RNG.random((12, 4)))  # a box from 0 to 1
    boxes = np.sort(RNG.random((12, 4)) * 300, axis=1)
    assert not are_answers(boxes)  # in pixels: the last is always the greatest
    assert not are_answers(1 / (1 + np.exp(-RNG.normal(size=(12, 80)))))  # many yes or no


def test_what_is_no_number_answers_nothing():
    assert not are_answers(np.full((3, 5), np.nan))


def test_information_is_the_divergence_from_the_mean_answer():
    certain = np.eye(4)[[0, 1, 2, 3]]
    np.testing.assert_allclose(information(certain), np.log(4))
    np.testing.assert_allclose(information(certain[[1, 1, 1]]), 0)
    np.testing.assert_allclose(information(np.full((3, 4), 0.25)), 0, atol=1e-12)
    p = softmax(peaked(5, 7, 2.0))
    expected = [sum(a * np.log(a / b) for a, b in zip(row, p.mean(0), strict=True)) for row in p]
    np.testing.assert_allclose(information(np.log(p) + 3), expected)


def test_logits_become_probabilities_and_those_stay():
    logits = peaked(6)
    np.testing.assert_allclose(probabilities(logits), softmax(logits))
    np.testing.assert_allclose(probabilities(softmax(logits)), softmax(logits))
