"""Answers: outputs that choose one of several classes, as probabilities or as scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calib.affine import Array

# How near to 1 the sum of probabilities is, and how far below zero rounding takes one.
WHOLE, ROUNDED = 1e-2, -1e-4
# Scores choose: the winner's mean probability after a softmax is so high, or with few classes so
# much above chance. An embedding's largest value is hardly above the next.
CHOSEN, ABOVE = 0.2, 3.0
# Samples from which on scores that always choose the same class are no answers.
ENOUGH = 8


def scores_of(outputs: Sequence[object]) -> Array | None:
    """The scores of each class (samples, classes), float64, where an output has one row of two
    numbers or more for each sample; None where it has not.

    Axes of size 1 do not count: (1, 1000, 1, 1) is a row.
    """
    rows = [x for x in outputs if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    sizes = {x.size for x in rows}
    if not rows or len(rows) < len(outputs) or len(sizes) > 1 or sizes.pop() < 2:
        return None
    if any(max(x.shape) != x.size or (x.ndim > 1 and len(x) > 1) for x in rows):
        return None
    return np.array([x.ravel() for x in rows], np.float64)


def probabilities(scores: Array) -> Array:
    """The rows as probabilities: as they are, or by a softmax where they are none."""
    if _are_probabilities(scores):
        return np.maximum(scores, 0.0)
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _are_probabilities(scores: Array) -> bool:
    sums = scores.sum(axis=1)
    return bool(scores.min() >= ROUNDED and np.abs(sums - 1).max() <= WHOLE)


def are_answers(scores: Array) -> bool:
    """Whether rows of scores choose a class: probabilities, their logarithms, or scores whose
    largest stands out from the others. Embeddings and coordinates do not.
    """
    if not np.isfinite(scores).all():
        return False
    if _are_probabilities(scores) or (scores.max() <= 0 and _are_probabilities(np.exp(scores))):
        return True
    classes = scores.shape[1]
    least = max(CHOSEN, ABOVE / (classes + 2))
    if probabilities(scores).max(axis=1).mean() < least:
        return False
    return len(scores) < ENOUGH or len(set(scores.argmax(axis=1).tolist())) > 1


def information(scores: Array) -> Array:
    """What each sample's answer says, in nats (samples,): the divergence of its probabilities from
    their mean over all samples, 0 where all answers are the same or unsure.

    Its mean is the logarithm of the inception score: Salimans et al., NeurIPS 2016.
    """
    shares = probabilities(scores)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = shares * np.log(shares / shares.mean(axis=0))
    return np.asarray(np.nan_to_num(terms).sum(axis=1))
