"""Placement: from the float graph, the operator table and the target to a plan without numbers.

Anchors (operators with weights, matrix products) are quantized wherever the target has an integer
kernel. Operators between them follow where all they read is integer already and an anchor reads on
from them. What is left behind the last anchor (the Softmax of the probabilities, a detector's
Concat tail) stays float: integers there cost accuracy and save nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from calib.affine import IntFormat
from converter.config import Config
from converter.config.keys import Recipe
from converter.errors import ConfigError
from converter.graph.edit import (
    constant,
    is_float,
    not_none,
    only_consumer,
    operand,
    reached,
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
from converter.plan.recipes import is_named, nearest_error, told, wishes_for
from converter.plan.targets import WIDE, Target


@dataclass(frozen=True)
class Wishes:
    """What is asked of the placement: names (glob patterns) and types to leave float, granularity
    of weights, bits of activations.

    `kept_float` holds nodes that later findings keep float, with the reason, and `wide` those that
    they give activations of 16 bits. `joined` are operators whose inputs share the parameters of
    the whole. `recipes` say what is wanted of single nodes.
    """

    skip_nodes: tuple[str, ...] = ()
    skip_types: tuple[str, ...] = ()
    per_channel: bool = True
    kept_float: Mapping[str, str] = field(default_factory=dict)
    bits: int = 8
    wide: Mapping[str, str] = field(default_factory=dict)
    joined: Collection[str] = ()
    recipes: tuple[Recipe, ...] = ()


@dataclass(frozen=True)
class _Unit:
    """A node with what is computed inside it."""

    node: ir.Node
    rule: OpRule
    absorbed: tuple[ir.Node, ...]
    activation: IntFormat

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
    wishes = replace(
        wishes,
        kept_float={**unfed(graph), **moved, **pooled, **open_, **wishes.kept_float},
    )
    units, reasons = _candidates(graph, target, wishes)
    if not target.all_pays:
        _drop(
            units,
            reasons,
            _fed_by_floats(units),
            "an input of it is float: converting it costs more than it saves",
        )
        _drop(units, reasons, _tails(units), "no integer operator reads on from it")
    tensors = _Tensors(list(units.values()), target)
    tensors.join([unit for unit in units.values() if unit.node.name in wishes.joined])
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
    return QuantPlan(nodes, tensors.plans, converted=tensors.converted)


def unfed(graph: ir.Graph) -> dict[str, str]:
    """Why nodes stay float, by name, that nothing fed reaches, such as restore stored weights."""
    fed = reached(graph, graph.inputs)
    constants = (node.name or "" for node in graph if fed.isdisjoint(values_read(node)))
    return dict.fromkeys(constants, "what it computes is constant")


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
            if node.name in wishes.kept_float:
                # Nothing is known of what was to be inside.
                reasons.update((inner, reason) for inner in _absorbed(node, target, wishes))
            continue
        absorbed = tuple(_absorbed(node, target, wishes))
        units[node] = _Unit(
            node,
            rule_of(node),
            absorbed,
            _activation(node, target, wishes),
        )
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


def skipped(node: ir.Node, wishes: Wishes) -> str | None:
    """Why the user wants `node` left float; None if that was not asked."""
    own = wishes_for(wishes.recipes, node.name or "", node.op_type).get("skip")
    if own is not None:
        return f"skip in [{own.section}]" if own.value else wishes.kept_float.get(node.name or "")
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
    return nearest_error(config.at("common_quant_param", key), what, wish, there)


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
    return rule.obstacle(node) or _too_small(node, target)


def _too_small(node: ir.Node, target: Target) -> str | None:
    """Why a matrix product is too small for the target's integer kernels, as far as its sizes are
    known.
    """
    if not rule_of(node).product or not target.least_product:
        return None
    shape = not_none(node.inputs[1]).shape
    sides = [side for side in list(shape or ())[-2:] if isinstance(side, int)]
    least = min(sides, default=target.least_product)
    if least >= target.least_product:
        return None
    return f"a product with {least} rows or columns is faster in floats on target {target.name}"


def _activation(node: ir.Node, target: Target, wishes: Wishes) -> IntFormat:
    """The format that a node's activations have."""
    own = wishes_for(wishes.recipes, node.name or "", node.op_type).get("activation_bits")
    asked = wishes.bits == WIDE.bits or (node.name or "") in wishes.wide
    if own is not None:
        asked = int(own.value) == WIDE.bits
    return WIDE if asked and node.op_type in target.wide else target.activation


def _absorbed(node: ir.Node, target: Target, wishes: Wishes) -> Iterator[ir.Node]:
    """The nodes behind `node` that the target computes inside it."""
    if rule_of(node).moves:
        return
    wide = _activation(node, target, wishes) == WIDE
    add = bias_add(node) if target.adds_bias and not wide else None
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


