"""Losses, written behind a model: by how much a tensor differs from a teacher's.

The teacher's is an input of its own of the same shape, and is fed as the teacher hands it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from converter.learn.terms import Scribe, Term

Loss = Callable[[Scribe], Term]
# What a loss and the teacher's tensors are called: nothing that a model has.
LOSS, TEACHER = "loss of the student", "{} of the teacher"
_DISTRIBUTIONS = {"Softmax", "LogSoftmax"}
# What may stand between a product that scores classes and the output.
_PASSING = {"Add", "Flatten", "Reshape", "Squeeze", "Identity"}
_PRODUCTS = {"Gemm", "MatMul", "Conv", "GlobalAveragePool"}


def is_distribution(value: ir.Value) -> bool:
    """Whether Softmax or LogSoftmax made an output."""
    node = _maker(value)
    return node is not None and node.op_type in _DISTRIBUTIONS


def tells_classes(value: ir.Value) -> bool:
    """Whether an output is a distribution over classes, or scores Softmax would make one of."""
    node = _maker(value)
    sides = [d for d in (value.shape or ())[1:] if d != 1]
    scores = node is not None and node.op_type in _PRODUCTS and len(sides) == 1
    return scores or is_distribution(value)


def _maker(value: ir.Value) -> ir.Node | None:
    """What computes a value, but for what passes numbers on."""
    node = value.producer()
    while node is not None and node.op_type in _PASSING:
        node = next((v.producer() for v in node.inputs if v is not None and v.producer()), None)
    return None if node is None or node.domain else node


def scaled(loss: Loss, factor: float) -> Loss:
    """A loss that counts less or more."""
    return lambda scribe: loss(scribe) * factor


def total(losses: Sequence[Loss]) -> Loss:
    """The sum of losses."""
    return lambda scribe: _total([loss(scribe) for loss in losses])


def squares(tensor: str) -> Loss:
    """The sum of squares, without a teacher."""

    def written(scribe: Scribe) -> Term:
        y = scribe.of(tensor)
        return (y * y).sum(range(y.rank))

    return written


def error(tensors: Sequence[str]) -> Loss:
    """The mean over tensors of the squared error over the teacher's mean square."""

    def written(scribe: Scribe) -> Term:
        return _total([_relative(scribe, name) for name in tensors]) * (1 / len(tensors))

    return written


def _relative(scribe: Scribe, tensor: str) -> Term:
    y, teacher = scribe.of(tensor), _teacher(scribe, tensor)
    axes = range(y.rank)
    power = (teacher * teacher).sum(axes)
    tiny = np.finfo(y.dtype.numpy()).tiny
    return ((y - teacher) * (y - teacher)).sum(axes) / power.op("Max", power.like(tiny))


def divergence(tensor: str) -> Loss:
    """The mean over samples of KL(teacher, student) in nats; the tensor holds logits, or what
    Softmax or LogSoftmax made of them.
    """

    def written(scribe: Scribe) -> Term:
        y, teacher = scribe.of(tensor), _teacher(scribe, tensor)
        node = y.value.producer()
        made = node.op_type if node and node.op_type in _DISTRIBUTIONS else ""
        axis = node.attributes.get_int("axis", -1) if node and made else -1
        if made == "Softmax" and node and node.inputs[0]:
            # The logarithm of a probability that is 0 would not be finite.
            y = scribe.read(node.inputs[0])
        student = y if made == "LogSoftmax" else y.op("LogSoftmax", axis=axis)
        known = _log_probabilities(teacher, made, axis)
        nats = known.op("Exp") * (known - student)
        return nats.sum(range(y.rank)) * (y.shape[axis] / y.size)

    return written


def _log_probabilities(teacher: Term, made: str, axis: int) -> Term:
    if made == "Softmax":
        tiny = np.finfo(teacher.dtype.numpy()).tiny
        return teacher.op("Max", teacher.like(tiny)).op("Log")
    return teacher if made else teacher.op("LogSoftmax", axis=axis)


def _teacher(scribe: Scribe, tensor: str) -> Term:
    y = scribe.of(tensor)
    return scribe.fed(TEACHER.format(tensor), y.shape, y.dtype)


def _total(terms: Sequence[Term]) -> Term:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
