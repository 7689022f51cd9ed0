"""FULL_QUANT: weights and activations become integers, with ranges from calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from calib.affine import INT8, UINT8
from calib.ranges import RANGE_METHODS, RangeMethod, RangeSpec, range_of
from calib.samples import Dataset
from converter.algorithms.weights import Options, decide_weights, products
from converter.cache import observe_with_cache
from converter.calibrate import Evidence, Wanted, activation_qparams
from converter.checks import check
from converter.config import Config
from converter.data import open_data, resources_of
from converter.edges import TYPES, Pixels, fold_normalisation, give_integers, take_integers
from converter.emit.qdq import emit
from converter.errors import ConfigError
from converter.job import Job, Resources, Watch
from converter.layerwise import Walk
from converter.model import is_float
from converter.ops import OPS
from converter.placement import Wishes, build_plan
from converter.plan import QuantPlan
from converter.prepare.equalize import EqualizePass
from converter.quantized import Quantized
from converter.sensitivity import fewest, output_drop, read_labels, sensitivities
from converter.targets import TARGETS, Target

# A Concat whose inputs' ranges differ by more than this gives the small ones too few codes.
MIXED_RANGES = 16.0


def make_plan(model: ir.Model, job: Job) -> QuantPlan:
    """The plan without numbers."""
    return build_plan(model.graph, _target(job.config), _wishes(job.config))


def quantize(model: ir.Model, job: Job, watch: Watch) -> Quantized:
    """The quantized copy of a prepared float model."""
    work = _Work.of(model, job, watch)
    quantized, plan, restored = work.within_drop()
    check(quantized, plan, work.target)
    _require_full_integer(plan, job.config)
    if not plan.units():
        watch.warn("No node could be quantized: the output is the float model in another form.")
    computed = {name: restored[name] for unit in plan.units() for name in unit.outputs if name in restored}
    return Quantized(model, quantized, plan, work.data, computed, lambda: work.set_edges(quantized, job))


def _target(config: Config) -> Target:
    target = TARGETS[config.full_quant.target_device or "CPU"]
    return target if config.full_quant.overflow_safe else replace(target, pair_limit=None)


def _wishes(config: Config) -> Wishes:
    return Wishes(config.common.skip_quant_node, config.common.skip_quant_type, config.full_quant.per_channel)


Attempt = tuple[ir.Model, QuantPlan, dict[str, str]]


@dataclass(frozen=True)
class _Work:
    """Everything that attempts with different nodes left float share."""

    model: ir.Model
    config: Config
    target: Target
    data: Dataset
    resources: Resources
    watch: Watch
    method: RangeMethod
    evidence: Evidence
    pixels: Pixels | None

    @classmethod
    def of(cls, model: ir.Model, job: Job, watch: Watch) -> _Work:
        full, wanted_data = job.config.full_quant, job.config.preprocess
        if full.equalize and not full.per_channel:
            EqualizePass()(model)
        pixels = None
        if job.input_type in TYPES and wanted_data.input_type == "IMAGE":
            pixels = fold_normalisation(model, wanted_data)
            wanted_data = pixels.preprocess(wanted_data)
        plan, data, resources = make_plan(model, job), open_data(model, job, watch, wanted_data), resources_of(job)
        method = RANGE_METHODS[full.activation_quant_method]
        means = products(model.graph, plan) if full.bias_correction else ()
        outputs = [v.name or "" for v in model.graph.outputs if job.output_type in TYPES and is_float(v)]
        tensors = tuple(dict.fromkeys([*plan.groups(), *outputs]))
        first = Walk(model, plan, data, resources).count
        wanted = Wanted(tensors, means, method.needs_histogram, method.needs_samples, first)
        evidence = observe_with_cache(model, wanted, data, resources, watch, job.config.common.calibration_cache)
        return cls(model, job.config, _target(job.config), data, resources, watch, method, evidence, pixels)

    def within_drop(self) -> Attempt:
        """The attempt that keeps the fewest nodes float and loses no more than max_drop."""
        bound, path = self.config.full_quant.max_drop, self.config.preprocess.label_file
        if bound is None:
            return self.attempt({})
        labels = read_labels(path, self.data) if path else None
        first = self.attempt({})
        if self._drop(first, labels) <= bound:
            return first
        ranked = sensitivities(self.model, first[1], self.data, self.resources, self.watch)
        for found in ranked:
            self.watch.say(f"Alone, {found.node.name} leaves the output {found.sqnr_db:.1f} dB, {found.cosine:.6f}.")
        # What only moves values has its neighbours' integers, or none where they are float.
        worst = [found for found in ranked if not OPS[found.node.op_type].moves]

        def attempt(count: int) -> Attempt | None:
            kept = {s.node.name: f"kept float for max_drop: alone it leaves {s.sqnr_db:.1f} dB" for s in worst[:count]}
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
        wishes = replace(_wishes(self.config), kept_float=kept_float)
        plan = self._with_ranges(build_plan(self.model.graph, self.target, wishes))
        if mixed := _mixed_concats(plan):
            wishes = replace(wishes, kept_float={**kept_float, **mixed})
            plan = self._with_ranges(build_plan(self.model.graph, self.target, wishes))
        walk = Walk(self.model, plan, self.data, self.resources, samples=self.evidence.first)
        self.watch.say(f"Weights are decided on {walk.count} of {len(self.data)} samples.")
        options = Options(self.config.full_quant.weight_rounding == "GPTQ", self.config.full_quant.power_of_two_scale)
        plan = decide_weights(self.model, plan, walk, self.evidence.means, options, self.watch)
        quantized = self.model.clone()
        return quantized, plan, emit(quantized, plan)

    def _with_ranges(self, plan: QuantPlan) -> QuantPlan:
        full = self.config.full_quant
        spec = RangeSpec(UINT8, False, full.power_of_two_scale, full.outlier_ratio)
        statistics, threads = self.evidence.statistics, self.resources.threads
        plan = plan.with_qparams(activation_qparams(plan, statistics, self.method, spec, threads))
        if self.pixels is None or self.target.activation != UINT8:
            return plan
        inputs = {value.name for value in self.model.graph.inputs}
        return plan.with_qparams({group: self.pixels.qparams for group in plan.groups() if group in inputs})

    def set_edges(self, quantized: ir.Model, job: Job) -> None:
        """Gives the quantized model the input and output types that the flags ask for."""
        for value in [v for v in quantized.graph.inputs if job.input_type in TYPES and is_float(v)]:
            take_integers(quantized, value.name or "", job.input_type, self.pixels)
        for value in [v for v in quantized.graph.outputs if job.output_type in TYPES and is_float(v)]:
            name, fmt = value.name or "", INT8 if job.output_type == "INT8" else UINT8
            spec = RangeSpec(fmt, False, self.config.full_quant.power_of_two_scale)
            q = spec.qparams(range_of(self.method, self.evidence.statistics[name], spec))
            self.watch.tell(give_integers(quantized, name, job.output_type, q))


def _mixed_concats(plan: QuantPlan) -> dict[str, str]:
    """Concat nodes whose inputs are too different in range to share one, with the reason."""
    mixed = {}
    for unit in plan.units():
        scales = [float(plan.params(name).scale) for name in unit.inputs] if unit.op_type == "Concat" else []
        if scales and max(scales) > MIXED_RANGES * min(scales):
            mixed[unit.name] = f"the ranges of its inputs differ {max(scales) / min(scales):.0f} times"
    return mixed


def _require_full_integer(plan: QuantPlan, config: Config) -> None:
    """Raises ConfigError where the user wants no float node and there is one."""
    left = [node for node in plan.nodes.values() if not node.quantized and not node.inside]
    if config.full_quant.require_full_integer and left:
        listed = "; ".join(f"{node.name} ({node.op_type}): {node.reason}" for node in left)
        where = config.at("full_quant_param", "require_full_integer")
        msg = f"{where}: {len(left)} node(s) would stay float: {listed}."
        raise ConfigError(msg)
