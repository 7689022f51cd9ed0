"""From plan and data to ranges: taps the tensors that are asked for and turns their statistics into
parameters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams, Range
from calib.ranges import RangeMethod, RangeSpec, range_of
from calib.samples import Dataset
from calib.stats import TensorStats
from calib.workers import over_samples
from converter.calibrate.runs import Opened, passes
from converter.graph.edit import constant, not_none, values_by_name
from converter.job import Resources, Watch
from converter.plan.ops import rule_of
from converter.plan.plan import QuantPlan, TensorPlan
from converter.plan.targets import Target

Statistics = dict[str, TensorStats]
# A tensor and its axis of channels: two operators may see channels along different axes of one
# tensor.
Mean = tuple[str, int]
# Lower numbers before a Softmax are masks, and so far below the largest one exp is 1e-14 of it.
MASKED, NOTHING_LEFT = -1e4, 32.0


@dataclass(frozen=True)
class Wanted:
    """What to find out about a float model: statistics of `tensors`, `means` of tensors along
    channel axes.

    The means are over the `first` samples only, those that they will be compared on. `part` (index,
    count) looks at a part of the samples, from which `merged` makes what looking at all of them
    finds.
    """

    tensors: tuple[str, ...]
    means: tuple[Mean, ...]
    histogram: bool
    samples: bool
    first: int = sys.maxsize
    part: tuple[int, int] = (0, 1)

    def indices(self, count: int) -> range:
        """The part of `count` samples; part 0 has all that means are taken of, as sums follow from
        their order.
        """
        number, parts = self.part
        head = max(count // parts, min(self.first, count) if self.means else 0)
        cuts = [
            0,
            *(head + (count - head) * k // max(parts - 1, 1) for k in range(parts)),
        ]
        return range(cuts[number], cuts[number + 1])

    def new_stats(self) -> TensorStats:
        """Empty statistics that hold what is wanted."""
        return TensorStats(self.histogram, self.samples)


@dataclass(frozen=True)
class Evidence:
    """What was found; `means` are float64 of shape (channels,), over the `first` samples."""

    statistics: Mapping[str, TensorStats]
    means: Mapping[Mean, Array]
    first: int = sys.maxsize


def observe(
    model: ir.Model, wanted: Wanted, data: Dataset, *, resources: Resources, watch: Watch
) -> Evidence:
    """Evidence over all samples; constants are read where they are, inputs as they are fed, the
    rest is tapped.

    Tensors are tapped in groups whose arrays fit the memory budget together; each group is one pass
    over the data.
    """
    constants = of_constants(wanted, values_by_name(model.graph))
    means = dict[Mean, Array]()
    # The parts together see a constant once.
    statistics = {} if wanted.part[0] else {**constants}
    names = dict.fromkeys([*wanted.tensors, *(name for name, _ in wanted.means)])
    computed = [name for name in names if name not in constants]
    whole = passes(
        model,
        computed,
        data.sample(0),
        budget=resources.memory // resources.threads,
        providers=resources.providers,
    )
    total = sum(whole.sizes.values()) / 1e6
    watch.say(
        f"Calibrating {len(computed)} tensors of {total:.0f} MB a sample, {len(whole.groups)} "
        "pass(es) over the data."
    )
    for group, tapped in whole:
        evidence = _observe_group(
            tapped, group, wanted, data=data, resources=resources, watch=watch
        )
        statistics |= evidence.statistics
        means |= evidence.means
    if wanted.part == (0, 1):
        warn_of_oddities(statistics, watch)
    return Evidence(statistics, means, wanted.first)


def of_constants(wanted: Wanted, values: Mapping[str, ir.Value]) -> Statistics:
    """Statistics of those of the tensors wanted that are constants."""
    statistics = {}
    for name in wanted.tensors:
        if (array := constant(values[name])) is not None:
            statistics[name] = wanted.new_stats()
            statistics[name].update(array, 0)
    return statistics


def _observe_group(
    tapped: Opened,
    group: Sequence[str],
    wanted: Wanted,
    *,
    data: Dataset,
    resources: Resources,
    watch: Watch,
) -> Evidence:
    watched = [name for name in group if name in wanted.tensors]
    averaged = [mean for mean in wanted.means if mean[0] in group and not wanted.part[0]]
    # A worker takes whichever statistics are idle: they merge into the same result however the
    # samples were spread.
    idle: SimpleQueue[Statistics] = SimpleQueue()
    for _ in range(resources.threads):
        idle.put({name: wanted.new_stats() for name in watched})

    def step(index: int) -> dict[Mean, Array]:
        compared = index < wanted.first
        tensors = tapped.fetch(group if compared else watched, data.sample(index))
        mine = idle.get()
        for name, stats in mine.items():
            stats.update(tensors[name], index)
        idle.put(mine)
        return {
            (name, axis): channel_mean(tensors[name], axis) for name, axis in averaged if compared
        }

    totals = {mean: np.zeros(()) for mean in averaged}
    part = wanted.indices(len(data))
    results = over_samples(
        len(part),
        lambda number: step(part[number]),
        resources.threads,
    )
    for sums in watch.track(results, "Calibrating", len(part)):
        totals.update((mean, totals[mean] + x) for mean, x in sums.items())
    stats = [idle.get() for _ in range(resources.threads)]
    means = {mean: total / min(wanted.first, len(data)) for mean, total in totals.items()}
    return Evidence(merged(stats), means, wanted.first)


def merged(parts: Iterable[Mapping[str, TensorStats]]) -> Statistics:
    """The statistics of all parts together, the same in any order."""
    whole: Statistics = {}
    for part in parts:
        whole.update(
            (name, whole[name].merge(stats) if name in whole else stats)
            for name, stats in part.items()
        )
    return whole


def warn_of_oddities(statistics: Mapping[str, TensorStats], watch: Watch) -> None:
    """Names the tensors that the data says little of."""
    for name, stats in statistics.items():
        if stats.nan_count or stats.inf_count:
            watch.warn(
                f"Tensor '{name}' held {stats.nan_count} NaN and {stats.inf_count} infinite "
                "values in the calibration "
                "data; its range ignores them."
            )
        if not stats.count:
            watch.warn(
                f"Tensor '{name}' had no finite value in the calibration data; its range is "
                "a guess."
            )


def channel_mean(x: Array, axis: int) -> Array:
    """Mean over all axes but `axis`, of the finite values: float64 of shape (channels,).

    NaN where a channel has none.
    """
    moved = np.moveaxis(x, axis, 1 if x.ndim > 1 else 0)
    with np.errstate(over="ignore", invalid="ignore"):
        # float32, pairwise along contiguous memory.
        inner = moved.mean(axis=tuple(range(2, x.ndim)))
        mean = np.asarray(
            inner.mean(axis=0, dtype=np.float64) if x.ndim > 1 else inner,
            np.float64,
        )
    if np.isfinite(mean).all():
        return mean
    return finite_mean(
        moved.swapaxes(0, 1).reshape(moved.shape[1], -1) if x.ndim > 1 else moved[:, None], 1
    )


def finite_mean(rows: Array, axis: int) -> Array:
    """Mean over an axis of two, in float64, of the finite values; NaN where there is none."""
    finite = np.isfinite(rows)
    total, count = rows.sum(axis, np.float64, where=finite), finite.sum(axis)
    return np.asarray(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0))


def activation_qparams(
    plan: QuantPlan,
    statistics: Mapping[str, TensorStats],
    method: RangeMethod,
    spec: RangeSpec,
    *,
    threads: int = 1,
    spans: Mapping[str, tuple[float, float]] | None = None,
    methods: Mapping[str, RangeMethod] | None = None,
) -> dict[str, QParams]:
    """Parameters of every group that the plan has none for; `spec` holds the methods' options,
    `spans` what of a group's range makes a difference, if not all, and `methods` are those of
    tensors that have their own.
    """
    groups = [item for item in plan.groups().items() if item[0] not in plan.qparams]

    def of(index: int) -> QParams:
        group, tensor = groups[index]
        span = (spans or {}).get(
            group,
            (-math.inf, math.inf),
        )
        own = (methods or {}).get(tensor.name, method)
        return _qparams(tensor, statistics[tensor.name], own, spec, span=span)

    qparams = over_samples(len(groups), of, threads)
    return {group: q for (group, _), q in zip(groups, qparams, strict=True)}


def _qparams(
    tensor: TensorPlan,
    stats: TensorStats,
    method: RangeMethod,
    spec: RangeSpec,
    *,
    span: tuple[float, float],
) -> QParams:
    spec = _spec_of(tensor, spec)
    whole = range_of(method, stats, spec)
    return spec.qparams(Range(np.clip(whole.lo, *span), np.clip(whole.hi, *span)))


def _spec_of(tensor: TensorPlan, spec: RangeSpec) -> RangeSpec:
    """`spec` with the tensor's own format."""
    return replace(spec, format=tensor.format, symmetric=tensor.symmetric)


