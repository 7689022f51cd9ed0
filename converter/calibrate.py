"""From plan and data to ranges: taps the tensors that the plan names and turns their statistics into parameters."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from calib.affine import QParams, qparams_of
from calib.ranges import RANGE_METHODS, RangeSpec, range_of
from calib.samples import Dataset
from calib.session import open_session, over_samples, run
from calib.stats import TensorStats
from converter.model import constant, saved, values_by_name
from converter.plan import QuantPlan, TensorPlan

Statistics = dict[str, TensorStats]


def collect(model: ir.Model, names: Iterable[str], data: Dataset, method: str, threads: int) -> Statistics:
    """Statistics over all samples of the named tensors of a float model; constants and inputs are not run."""
    values = values_by_name(model.graph)
    statistics = {name: RANGE_METHODS[method].new_stats() for name in names}
    for name, stats in statistics.items():
        if (array := constant(values[name])) is not None:
            stats.update(array, 0)
    taps = [name for name in statistics if constant(values[name]) is None and not values[name].is_graph_input()]
    fed = [name for name in statistics if values[name].is_graph_input()]
    with saved(model, taps) as path:
        session = open_session(path)

        def step(mine: Statistics, index: int) -> None:
            sample = data.sample(index)
            tensors = {**run(session, taps, sample), **{name: sample[name] for name in fed}}
            for name, x in tensors.items():
                mine[name].update(x, index)

        workers = over_samples(
            len(data), lambda: {name: RANGE_METHODS[method].new_stats() for name in (*taps, *fed)}, step, threads
        )
    for mine in workers:
        statistics.update((name, statistics[name].merge(stats)) for name, stats in mine.items())
    return statistics


def activation_qparams(plan: QuantPlan, statistics: Statistics, method: str) -> dict[str, QParams]:
    """Parameters of every group of the plan."""
    return {group: _qparams(tensor, statistics[group], method) for group, tensor in plan.groups().items()}


def _qparams(tensor: TensorPlan, stats: TensorStats, method: str) -> QParams:
    span = range_of(RANGE_METHODS[method], stats, RangeSpec(tensor.format, tensor.symmetric))
    return qparams_of(span, tensor.format, tensor.symmetric)
