#!/usr/bin/env python3
"""Gradients: processor seconds of a forward and backward pass, beside PyTorch's where it is there.

    python benchmarks/gradients.py [MODEL ...] [--batch 16] [--rounds 10]

Gradients of the sum of squares of the outputs with respect to all weights and biases, on one
thread, the same batch, least of interleaved rounds; and the largest difference of a gradient from
PyTorch's, over its largest value.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from common import CLASSIFIERS

from calib.session import open_session
from converter.graph.files import load, serialized
from converter.learn.blocked import block_convolutions
from converter.learn.gradients import gradient_model
from converter.learn.losses import squares
from converter.prepare import prepare

Arrays = dict[str, np.ndarray]


def parameters(model: ir.Model) -> Arrays:
    """Weights and biases by name."""
    values = [v for n in model.graph if n.op_type in {"Conv", "Gemm"} for v in n.inputs[1:] if v]
    return {value.name: value.const_value.numpy() for value in values}


def ours(model: ir.Model, wanted: Arrays, x: np.ndarray) -> Callable[[], Arrays]:
    """What computes the gradients once."""
    name, output = model.graph.inputs[0].name, model.graph.outputs[0].name
    found = gradient_model(model, squares(output), list(wanted), {name: x.shape})
    assert not found.gaps
    session = open_session(serialized(block_convolutions(found.model)), same_sizes=True)
    names = list(found.outputs.values())
    return lambda: dict(zip(found.outputs, session.run(names, {name: x, **wanted}), strict=True))


def torchs(model: ir.Model, wanted: Arrays, x: np.ndarray) -> Callable[[], Arrays]:
    """The same, node by node of the same prepared graph, by PyTorch."""
    import torch

    torch.set_num_threads(1)
    free = {k: torch.tensor(a, requires_grad=True) for k, a in wanted.items()}
    fed = {model.graph.inputs[0].name: torch.tensor(x)}

    def once() -> Arrays:
        for tensor in free.values():
            tensor.grad = None
        values = {**free, **fed}
        for node in model.graph:
            inputs = [values.get(value.name) for value in node.inputs]
            made = TORCH[node.op_type](torch.nn.functional, node, *inputs)
            values[node.outputs[0].name] = made
        values[model.graph.outputs[0].name].square().sum().backward()
        return {k: tensor.grad.numpy() for k, tensor in free.items()}

    return once


def constant(node: ir.Node, index: int) -> Any:
    """A constant input as Python's numbers."""
    return node.inputs[index].const_value.numpy().tolist()


def bounds(node: ir.Node) -> list[float]:
    """What a Clip keeps numbers between; some exporters write lists of one."""
    return [float(np.asarray(constant(node, i)).reshape(())) for i in (1, 2)]


def torch_conv(nn: Any, node: ir.Node, x: Any, weight: Any, bias: Any = None) -> Any:
    """A convolution, whose padding PyTorch wants to be even."""
    pads = node.attributes.get_ints("pads", [0] * 4)
    if pads[:2] != pads[2:]:
        x, pads = nn.pad(x, (pads[1], pads[3], pads[0], pads[2])), [0] * 4
    strides = tuple(node.attributes.get_ints("strides", [1, 1]))
    group = node.attributes.get_int("group", 1)
    return nn.conv2d(x, weight, bias, strides, tuple(pads[:2]), 1, group)


def torch_gemm(nn: Any, node: ir.Node, x: Any, weight: Any, bias: Any) -> Any:
    """A linear layer."""
    return nn.linear(x, weight if node.attributes.get_int("transB", 0) else weight.T, bias)


def torch_slice(nn: Any, node: ir.Node, x: Any, *_: Any) -> Any:
    """A slice with steps."""
    parts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(*(constant(node, i) for i in (3, 1, 2, 4)), strict=True):
        parts[axis] = slice(start, min(end, x.shape[axis]), step)
    return x[tuple(parts)]


def torch_pad(nn: Any, node: ir.Node, x: Any, *_: Any) -> Any:
    """Zeros around; PyTorch counts axes from the last."""
    pads = constant(node, 1)
    return nn.pad(x, [pads[i + k * x.ndim] for i in reversed(range(x.ndim)) for k in (0, 1)])


# (torch.nn.functional, node, inputs) -> output
TORCH: dict[str, Callable[..., Any]] = {
    "Conv": torch_conv,
    "Gemm": torch_gemm,
    "Slice": torch_slice,
    "Pad": torch_pad,
    "Add": lambda nn, node, a, b: a + b,
    "Clip": lambda nn, node, x, *_: x.clamp(*bounds(node)),
    "Relu": lambda nn, node, x: x.relu(),
    "GlobalAveragePool": lambda nn, node, x: x.mean((2, 3), keepdim=True),
    "Flatten": lambda nn, node, x: x.flatten(1),
    "Softmax": lambda nn, node, x: x.softmax(-1),
}


def seconds(once: Callable[[], Arrays]) -> float:
    """Processor time of one pass."""
    start = time.process_time()
    once()
    return time.process_time() - start


def difference(found: Arrays, wanted: Arrays) -> float:
    """The largest of a tensor over its largest value, of all tensors."""
    return max(np.abs(found[k] - a).max() / np.abs(a).max() for k, a in wanted.items())


def main() -> None:
    """One line a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["mobilenet_v1_0.75_224", "resnet20_cifar10"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    beside = importlib.util.find_spec("torch") is not None
    print(f"{'':24} forward  both    PyTorch ratio  difference")
    for name in arguments.models:
        model = prepare(load(CLASSIFIERS[name].path))
        data, _ = CLASSIFIERS[name].samples("calib", arguments.batch)
        feed = CLASSIFIERS[name].input
        x = np.concatenate([data.sample(i)[feed] for i in range(arguments.batch)])
        wanted = parameters(model)
        forward = open_session(serialized(model), same_sizes=True)
        runs = [lambda f=forward, k=feed, x=x: f.run(None, {k: x}), ours(model, wanted, x)]
        runs += [torchs(model, wanted, x)] if beside else []
        times = [[seconds(run) for run in runs] for _ in range(arguments.rounds)]
        least = [min(column) for column in zip(*times, strict=True)]
        text = f"{name:24} {least[0]:.3f}   {least[1]:.3f}"
        if beside:
            error = difference(runs[1](), runs[2]())
            text += f"   {least[2]:.3f}   {least[1] / least[2]:.2f}   {error:.1e}"
        print(text, flush=True)


if __name__ == "__main__":
    main()
