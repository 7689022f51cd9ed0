"""Gradients of pooling and resizing. Averages and resized pictures are the same linear map along
one axis after the other: its matrix is what the operator makes of a line of unit vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.session import open_session
from converter.graph.files import serialized
from converter.learn.site import Rule, Site, by_input
from converter.learn.terms import NoGradientError, Term
from converter.learn.windows import window_of


def global_average(site: Site) -> Term:
    """The same for all places, shared."""
    share = site.dy.size / site.x().size
    return (site.dy * share).expand(*site.x().shape)


def global_max(site: Site) -> Term:
    """For the largest of all places; equal ones share it."""
    hits = site.x().equals(site.y).cast(site.dy.dtype)
    return hits * (site.dy / hits.sum(range(2, site.dy.rank), keep=True))


def max_pool(site: Site) -> Term:
    """For the place that MaxPool says it took."""
    if site.whole("storage_order", 0):
        msg = "storage_order is set"
        raise NoGradientError(msg)
    x = site.x()
    if len(site.node.outputs) == 1 or site.node.outputs[1].shape is None:
        site.node.resize_outputs(2)
        places = site.node.outputs[1]
        places.name = f"{site.y.value.name}_places"
        places.shape, places.dtype = ir.Shape(site.y.shape), ir.DataType.INT64
    taken = site.scribe.read(site.node.outputs[1]).reshape(-1)
    zeros = (x * 0).reshape(-1)  # not a constant, which every session would keep
    operands = [zeros, taken, site.dy.reshape(-1)]
    found = x.scribe.op(
        "ScatterElements",
        operands,
        zeros.shape,
        axis=0,
        reduction="add",
    )
    return found.reshape(*x.shape)


def average_pool(site: Site) -> Term:
    """Every average goes back to what it was taken over."""
    kernel, x = site.ints("kernel_shape") or (), site.x()
    if kernel == x.shape[2:] and not any(site.ints("pads") or ()):
        return global_average(site)
    window, dy = window_of(site, kernel, x.shape[2:]), site.dy
    for axis, size in enumerate(x.shape[2:]):
        attributes = {
            "kernel_shape": [window.kernel[axis], 1],
            "strides": [window.strides[axis], 1],
            "pads": [window.before[axis], 0, window.after[axis], 0],
            "ceil_mode": site.whole("ceil_mode", 0),
            "count_include_pad": site.whole("count_include_pad", 0),
        }
        if set(window.dilations) != {1}:
            attributes["dilations"] = [window.dilations[axis], 1]
        dy = dy.along(axis + 2, _matrix(site, size, attributes).T)
    return dy


def resize(site: Site) -> Term:
    """Every pixel goes back to those that it was mixed of."""
    x, dy = site.x(), site.dy
    if site.text("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        msg = "it crops"
        raise NoGradientError(msg)
    kept = {
        name: attribute
        for name, attribute in site.node.attributes.items()
        if name not in {"axes", "keep_aspect_ratio_policy"}
    }
    scales = _scales(site)
    for axis, (size, new) in enumerate(zip(x.shape, dy.shape, strict=True)):
        if size != new or scales[axis] != 1:
            dy = dy.along(
                axis,
                _matrix(site, size, kept, _along(scales[axis], size, new)).T,
            )
    return dy


def _scales(site: Site) -> list[float]:
    """How much wider each axis becomes."""
    rank = site.x().rank
    axes = site.ints("axes") or tuple(range(rank))
    if site.has(2) and site.array(2).size:
        given = dict(zip(axes, site.array(2).tolist(), strict=True))
        return [given.get(axis, 1.0) for axis in range(rank)]
    return [new / size for size, new in zip(site.x().shape, site.dy.shape, strict=True)]


def _along(scale: float, size: int, new: int) -> dict[int, Array]:
    """Further inputs of a Resize along axis 2 alone, by size where that says it."""
    if scale == new / size:
        return {3: np.array([1, 1, new, size], np.int64)}
    return {2: np.array([1, 1, scale, 1], np.float32)}


def _matrix(
    site: Site,
    size: int,
    attributes: Mapping[str, Any],
    constants: Mapping[int, Array] | None = None,
) -> Array:
    """What the operator makes of each of the unit vectors of `size` numbers: (new size, size)."""
    x = ir.val(
        "x",
        ir.DataType.FLOAT,
        ir.Shape([1, 1, size, size]),
    )
    values: list[ir.Value | None] = [x]
    initializers = list[ir.Value]()
    for index, array in (constants or {}).items():
        values += [None] * (index - len(values))
        constant = ir.val(f"c{index}", const_value=ir.tensor(array, name=f"c{index}"))
        values.append(constant)
        initializers.append(constant)
    node = ir.node(site.node.op_type, values, attributes)
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape([None] * 4)
    imports = dict(site.scribe.model.graph.opset_imports)
    graph = ir.Graph(
        [x],
        node.outputs,
        nodes=[node],
        initializers=initializers,
        opset_imports=imports,
        name="lines",
    )
    session = open_session(serialized(ir.Model(graph, ir_version=site.scribe.model.ir_version)))
    lines = np.eye(size, dtype=np.float32)[None, None]
    found: Array = session.run(None, {"x": lines})[0][0, 0]
    return found


RULES: dict[str, Rule] = {
    "GlobalAveragePool": by_input(global_average),
    "GlobalMaxPool": by_input(global_max),
    "MaxPool": by_input(max_pool),
    "AveragePool": by_input(average_pool),
    "Resize": by_input(resize),
}
