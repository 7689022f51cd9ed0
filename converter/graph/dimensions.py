"""Dimensions of inputs that share a name, but not a size.

A name stands for one size, and ONNX Runtime plans its memory by that. Exporters write N on whatever
is open: a float model may run all the same, and the quantized one fail, as its tensors are others.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from calib.samples import Dataset

# An input and its axis.
Place = tuple[str, int]


def shared_names(model: ir.Model) -> dict[str, list[Place]]:
    """Names that several dimensions of the inputs bear, with these."""
    places_of: dict[str, list[Place]] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                places_of.setdefault(size.value, []).append((value.name or "", axis))
    return {name: places for name, places in places_of.items() if len(places) > 1}


def contradicted(model: ir.Model, data: Dataset) -> set[str]:
    """The shared names that stand for several sizes in a sample."""
    shared, contradictory = shared_names(model), set[str]()
    for index in range(len(data) if shared else 0):
        sample = data.sample(index)
        for name, places in shared.items():
            if len({sample[value].shape[axis] for value, axis in places}) > 1:
                contradictory.add(name)
    return contradictory


def told_apart(model: ir.Model, name: str) -> ir.Model:
    """A copy in which the dimensions of that name have the sizes 2, 3, 4, …"""
    copy = model.clone()
    values = {value.name: value for value in copy.graph.inputs}
    for size, (value, axis) in enumerate(shared_names(model)[name], start=2):
        values[value].shape = _replaced(values[value].shape, axis, size)
    return copy


def name_apart(model: ir.Model, names: Collection[str]) -> None:
    """Gives the dimensions of these names one of their own each, in place, and those of outputs
    none.
    """
    values = {value.name: value for value in model.graph.inputs}
    for name, places in shared_names(model).items():
        for given, axis in places if name in names else ():
            values[given].shape = _replaced(values[given].shape, axis, f"{given}_{name}_{axis}")
    for value in model.graph.outputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value in names:
                value.shape = _replaced(value.shape, axis, None)


def _replaced(shape: ir.Shape | None, axis: int, size: int | str | None) -> ir.Shape:
    """The shape with another size of one axis."""
    sizes = list(shape or ())
    return ir.Shape([*sizes[:axis], size, *sizes[axis + 1 :]])
