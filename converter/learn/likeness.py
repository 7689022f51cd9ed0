"""A loss that is small where samples show a model what it was trained on, by what the model itself
knows of that.

Means and variances of tensors, over all samples together, shall be those that BatchNormalization
has kept: Cai et al., "ZeroQ" (arXiv 2001.00281), section 3.1. And every sample shall be of a class,
as of Xu et al., "Generative Low-bitwidth Data Free Quantization" (arXiv 2003.03603), without which
scores stay small and are cut off later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import not_none
from converter.learn.losses import Loss
from converter.learn.terms import Scribe, Shape, Term
from converter.plan.ops import rule_of
from converter.prepare.fold_affine import Moments

# What is fed: moments of all other samples, and the places that shall stand out; and handed out:
# moments of this one. Moments are (2, channels of all tensors): means and mean squares of what is
# normal where training was.
OTHERS, TARGET, OWN = "likeness_others", "likeness_target{}", "likeness_own"
# Channels that vary less than this, beside the tensor's largest, tell nothing.
STILL = 1e-3
LEAST_VARIANCE = 1e-6
# What certainty weighs beside moments, and what scores are divided by: trained models are surer
# than a probability of 1 in float32 tells.
CERTAINTY, TEMPERATURE = 0.1, 3.0


@dataclass(frozen=True)
class Scores:
    """A tensor one of whose numbers shall stand out in every row, among those along `axis`; among
    all where it is None.
    """

    tensor: str
    axis: int | None


def scores_of(model: ir.Model) -> tuple[Scores, ...]:
    """Where a model says how sure it is: what Softmax or Sigmoid make outputs of, and outputs that
    are rows of products.
    """
    found = (_scores(value) for value in model.graph.outputs)
    return tuple(dict.fromkeys(scores for scores in found if scores))


def _scores(output: ir.Value) -> Scores | None:
    value, node = output, output.producer()
    while node is not None and rule_of(node).moves and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    if node is None or node.domain:
        return None
    source = not_none(node.inputs[0]).name or ""
    if node.op_type in {"Softmax", "LogSoftmax"}:
        return Scores(source, node.attributes.get_int("axis", -1))
    if node.op_type == "Sigmoid":
        return Scores(source, None)
    is_row = output.shape is not None and len(output.shape) == 2
    return Scores(output.name or "", 1) if rule_of(node).weight is not None and is_row else None


@dataclass(frozen=True)
class Likeness:
    """What a model knows: `moments` by tensor, and its scores."""

    moments: Mapping[str, Moments]
    scores: Sequence[Scores]

    @property
    def channels(self) -> int:
        """Of all tensors together."""
        return sum(known.mean.size for known in self.moments.values())

    def loss(self, count: int) -> Loss:
        """The loss of one of `count` samples, given what the others are."""

        def written(scribe: Scribe) -> Term:
            parts = [self._unlike(scribe, count)] if self.moments else []
            sure = [_unsure(scribe, one, i) for i, one in enumerate(self.scores)]
            parts += [term * (CERTAINTY / len(sure)) for term in sure]
            return sum(parts[1:], parts[0])

        return written

    def _unlike(self, scribe: Scribe, count: int) -> Term:
        """How far moments are from those of training: squared, in deviations, the mean over a
        tensor's channels and over tensors.
        """
        normal = [_normal(scribe.of(name), known) for name, known in self.moments.items()]
        parts = [_means(x) for x in normal], [_means(x * x) for x in normal]
        rows = [scribe.concat(part, 1) for part in parts]
        own = scribe.read(scribe.named(scribe.concat(rows, 0), OWN))
        others = scribe.fed(OTHERS, own.shape, own.dtype)
        mean, square = _rows(others + own * (1 / count))
        variance = (square - mean * mean).op("Max", own.like(LEAST_VARIANCE))
        away = variance.op("Sqrt") - 1
        weights = np.concatenate([_weights(known) for known in self.moments.values()])
        apart = (mean * mean + away * away) * own.like(weights[None] / len(self.moments))
        return apart.sum((0, 1))


def _usable(known: Moments) -> Array:
    largest = known.deviation.max(initial=0.0)
    return np.asarray((known.deviation > STILL * largest) & np.isfinite(known.deviation))


def _weights(known: Moments) -> Array:
    usable = _usable(known)
    return np.asarray(usable / max(1, usable.sum()))


def _normal(y: Term, known: Moments) -> Term:
    """A tensor as deviations from its mean, 0 where it does not vary."""
    usable, shape = _usable(known), (1, -1) + (1,) * (y.rank - 2)
    slope = np.divide(
        1,
        known.deviation,
        out=np.zeros_like(known.deviation),
        where=usable,
    )
    return (y - y.like(known.mean.reshape(shape))) * y.like(slope.reshape(shape))


def _means(x: Term) -> Term:
    """Of every channel: (1, channels)."""
    return x.mean([0, *range(2, x.rank)]).reshape(
        1,
        -1,
    )


def _rows(moments: Term) -> Iterator[Term]:
    for row in (0, 1):
        yield moments.slice({0: (row, 1, 1)})


def _unsure(scribe: Scribe, scores: Scores, number: int) -> Term:
    """How little the numbers at the target stand out, in nats, the mean over rows."""
    y = scribe.of(scores.tensor) * (1 / TEMPERATURE)
    rows, axis = y.shape[0], scores.axis
    if axis is None:
        y, axis = y.reshape(rows, -1), 1
    target = scribe.fed(TARGET.format(number), y.shape, y.dtype)
    return -(target * y.op("LogSoftmax", axis=axis)).sum(range(y.rank)) * (1 / rows)


def targets(shape: Shape, number: int) -> Array:
    """For sample `number`, one number of every row of `shape`: 1 there, else 0. Each has its turn
    before one comes again.
    """
    rows = np.zeros(
        (shape[0], math.prod(shape[1:])),
        np.float32,
    )
    order = np.random.default_rng(0).permutation(rows.shape[1])
    chosen = order[(number * len(rows) + np.arange(len(rows))) % len(order)]
    rows[np.arange(len(rows)), chosen] = 1
    return rows.reshape(shape)
