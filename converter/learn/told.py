"""By what a model is told from another: the tensors whose numbers a teacher knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from converter.graph.edit import is_float, values_by_name, values_read
from converter.learn.gradients import fix_shapes
from converter.learn.terms import NoGradientError, shape_of


def told_by(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The float outputs whose shapes follow from the `shapes` of inputs; of the others, as the
    classes of an ArgMax or boxes that were picked, the nearest such tensors that they are made of.
    """
    fixed, known = model.clone(), values_by_name(model.graph)
    fix_shapes(fixed, shapes)
    waiting, seen, found = list(reversed(fixed.graph.outputs)), set[ir.Value](), list[str]()
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        if is_float(value) and value.name in known and _is_sized(value):
            found.append(value.name)
        else:
            waiting.extend(reversed(values_read(node)))
    return tuple(found)


def _is_sized(value: ir.Value) -> bool:
    try:
        shape_of(value)
    except NoGradientError:
        return False
    return True
