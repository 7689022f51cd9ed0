"""Moves outlier channels of a model's activations into the weights behind them, as samples tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.samples import Dataset
from calib.workers import over_samples
from converter.calibrate.runs import opened
from converter.graph.edit import not_none, operand
from converter.graph.mapped import release
from converter.job import Watch
from converter.plan.ops import is_transposed
from converter.plan.plan import NodePlan
from converter.prepare.smooth import divide_channels, linear_in
from converter.weights.smoothquant import (
    Channels,
    channels_of,
    joined,
    smoothing_factors,
)


def smooth(
    model: ir.Model,
    products: Iterable[NodePlan],
    data: Dataset,
    *,
    threads: int,
    watch: Watch,
) -> None:
    """Moves the channels that stand out in what `products` of the main graph read into their
    weights, in place.
    """
    readers = _readers(
        model.graph,
        {unit.name: unit.inputs[0] for unit in products},
    )
    if not readers:
        return
    channels = observe_channels(model, list(readers), data, threads)
    weights = {
        name: np.concatenate(list(map(_weight, nodes)), axis=1) for name, nodes in readers.items()
    }
    possible = {
        name: smoothing_factors(channels[name], weights[name], free=bool(linear_in(nodes)))
        for name, nodes in readers.items()
    }
    factors = {name: values for name, values in possible.items() if values is not None}
    watch.say(
        f"Channels that stand out in {len(factors)} of {len(readers)} tensors are moved into "
        "the weights."
    )
    divide_channels(model, factors, readers)


def _readers(graph: ir.Graph, inputs: Mapping[str, str]) -> dict[str, list[ir.Node]]:
    """By tensor the products that read it, where their weights are theirs alone."""
    readers: dict[str, list[ir.Node]] = {}
    for node in (node for node in graph if node.name in inputs):
        readers.setdefault(inputs[node.name or ""], []).append(node)
    return {name: nodes for name, nodes in readers.items() if all(map(_alone, nodes))}


def _alone(product: ir.Node) -> bool:
    return product.inputs[1] is not None and len(product.inputs[1].uses()) == 1


def _factors(channels: Channels, nodes: Sequence[ir.Node]) -> Array | None:
    """Those of a tensor that the products `nodes` read."""
    weight = np.concatenate(list(map(_weight, nodes)), axis=1)
    release(not_none(node.inputs[1]) for node in nodes)
    return smoothing_factors(channels, weight, free=bool(linear_in(nodes)))


def _weight(product: ir.Node) -> Array:
    """(channels, columns)."""
    weight = not_none(operand(product, 1))
    return weight.T if is_transposed(product) else weight


def observe_channels(
    model: ir.Model, names: Sequence[str], data: Dataset, threads: int
) -> dict[str, Channels]:
    """The channels of the named tensors over all samples."""
    tapped = opened(model, names, optimize=True)

    def step(index: int) -> dict[str, Channels]:
        tensors = tapped.fetch(names, data.sample(index))
        return {name: channels_of(tensors[name]) for name in names}

    seen = list(over_samples(len(data), step, threads))
    return {name: joined(sample[name] for sample in seen) for name in names}
