"""WEIGHT_QUANT: weights are stored in 1 to 16 bits each and are floats again when the model
runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import onnx_ir as ir

from calib.affine import IntFormat
from calib.samples import Dataset
from converter.calibrate.cache import fingerprint_of
from converter.calibrate.data import open_data, resources_of, synthetic_data
from converter.calibrate.judges import Parted, parted
from converter.config.keys import WeightQuantParam
from converter.config.settings import settings_of
from converter.emit.dequantize import (
    NEWEST_OPSET,
    TYPES,
    emit_dequantized,
    emit_signed,
    opset_for,
    type_for,
)
from converter.emit.finish import finish
from converter.emit.half import store_biases_as_half
from converter.emit.planes import PlaneWriter
from converter.emit.stored import emit_stored
from converter.errors import ConfigError, ModelError
from converter.graph.edit import constant, initializers_of, nodes_of, not_none
from converter.graph.files import accepting, file_bytes, refusal, save, saved
from converter.graph.mapped import release
from converter.job import Job, Watch
from converter.learn.own_data import with_distilled
from converter.learn.tuning import Tuning
from converter.plan.ops import (
    bias_add,
    picks_rows,
    rule_of,
    takes_weight,
    unusable,
    weights_of,
    words_of,
)
from converter.plan.placement import Wishes, skipped, unfed
from converter.plan.plan import (
    Granularity,
    NodePlan,
    PerAxis,
    PerBlock,
    PerTensor,
    QuantPlan,
    WeightPlan,
    stored_bytes,
)
from converter.plan.recipes import Wish, told, wishes_for
from converter.plan.requests import stores_signed
from converter.plan.result import Quantized, Tradeoff
from converter.prepare.fake_quant import Prepared
from converter.prepare.opset import opset_of, raise_opset
from converter.report.provenance import provenance
from converter.weights.bit_search import Search
from converter.weights.journal import Journal
from converter.weights.layers import Fitter
from converter.weights.stored import WIDEST, Storage

Emit = Callable[[QuantPlan], ir.Model]
# Keys of a node's own that say how its weights are stored.
WISHES = ("bit_num", "per_channel", "block_size", "quant_strategy")
# The width in a plan whose widths are not found yet.
UNKNOWN_BITS = 8
# Tables of no more bytes, and no more of the whole model, stay float.
SMALL_TABLE, SMALL_SHARE = 4096, 0.01


def make_plan(prepared: Prepared, job: Job) -> QuantPlan:
    """The plan without numbers."""
    return _plan_of(prepared.model, job)


def _plan_of(model: ir.Model, job: Job) -> QuantPlan:
    nodes: dict[str, NodePlan] = {}
    words, small = words_of(model), _small_tables(model)
    common, recipes = job.config.common, job.config.recipes
    kept = unfed(model.graph)
    wishes = Wishes(
        common.skip_quant_node, common.skip_quant_type, kept_float=kept, recipes=recipes
    )
    for node in nodes_of(model):
        planned = _node_plan(node, words, small, job=job, wishes=wishes)
        unit = nodes.setdefault(node.name or "", planned)
        release(value for value in node.inputs if value is not None)
        for name in unit.absorbed:
            nodes[name] = NodePlan(
                name, "Add", False, f"computed inside {unit.name}", inside=unit.name
            )
    return QuantPlan(nodes, {})


def _small_tables(model: ir.Model) -> dict[ir.Value | None, str]:
    """Tables that save next to nothing, with the reason to leave them float: all who read a row
    read its error, as every word does that of its kind.
    """
    weights = [value for value in initializers_of(model) if value.const_value is not None]
    sizes = {value: not_none(value.const_value).nbytes for value in weights}
    most = min(SMALL_TABLE, SMALL_SHARE * sum(sizes.values()))
    tables = [node.inputs[0] for node in nodes_of(model) if picks_rows(node)]
    return {
        table: f"a table of {sizes[table] / 1000:.1f} kB saves next to nothing"
        for table in tables
        if table is not None and sizes.get(table, most + 1) <= most
    }


def storage_plan(model: ir.Model, job: Job) -> QuantPlan:
    """The plan that stores every weight it can in 8 bits, for modes that have no limits of their
    own for it.
    """
    common = replace(
        job.config.common,
        bit_num=8,
        min_quant_weight_size=0,
        min_quant_weight_channel=0,
    )
    config = replace(job.config, common=common, weight_quant=WeightQuantParam())
    return _plan_of(model, replace(job, config=config))


def quantize(prepared: Prepared, job: Job, watch: Watch) -> Quantized:
    """The quantized copy of a prepared float model."""
    model = prepared.model
    wanted = job.config.weight_quant
    data, tuning = _data(prepared, job, watch), Tuning(job, watch)
    bounded = not job.config.common.bit_num and _is_bounded(job)
    judges = parted(data, False, watch) if bounded else Parted(data, data, data)
    data = judges.fitted
    # What judged the search was not seen by rounding either.
    apart = judges.judges is not judges.fitted
    parts = (data, judges.judges) if apart and tuning.wanted else tuning.parted(data)
    resources = resources_of(job)
    given = len(data) > 0 and job.config.has_samples and not data.random
    plan, pareto = make_plan(prepared, job), tuple[Tradeoff, ...]()
    seeing = any(not weight.blind for unit in plan.units() for weight in unit.weights)
    by_outputs = given and seeing
    signed = stores_signed(job.config)
    storage = Storage(by_outputs, wanted.bias_correction, wanted.on_the_fly, symmetric=signed)
    newest = _newest_opset(model, job, watch) if wanted.on_the_fly else None
    emit = partial(_emitted, model, newest=newest, signed=signed)
    best = _Best(job, emit, data)
    fitter = Fitter(model, parts[0], resources, storage, watch)
    if job.config.common.bit_num:
        plan = fitter.fitted(plan)
    else:
        with best.told():
            plan, pareto = _searched(fitter, judges.judges, plan, best, newest=newest)
    if tuning.wanted:
        again = None if apart else partial(replace(fitter, data=data).fitted, plan)
        with best.told():
            plan = tuning.tuned(model, plan, parts, keep=best.keep, again=again)
    widths = Counter(weight.qparams.format.bits for weight in plan.stored.values())
    watch.tell(
        "Bits of weights: "
        f"{', '.join(f'{bits} ({count})' for bits, count in sorted(widths.items()))}."
    )
    for found in pareto:
        measured = "" if found.measured is None else f", {found.measured:.2g} measured"
        size = f"{found.ratio:.2f} times smaller, {found.bits:.2f} bits a weight"
        watch.tell(f"Could be had: {size}: loss of {found.expected:.2g} expected{measured}.")
    quantized = emit(plan)
    used, last = (data, judges.last) if given else (Dataset((), (), ()), None)
    decided = {} if job.config.common.bit_num else _widths(plan)
    return Quantized(model, quantized, plan, used, pareto=pareto, decided=decided, last=last)


def _widths(plan: QuantPlan) -> dict[str, dict[str, object]]:
    """The bits of each node's weights, as keys of sections about nodes."""
    stored = plan.stored.items()
    return {name: {"bit_num": weight.qparams.format.bits} for (name, _), weight in stored}