class _Tensors:
    """The activations of units, and which of them are read in another format than they are made in.

    What units compute has their format; what becomes integers of floats has the widest of those
    that read it.
    """

    def __init__(self, units: Sequence[_Unit], target: Target) -> None:
        self.target = target
        self.plans: dict[str, TensorPlan] = {}
        self.converted: dict[str, TensorPlan] = {}
        branches = (_fused_branch(unit, units) for unit in units if target.fuses_residual)
        self.inner = {value for value in branches if value}
        self.read = {value for unit in units for value in unit.data} - self.inner
        self.widest: dict[ir.Value, IntFormat] = {}
        for unit in units:
            for value in unit.data:
                known = self.widest.get(value, unit.activation)
                self.widest[value] = max(
                    known,
                    unit.activation,
                    key=lambda fmt: fmt.bits,
                )
        for unit in units:
            self._add_read(unit)
            self._add_made(unit)

    def _add_read(self, unit: _Unit) -> None:
        for value in unit.data:
            if value in self.read:
                why = f"read by {unit.node.name}"
                self._add(value, self.widest[value], value.name or "", why)
                self._convert(value, unit)

    def _convert(self, value: ir.Value, unit: _Unit) -> None:
        name, fmt = value.name or "", unit.activation
        if self.plans[name].format != fmt and name not in self.converted:
            group, why = f"{name} as {fmt}", f"read by {unit.node.name}"
            plan = TensorPlan(name, fmt, self.target.symmetric, group, why)
            self.converted[name] = plan

    def _add_made(self, unit: _Unit) -> None:
        op_type, why = unit.node.op_type, f"computed by {unit.node.name}"
        source = self._group_of(unit.data[0].name or "", unit) if unit.rule.moves else ""
        for value in unit.outputs:
            kept = op_type not in self.target.float_output and value not in self.inner
            if value in self.read or kept:
                self._add(value, unit.activation, source or value.name or "", why)

    def _group_of(self, name: str, unit: _Unit) -> str:
        made = self.plans[name]
        return (made if made.format == unit.activation else self.converted[name]).group

    def join(self, units: Sequence[_Unit]) -> None:
        """Lets the inputs of each unit have the parameters of its output, whose range holds theirs;
        but for those that are part of another whole.
        """
        wholes = set[str]()
        for unit in reversed(units):
            whole = self.plans[unit.outputs[0].name or ""].group
            wholes.add(whole)
            parts = {self._group_of(value.name or "", unit) for value in unit.data} - wholes
            for plans in (self.plans, self.converted):
                members = {n: t for n, t in plans.items() if t.group in parts}
                plans.update((n, replace(t, group=whole)) for n, t in members.items())

    def _add(self, value: ir.Value, fmt: IntFormat, group: str, why: str) -> None:
        name = value.name or ""
        plan = TensorPlan(name, fmt, self.target.symmetric, group, why)
        self.plans.setdefault(name, plan)


def _fused_branch(unit: _Unit, units: Sequence[_Unit]) -> ir.Value | None:
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
        reason=_reason(unit, target, wishes),
        inputs=tuple(value.name or "" for value in unit.data),
        outputs=tuple(value.name or "" for value in unit.outputs),
        absorbed=tuple(inner.name or "" for inner in unit.absorbed),
        weight=_weight_plan(unit, target, wishes),
        bias=_bias_name(unit),
        integer_bias=target.integer_bias,
        bare=node.op_type in target.bare and unit.activation == target.activation,
        activation=unit.activation,
    )


def _reason(unit: _Unit, target: Target, wishes: Wishes) -> str:
    name, op_type = unit.node.name or "", unit.node.op_type
    reason, why = f"integer kernel of target {target.name}", wishes.wide.get(name)
    own = wishes_for(wishes.recipes, name, op_type)
    if why and unit.activation == WIDE and "activation_bits" not in own:
        reason += f", 16-bit activations {why}"
    return reason + told(own, {"activation_bits", "activation_quant_method", "per_channel"})


def _weight_plan(unit: _Unit, target: Target, wishes: Wishes) -> WeightPlan | None:
    if (index := unit.weight_index) is None:
        return None
    name, op_type = unit.node.name or "", unit.node.op_type
    own = wishes_for(wishes.recipes, name, op_type).get("per_channel")
    asked = own.value if own is not None else wishes.per_channel
    may = asked and (target.channels is None or op_type in target.channels)
    axis = unit.rule.channel_axis(unit.node) if may else None
    weight = not_none(unit.node.inputs[index])
    pairs, shape = unit.rule.pairs, not_none(constant(weight)).shape
    added = pairs is not None and pairs(unit.node, shape)
    pair_limit = target.pair_limit if added and unit.activation == target.activation else None
    granularity = PerTensor() if axis is None else PerAxis(axis)
    return WeightPlan(weight.name or "", index, target.weight, granularity, pair_limit)


def _bias_name(unit: _Unit) -> str | None:
    product = unit.node.outputs[0]
    adders = [node for node in unit.absorbed if rule_of(node).adds]
    added = [value for node in adders for value in node.inputs if value is not product]
    return next((value.name for value in (*added, own_bias(unit.node)) if value), None)
