"""FULL_QUANT: weights and activations become integers, with ranges from calibration data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import onnx_ir as ir

from calib.affine import INT8, UINT8, IntFormat, QParams, dequantize
from calib.ranges import RANGE_METHODS, RangeMethod, RangeSpec, range_of
from calib.samples import Dataset
from calib.search import fewest
from converter.calibrate.cache import observe_with_cache
from converter.calibrate.data import open_data, resources_of
from converter.calibrate.judges import TELLING, Parted, parted, tells
from converter.calibrate.noise import decibels_left, product_spreads
from converter.calibrate.observe import (
    Evidence,
    Wanted,
    activation_qparams,
    fixed_qparams,
    given_qparams,
    masked_qparams,
    of_constants,
    probability_qparams,
)
from converter.calibrate.runs import Opened, opened
from converter.calibrate.spans import seen_spans
from converter.calibrate.trained_ranges import in_format, untrained, with_trained_ranges
from converter.calibrate.walk import Walk
from converter.config import Config
from converter.config.keys import FineTuneParam, FullQuantParam
from converter.emit.integer_types import TYPES, give_integers, take_integers
from converter.emit.qdq import emit
from converter.emit.wide_products import keep_wide
from converter.errors import ConfigError, UsageError
from converter.graph.edit import constant, is_float, not_none, values_by_name
from converter.graph.files import fed_inputs
from converter.job import Job, Resources, Watch
from converter.learn.own_data import with_distilled
from converter.learn.restored import as_stored, with_integers
from converter.learn.student import Learnable
from converter.learn.tuning import Tuning
from converter.measure.errors import error_of, tally
from converter.measure.labels import read_labels
from converter.measure.pairing import pair
from converter.measure.rounding import rounding_costs
from converter.measure.sensitivity import RANKED_ON, alone, output_drop
from converter.measure.target_checks import check
from converter.modes import weight_quant
from converter.plan.ops import OPS, rule
from converter.plan.payoff import NO_FASTER, stays_float, unprofitable
from converter.plan.placement import Wishes, build_plan
from converter.plan.plan import NodePlan, QuantPlan, TensorPlan
from converter.plan.recipes import EVERY, ranges_of, wishes_for
from converter.plan.result import Quantized
from converter.plan.targets import TARGETS, WIDE, Target
from converter.plan.units import Weighted, weighted
from converter.plan.widths import MOST_WIDE, NARROW, Widening, wide_share
from converter.prepare.equalize import equalize
from converter.prepare.fake_quant import Prepared, Trained
from converter.prepare.pixels import Pixels, fold_normalisation, trained_pixels
from converter.weights.integer import Rounding
from converter.weights.layers import Fitter, decide_weights, products
from converter.weights.smoothing import smooth
from converter.weights.stored import Storage
from converter.weights.trained import Kept, tell_kept, with_trained_weights

# A Concat whose inputs' ranges differ by more than this gives the small ones too few codes.
MIXED_RANGES = 16.0
# Samples that weights of 8 bits are fitted on where nothing is integer.
FITTED_ON = 32
# The width of integers unless they are trained for fewer.
FULL_BITS = 8
# Samples that tell what a border of another pixel costs.
BORDER_SAMPLES = 4
# Decibels that the codes of its inputs must leave of a product: with less it is noise.
LEAST_LEFT = 18.0


def make_plan(prepared: Prepared, job: Job) -> QuantPlan:
    """The plan without the numbers that data gives."""
    model, trained = prepared.floats, prepared.trained
    slow = _slow(model, trained, job.config, {})
    return _planned(model, trained, job.config, Choice(slow))


def quantize(prepared: Prepared, job: Job, watch: Watch) -> Quantized:
    """The quantized copy of a prepared float model."""
    setup = set_up(prepared, job, watch)
    evidence = observed(setup, watch)
    final = fine_tuned(setup, within_drop(setup, evidence, watch), watch)
    check(final.model, final.plan, setup.target)
    _require_full_integer(final.plan, job.config)
    _tell_of_floats(final.plan, watch)
    _tell_of_wide(final.plan, setup.target, watch)
    _tell_of_ranges(final.plan, job.config, watch)
    # What was trained is compared with what training saw, unless flags gave it other types.
    as_given = setup.trained and _edges(prepared.model) == _edges(setup.model)
    return Quantized(
        reference=prepared.model if as_given else setup.model,
        model=final.model,
        plan=final.plan,
        data=setup.every,
        tensors=_restored_outputs(setup.model, final),
        finish=partial(set_edges, final.model, setup, evidence, watch),
        compared=setup.model,
        trained=bool(setup.trained),
        exact=_named_target(job.config).pair_limit is None,
        decided=_decided(setup, final),
        last=setup.judges.last,
    )


def _decided(setup: Setup, final: Attempt) -> dict[str, dict[str, object]]:
    """What findings decided, as keys of sections about nodes."""
    narrow: dict[str, dict[str, object]] = {EVERY: {"activation_bits": NARROW}}
    decided = narrow if _may_widen(setup) else {}
    units = {unit.name: unit for unit in final.plan.units()}
    wide = [name for name, unit in units.items() if unit.activation == WIDE]
    decided.update((name, {"activation_bits": WIDE.bits}) for name in wide if _may_widen(setup))
    # What was asked for by node stays in what is written: it may replace the sections it came from.
    recipes, nodes = setup.job.config.recipes, final.plan.nodes.values()
    wishes = {node.name: wishes_for(recipes, node.name, node.op_type) for node in nodes}
    asked = {name for name, own in wishes.items() if "skip" in own and own["skip"].value}
    floats = asked | final.choice.floats.keys()
    decided.update((name, {"skip": "true"}) for name in wishes if name in floats)
    return decided


def calibrate(prepared: Prepared, job: Job, watch: Watch) -> None:
    """Looks at `job.part` of the calibration data and leaves what it finds beside the calibration
    cache.
    """
    observed(set_up(prepared, job, watch), watch)


@dataclass(frozen=True)
class Choice:
    """What findings decide of nodes, by name: which stay `floats` and which are `wide`, each with
    the reason, and which join what has one range.
    """

    floats: Mapping[str, str] = field(default_factory=dict)
    wide: Mapping[str, str] = field(default_factory=dict)
    joined: frozenset[str] = frozenset()

    def __or__(self, other: Choice) -> Choice:
        floats, wide = {**self.floats, **other.floats}, {**self.wide, **other.wide}
        return Choice(floats, wide, self.joined | other.joined)


@dataclass(frozen=True)
class Setup:
    """The float model in its last form, its data, what judges a search, and what was asked. Samples
    `held` judge what is learned; `every` are both.
    """

    model: ir.Model
    job: Job
    target: Target
    trained: Trained
    data: Dataset
    held: Dataset
    every: Dataset
    judges: Parted
    pixels: Pixels | None
    resources: Resources

    @property
    def wanted(self) -> FullQuantParam:
        """The section of the config."""
        return self.job.config.full_quant

    @property
    def method(self) -> RangeMethod:
        """How ranges follow from statistics: for few bits with the least error, unless a method is
        asked for.
        """
        config, named = self.job.config, self.wanted.activation_quant_method
        given = ("full_quant_param", "activation_quant_method") in config.lines
        few = config.fine_tune.in_few_bits and not given
        return RANGE_METHODS["MSE" if few else named]

    def methods(self, plan: QuantPlan) -> dict[str, RangeMethod]:
        """By tensor, where a node that makes it has a method of its own."""
        found = {}
        for unit in plan.units():
            own = wishes_for(self.job.config.recipes, unit.name, unit.op_type)
            if (wish := own.get("activation_quant_method")) is not None:
                found.update(dict.fromkeys(unit.outputs, RANGE_METHODS[wish.value]))
        return found

    @cached_property
    def executed(self) -> Opened:
        """The model as ONNX Runtime executes it."""
        return opened(self.model, optimize=True)

    def planned(self, choice: Choice) -> QuantPlan:
        """The plan without numbers of what is decided."""
        return _planned(
            self.model,
            self.trained,
            self.job.config,
            Choice(self.slow) | choice,
        )

    @cached_property
    def spreads(self) -> Mapping[str, float]:
        """How much the products of the whole plan vary, by tensor."""
        layers = weighted(self.model, self.planned(Choice())) if len(self.data) else ()
        axes = {not_none(x.node.outputs[0].name): OPS[x.node.op_type].output_axis for x in layers}
        return product_spreads(self.model, axes, self.data, self.resources) if axes else {}

    @cached_property
    def slow(self) -> Mapping[str, str]:
        """What integers would make no faster, with the reason."""
        sample = self.data.sample(0) if len(self.data) else {}
        fed = {name: x.shape for name, x in sample.items()}
        return _slow(self.model, self.trained, self.job.config, fed)

    def with_trained_weights(self, plan: QuantPlan) -> tuple[QuantPlan, Mapping[str, Kept]]:
        """The plan with what training knew of the weights, and what became of it."""
        everything = not len(self.data)
        layers = weighted(self.model, plan)
        return with_trained_weights(layers, plan, self.trained, everything)


@dataclass(frozen=True)
class Attempt:
    """A quantized model as was chosen; `restored` are its floats by float tensor."""

    model: ir.Model
    plan: QuantPlan
    restored: Mapping[str, str]
    choice: Choice


# --- the float model in its last form


def set_up(prepared: Prepared, job: Job, watch: Watch) -> Setup:
    """A copy of the model in its last form, with all that may be moved between weights and
    activations where it belongs. Nothing changes it afterwards.
    """
    wanted, resources = job.config.full_quant, resources_of(job)
    model, trained = prepared.floats.clone(), prepared.trained
    samples, pixels = job.config.preprocess, trained_pixels(job.config.transform, watch)
    if pixels is None and job.input_type in TYPES and _takes_pictures(job.config):
        pixels = fold_normalisation(model, samples)
        samples = pixels.preprocess(samples)
    data = open_data(model, job, watch, samples)
    if pixels and pixels.border:
        _tell_of_borders(
            prepared.floats, model, replace(job, part=None), pixels=pixels, watch=watch
        )
    judges = None
    if wanted.max_drop is not None and len(data):
        judges = parted(data, job.config.preprocess.label_file is not None, watch)
        data = judges.fitted
    data = with_distilled(data, model, prepared.moments, job, watch=watch, wanted=samples)
    judges = judges or Parted(data, data, data)
    if wanted.equalize and not wanted.per_channel and not trained:
        equalize(model)
    fit, held = Tuning(job, watch).parted(data)
    parts = fit, held, data, judges
    setup = Setup(
        model,
        job,
        _target(job.config),
        trained,
        *parts,
        pixels,
        resources,
    )
    if len(fit) and not trained:
        smooth(
            model,
            _fed_by_floats(model, setup.planned(Choice())),
            fit,
            threads=resources.threads,
            watch=watch,
        )
    return setup


def _takes_pictures(config: Config) -> bool:
    """Whether it is known how the pixels of pictures enter the model."""
    samples = config.preprocess
    return samples.input_type == "IMAGE" or (config.distils and bool(samples.normalize_mean))


def _tell_of_borders(
    given: ir.Model, model: ir.Model, job: Job, *, pixels: Pixels, watch: Watch
) -> None:
    """Says what it costs that the pixel which pads pictures stands for not quite zero."""
    wanted = job.config.preprocess
    ways = ((given, wanted), (model, pixels.preprocess(wanted)))
    answers = []
    for one, preprocess in ways:
        data = open_data(one, job, Watch(), preprocess, spread=BORDER_SAMPLES)
        answers.append([opened(one).answer(data.sample(k)) for k in range(len(data))])
    tallies = [list(map(tally, *pair)) for pair in zip(*answers, strict=True)]
    if not tallies:
        return  # nothing was seen
    errors = [error_of("", total) for total in np.sum(tallies, axis=0)]
    least = min(error.sqnr_db for error in errors)
    watch.tell(
        f"Pixel {pixels.qparams.zero_point} pads pictures, which is {pixels.border:.2g} off the "
        f"zero of training: the outputs stay {least:.1f} dB above the difference."
    )


def _edges(model: ir.Model) -> list[ir.DataType | None]:
    return [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)]


def _named_target(config: Config) -> Target:
    return TARGETS[config.full_quant.target_device or "CPU"]


def _target(config: Config) -> Target:
    target = _named_target(config)
    return target if config.full_quant.overflow_safe else replace(target, pair_limit=None)


def _may_stay_float(wanted: FullQuantParam) -> bool:
    """Whether what has an integer kernel may be left float all the same."""
    return wanted.only_where_it_pays and not wanted.require_full_integer


def _slow(
    model: ir.Model, trained: Trained, config: Config, fed: Mapping[str, tuple[int, ...]]
) -> Mapping[str, str]:
    """The nodes that integers would make no faster, with the reason."""
    full, target = config.full_quant, _target(config)
    # No table knows what 16 bits cost: who asks for them does not ask for speed.
    if trained or not target.counts_costs or not _may_stay_float(full) or full.bits > 8:
        return {}
    plan = build_plan(model.graph, target, _wishes(config, Choice()))
    return unprofitable(model, plan, fed)


def _wishes(config: Config, choice: Choice) -> Wishes:
    common, full = config.common, config.full_quant
    return Wishes(
        common.skip_quant_node,
        common.skip_quant_type,
        full.per_channel,
        choice.floats,
        full.bits,
        choice.wide,
        choice.joined,
        config.recipes,
    )


def _planned(model: ir.Model, trained: Trained, config: Config, choice: Choice) -> QuantPlan:
    """The plan with trained ranges; without data, the nodes whose ranges are open stay float."""
    plan = build_plan(model.graph, _target(config), _wishes(config, choice))
    if config.fine_tune.in_few_bits and not trained:
        plan = _in_bits(plan, config.fine_tune)
    known = {**({} if config.has_samples else trained.follows), **trained.tensors}
    plan = with_trained_ranges(plan, known, config.full_quant.power_of_two_scale)
    if config.has_samples:
        return plan
    values = values_by_name(model.graph)
    groups = plan.groups().items()
    left = untrained(
        plan,
        {name for name, t in groups if constant(values[t.name]) is not None},
    )
    return _planned(model, trained, config, choice | Choice(left)) if left else plan


# --- what the data says


def observed(setup: Setup, watch: Watch) -> Evidence:
    """What data says about all that the plan, with what was trained, leaves open."""
    plan, kept = setup.with_trained_weights(setup.planned(Choice()))
    tell_kept(kept, watch)
    open_nodes = {name: unit for name, unit in plan.nodes.items() if name not in plan.weights}
    wanted = _wanted(setup, plan, replace(plan, nodes=open_nodes))
    if not len(setup.data):
        return Evidence(of_constants(wanted, values_by_name(setup.model.graph)), {})
    if not wanted.tensors and not any(
        unit.quantized and unit.weight for unit in open_nodes.values()
    ):
        return Evidence({}, {})
    first = Walk(setup.model, plan, setup.data, setup.resources).count
    cache = setup.job.config.common.calibration_cache
    return observe_with_cache(
        setup.model,
        replace(wanted, first=first),
        setup.data,
        resources=setup.resources,
        watch=watch,
        path=cache,
    )


def _wanted(setup: Setup, plan: QuantPlan, open_plan: QuantPlan) -> Wanted:
    graph, method = setup.model.graph, setup.method
    # Without its trained bounds a model has other means.
    corrects = setup.wanted.bias_correction and not setup.trained
    means = products(graph, open_plan) if corrects else ()
    mixed = _may_widen(setup)
    # What is only moved may yet get a format of its own.
    known = plan.tensors.values() if mixed else plan.groups().values()
    open_groups = [tensor.name for tensor in known if tensor.group not in plan.qparams]
    outputs = [value.name or "" for value in _integer_outputs(setup.job, graph)]
    tensors = tuple(dict.fromkeys([*open_groups, *outputs]))
    part = setup.job.part or (0, 1)
    methods = [method, *setup.methods(plan).values()]
    histogram = any(each.needs_histogram for each in methods)
    samples = any(each.needs_samples for each in methods)
    return Wanted(tensors, means, histogram, samples, part=part)


# --- one attempt, and the best of several


def within_drop(setup: Setup, evidence: Evidence, watch: Watch) -> Attempt:
    """The attempt that keeps the fewest nodes float and loses no more than max_drop."""
    bound, path = setup.wanted.max_drop, setup.job.config.preprocess.label_file
    mixed = _may_widen(setup)
    if bound is None and mixed:
        return attempt(setup, evidence, _widest(setup, evidence, watch), watch)
    first = attempt(setup, evidence, Choice(), watch)
    if bound is None:
        return first
    judged = setup.judges.judges
    judged = judged.real if path else judged  # only files have labels
    labels = read_labels(path, judged) if path else None
    if labels is not None and not tells(len(judged), bound):
        watch.warn(
            f"{len(judged)} labelled samples cannot tell a loss of {bound:.1%} from chance, "
            f"{math.ceil(TELLING / bound)} could: max_drop bounds the loss of cosine similarity "
            "instead."
        )
        labels = None
    if mixed:
        return _wide_within_drop(setup, evidence, first, judged, labels=labels, watch=watch)
    if _drop(setup, first, judged, labels=labels, watch=watch) <= bound:
        return first
    pairing = pair(setup.model, first.model, first.plan)
    floats = opened(setup.model, pairing.tensors)
    costs = alone(
        pairing,
        floats,
        setup.data,
        count=RANKED_ON,
        threads=setup.resources.threads,
    )
    # What only moves values has its neighbours' integers, or none where they are float.
    units = [unit.name for unit in first.plan.units() if not rule(unit.op_type).moves]
    leaves = {name: costs[name].output.sqnr_db if name in costs else math.inf for name in units}
    worst = sorted(units, key=lambda name: leaves[name])
    for name in worst:
        watch.say(f"Alone, {name} leaves the output {leaves[name]:.1f} dB.")

    def without(count: int) -> Attempt | None:
        kept = {
            name: f"kept float for max_drop: alone it leaves {leaves[name]:.1f} dB"
            for name in worst[:count]
        }
        result = attempt(setup, evidence, Choice(kept), watch)
        within = _drop(setup, result, judged, labels=labels, watch=watch) <= bound
        return result if within or count == len(worst) else None

    return fewest(len(worst), without)


def _ranked(setup: Setup, evidence: Evidence, watch: Watch) -> tuple[Choice, Widening]:
    """The choice of 8 bits throughout, and in which order units had better have 16."""
    choice, plan = _fitting(setup, evidence, Choice())
    watch.say(f"Ranking {len(plan.groups())} activations by what their rounding costs.")
    threads = setup.resources.threads
    costs = rounding_costs(setup.model, plan, setup.data, count=RANKED_ON, threads=threads)
    recipes = setup.job.config.recipes
    wishes = {unit.name: wishes_for(recipes, unit.name, unit.op_type) for unit in plan.units()}
    kept = {name for name, own in wishes.items() if "activation_bits" in own}
    return choice, Widening(plan, costs, setup.target.wide, kept)


def _widest(setup: Setup, evidence: Evidence, watch: Watch) -> Choice:
    """The choice that spends a bounded share of the tensors on 16 bits."""
    choice, widening = _ranked(setup, evidence, watch)
    return choice | _widened(widening.within(MOST_WIDE))


def _widened(names: Collection[str]) -> Choice:
    return Choice(wide=dict.fromkeys(names, "as its tensors lose most in 8"))


def _wide_within_drop(
    setup: Setup,
    evidence: Evidence,
    first: Attempt,
    judged: Dataset,
    *,
    labels: Mapping[str, int] | None,
    watch: Watch,
) -> Attempt:
    """The attempt that gives the fewest units 16 bits and loses no more than max_drop."""
    bound = not_none(setup.wanted.max_drop)
    if _drop(setup, first, judged, labels=labels, watch=watch) <= bound:
        return first
    choice, widening = _ranked(setup, evidence, watch)
    steps = list(widening.order())

    def with_wide(count: int) -> Attempt | None:
        result = attempt(setup, evidence, choice | _widened(steps[count - 1]), watch)
        drop = _drop(setup, result, judged, labels=labels, watch=watch)
        if drop > bound and count == len(steps):
            watch.warn(
                f"max_drop = {bound:g} is missed: with 16 bits in every activation the output "
                f"still loses {drop:.5f}."
            )
        return result if drop <= bound or count == len(steps) else None

    return fewest(len(steps), with_wide) if steps else first


def _drop(
    setup: Setup,
    tried: Attempt,
    data: Dataset,
    *,
    labels: Mapping[str, int] | None,
    watch: Watch,
) -> float:
    quantized, threads = opened(tried.model, optimize=True), setup.resources.threads
    drop = output_drop(setup.executed, quantized, data, labels, threads=threads)
    units, measure = len(tried.plan.units()), "cosine" if labels is None else "top-1"
    watch.say(f"With {units} nodes quantized the output loses {drop:.5f} of {measure}.")
    return drop


def attempt(setup: Setup, evidence: Evidence, choice: Choice, watch: Watch) -> Attempt:
    """The model quantized as is chosen."""
    choice, plan = _fitting(setup, evidence, choice)
    plan, _ = setup.with_trained_weights(plan)
    if any(unit.weight and unit.name not in plan.weights for unit in plan.units()):
        walk = Walk(
            setup.model,
            plan,
            setup.data,
            setup.resources,
            samples=evidence.first,
        )
        watch.say(f"Weights are decided on {walk.count} of {len(setup.data)} samples.")
        compensate = setup.wanted.weight_rounding == "GPTQ"
        rounding = Rounding(compensate, setup.wanted.power_of_two_scale)
        plan = decide_weights(
            setup.model, plan, walk, means=evidence.means, rounding=rounding, watch=watch
        )
    return _emitted(setup, _with_stored(setup, plan, watch), choice)


def _emitted(setup: Setup, plan: QuantPlan, choice: Choice) -> Attempt:
    quantized = setup.model.clone()
    restored = emit(quantized, plan)
    if setup.target.wide_is_slow:
        keep_wide(quantized)
    return Attempt(quantized, plan, restored, choice)


def _fitting(setup: Setup, evidence: Evidence, choice: Choice) -> tuple[Choice, QuantPlan]:
    """The choice with what its ranges do not suit, and the plan with ranges."""
    plan = _with_ranges(setup, evidence, setup.planned(choice))
    for unfit in (partial(_mixed_concats, setup), partial(_drowned, setup)):
        if (more := unfit(plan)) != Choice():
            choice = choice | more
            plan = _with_ranges(setup, evidence, setup.planned(choice))
    return choice, plan


def fine_tuned(setup: Setup, found: Attempt, watch: Watch) -> Attempt:
    """The attempt with scales of weights and biases learned, as the config wants. Codes of 8 bits,
    which kernels may bound, and ranges for them stay.
    """
    wanted = setup.job.config.fine_tune
    may = Learnable(wanted.weight_bits < FULL_BITS, wanted.activation_bits < FULL_BITS)
    tuning = Tuning(setup.job, watch, may)
    if not tuning.wanted:
        return found
    latest = found

    def again() -> QuantPlan:
        nonlocal latest
        # The cache is of what was calibrated first.
        common = replace(setup.job.config.common, calibration_cache=None)
        job = replace(setup.job, config=replace(setup.job.config, common=common))
        whole = replace(setup, data=setup.every, job=job)
        latest = attempt(whole, observed(whole, watch), found.choice, watch)
        return as_stored(latest.plan)

    parts = setup.data, setup.held
    learned = tuning.tuned(
        setup.model, as_stored(found.plan), parts, keep=lambda plan: None, again=again
    )
    plan = with_integers(latest.plan, learned)
    plan = _for_kernels(setup, plan) if may.points else plan
    return _emitted(setup, plan, latest.choice)


def _for_kernels(setup: Setup, plan: QuantPlan) -> QuantPlan:
    """The plan with weights of few bits as kernels take those that were trained."""
    bare = replace(plan, nodes=_with_weight_bits(plan.nodes, FULL_BITS), weights={})
    layers = (_as_learned(layer, plan) for layer in weighted(setup.model, bare))
    found, _ = with_trained_weights(layers, bare, Trained(weights=plan.weights), False)
    return found


def _as_learned(layer: Weighted, plan: QuantPlan) -> Weighted:
    """A layer with the weight and bias that a plan has learned."""
    name, learned = layer.unit.name, plan.weights[layer.unit.name]
    bias = plan.biases.get(name, layer.bias)
    return replace(layer, weight=dequantize(learned.codes, learned.qparams), bias=bias)


def _in_bits(plan: QuantPlan, wanted: FineTuneParam) -> QuantPlan:
    """The plan in the widths that are to be learned."""
    bits = wanted.activation_bits
    tensors = {
        name: replace(tensor, format=replace(tensor.format, bits=bits))
        for name, tensor in plan.tensors.items()
    }
    return replace(plan, nodes=_with_weight_bits(plan.nodes, wanted.weight_bits), tensors=tensors)


def _with_weight_bits(nodes: Mapping[str, NodePlan], bits: int) -> dict[str, NodePlan]:
    return {name: node.in_bits(bits) if node.weight else node for name, node in nodes.items()}


def _with_ranges(setup: Setup, evidence: Evidence, plan: QuantPlan) -> QuantPlan:
    wanted, graph, statistics = setup.wanted, setup.model.graph, evidence.statistics
    spec = RangeSpec(UINT8, False, wanted.power_of_two_scale, wanted.outlier_ratio)
    threads, spans = setup.resources.threads, seen_spans(graph, plan)
    qparams = activation_qparams(
        plan,
        statistics,
        setup.method,
        spec,
        threads=threads,
        spans=spans,
        methods=setup.methods(plan),
    )
    plan = plan.with_qparams(qparams)
    plan = plan.with_qparams(probability_qparams(graph, plan, statistics, spec))
    plan = plan.with_qparams(masked_qparams(graph, plan, statistics, spec))
    ranges = ranges_of(setup.job.config.recipes, plan.tensors)
    plan = plan.with_qparams(given_qparams(plan, ranges, spec))
    plan = plan.with_qparams(fixed_qparams(plan, setup.target))
    if (pixels := setup.pixels) is None:
        return plan
    inputs = {value.name for value in graph.inputs}
    groups = plan.groups().items()
    fed = [g for g, tensor in groups if tensor.name in inputs and tensor.format == UINT8]
    return plan.with_qparams(dict.fromkeys(fed, pixels.qparams))


def _with_stored(setup: Setup, plan: QuantPlan, watch: Watch) -> QuantPlan:
    """The plan with weights of 8 bits for float lookups and for what integers make no faster:
    fitted to outputs where no product is integer, in a product's codes where it multiplies with
    the same ones.
    """
    nodes = {
        unit.name: replace(unit, reason=f"{reason}; its weights are stored in 8 bits")
        for unit in weight_quant.storage_plan(setup.model, setup.job).units()
        if (reason := _stored_for(unit, plan))
    }
    weights = {unit.weight.name: plan.weights[unit.name] for unit in plan.units() if unit.weight}
    by_outputs = bool(nodes and len(setup.data) and not weights)
    storage = Storage(by_outputs, setup.wanted.bias_correction)
    fitter = Fitter(setup.model, setup.data, setup.resources, storage, watch, FITTED_ON)
    others = plan.nodes if by_outputs else {}
    fitted = fitter.fitted(QuantPlan({**others, **nodes}, {}))
    tied = {
        (unit.name, unit.weight.index): weights[unit.weight.name]
        for unit in nodes.values()
        if unit.weight and unit.weight.name in weights
    }
    return replace(
        plan,
        nodes={**plan.nodes, **fitted.nodes},
        stored={**fitted.stored, **tied},
        biases={**plan.biases, **fitted.biases},
    )


def _stored_for(unit: NodePlan, plan: QuantPlan) -> str:
    """Why the weights of a node are stored in codes although it computes in floats; empty where
    they are not.
    """
    planned = plan.nodes.get(unit.name)
    if planned is None or planned.quantized:
        return ""
    return planned.reason if rule(unit.op_type).looks_up or planned.reason == NO_FASTER else ""


# --- the edges of the model


def set_edges(quantized: ir.Model, setup: Setup, evidence: Evidence, watch: Watch) -> None:
    """Gives the quantized model the input and output types that the flags ask for."""
    job = setup.job
    kind = job.input_type if job.input_type in TYPES else "UINT8" if setup.pixels else ""
    for value in [v for v in fed_inputs(quantized) if kind and is_float(v)]:
        take_integers(quantized, value.name or "", kind, setup.pixels)
    for value in _integer_outputs(job, quantized.graph):
        name, fmt = value.name or "", INT8 if job.output_type == "INT8" else UINT8
        q = _output_qparams(setup, evidence, name, fmt)
        watch.tell(give_integers(quantized, name, job.output_type, q))


def _integer_outputs(job: Job, graph: ir.Graph) -> list[ir.Value]:
    """The float outputs that the flags make integers."""
    return [value for value in graph.outputs if job.output_type in TYPES and is_float(value)]


def _output_qparams(setup: Setup, evidence: Evidence, name: str, fmt: IntFormat) -> QParams:
    """Parameters of an output that becomes integers; raises UsageError where no range is known."""
    spec = RangeSpec(fmt, False, setup.wanted.power_of_two_scale)
    if name in setup.trained.tensors:
        tensor = TensorPlan(name, fmt, False, name, "")
        return in_format(setup.trained.tensors[name], tensor, spec.power_of_two)
    if name not in evidence.statistics:
        msg = (
            f"--outputDataType: training left the range of output '{name}' open; give "
            "calibrate_path, or floats."
        )
        raise UsageError(msg)
    return spec.qparams(range_of(setup.method, evidence.statistics[name], spec))


def _restored_outputs(model: ir.Model, final: Attempt) -> dict[str, str]:
    """What the units put out, by float tensor."""
    known = values_by_name(model.graph)
    outputs = (name for unit in final.plan.units() for name in unit.outputs)
    return {
        name: final.restored[name] for name in outputs if name in final.restored and name in known
    }


def _fed_by_floats(model: ir.Model, plan: QuantPlan) -> list[NodePlan]:
    """The matrix products of what float nodes compute, as in transformers; others read what is
    integer anyway.
    """
    other = {value.name for value in model.graph.inputs} | {
        name for unit in plan.units() for name in unit.outputs
    }
    products = [unit for unit in plan.units() if rule(unit.op_type).product and unit.weight]
    return [unit for unit in products if unit.inputs[0] not in other]


def _mixed_concats(setup: Setup, plan: QuantPlan) -> Choice:
    """Concat nodes whose inputs are too different in range to share one, with the reason."""
    mixed, joined = dict[str, str](), set[str]()
    for unit in (unit for unit in plan.units() if rule(unit.op_type).joins):
        spans = [_span(plan, unit, name) for name in unit.inputs]
        finer = (unit.activation or UINT8).bits - UINT8.bits
        if max(spans) > MIXED_RANGES * 2**finer * min(spans):
            mixed[unit.name] = (
                f"the ranges of its inputs differ {max(spans) / min(spans):.0f} times"
            )
        elif setup.target.joins_alike and not any(_bound(setup, plan, n) for n in unit.inputs):
            joined.add(unit.name)
    return Choice({} if _may_widen(setup) else mixed, joined=frozenset(joined))


def _bound(setup: Setup, plan: QuantPlan, tensor: str) -> bool:
    """Whether what makes a tensor decides its parameters, data aside."""
    made_by = {name: unit for unit in plan.units() for name in unit.outputs}
    maker = made_by.get(plan.tensors[tensor].group)
    if maker is None:
        return False
    bits = (maker.activation or UINT8).bits
    return rule(maker.op_type).probabilities or (maker.op_type, bits) in setup.target.fixed


def _span(plan: QuantPlan, unit: NodePlan, name: str) -> float:
    q = plan.read_params(unit, name)
    return float(q.scale) * (q.format.qmax - q.format.qmin)


def _may_widen(setup: Setup) -> bool:
    """Whether what 8 bits do not suit gets 16: measuring tells, and nothing stays float for it."""
    return setup.wanted.activation_bits == "MIXED"


def _tell_of_wide(plan: QuantPlan, target: Target, watch: Watch) -> None:
    """Says how many activations have 16 bits, and what that costs."""
    share = wide_share(plan)
    if not share:
        return
    watch.tell(f"Activations of 16 bits: {share:.0%} of {len(plan.tensors)}.")
    if target.wide_is_slow:
        watch.warn(
            f"16-bit activations cost speed on target {target.name}: ONNX Runtime computes them in "
            "floats between conversions; they are for NPUs, target_device = QNN."
        )


def _tell_of_ranges(plan: QuantPlan, config: Config, watch: Watch) -> None:
    """Warns of ranges given for what stays float."""
    given = [recipe for recipe in config.recipes if "range" in recipe.wishes]
    for recipe in (recipe for recipe in given if recipe.pattern not in plan.tensors):
        watch.warn(
            f"{config.path}:{recipe.line}: [{recipe.section}] range has no effect, as the tensor "
            "stays float; remove the section."
        )


def _tell_of_floats(plan: QuantPlan, watch: Watch) -> None:
    """Warns of a model in which integers make nothing faster."""
    computed = [unit for unit in plan.units() if not rule(unit.op_type).looks_up]
    if computed and all(map(stays_float, computed)):
        watch.warn(
            "Nothing of this model is faster in integers here: it computes in floats, its weights "
            "stored in 8 bits as WEIGHT_QUANT does; only_where_it_pays = false in "
            "[full_quant_param] makes integers all the same."
        )


def _drowned(setup: Setup, plan: QuantPlan) -> Choice:
    """Products that drown in the noise of their inputs' codes, with what makes these, and the
    reason: quiet channels have large weights there, mostly in depthwise convolutions.
    """
    if setup.trained or _may_widen(setup) or not _may_stay_float(setup.wanted):
        return Choice()
    if setup.job.config.fine_tune.in_few_bits:
        return Choice()
    kept: dict[str, str] = {}
    for layer in weighted(setup.model, plan):
        product, source = not_none(layer.node.outputs[0].name), layer.unit.inputs[0]
        if layer.view is None or source not in plan.tensors or product not in setup.spreads:
            continue
        matrix = layer.view.matrix(layer.weight.astype(np.float64))
        scale = float(plan.read_params(layer.unit, source).scale)
        left = decibels_left(setup.spreads[product], matrix, scale)
        if left < LEAST_LEFT:
            why = f"would leave {left:.0f} dB of the products"
            kept[layer.unit.name] = f"codes of its input {why}"
            makers = dict.fromkeys(_makers(plan, source), f"its codes {why} of {layer.unit.name}")
            kept = {**makers, **kept}
    return Choice(kept)


def _makers(plan: QuantPlan, tensor: str) -> list[str]:
    """The units whose codes a tensor's values come from, back to the products among them."""
    made_by = {name: unit for unit in plan.units() for name in unit.outputs}
    makers, waiting = dict[str, None](), [tensor]
    while waiting:
        unit = made_by.get(waiting.pop())
        if unit is not None and unit.name not in makers:
            makers[unit.name] = None
            waiting += unit.inputs if unit.weight is None else ()
    return list(makers)


def _require_full_integer(plan: QuantPlan, config: Config) -> None:
    """Raises ConfigError where the user wants no float node and there is one."""
    allowed = config.full_quant.allow_float
    floats = (node for node in plan.outside if not node.quantized)
    left = [node for node in floats if node.op_type not in allowed]
    if config.full_quant.require_full_integer and left:
        listed = "; ".join(f"{node.name} ({node.op_type}): {node.reason}" for node in left)
        where = config.at("full_quant_param", "require_full_integer")
        types = ",".join(dict.fromkeys([*allowed, *(node.op_type for node in left)]))
        msg = (
            f"{where}: {len(left)} node(s) would stay float: {listed}; to let them, write "
            f"allow_float = {types}."
        )
        raise ConfigError(msg)