def _newest_opset(model: ir.Model, job: Job, watch: Watch) -> int:
    """The newest opset that integers in memory may ask for: ONNX Runtime may lack an operator of
    the model in newer ones than its own.

    Raises ModelError where there is no type for the integers then.
    """
    bits = job.config.common.bit_num
    wishes = [recipe.wishes for recipe in job.config.recipes]
    sized = [job.config.weight_quant.block_size, *(own.get("block_size") for own in wishes)]
    blocks = any(size is not None for size in sized)
    widths = [
        bits or 1,
        bits or WIDEST,
        *(own["bit_num"] for own in wishes if "bit_num" in own),
    ]
    narrow, wide = min(widths), max(widths)
    signed = stores_signed(job.config)
    wanted = not_none(type_for(narrow, blocks, NEWEST_OPSET, signed))[1]
    if (limit := job.config.common.opset or wanted) < wanted:
        found = type_for(narrow, blocks, limit, signed)
        if found is None or type_for(wide, blocks, limit, signed) is None:
            where = f"{job.config.at('common_quant_param', 'opset')} = {limit}"
            msg = (
                f"{where}: these integers need a type of opset {wanted}; write opset = {wanted} or "
                "more, or dequant_strategy = ON_LOAD."
            )
            raise ConfigError(msg)
        watch.warn(
            f"Weights of fewer than {found[0].bitwidth} bits are stored in as many, as opset = "
            f"{limit} has no narrower type."
        )
        wanted = limit
    newest, reason = _loadable(model, wanted)
    if newest == wanted:
        return newest
    said = f"At opset {wanted} the model does not load: {reason}"
    found = type_for(narrow, blocks, newest, signed)
    if found is None or type_for(wide, blocks, newest, signed) is None:
        where = job.config.at("weight_quant_param", "dequant_strategy")
        msg = f"{where}: these integers need a type of a newer opset; write ON_LOAD. {said}"
        raise ModelError(msg)
    watch.warn(f"Weights of fewer than {found[0].bitwidth} bits are stored in as many. {said}")
    return newest


