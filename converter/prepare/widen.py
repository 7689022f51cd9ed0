"""float16 and bfloat16 models become float32 ones, so that everything behind has one float type to
know.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converter.model import Names, known

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Attributes by which operators name the type that they compute.
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def widen(model: ir.Model) -> bool:
    """Computes in float32, in place, between Casts at inputs and outputs; returns whether there was
    anything narrow.
    """
    values = [
        v for g in model.graphs() for v in (*g.inputs, *g.initializers.values(), *_computed(g))
    ]
    narrow = {v: v.dtype for v in values if v.dtype in NARROW and isinstance(v.type, ir.TensorType)}
    edges = {v: narrow[v] for v in (*model.graph.inputs, *model.graph.outputs) if v in narrow}
    for value in (v for v in values if v not in narrow and _is_narrow(v.type)):
        value.type = _wide(known(value.type))
    for value in narrow:
        if value.const_value is not None:
            value.const_value = ir.tensor(
                value.const_value.numpy().astype(np.float32), name=value.name
            )
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in (node for graph in model.graphs() for node in graph):
        for attribute in list(node.attributes.values()):
            if (wide := _widened(attribute)) is not None:
                node.attributes[attribute.name] = wide
    names = Names(model)
    for value, dtype in edges.items():
        cast = _cast_input if value.is_graph_input() else _cast_output
        cast(model.graph, value, dtype, names)
    return bool(narrow)


def _widened(attribute: ir.Attr) -> ir.Attr | None:
    """An attribute that names or holds a narrow type, in float32; None for any other."""
    name, value = attribute.name, attribute.value
    if name in TYPE_ATTRIBUTES and value in NARROW:
        return ir.AttrInt64(name, ir.DataType.FLOAT)
    if attribute.type == ir.AttributeType.TENSOR and value.dtype in NARROW:
        return ir.AttrTensor(name, ir.tensor(value.numpy().astype(np.float32)))
    if attribute.type == ir.AttributeType.TYPE_PROTO and _is_narrow(value.type):
        return ir.AttrTypeProto(name, ir.TypeAndShape(_wide(value.type), value.shape))
    return None


def _is_narrow(kind: ir.TypeProtocol | None) -> bool:
    """Whether a tensor, or a sequence or an optional of some, is narrow."""
    return kind is not None and kind.dtype in NARROW


def _wide(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_wide(kind.elem_type))
    return ir.TensorType(ir.DataType.FLOAT)


def _computed(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]


def _cast_input(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, names: Names) -> None:
    cast = _cast(value, ir.DataType.FLOAT, f"{value.name}_float32", names)
    value.type = ir.TensorType(dtype)
    value.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, value)
    graph.insert_before(graph[0], cast)


def _cast_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, names: Names) -> None:
    """A Cast hands the output over under its name."""
    name = value.name or ""
    value.name = names.fresh(f"{name}_float32")
    cast = _cast(value, dtype, name, names)
    graph.append(cast)
    graph.outputs[list(graph.outputs).index(value)] = cast.outputs[0]


def _cast(value: ir.Value, to: ir.DataType, name: str, names: Names) -> ir.Node:
    node = ir.node("Cast", [value], {"to": to}, name=names.fresh(f"{name}_Cast"))
    result = node.outputs[0]
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(to)
    return node
