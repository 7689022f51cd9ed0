"""What hardware with exact sums of bytes computes for each layer of a quantized model: int8 times
int8, added up as whole numbers, times the scales, plus the bias. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from graphs import run

from converter.graph.edit import constant

LAYERS = ("Conv", "Gemm", "MatMul")


def quantized_layers(model: ir.Model) -> list[ir.Node]:
    """The layers whose input and weight come out of conversions."""
    return [
        node
        for node in model.graph
        if node.op_type in LAYERS
        and all(
            v.producer() and v.producer().op_type == "DequantizeLinear" for v in node.inputs[:2]
        )
    ]


def with_taps(model: ir.Model, nodes: list[ir.Node]) -> bytes:
    """The model that hands out what each node makes, and the codes that it reads."""
    proto = ir.to_proto(model)
    names = [value.name for node in nodes for value in (node.outputs[0], codes_of(node, 0))]
    known = {value.name for value in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(proto.SerializeToString())


def codes_of(node: ir.Node, index: int) -> ir.Value:
    return node.inputs[index].producer().inputs[0]


def differences(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    """By layer, the largest difference of exact integers to ONNX Runtime, over the largest output."""
    nodes = quantized_layers(model)
    seen = run(with_taps(model, nodes), feeds)
    for node in nodes:
        exact = computed(node, seen[codes_of(node, 0).name])
        found = seen[node.outputs[0].name].astype(np.float64)
        yield node.name, float(np.abs(exact - found).max() / max(np.abs(found).max(), 1e-30))


def computed(node: ir.Node, x: np.ndarray) -> np.ndarray:
    """A layer of codes `x`, in float64."""
    data, weight = (node.inputs[index].producer() for index in (0, 1))
    codes = constant(weight.inputs[0]).astype(np.int64)
    scale = constant(data.inputs[1]).astype(np.float64)
    by = constant(weight.inputs[1]).astype(np.float64)
    whole = x.astype(np.int64) - constant(data.inputs[2]).astype(np.int64)
    bias = None if len(node.inputs) < 3 else constant(node.inputs[2]).astype(np.float64)
    if node.op_type == "Conv":
        channels = (1, -1, *[1] * (x.ndim - 2))
        total = _convolved(node, whole, codes) * (scale * by).reshape(channels if by.ndim else ())
        return total if bias is None else total + bias.reshape(channels)
    turned = node.attributes.get_int("transB", 0)
    total = whole @ (codes.T if turned else codes) * (scale * by)
    return total if bias is None else total + bias


def _convolved(node: ir.Node, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Sums of whole numbers, by windows."""
    get, rank = node.attributes.get_ints, x.ndim - 2
    strides, dilations = get("strides", [1] * rank), get("dilations", [1] * rank)
    pads, groups = get("pads", [0] * 2 * rank), node.attributes.get_int("group", 1)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, x.ndim)))
    steps = tuple(slice(None, None, s) for s in strides)
    taps = tuple(slice(None, None, d) for d in dilations)
    windows = windows[(slice(None), slice(None), *steps, *taps)]
    split = [np.split(each, groups, axis) for each, axis in ((windows, 1), (w, 0))]
    letters = "abc"[:rank]
    formula = f"nk{letters.upper()}{letters},ok{letters}->no{letters.upper()}"
    parts = [np.einsum(formula, a, b) for a, b in zip(*split, strict=True)]
    return np.concatenate(parts, axis=1)
