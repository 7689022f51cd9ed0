"""Lets a quantized graph take and return integers: the conversion at its edge is left out."""

from __future__ import annotations

import onnx_ir as ir


def feed_integers(graph: ir.Graph, name: str) -> None:
    """Graph input `name`, quantized by an emitted pair, becomes an input of the pair's integers."""
    old = next(value for value in graph.inputs if value.name == name)
    quantize = next(use.node for use in old.uses() if use.node.op_type == "QuantizeLinear")
    codes = quantize.outputs[0]
    restored = next(use.node for use in codes.uses() if use.node.op_type == "DequantizeLinear").outputs[0]
    for use in list(old.uses()):
        if use.node is not quantize:
            use.node.replace_input_with(use.idx, restored)
    zero_point = quantize.inputs[2]
    assert zero_point is not None
    new = ir.Value(name=name, shape=old.shape, type=ir.TensorType(zero_point.dtype))
    codes.replace_all_uses_with(new)
    graph.remove(quantize, safe=True)
    old.name = None
    graph.inputs[list(graph.inputs).index(old)] = new


def hand_out_integers(graph: ir.Graph, name: str) -> None:
    """Graph output `name`, restored by an emitted pair, becomes an output of the pair's integers."""
    old = next(value for value in graph.outputs if value.name == name)
    restore = old.producer()
    assert restore is not None
    codes = restore.inputs[0]
    assert codes is not None
    old.name, codes.name = codes.name, name
    codes.type, codes.shape = ir.TensorType(restore.inputs[2].dtype), old.shape  # type: ignore[union-attr]
    graph.outputs[list(graph.outputs).index(old)] = codes
