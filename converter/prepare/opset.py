"""Raises a model to the opset that quantized graphs need, by ONNX's own converter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from converter.errors import ModelError
from converter.graph.edit import (
    Names,
    add_constant,
    constant,
    graph_of,
    initializers_of,
    input_at,
)
from converter.graph.files import MAKERS_OF_MAPS, first_line, refusal, saved
from converter.prepare.former_ops import write_out_former_operators

# Per-channel QuantizeLinear/DequantizeLinear, the youngest operators that are written, came with
# opset 13.
LEAST_OPSET = 13
# The file formats that go with opsets; from version 4 on, initializers need not be inputs.
IR_VERSIONS = {
    LEAST_OPSET: 7,
    21: 10,
    23: 11,
    24: 12,
    25: 13,
    28: 14,
}

# The domain of nodes that the converter shall pass on as they are.
HIDDEN = "kept.as.it.is"
# The converter loses how these find their samples; Resize has its present form since this opset.
SCALERS, RESIZE_OPSET = {"Upsample", "Resize"}, 11
# The converter reads smaller constants (scales, axes, bounds).
SEEN_SIZE = 1024


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators the model is written in."""
    return model.graph.opset_imports.get("") or LEAST_OPSET


def newest_opset() -> int:
    """The newest version of the standard operators that is known here."""
    return int(onnx.defs.onnx_opset_version())


def runtime_knows(opset: int) -> bool:
    """Whether ONNX Runtime here converts to integers at an opset."""
    x, scale = (
        ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.FLOAT))
        for name in ("x", "scale")
    )
    node = ir.node("QuantizeLinear", [x, scale])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.UINT8)
    graph = ir.Graph(
        [x, scale], node.outputs, nodes=[node], opset_imports={"": opset}, name="probe"
    )
    model = ir.Model(
        graph,
        ir_version=max(v for o, v in IR_VERSIONS.items() if o <= opset),
    )
    with saved(model) as path:
        return refusal(path, optimize=False) is None


def raise_opset(model: ir.Model, least: int = LEAST_OPSET) -> ir.Model:
    """The model, converted where its opset is below `least`; raises ModelError where that is
    impossible.
    """
    model.ir_version = max(
        [
            model.ir_version,
            *(version for opset, version in IR_VERSIONS.items() if opset <= least),
        ]
    )
    if opset_of(model) > (newest := newest_opset()):
        msg = (
            f"The model's opset {opset_of(model)} is newer than any known; export it again with "
            f"opset {newest}."
        )
        raise ModelError(msg)
    if opset_of(model) >= least:
        return model
    try:
        return _converted(model, least)
    except Exception as error:
        msg = (
            f"The model's opset {opset_of(model)} cannot be converted to {least} "
            f"({first_line(error)}); "
            f"export it again with opset {least} or newer."
        )
        raise ModelError(msg) from error


def _converted(model: ir.Model, least: int) -> ir.Model:
    """A copy by ONNX's own converter, which sees no weights, and of operators that it changes
    wrongly or does not know only names.
    """
    copy = model.clone()
    if opset_of(model) < RESIZE_OPSET:
        names = Names(copy)
        for node in [n for n in copy.graph.all_nodes() if not n.domain and n.op_type in SCALERS]:
            _as_resize(node, names)
    for node in [node for node in copy.graph.all_nodes() if _is_foreign(node)]:
        node.domain = f"{HIDDEN}{node.domain}"
        copy.graph.opset_imports[node.domain] = 1
    tensors = without_weights(copy)
    proto = onnx.version_converter.convert_version(ir.to_proto(copy), least)
    raised: ir.Model = ir.from_proto(proto)
    _with_weights(raised, tensors)
    for node in raised.graph.all_nodes():
        node.domain = node.domain.removeprefix(HIDDEN)
    for domain in [name for name in raised.graph.opset_imports if name.startswith(HIDDEN)]:
        del raised.graph.opset_imports[domain]
    write_out_former_operators(raised)
    raised.ir_version = max(raised.ir_version, model.ir_version)
    raised.graph.meta.update(model.graph.meta)
    return raised


def _is_foreign(node: ir.Node) -> bool:
    """Whether ONNX knows no such standard operator, the node is in its newest form already, or
    makes a map.
    """
    if node.domain:
        return node.op_type in MAKERS_OF_MAPS
    return node.op_type in SCALERS or not onnx.defs.has(node.op_type)


def _as_resize(node: ir.Node, names: Names) -> None:
    """An Upsample, or a Resize of opset 10, in the words of opset 11.

    Both take sample i of the output from i / scale, rounded down or, where they shrink, up.
    """
    scales = input_at(node, 1)
    if scales is None:
        numbers = np.array(node.attributes.pop("scales").as_floats(), np.float32)
        scales = add_constant(graph_of(node), names.fresh(f"{node.name}_scales"), numbers)
    array = constant(scales)
    shrinks = array is not None and bool((array < 1).any())
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    node.op_type = "Resize"
    for name, value in (
        ("coordinate_transformation_mode", "asymmetric"),
        ("nearest_mode", "ceil" if shrinks else "floor"),
    ):
        node.attributes[name] = ir.AttrString(name, value)


def without_weights(model: ir.Model) -> list[ir.TensorProtocol]:
    """Puts numbered references in the place of large tensors and of those in other files, whose
    folder the converter would lose; returns them.
    """
    tensors = list[ir.TensorProtocol]()
    for value in initializers_of(model):
        tensor = value.const_value
        if tensor is None or not (tensor.size > SEEN_SIZE or isinstance(tensor, ir.ExternalTensor)):
            continue
        name, shape = f"{HIDDEN}{len(tensors)}", ir.Shape(tensor.numpy().shape)
        value.const_value = ir.ExternalTensor(
            name,
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=shape,
            name=tensor.name or "",
            base_dir="",
        )
        tensors.append(tensor)
    return tensors


def _with_weights(model: ir.Model, tensors: Sequence[ir.TensorProtocol]) -> None:
    """Puts the tensors back that references stand for."""
    for value in initializers_of(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location).startswith(HIDDEN):
            value.const_value = tensors[int(str(tensor.location).removeprefix(HIDDEN))]
