"""By what a model is told from another: the tensors whose numbers a teacher knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from converter.graph.edit import is_float, values_by_name, values_read
from converter.learn.gradients import fix_shapes
from converter.learn.terms import NoGradientError, shape_of


def told_by(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The float outputs whose shapes follow from the `shapes` of inputs; of the others, as the
    classes of an ArgMax or boxes that were picked, the nearest such tensors that they are made of.
    """
    fixed, seen = model.clone(), set[ir.Value]()
    fix_shapes(fixed, shapes)
    known = values_by_name(model.graph)
    found = (v for output in fixed.graph.outputs for v in _nearest(output, known, seen))
    return tuple(dict.fromkeys(value.name or "" for value in found))


def _nearest(
    value: ir.Value, known: Mapping[str, ir.Value], seen: set[ir.Value]
) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None or value in seen:
        return
    seen.add(value)
    if is_float(value) and value.name in known and _is_sized(value):
        yield value
        return
    for read in values_read(node):
        yield from _nearest(read, known, seen)


def _is_sized(value: ir.Value) -> bool:
    try:
        shape_of(value)
    except NoGradientError:
        return False
    return True
