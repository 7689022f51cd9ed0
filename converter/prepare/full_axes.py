"""Pads and resizes of some axes become ones of all, as runtimes that move axes around expect."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.graph.edit import Names, nodes_of, operand, replace_constant


def full_axes(model: ir.Model) -> None:
    """Rewrites, in place, what opsets 18 and 19 say in a new way in the words of opset 13."""
    names = Names(model)
    for node in (node for node in nodes_of(model) if not node.domain):
        if node.op_type == "Pad":
            _full_pads(node, names)
        elif node.op_type == "Resize":
            _full_scales(node, names)
        elif node.op_type == "AveragePool":
            _drop_plain_dilations(node)


def _full_pads(node: ir.Node, names: Names) -> None:
    """Pad reads (begins, ends) of `axes`: zeros for all others."""
    pads, axes, shape = operand(node, 1), operand(node, 3), _shape(node)
    if pads is None or axes is None or shape is None:
        return
    full = np.zeros((2, len(shape)), np.int64)
    full[:, axes] = pads.reshape(2, -1)
    replace_constant(node, 1, full.reshape(-1), names)
    node.resize_inputs(3)


def _full_scales(node: ir.Node, names: Names) -> None:
    """Resize reads factors, or sizes where all others are known, of `axes`."""
    axes, shape = list(node.attributes.get_ints("axes", ())), _shape(node)
    policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
    if not axes or shape is None or policy != "stretch":
        return
    sizes = [size if isinstance(size, int) else 0 for size in shape]
    fillers: dict[int, Array] = {
        2: np.ones(len(sizes), np.float32),
        3: np.array(sizes, np.int64),
    }
    for index, full in fillers.items():
        if (given := operand(node, index)) is None or not given.size:
            continue
        full[axes] = given
        if not full.all():
            return
        replace_constant(node, index, full, names)
        del node.attributes["axes"]
        return


def _drop_plain_dilations(node: ir.Node) -> None:
    if all(size == 1 for size in node.attributes.get_ints("dilations", ())):
        node.attributes.pop("dilations", None)


def _shape(node: ir.Node) -> ir.Shape | None:
    return node.inputs[0].shape if node.inputs[0] is not None else None
