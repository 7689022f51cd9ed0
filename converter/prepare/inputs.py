"""Gives the model's inputs the shapes that the user asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import onnx_ir as ir

from converter.errors import UsageError


def set_input_shapes(model: ir.Model, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Replaces dynamic dimensions in place; raises UsageError for an unknown input or a contradiction."""
    inputs = {v.name or "": v for v in model.graph.inputs if v.name not in model.graph.initializers}
    for name, shape in shapes.items():
        if name not in inputs:
            near = difflib.get_close_matches(name, inputs, 1, 0.0)
            msg = f"--inputShape: the model has no input '{name}'; write '{near[0]}' or another of {', '.join(inputs)}."
            raise UsageError(msg)
        _set_shape(inputs[name], shape)


def _set_shape(value: ir.Value, shape: tuple[int | None, ...]) -> None:
    old = value.shape
    fits = old is None or (
        len(old) == len(shape)
        and all(not isinstance(was, int) or now in (was, None) for was, now in zip(old, shape, strict=True))
    )
    if not fits:
        msg = f"--inputShape: input '{value.name}' has the shape {list(old or ())}, which {list(shape)} contradicts."
        raise UsageError(msg)
    value.shape = ir.Shape([was if now is None else now for was, now in zip(old or shape, shape, strict=True)])