def probability_qparams(
    graph: ir.Graph,
    plan: QuantPlan,
    statistics: Mapping[str, TensorStats],
    spec: RangeSpec,
) -> dict[str, QParams]:
    """Parameters of the groups that hold what a Softmax makes of integers: from 0 to at least twice
    the largest probability seen.

    Between two conversions ONNX Runtime computes it on integers, and there values beyond the range
    wrap around.
    """
    values, qparams = values_by_name(graph), {}
    for name, group in plan.groups().items():
        softmax = _behind(values[group.name], bounds=True).producer()
        source = softmax.inputs[0] if softmax and rule_of(softmax).probabilities else None
        if source and _behind(source).name in plan.tensors:
            largest = statistics[group.name].hi if group.name in statistics else 1.0
            span = Range(np.array(0.0), np.array(_probability_above(largest)))
            qparams[name] = _spec_of(group, spec).qparams(span)
    return qparams


def masked_qparams(
    graph: ir.Graph,
    plan: QuantPlan,
    statistics: Mapping[str, TensorStats],
    spec: RangeSpec,
) -> dict[str, QParams]:
    """Parameters of the groups with masks before a Softmax: a mask need not reach lower than where
    nothing is left of a probability.
    """
    groups, qparams = plan.groups(), dict[str, QParams]()

    def cut_off(name: str, depth: float) -> None:
        for members in (plan.tensors, plan.converted):
            group = members[name].group if name in members else ""
            stats = statistics.get(groups[group].name) if group else None
            if stats is not None and stats.lo < MASKED:
                span = Range(
                    np.array(stats.hi - depth),
                    np.array(stats.hi),
                )
                qparams[group] = _spec_of(groups[group], spec).qparams(span)

    for softmax in (node for node in graph if rule_of(node).probabilities):
        source = _behind(not_none(softmax.inputs[0]))
        cut_off(source.name or "", NOTHING_LEFT)
        adder = source.producer()
        if adder is None or not rule_of(adder).adds:
            continue
        names = [value.name or "" for value in adder.inputs if value is not None]
        spans = [statistics[n].hi - statistics[n].lo for n in names if n in statistics]
        for name in names:
            cut_off(name, NOTHING_LEFT + min(spans, default=0.0))
    return qparams


