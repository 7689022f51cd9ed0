"""Gives the model's inputs the shapes that the user asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import onnx_ir as ir

from converter.errors import ModelError, UsageError


def set_input_shapes(model: ir.Model, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Replaces dynamic dimensions in place; raises UsageError for an unknown input or a
    contradiction.
    """
    inputs = {v.name or "": v for v in model.graph.inputs if v.name not in model.graph.initializers}
    for name, shape in shapes.items():
        if name not in inputs:
            near = ", ".join(difflib.get_close_matches(name, inputs, len(inputs), 0.0))
            msg = f"--inputShape: the model has no input '{name}'; write one of {near}."
            raise UsageError(msg)
        _set_shape(inputs[name], shape)


def check_shapes(model: ir.Model) -> None:
    """Raises ModelError for an input of unknown shape, which a valid model must declare."""
    for value in model.graph.inputs:
        if value.shape is None:
            msg = (
                f"The model's input '{value.name}' has no known number of dimensions; give "
                "--inputShape."
            )
            raise ModelError(msg)


def _set_shape(value: ir.Value, shape: tuple[int | None, ...]) -> None:
    old = value.shape
    fits = old is None or (
        len(old) == len(shape)
        and all(
            not isinstance(was, int) or now in (was, None)
            for was, now in zip(old, shape, strict=True)
        )
    )
    if not fits:
        known = ", ".join(str(d) if isinstance(d, int) else "?" for d in old or ())
        given = ", ".join("?" if d is None else str(d) for d in shape)
        msg = (
            f"--inputShape: input '{value.name}' has the shape [{known}], which [{given}] "
            "contradicts."
        )
        raise UsageError(msg)
    value.shape = ir.Shape(
        [was if now is None else now for was, now in zip(old or shape, shape, strict=True)]
    )
