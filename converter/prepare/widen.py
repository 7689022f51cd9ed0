"""float16 and bfloat16 models become float32 ones, so that everything behind has one float type to
know.

Whoever feeds the model and reads its outputs keeps the type it was written for, behind Casts, and
so do two kinds of node: those of domains that nobody here knows, and those that look at bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from converter.graph.edit import Names, graph_of, nodes_of, not_none
from converter.plan.ops import OF_BITS, cast_to

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Attributes by which operators name the type that they compute, or compute in.
TYPE_ATTRIBUTES = {
    *("to", "dtype", "output_dtype", "output_datatype"),
    *("precision", "softmax_precision", "stash_type"),
}
# Domains whose operators compute in float32 as well.
KNOWN_DOMAINS = {"", "ai.onnx.ml", "com.microsoft"}


def widen(model: ir.Model) -> None:
    """Computes in float32, in place.

    A model that takes or gives sequences or optionals of narrow tensors stays as it is: no Cast
    stands for those.
    """
    edges = [*model.graph.inputs, *model.graph.outputs]
    if any(_is_narrow(v.type) and not isinstance(v.type, ir.TensorType) for v in edges):
        return
    nodes = nodes_of(model)
    narrow = {value: value.dtype for value in _values(model) if _is_narrow(value.type)}
    names = Names(model)
    wide = {value for value in narrow if not _is_given(value, model.graph)}
    for value in wide:
        _widen_value(value)
    for node in nodes:
        if not _keeps_type(node):
            _widen_attributes(node)
    for value, dtype in narrow.items():
        if value in wide:
            _give(value, not_none(dtype), model.graph, names)
        else:
            _take(value, model.graph, names)
    _drop_casts(nodes)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from dict.fromkeys([*graph.inputs, *graph.initializers.values()])
        yield from (value for node in graph for value in node.outputs)


def _is_narrow(kind: ir.TypeProtocol | None) -> bool:
    """Whether a tensor, or a sequence or an optional of some, is narrow."""
    return kind is not None and kind.dtype in NARROW


def _keeps_type(node: ir.Node) -> bool:
    return node.domain not in KNOWN_DOMAINS or node.op_type in OF_BITS


def _is_given(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether the value comes narrow, from outside of `graph` or from a node that keeps its
    type.
    """
    maker = value.producer()
    if maker is not None:
        return _keeps_type(maker)
    return value.graph is graph and not value.is_initializer()


# --- to float32


def _widen_value(value: ir.Value) -> None:
    if value.const_value is not None:
        array = value.const_value.numpy().astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
    value.type = _wide(not_none(value.type))


def _wide(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_wide(kind.elem_type))
    return ir.TensorType(ir.DataType.FLOAT)


def _widen_attributes(node: ir.Node) -> None:
    for attribute in list(node.attributes.values()):
        if (wide := _widened(attribute)) is not None:
            node.attributes[attribute.name] = wide


def _widened(attribute: ir.Attr) -> ir.Attr | None:
    """An attribute that names or holds a narrow type, in float32; None for any other."""
    name, value = attribute.name, attribute.value
    if name in TYPE_ATTRIBUTES and value in NARROW:
        return ir.AttrInt64(name, ir.DataType.FLOAT)
    if attribute.type == ir.AttributeType.TENSOR and value.dtype in NARROW:
        return ir.AttrTensor(
            name,
            ir.tensor(value.numpy().astype(np.float32)),
        )
    if attribute.type == ir.AttributeType.TYPE_PROTO and _is_narrow(value.type):
        return ir.AttrTypeProto(name, ir.TypeAndShape(_wide(value.type), value.shape))
    return None


# --- where narrow and wide meet


def _take(value: ir.Value, main: ir.Graph, names: Names) -> None:
    """Lets all that computes in float32 read the narrow `value` behind a Cast."""
    uses = [use for use in value.uses() if not _keeps_type(use.node)]
    inner = value.graph is not main
    if not (uses or inner):
        return
    wide = _cast(value, ir.DataType.FLOAT, names.fresh(f"{value.name}_float32"), names)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)
    if inner:
        _replace_output(value, wide)


def _give(value: ir.Value, dtype: ir.DataType, main: ir.Graph, names: Names) -> None:
    """Lets all that reads narrow tensors read `value`, float32 by now, behind a Cast; an output of
    the model keeps its name.
    """
    uses = [use for use in value.uses() if _keeps_type(use.node)]
    handed_out = value.is_graph_output() and value.graph is main
    if not (uses or handed_out):
        return
    wish = value.name or ""
    if handed_out:
        value.name = names.fresh(f"{wish}_float32")
    narrow = _cast(value, dtype, wish if handed_out else names.fresh(f"{wish}_narrow"), names)
    for use in uses:
        use.node.replace_input_with(use.idx, narrow)
    if handed_out:
        _replace_output(value, narrow)


def _replace_output(old: ir.Value, new: ir.Value) -> None:
    outputs = graph_of(old).outputs
    for index, output in enumerate(outputs):
        if output is old:
            outputs[index] = new


def _cast(value: ir.Value, to: ir.DataType, name: str, names: Names) -> ir.Value:
    """What a new Cast behind `value` makes of it."""
    node = ir.node("Cast", [value], {"to": to}, name=names.fresh(f"{name}_Cast"))
    result, graph, maker = node.outputs[0], graph_of(value), value.producer()
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(to)
    if maker is not None:
        graph.insert_after(maker, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)
    return result


def _drop_casts(nodes: list[ir.Node]) -> None:
    """Removes Casts from float32 to float32."""
    for node in nodes:
        to, source = cast_to(node), node.inputs[0] if node.inputs else None
        if source is None or source.dtype != ir.DataType.FLOAT or source.graph is not node.graph:
            continue
        result = node.outputs[0]
        if to == ir.DataType.FLOAT and not result.is_graph_output():
            result.replace_all_uses_with(source)
            graph_of(node).remove(node, safe=True)
