"""Placement: from the float graph, the operator table and the target to a plan without numbers.

Anchors (operators with weights, matrix products) are quantized wherever the target has an integer
kernel. Operators between them follow where all they read is integer already and an anchor reads on
from them. What is left behind the last anchor (the Softmax of the probabilities, a detector's
Concat tail) stays float: integers there cost accuracy and save nothing.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from calib.sources import as_item
from converter.config import Config
from converter.errors import ConfigError
from converter.graph.edit import (
    constant,
    is_float,
    not_none,
    only_consumer,
    operand,
    readers_of,
    values_read,
)
from converter.graph.files import DEFAULTS
from converter.plan.ops import OpRule, bias_add, own_bias, rule_of
from converter.plan.plan import (
    NodePlan,
    PerAxis,
    PerTensor,
    QuantPlan,
    TensorPlan,
    WeightPlan,
)
from converter.plan.targets import Target


@dataclass(frozen=True)
class Wishes:
    """What is asked of the placement: names (glob patterns) and types to leave float, granularity
    of weights.

    `kept_float` holds nodes that later findings keep float, with the reason.
    """

    skip_nodes: tuple[str, ...] = ()
    skip_types: tuple[str, ...] = ()
    per_channel: bool = True
    kept_float: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Unit:
    """A node with what is computed inside it."""

    node: ir.Node
    rule: OpRule
    absorbed: tuple[ir.Node, ...]

    @property
    def anchor(self) -> bool:
        return self.rule.weight is not None

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        return tuple((self.absorbed[-1] if self.absorbed else self.node).outputs)

    @property
    def weight_index(self) -> int | None:
        """Where the constant weight stands; a constant on the left of a MatMul is an activation to
        kernels.
        """
        index = self.rule.weight
        return index if index is not None and operand(self.node, index) is not None else None

    @property
    def data(self) -> list[ir.Value]:
        """The activations it reads, constant ones included, its weight not."""
        indices = range(len(self.node.inputs)) if self.rule.data is None else self.rule.data
        return [
            v for i in indices if i != self.weight_index and (v := self.node.inputs[i]) is not None
        ]


def build_plan(graph: ir.Graph, target: Target, wishes: Wishes) -> QuantPlan:
    """The plan of a prepared float graph, without numbers."""
    moved = _moved_into_bodies(graph)
    pooled = _behind_dilated_pools(graph)
    open_ = _reading_defaults(graph)
    wishes = replace(wishes, kept_float={**moved, **pooled, **open_, **wishes.kept_float})
    units, reasons = _candidates(graph, target, wishes)
    if not target.all_pays:
        _drop(
            units,
            reasons,
            _fed_by_floats(units),
            "an input of it is float: converting it costs more than it saves",
        )
        _drop(units, reasons, _tails(units), "no integer operator reads on from it")
    tensors = _tensor_plans(units.values(), target)
    inside = {inner: unit.node.name for unit in units.values() for inner in unit.absorbed}
    nodes = {}
    for node in graph:
        name = node.name or ""
        if unit := units.get(node):
            nodes[name] = _unit_plan(unit, target, wishes)
        else:
            nodes[name] = NodePlan(
                name, node.op_type, False, reasons[node], inside=inside.get(node)
            )
    return QuantPlan(nodes, tensors)


# --- which nodes could be integer


def _candidates(
    graph: ir.Graph, target: Target, wishes: Wishes
) -> tuple[dict[ir.Node, _Unit], dict[ir.Node, str]]:
    """The units the target could compute, in graph order, and for every other node why not."""
    units: dict[ir.Node, _Unit] = {}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        if node in reasons:
            continue
        if reason := _obstacle(node, target, wishes):
            reasons[node] = reason
            continue
        units[node] = _Unit(node, rule_of(node), tuple(_absorbed(node, target, wishes)))
        reasons.update((inner, f"computed inside {node.name}") for inner in units[node].absorbed)
    return units, reasons


def _moved_into_bodies(graph: ir.Graph) -> dict[str, str]:
    """Nodes, with the reason, whose results bodies of control flow read after moves (a Transpose, a
    Slice, …).

    ONNX Runtime takes conversions to integers along such moves, and crashes where a body reads on.
    """
    kept: dict[str, str] = {}
    for node in graph:
        for value in set(values_read(node)) - set(node.inputs):
            chain = [value.producer()]
            while (last := chain[-1]) is not None and rule_of(last).moves and last.inputs[0]:
                chain.append(last.inputs[0].producer())
            if len(chain) > 1:
                kept.update(
                    (each.name or "", f"a body of {node.name} reads it on")
                    for each in chain
                    if each
                )
    return kept


def _behind_dilated_pools(graph: ir.Graph) -> dict[str, str]:
    """Readers, with the reason, of a pool that has to stay float.

    ONNX Runtime takes a pair of conversions around it for its integer kernel, and then refuses
    the model.
    """
    pools = (node for node in graph if rule_of(node).obstacle_spreads)
    kept: dict[str, str] = {}
    for pool in pools:
        if rule_of(pool).obstacle(pool):
            for node in readers_of(pool.outputs[0]):
                kept[node.name or ""] = f"it reads the dilated {pool.name}"
    return kept


def _reading_defaults(graph: ir.Graph) -> dict[str, str]:
    """Nodes, with the reason, that read floats of an input with a default value, or what follows
    from such inputs and constants alone: no range that data shows holds for what may be fed.
    """
    defaults = graph.meta.get(DEFAULTS, {})
    origin = {value: value.name for value in graph.inputs if value.name in defaults}
    kept: dict[str, str] = {}
    for node in graph if origin else ():
        read = [value for value in node.inputs if value in origin]
        if any(is_float(value) for value in read):
            kept[node.name or ""] = f"it reads '{origin[read[0]]}', an input with a default value"
        if read and all(v in origin or v is None or constant(v) is not None for v in node.inputs):
            origin.update(dict.fromkeys(node.outputs, origin[read[0]]))
    return kept


def is_named(name: str, pattern: str) -> bool:
    """Whether a name is what the user wrote, literally (brackets and all) or as a glob pattern."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def skipped(node: ir.Node, wishes: Wishes) -> str | None:
    """Why the user wants `node` left float; None if that was not asked."""
    if any(is_named(node.name or "", pattern) for pattern in wishes.skip_nodes):
        return "named in skip_quant_node"
    if node.op_type in wishes.skip_types:
        return "named in skip_quant_type"
    return wishes.kept_float.get(node.name or "")