def _loadable(model: ir.Model, wanted: int) -> tuple[int, str]:
    """The newest opset up to `wanted` at which ONNX Runtime loads the model, and why no newer."""
    own, why = opset_of(model), ""
    newer = {opset for _, _, opset in TYPES if own < opset <= wanted}
    for opset in sorted(newer, reverse=True):
        if (refused := _refusal_at(model, opset)) is None:
            return opset, why
        why = why or refused
    # A model that the runtime never loads tells nothing.
    return (own, why) if newer and _refusal_at(model, own) is None else (wanted, "")


def _refusal_at(model: ir.Model, opset: int) -> str | None:
    """Why ONNX Runtime does not load the model at an opset, None if it does."""
    try:
        with saved(raise_opset(model.clone(), opset)) as path:
            return refusal(path, optimize=False)
    except ModelError as error:
        return str(error)


def _emitted(model: ir.Model, plan: QuantPlan, newest: int | None, signed: bool) -> ir.Model:
    """`newest` is the newest opset that integers in memory may ask for, None for weights that are
    unpacked when the model is loaded; these are `signed` where the target wants them so.
    """
    quantized = model.clone()
    if newest is None:
        emit_stored(quantized, plan, PlaneWriter(quantized))
        store_biases_as_half(quantized, plan)
        return quantized
    opsets = [opset_for(weight, newest, signed) for weight in plan.stored.values()]
    quantized = raise_opset(quantized, max(opsets, default=0))
    if signed:
        emit_signed(quantized, plan, newest)
    else:
        emit_dequantized(quantized, plan, newest)
    return quantized


def _searches(job: Job) -> bool:
    """Whether outputs are compared to find widths."""
    return job.config.mixed_bit.auto_tune or job.config.mixed_bit.search == "SENSITIVITY"


def _is_bounded(job: Job) -> bool:
    """Whether widths are found that keep a bound, which samples apart must judge; what compares
    widths of one size sets some aside for that alone.
    """
    mixed = job.config.mixed_bit
    return mixed.target_ratio is None if mixed.search == "SENSITIVITY" else mixed.auto_tune


@dataclass
class _Best:
    """The best plan so far as the job's output for the time being."""

    job: Job
    emit: Emit
    data: Dataset
    kept: bool = False

    @cached_property
    def origin(self) -> Mapping[str, str]:
        """Where the output comes from."""
        return provenance(self.job, self.data)

    def written(self, plan: QuantPlan) -> ir.Model:
        """The model that a plan's file holds."""
        model = self.emit(plan)
        finish(model, self.origin, half=self.job.fp16)
        return model

    def keep(self, plan: QuantPlan) -> None:
        """Makes a plan the output."""
        save(self.written(plan), self.job.output, accepting(self.job.model, Watch()))
        self.kept = True

    @contextmanager
    def told(self) -> Iterator[None]:
        """Says what there is where whoever waits for more stops it."""
        try:
            yield
        except KeyboardInterrupt:
            holds = f"{self.job.output} holds the best so far"
            there = holds if self.kept else "no output is written yet"
            msg = f"Interrupted; {there}, and the same command goes on where this one was."
            raise KeyboardInterrupt(msg) from None


def _searched(
    fitter: Fitter,
    judges: Dataset,
    plan: QuantPlan,
    best: _Best,
    *,
    newest: int | None,
) -> tuple[QuantPlan, tuple[Tradeoff, ...]]:
    """The plan with widths found; until then a journal lies beside the output."""
    job, config = best.job, best.job.config

    def held(bits: int) -> int:
        found = newest and type_for(bits, False, newest, stores_signed(config))
        return found[0].bitwidth if found else bits

    told = "\n".join([fingerprint_of(fitter.model, fitter.data), *settings_of(config)])
    journal = Journal(job.output.with_name(f"{job.output.name}.search.json"), told)
    before, mixed = file_bytes(job.model), config.mixed_bit
    search = Search(fitter, judges, plan, mixed, journal, best.keep, best.written, before, held)
    found = search.mixed()
    journal.close()
    return found


def _data(prepared: Prepared, job: Job, watch: Watch) -> Dataset:
    """The calibration samples, random ones where a search must compare outputs without, or none."""
    model = prepared.model
    if job.config.has_samples:
        data = open_data(model, job, watch)
        data = with_distilled(data, model, prepared.moments, job, watch=watch)
        if len(data):
            return data
    if job.config.common.bit_num or not _searches(job):
        return Dataset((), (), ())
    watch.warn(
        "There is no calibration data: bits are chosen by what random inputs show; give "
        "calibrate_path."
    )
    return synthetic_data(model)


