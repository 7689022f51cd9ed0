"""Lets a quantized graph take and return integers: the conversion at its edge is left out."""

from __future__ import annotations

import onnx_ir as ir

from converter.graph.edit import not_none, readers_of
from converter.graph.qdq import is_dequantize, is_quantize
from converter.plan.ops import rule_of


def feed_integers(graph: ir.Graph, name: str) -> None:
    """Graph input `name`, quantized by an emitted pair, becomes an input of the pair's integers."""
    old = next(value for value in graph.inputs if value.name == name)
    quantize = next(filter(is_quantize, readers_of(old)))
    codes = quantize.outputs[0]
    for use in [use for use in old.uses() if use.node is not quantize]:
        use.node.replace_input_with(use.idx, _restoring(codes).outputs[0])
    new = ir.Value(name=name, shape=old.shape, type=_integers_of(quantize))
    codes.replace_all_uses_with(new)
    graph.remove(quantize, safe=True)
    old.name = None
    graph.inputs[list(graph.inputs).index(old)] = new


def hand_out_integers(graph: ir.Graph, name: str) -> None:
    """Graph output `name`, restored by an emitted pair, becomes an output of the pair's
    integers.
    """
    old = next(value for value in graph.outputs if value.name == name)
    restore = not_none(old.producer())
    codes = not_none(restore.inputs[0])
    old.name, codes.name = codes.name, name
    codes.type, codes.shape = _integers_of(restore), old.shape
    graph.outputs[list(graph.outputs).index(old)] = codes
    if not old.uses():
        graph.remove(restore, safe=True)


def _restoring(codes: ir.Value) -> ir.Node:
    """The DequantizeLinear behind `codes`, or behind the Clip to their bounds."""
    readers = readers_of(codes)
    reader = next(node for node in readers if is_dequantize(node) or rule_of(node).bounds)
    return reader if is_dequantize(reader) else _restoring(reader.outputs[0])


def _integers_of(conversion: ir.Node) -> ir.TensorType:
    """The type of the integers on one side of a QuantizeLinear or DequantizeLinear: that of its
    zero point.
    """
    return ir.TensorType(not_none(not_none(conversion.inputs[2]).dtype))