def check_skips(config: Config, nodes: Collection[tuple[str, str]]) -> None:
    """Raises ConfigError for a wish to skip that is of none of the `nodes` (name, operator
    type).
    """
    names = sorted({name for name, _ in nodes})
    types = sorted({op_type for _, op_type in nodes})
    for pattern in config.common.skip_quant_node:
        if not any(is_named(name, pattern) for name in names):
            raise _unknown(
                config,
                "skip_quant_node",
                f"no node is named '{pattern}'",
                wish=pattern,
                there=names,
            )
    for op_type in config.common.skip_quant_type:
        if op_type not in types:
            raise _unknown(
                config,
                "skip_quant_type",
                f"no node is of type '{op_type}'",
                wish=op_type,
                there=types,
            )


def _unknown(config: Config, key: str, what: str, *, wish: str, there: list[str]) -> ConfigError:
    nearest = difflib.get_close_matches(wish, there, 1, cutoff=0.0)[0]
    # What no list can hold is written as a pattern.
    item = as_item(nearest) or as_item("".join(c if c.isalnum() else "?" for c in nearest))
    written = "" if item == nearest else f", written {item}"
    where = config.at("common_quant_param", key)
    return ConfigError(f"{where}: {what} in this model; the nearest is '{nearest}'{written}.")


def _obstacle(node: ir.Node, target: Target, wishes: Wishes) -> str | None:
    rule = rule_of(node)
    if reason := skipped(node, wishes):
        return reason
    if any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values()):
        return "FULL_QUANT leaves the bodies of control flow float"
    if node.domain:
        return f"operator of the domain {node.domain}"
    if node.op_type not in target.integer | target.bare:
        return f"no integer kernel for {node.op_type} on target {target.name}"
    if not all(is_float(value) for value in node.outputs):
        return "its values are not float32"
    constants = any(constant(value) is not None for value in node.inputs)
    if rule.of_activations and not constants and not target.computed_products:
        return f"a product of two activations is no faster in integers on target {target.name}"
    return rule.obstacle(node)


def _absorbed(node: ir.Node, target: Target, wishes: Wishes) -> Iterator[ir.Node]:
    """The nodes behind `node` that the target computes inside it."""
    if rule_of(node).moves:
        return
    add = bias_add(node)
    if add and not skipped(add, wishes):
        yield add
        node = add
    follower = only_consumer(node.outputs[0])
    if follower and clips_at_zero(follower, target) and not skipped(follower, wishes):
        yield follower


