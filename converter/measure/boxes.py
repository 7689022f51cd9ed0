"""Boxes of detectors whose outputs have one of the common forms: found in both models, and which of
them are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from calib.affine import Array

# What a box is sure from, how much two of one class overlap that are the same, and how much the
# boxes of one model may.
SURE, SAME, ALIKE = 0.5, 0.5, 0.45
# Corners, or a centre and a size.
SIDES = 4
# Coordinates up to this are parts of the picture, and what is farther outside of it is no box.
RELATIVE, OUTSIDE = 2.0, 0.5
# The surest boxes of a picture.
MOST = 100


def boxes(outputs: Sequence[Array], size: tuple[int, int]) -> Array | None:
    """Rows of left, top, right, bottom (parts of a picture of `size`, width and height), score and
    class, the surest first; None where the outputs have no form that is known.

    Known are an output of boxes (1, n, 4) beside one of scores (1, n, classes), the first of two
    and more the background, and one of centres and sizes in pixels with scores, (1, 4 + classes, n)
    or its transpose.
    """
    for places, scores in _forms(outputs, size):
        if not (places.size and scores.min() >= 0 and scores.max() <= 1):
            continue
        around = _corners(places)
        scale = 1.0 if np.abs(places).max(initial=0) <= RELATIVE else (*size, *size)
        around = around / np.asarray(scale)
        sure = scores.max(axis=1, initial=0) >= SURE
        if (np.abs(around[sure] - 0.5) > 0.5 + OUTSIDE).any():
            continue
        best = np.stack(
            [scores.max(axis=1), scores.argmax(axis=1)],
            axis=1,
        )
        return _apart(np.concatenate([around, best], axis=1)[sure])
    return None


def _forms(outputs: Sequence[Array], size: tuple[int, int]) -> Iterator[tuple[Array, Array]]:
    """Places (n, 4) and scores (n, classes) as they may be meant."""
    tables = [x[0] for x in outputs if x.ndim == 3 and len(x) == 1 and x.dtype.kind == "f"]
    if len(tables) == len(outputs) == 2:
        for places, scores in (tables, tables[::-1]):
            if places.shape[1] == SIDES and len(scores) == len(places):
                yield places, scores[:, 1:] if scores.shape[1] > 1 else scores
    if len(tables) == len(outputs) == 1:
        (table,) = tables
        table = table.T if len(table) < table.shape[1] else table
        if table.shape[1] > SIDES and RELATIVE < table[:, :SIDES].max(initial=0) <= 2 * max(size):
            yield table[:, :SIDES], table[:, SIDES:]


def _corners(places: Array) -> Array:
    """Corners, also of boxes that are a centre and a size."""
    if (places[:, 2:] >= places[:, :2]).mean() > 0.99 and np.abs(places).max() <= RELATIVE:
        return places
    centre, half = places[:, :2], places[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def _apart(found: Array) -> Array:
    """The surest boxes, without those that overlap a surer one of their class (greedy NMS)."""
    kept, rest = list[Array](), found[np.argsort(-found[:, 4], kind="stable")]
    while len(rest) and len(kept) < MOST:
        kept.append(rest[0])
        rest = rest[_overlaps(rest[0], rest) <= ALIKE]
    return np.reshape(kept, (-1, SIDES + 2))


def _overlaps(box: Array, others: Array) -> Array:
    """Intersection over union with boxes of the same class; 0 with those of others."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:4], others[:, 2:4])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = np.clip(others[:, 2:4] - others[:, :2], 0, None).prod(axis=1)
    own = float(np.prod(box[2:4] - box[:2]))
    return np.asarray(shared / np.maximum(own + areas - shared, 1e-12) * (others[:, 5] == box[5]))


def found_again(wanted: Array, given: Array) -> int:
    """How many of the boxes there are among the given ones, each taken once."""
    free, hits = np.ones(len(given), bool), 0
    for box in wanted:
        overlaps = _overlaps(box, given) * free
        if len(given) and overlaps.max() >= SAME:
            free[overlaps.argmax()] = False
            hits += 1
    return hits
