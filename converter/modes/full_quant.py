"""FULL_QUANT: weights and activations become integers, with ranges from calibration data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from calib.affine import INT8, UINT8, IntFormat, QParams
from calib.ranges import RANGE_METHODS, RangeSpec, range_of
from converter.calibrate.cache import observe_with_cache
from converter.calibrate.data import open_data, resources_of
from converter.calibrate.observe import (
    Evidence,
    Wanted,
    activation_qparams,
    masked_qparams,
    of_constants,
    probability_qparams,
)
from converter.calibrate.trained_ranges import in_format, untrained, with_trained_ranges
from converter.calibrate.walk import Walk
from converter.config import Config
from converter.emit.integer_types import TYPES, give_integers, take_integers
from converter.emit.qdq import emit
from converter.errors import ConfigError, ModelError, UsageError
from converter.graph.edit import constant, is_float, values_by_name
from converter.graph.files import fed_inputs
from converter.job import FLOATS, Job, Watch
from converter.measure.pairing import pair
from converter.measure.sensitivity import RANKED_ON, alone, fewest, output_drop, read_labels
from converter.measure.target_checks import check
from converter.modes import weight_quant
from converter.plan.ops import OPS
from converter.plan.placement import Wishes, build_plan
from converter.plan.plan import NodePlan, QuantPlan, TensorPlan
from converter.plan.result import Quantized
from converter.plan.targets import TARGETS, Target
from converter.prepare.equalize import equalize
from converter.prepare.fake_quant import Trained, take_trained
from converter.prepare.pixels import fold_normalisation, trained_pixels
from converter.weights.integer import Options, decide_weights, products
from converter.weights.smoothquant import smooth
from converter.weights.stored import Options as StoredOptions
from converter.weights.stored import store_by_weights
from converter.weights.trained import tell_kept, with_trained_weights

# A Concat whose inputs' ranges differ by more than this gives the small ones too few codes.
MIXED_RANGES = 16.0


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """The plan without the numbers that data gives."""
    return _planned(model, job.config, _taken(model, job), {})


def quantize(model: ir.Model, job: Job, watch: Watch) -> Quantized:
    """The quantized copy of a prepared float model."""
    given = model.clone()
    work = _Work(model, job, watch)
    quantized, plan, restored = work.within_drop()
    check(quantized, plan, _target(job.config))
    _require_full_integer(plan, job.config)
    # What was trained is compared with what training saw, unless flags gave it other types.
    reference = given if work.trained and _edges(given) == _edges(model) else model
    known = values_by_name(reference.graph)
    outputs = [
        name for unit in plan.units() for name in unit.outputs if name in restored and name in known
    ]
    computed, finish = (
        {name: restored[name] for name in outputs},
        partial(work.set_edges, quantized),
    )
    return Quantized(
        reference,
        quantized,
        plan,
        work.data,
        computed,
        finish,
        compared=model,
        trained=bool(work.trained),
        exact=_named_target(job.config).pair_limit is None,
    )


def calibrate(model: ir.Model, job: Job, watch: Watch) -> None:
    """Looks at `job.part` of the calibration data and leaves what it finds beside the calibration
    cache.
    """
    _Work(model, job, watch)


def _edges(model: ir.Model) -> list[ir.DataType | None]:
    return [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)]


def _named_target(config: Config) -> Target:
    return TARGETS[config.full_quant.target_device or "CPU"]


def _target(config: Config) -> Target:
    target = _named_target(config)
    return target if config.full_quant.overflow_safe else replace(target, pair_limit=None)


def _taken(model: ir.Model, job: Job) -> Trained:
    """What the model knows of its quantization, taken out of it; raises ModelError where it must
    know and does not.
    """
    trained = take_trained(model, job.input_type in FLOATS, job.output_type in FLOATS)
    if not trained and not job.config.preprocess.calibrate_path:
        where = job.config.at("transform_quant_param", "export_precision_mode")
        msg = (
            f"{where}: {job.model} was not trained with quantization; give it calibrate_path to "
            "quantize it."
        )
        raise ModelError(msg)
    return trained


def _planned(
    model: ir.Model, config: Config, trained: Trained, kept_float: Mapping[str, str]
) -> QuantPlan:
    """The plan with trained ranges; without data, the nodes whose ranges are open stay float."""
    common, full = config.common, config.full_quant
    wishes = Wishes(common.skip_quant_node, common.skip_quant_type, full.per_channel, kept_float)
    plan = build_plan(model.graph, _target(config), wishes)
    plan = with_trained_ranges(plan, trained.tensors, full.power_of_two_scale)
    if config.preprocess.calibrate_path:
        return plan
    values = values_by_name(model.graph)
    left = untrained(
        plan, {group for group in plan.groups() if constant(values[group]) is not None}
    )
    return _planned(model, config, trained, {**kept_float, **left}) if left else plan


Attempt = tuple[ir.Model, QuantPlan, dict[str, str]]


class _Work:
    """Everything that attempts with different nodes left float share."""

    def __init__(self, model: ir.Model, job: Job, watch: Watch) -> None:
        self.model, self.job, self.config, self.watch = model, job, job.config, watch
        self.full, self.resources = job.config.full_quant, resources_of(job)
        self.method = RANGE_METHODS[self.full.activation_quant_method]
        self.trained = _taken(model, job)
        if self.full.equalize and not self.full.per_channel and not self.trained:
            equalize(model)
        samples, self.pixels = job.config.preprocess, trained_pixels(job.config.transform, watch)
        if self.pixels is None and job.input_type in TYPES and samples.input_type == "IMAGE":
            self.pixels = fold_normalisation(model, samples)
            samples = self.pixels.preprocess(samples)
        self.data = open_data(model, job, watch, samples)
        plan = self._planned({})
        if len(self.data) and not self.trained:
            smooth(model, _fed_by_floats(model, plan), self.data, self.resources.threads, watch)
            plan = self._planned({})
        plan, kept = with_trained_weights(model, plan, self.trained, everything=not len(self.data))
        tell_kept(kept, watch)
        self.evidence = self._observed(plan)
        stored = weight_quant.storage_plan(model, job).units()
        self.lookups = {
            unit.name: unit
            for unit in stored
            if unit.op_type == "Gather" and unit.name in plan.nodes
        }

    def _planned(self, kept_float: Mapping[str, str]) -> QuantPlan:
        return _planned(self.model, self.config, self.trained, kept_float)

    def _observed(self, plan: QuantPlan) -> Evidence:
        """What data says about all that `plan`, with what was trained, leaves open."""
        open_units = replace(
            plan,
            nodes={name: unit for name, unit in plan.nodes.items() if name not in plan.weights},
        )
        # Without its trained bounds a model has other means.
        means = (
            products(self.model.graph, open_units)
            if self.full.bias_correction and not self.trained
            else ()
        )
        outputs = [
            v.name or ""
            for v in self.model.graph.outputs
            if self.job.output_type in TYPES and is_float(v)
        ]
        tensors = tuple(
            dict.fromkeys(
                [*(group for group in plan.groups() if group not in plan.qparams), *outputs]
            )
        )
        method, part = self.method, self.job.part or (0, 1)
        wanted = Wanted(tensors, means, method.needs_histogram, method.needs_samples, part=part)
        if not len(self.data):
            return Evidence(of_constants(wanted, values_by_name(self.model.graph)), {})
        if not tensors and not any(unit.weight for unit in open_units.units()):
            return Evidence({}, {})
        wanted = replace(wanted, first=Walk(self.model, plan, self.data, self.resources).count)
        cache = self.config.common.calibration_cache
        return observe_with_cache(self.model, wanted, self.data, self.resources, self.watch, cache)

    def within_drop(self) -> Attempt:
        """The attempt that keeps the fewest nodes float and loses no more than max_drop."""
        bound, path = self.full.max_drop, self.config.preprocess.label_file
        if bound is None:
            return self.attempt({})
        labels = read_labels(path, self.data) if path else None
        first = self.attempt({})
        if self._drop(first, labels) <= bound:
            return first
        found = alone(pair(self.model, first[0], first[1]), self.data, RANKED_ON, self.resources)
        # What only moves values has its neighbours' integers, or none where they are float.
        units = [unit.name for unit in first[1].units() if not OPS[unit.op_type].moves]
        leaves = {name: found[name].output.sqnr_db if name in found else math.inf for name in units}
        worst = sorted(units, key=lambda name: leaves[name])
        for name in worst:
            self.watch.say(f"Alone, {name} leaves the output {leaves[name]:.1f} dB.")

        def attempt(count: int) -> Attempt | None:
            kept = {
                name: f"kept float for max_drop: alone it leaves {leaves[name]:.1f} dB"
                for name in worst[:count]
            }
            result = self.attempt(kept)
            return result if self._drop(result, labels) <= bound or count == len(worst) else None

        return fewest(len(worst), attempt)

    def _drop(self, attempt: Attempt, labels: Mapping[str, int] | None) -> float:
        drop = output_drop(self.model, attempt[0], self.data, labels, self.resources)
        units, measure = len(attempt[1].units()), "cosine" if labels is None else "top-1"
        self.watch.say(f"With {units} nodes quantized the output loses {drop:.5f} of {measure}.")
        return drop

    def attempt(self, kept_float: Mapping[str, str]) -> Attempt:
        """The model quantized without the nodes `kept_float`."""
        plan = self._with_ranges(self._planned(kept_float))
        if mixed := _mixed_concats(plan):
            plan = self._with_ranges(self._planned({**kept_float, **mixed}))
        plan, _ = with_trained_weights(
            self.model, plan, self.trained, everything=not len(self.data)
        )
        if any(unit.weight and unit.name not in plan.weights for unit in plan.units()):
            walk = Walk(self.model, plan, self.data, self.resources, samples=self.evidence.first)
            self.watch.say(f"Weights are decided on {walk.count} of {len(self.data)} samples.")
            options = Options(self.full.weight_rounding == "GPTQ", self.full.power_of_two_scale)
            plan = decide_weights(self.model, plan, walk, self.evidence.means, options, self.watch)
        quantized, plan = self.model.clone(), self._with_tables(plan)
        return quantized, plan, emit(quantized, plan)

    def _with_tables(self, plan: QuantPlan) -> QuantPlan:
        """The plan with float lookups in tables of 8 bits; in a product's codes where it multiplies
        with the table.
        """
        nodes = {
            name: unit for name, unit in self.lookups.items() if not plan.nodes[name].quantized
        }
        stored = store_by_weights(
            self.model, replace(plan, nodes=nodes), StoredOptions(), self.watch
        ).stored
        weights = {
            unit.weight.name: plan.weights[unit.name] for unit in plan.units() if unit.weight
        }
        tied = {
            (u.name, 0): weights[u.weight.name]
            for u in nodes.values()
            if u.weight and u.weight.name in weights
        }
        return replace(plan, nodes={**plan.nodes, **nodes}, stored={**stored, **tied})

    def _with_ranges(self, plan: QuantPlan) -> QuantPlan:
        spec = RangeSpec(UINT8, False, self.full.power_of_two_scale, self.full.outlier_ratio)
        statistics, threads = self.evidence.statistics, self.resources.threads
        plan = plan.with_qparams(activation_qparams(plan, statistics, self.method, spec, threads))
        graph = self.model.graph
        plan = plan.with_qparams(probability_qparams(graph, plan, statistics, spec))
        plan = plan.with_qparams(masked_qparams(graph, plan, statistics, spec))
        if self.pixels is None or _target(self.config).activation != UINT8:
            return plan
        inputs = {value.name for value in self.model.graph.inputs}
        return plan.with_qparams(
            {group: self.pixels.qparams for group in plan.groups() if group in inputs}
        )

    def set_edges(self, quantized: ir.Model) -> None:
        """Gives the quantized model the input and output types that the flags ask for."""
        job = self.job
        kind = job.input_type if job.input_type in TYPES else "UINT8" if self.pixels else ""
        for value in [v for v in fed_inputs(quantized) if kind and is_float(v)]:
            take_integers(quantized, value.name or "", kind, self.pixels)
        for value in [
            v for v in quantized.graph.outputs if job.output_type in TYPES and is_float(v)
        ]:
            name, fmt = value.name or "", INT8 if job.output_type == "INT8" else UINT8
            self.watch.tell(
                give_integers(quantized, name, job.output_type, self._output_qparams(name, fmt))
            )

    def _output_qparams(self, name: str, fmt: IntFormat) -> QParams:
        """Parameters of an output that becomes integers; raises UsageError where no range is
        known.
        """
        spec = RangeSpec(fmt, False, self.full.power_of_two_scale)
        if name in self.trained.tensors:
            return in_format(
                self.trained.tensors[name],
                TensorPlan(name, fmt, False, name, ""),
                spec.power_of_two,
            )
        if name not in self.evidence.statistics:
            msg = (
                f"--outputDataType: training left the range of output '{name}' open; give "
                "calibrate_path, or floats."
            )
            raise UsageError(msg)
        return spec.qparams(range_of(self.method, self.evidence.statistics[name], spec))


def _fed_by_floats(model: ir.Model, plan: QuantPlan) -> list[NodePlan]:
    """The matrix products of what float nodes compute, as in transformers; others read what is
    integer anyway.
    """
    other = {value.name for value in model.graph.inputs} | {
        name for unit in plan.units() for name in unit.outputs
    }
    products = [unit for unit in plan.units() if unit.op_type in {"MatMul", "Gemm"} and unit.weight]
    return [unit for unit in products if unit.inputs[0] not in other]


def _mixed_concats(plan: QuantPlan) -> dict[str, str]:
    """Concat nodes whose inputs are too different in range to share one, with the reason."""
    mixed = {}
    for unit in plan.units():
        scales = (
            [float(plan.params(name).scale) for name in unit.inputs]
            if unit.op_type == "Concat"
            else []
        )
        if scales and max(scales) > MIXED_RANGES * min(scales):
            mixed[unit.name] = (
                f"the ranges of its inputs differ {max(scales) / min(scales):.0f} times"
            )
    return mixed


def _require_full_integer(plan: QuantPlan, config: Config) -> None:
    """Raises ConfigError where the user wants no float node and there is one."""
    left = [node for node in plan.nodes.values() if not node.quantized and not node.inside]
    if config.full_quant.require_full_integer and left:
        listed = "; ".join(f"{node.name} ({node.op_type}): {node.reason}" for node in left)
        where = config.at("full_quant_param", "require_full_integer")
        msg = f"{where}: {len(left)} node(s) would stay float: {listed}."
        raise ConfigError(msg)