def clips_at_zero(node: ir.Node, target: Target) -> bool:
    """Whether `node` is a fused Relu or Clip from zero, so that the integer type's own clipping can
    stand for it.
    """
    if node.domain or node.op_type not in target.fused:
        return False
    floor = rule_of(node).floor
    return floor is not None and floor(node) == 0.0


# --- which of them pay


def _drop(
    units: dict[ir.Node, _Unit],
    reasons: dict[ir.Node, str],
    dropped: Iterable[_Unit],
    why: str,
) -> None:
    for unit in list(dropped):
        del units[unit.node]
        reasons.update((node, why) for node in (unit.node, *unit.absorbed))


def _fed_by_floats(units: dict[ir.Node, _Unit]) -> Iterator[_Unit]:
    """Operators without weights that would need a conversion of their own."""
    integer = {
        value for unit in units.values() if unit.anchor for value in (*unit.data, *unit.outputs)
    }
    # A conversion to integers costs nothing more before an operator that only moves values than
    # behind it.
    for unit in reversed(units.values()):
        if unit.rule.moves and all(value in integer for value in unit.outputs):
            integer.update(unit.data)
    for unit in units.values():
        if unit.anchor or all(
            value in integer or constant(value) is not None for value in unit.data
        ):
            integer.update(unit.outputs)
        else:
            yield unit


def _tails(units: dict[ir.Node, _Unit]) -> Iterator[_Unit]:
    """Operators without weights from which no anchor reads on."""
    read = {value for unit in units.values() if unit.anchor for value in unit.data}
    for unit in reversed(list(units.values())):
        if unit.anchor or any(value in read for value in unit.outputs):
            read.update(unit.data)
        else:
            yield unit


# --- the plan


def _tensor_plans(units: Iterable[_Unit], target: Target) -> dict[str, TensorPlan]:
    units = list(units)
    inner = {
        value for unit in units if target.fuses_residual and (value := _fused_branch(unit, units))
    }
    read = {value for unit in units for value in unit.data} - inner
    plans: dict[str, TensorPlan] = {}

    def add(value: ir.Value, group: str, reason: str) -> None:
        name = value.name or ""
        plans.setdefault(name, TensorPlan(name, target.activation, target.symmetric, group, reason))

    for unit in units:
        for value in unit.data:
            if value in read:
                add(value, value.name or "", f"read by {unit.node.name}")
        source = plans[unit.data[0].name or ""].group if unit.rule.moves else None
        for value in unit.outputs:
            if value in read or (
                unit.node.op_type not in target.float_output and value not in inner
            ):
                add(value, source or value.name or "", f"computed by {unit.node.name}")
    return plans


def _fused_branch(unit: _Unit, units: list[_Unit]) -> ir.Value | None:
    """The convolution output that the runtime adds to inside the convolution."""
    if not unit.rule.adds:
        return None
    made = {value for other in units if other.anchor for value in other.outputs}
    return next((v for v in unit.data if v in made and only_consumer(v) is unit.node), None)


def _unit_plan(unit: _Unit, target: Target, wishes: Wishes) -> NodePlan:
    node = unit.node
    return NodePlan(
        name=node.name or "",
        op_type=node.op_type,
        quantized=True,
        reason=f"integer kernel of target {target.name}",
        inputs=tuple(value.name or "" for value in unit.data),
        outputs=tuple(value.name or "" for value in unit.outputs),
        absorbed=tuple(inner.name or "" for inner in unit.absorbed),
        weight=_weight_plan(unit, target, wishes),
        bias=_bias_name(unit),
        integer_bias=target.integer_bias,
        bare=node.op_type in target.bare,
    )


def _weight_plan(unit: _Unit, target: Target, wishes: Wishes) -> WeightPlan | None:
    if (index := unit.weight_index) is None:
        return None
    axis = unit.rule.channel_axis(unit.node) if wishes.per_channel else None
    weight = not_none(unit.node.inputs[index])
    pairs, shape = unit.rule.pairs, not_none(constant(weight)).shape
    pair_limit = target.pair_limit if pairs and pairs(unit.node, shape) else None
    granularity = PerTensor() if axis is None else PerAxis(axis)
    return WeightPlan(weight.name or "", index, target.weight, granularity, pair_limit)


def _bias_name(unit: _Unit) -> str | None:
    product = unit.node.outputs[0]
    adders = [node for node in unit.absorbed if rule_of(node).adds]
    added = [value for node in adders for value in node.inputs if value is not product]
    return next((value.name for value in (*added, own_bias(unit.node)) if value), None)
