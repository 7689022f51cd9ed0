"""From plan and data to ranges: taps the tensors that the plan names and turns their statistics into parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, qparams_of
from calib.ranges import RangeMethod, RangeSpec, range_of
from calib.samples import Dataset
from calib.session import open_session, over_samples, run
from calib.stats import TensorStats
from converter.job import Watch
from converter.layerwise import channel_mean
from converter.model import constant, saved, values_by_name
from converter.plan import QuantPlan, TensorPlan

Statistics = dict[str, TensorStats]


@dataclass(frozen=True)
class Evidence:
    """What one pass of the float model over the data found: statistics of tensors, channel means of others."""

    statistics: Statistics
    means: Mapping[str, Array]


def observe(
    model: ir.Model, names: Iterable[str], means: Mapping[str, int], data: Dataset, method: RangeMethod, threads: int, watch: Watch
) -> Evidence:
    """Statistics of the tensors `names`, and means a channel of the tensors `means` (name → channel axis).

    Constants and graph inputs are read where they are; everything else is tapped in one pass over all samples.
    """
    values = values_by_name(model.graph)
    constants = {name: array for name in names if (array := constant(values[name])) is not None}
    fed = {value.name for value in model.graph.inputs}
    watched = [name for name in names if name not in constants]
    taps = [name for name in dict.fromkeys([*watched, *means]) if name not in fed]
    idle: SimpleQueue[Statistics] = SimpleQueue()
    for _ in range(threads):
        idle.put({name: method.new_stats() for name in watched})
    with saved(model, taps) as path:
        session = open_session(path)

        def step(index: int) -> dict[str, Array]:
            sample = data.sample(index)
            tensors = {**sample, **run(session, taps, sample)}
            mine = idle.get()
            for name, stats in mine.items():
                stats.update(tensors[name], index)
            idle.put(mine)
            return {name: channel_mean(tensors[name], axis) for name, axis in means.items()}

        total = {name: np.zeros(()) for name in means}
        for found in watch.track(over_samples(len(data), step, threads), "Calibrating", len(data)):
            total = {name: total[name] + mean for name, mean in found.items()}
    statistics = idle.get()
    while not idle.empty():
        other = idle.get()
        statistics = {name: stats.merge(other[name]) for name, stats in statistics.items()}
    for name, array in constants.items():
        statistics[name] = method.new_stats()
        statistics[name].update(array, 0)
    return Evidence(statistics, {name: x / len(data) for name, x in total.items()})


def activation_qparams(plan: QuantPlan, statistics: Statistics, method: RangeMethod) -> dict[str, QParams]:
    """Parameters of every group of the plan."""
    return {group: _qparams(tensor, statistics[group], method) for group, tensor in plan.groups().items()}


def _qparams(tensor: TensorPlan, stats: TensorStats, method: RangeMethod) -> QParams:
    span = range_of(method, stats, RangeSpec(tensor.format, tensor.symmetric))
    return qparams_of(span, tensor.format, tensor.symmetric)