def _node_plan(
    node: ir.Node,
    words: Collection[ir.Value],
    small: Mapping[ir.Value | None, str],
    *,
    job: Job,
    wishes: Wishes,
) -> NodePlan:
    common, name, axes = job.config.common, node.name or "", weights_of(node)
    own = wishes_for(job.config.recipes, name, node.op_type)
    weights = [
        _weight_plan(node, index, axis, words=words, job=job, own=own)
        for index, axis in axes.items()
    ]
    reasons = (_obstacle(node, weight, job) for weight in weights)
    reason = skipped(node, wishes) or next(
        filter(None, reasons), None if weights else _without_weight(node)
    )
    if weights and not weights[0].fixed:
        reason = reason or small.get(node.inputs[weights[0].index])
    if reason:
        return NodePlan(name, node.op_type, False, reason)
    add = bias_add(node)
    data = next(v for i, v in enumerate(node.inputs) if v is not None and i not in axes)
    return NodePlan(
        name,
        node.op_type,
        quantized=True,
        reason=_reason(weights[0], common.bit_num) + told(own, WISHES),
        inputs=(data.name or "",),
        absorbed=(add.name or "",) if add else (),
        weight=weights[0],
        further=tuple(weights[1:]),
    )


def _reason(weight: WeightPlan, wanted: int) -> str:
    bits = weight.format.bits
    if not (wanted or weight.fixed):
        return "weights stored in as few bits as they need"
    why = (
        ""
        if bits == wanted or weight.fixed
        else ", as table_bit_num asks for: a table of words or their scores"
    )
    return f"weights stored in {bits} bits{why}"


def _bits(of_words: bool, job: Job) -> int:
    """The width of a weight, 0 where it is to be found."""
    wanted = job.config.common.bit_num
    least = job.config.weight_quant.table_bit_num if wanted and of_words else 0
    return max(wanted, least)


def _without_weight(node: ir.Node) -> str:
    """Why a node has no weight that could be stored."""
    for index, value in enumerate(node.inputs):
        array = constant(value) if takes_weight(node, index) else None
        if array is not None and array.dtype.kind == "f" and (reason := unusable(array)):
            return f"its weight {reason}"
    return "no constant weight"


def _weight_plan(
    node: ir.Node,
    index: int,
    axis: int | None,
    *,
    words: Collection[ir.Value],
    job: Job,
    own: Mapping[str, Wish],
) -> WeightPlan:
    wanted = replace(job.config.weight_quant, **_values(own, "per_channel", "block_size"))
    fixed, strategy = own.get("bit_num"), own.get("quant_strategy")
    bits = fixed.value if fixed else _bits(node.inputs[index] in words, job) or UNKNOWN_BITS
    value = node.inputs[index]
    array = constant(node.inputs[index])
    assert value is not None
    assert array is not None
    granularity: Granularity = PerTensor()
    if axis is not None and wanted.per_channel:
        granularity = _along(node, array.shape, axis % array.ndim, wanted.block_size)
    fmt = IntFormat(bits, signed=False)
    blind = (strategy.value if strategy else wanted.quant_strategy) == "MAX_MIN"
    name, is_fixed = value.name or "", fixed is not None
    return WeightPlan(name, index, fmt, granularity, fixed=is_fixed, blind=blind)


def _values(own: Mapping[str, Wish], *keys: str) -> dict[str, Any]:
    return {key: own[key].value for key in keys if key in own}


def _along(node: ir.Node, shape: tuple[int, ...], axis: int, size: int | None) -> Granularity:
    """In blocks of `size` where a channel is a whole number of them, in a matrix product or a
    table of rows.
    """
    is_matrix = len(shape) == 2 and (rule_of(node).product or picks_rows(node))
    if size and is_matrix and shape[1 - axis] % size == 0:
        return PerBlock(axis, size)
    return PerAxis(axis)


def _obstacle(node: ir.Node, weight: WeightPlan, job: Job) -> str | None:
    common, array = job.config.common, constant(node.inputs[weight.index])
    assert array is not None
    if reason := unusable(array):
        return f"its weight {reason}"
    channels = 1 if weight.axis is None else array.shape[weight.axis]
    few, narrow = common.min_quant_weight_size, common.min_quant_weight_channel
    if array.size <= few:
        return f"not more than min_quant_weight_size = {few} weights"
    own = rule_of(node)
    convolves = own.weight is not None and not own.product
    if convolves and array.shape[weights_of(node)[weight.index] or 0] <= narrow:
        return f"not more than min_quant_weight_channel = {narrow} channels"
    bits = weight.format.bits
    return (
        f"no smaller in {bits} bits"
        if stored_bytes(array.size, channels, bits) >= array.nbytes
        else None
    )