def given_qparams(
    plan: QuantPlan, ranges: Mapping[str, Range], spec: RangeSpec
) -> dict[str, QParams]:
    """Parameters of the groups of tensors whose ranges are given."""
    groups, qparams = plan.groups(), {}
    for name, span in ranges.items():
        for members in (plan.tensors, plan.converted):
            if name in members:
                group = members[name].group
                qparams[group] = _spec_of(groups[group], spec).qparams(span)
    return qparams


def fixed_qparams(plan: QuantPlan, target: Target) -> dict[str, QParams]:
    """Parameters of the groups whose target leaves them no choice."""
    qparams = {}
    for unit in plan.units():
        fmt = unit.activation or target.activation
        given = target.fixed.get((unit.op_type, fmt.bits))
        for name in unit.outputs if given else ():
            scale, zero = not_none(given)
            q = QParams(
                np.array(scale, np.float32),
                np.array(zero, fmt.dtype),
                fmt,
            )
            qparams[plan.tensors[name].group] = q
    return qparams


def _probability_above(largest: float) -> float:
    """The least power of two that is at least twice `largest`, at most 1."""
    if not 0 < largest < 0.5:
        return 1.0
    return float(np.exp2(np.ceil(np.log2(2 * largest))))


def _behind(value: ir.Value, bounds: bool = False) -> ir.Value:
    """The value that `value` is but for moves, and bounds."""
    node = value.producer()
    passes = node is not None and (rule_of(node).moves or (bounds and rule_of(node).bounds))
    return _behind(node.inputs[0], bounds) if passes and node and node.inputs[0] else value
