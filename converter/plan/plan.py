"""The quantization plan: which nodes and tensors become integers, in which format, and why; plain
frozen data.

A *unit* is one node with what runtimes compute inside it: the bias Add behind a MatMul and the Relu
or Clip behind any integer operator. A plan is keyed by names, so that algorithms return changed
copies and need no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from calib.affine import BYTE_ZERO_BITS, Array, IntFormat, QParams

# Codes of up to this many bits are worth scales and zeros of float16.
HALF_BITS = 8
# Bytes the file grows by for the nodes that restore one weight, about.
OVERHEAD = 1100


def stored_bytes(size: int, channels: int, bits: int) -> int:
    """Bytes that `size` weights with a scale and a zero point for each of `channels` take in the
    file.
    """
    each = 3 if bits <= BYTE_ZERO_BITS else 4 if bits <= HALF_BITS else 8
    return -(-size * bits // 8) + channels * each + OVERHEAD


@dataclass(frozen=True)
class TensorPlan:
    """An activation that becomes integers. Tensors of one `group` share the parameters of the
    tensor it is named by.
    """

    name: str
    format: IntFormat
    symmetric: bool
    group: str
    reason: str


@dataclass(frozen=True)
class PerTensor:
    """One scale for all."""

    axis: ClassVar[None] = None


@dataclass(frozen=True)
class PerAxis:
    """A scale for every channel."""

    axis: int


@dataclass(frozen=True)
class PerBlock:
    """A scale for every `size` weights of a channel, which are the next to one another in it."""

    axis: int
    size: int


Granularity = PerTensor | PerAxis | PerBlock


@dataclass(frozen=True)
class WeightPlan:
    """A constant operand that becomes integers.

    `pair_limit` bounds the sum of two codes that a kernel multiplies and adds in 16 bits; None if
    it does not. No search changes the width of a `fixed` one, and one that is `blind` is rounded
    for itself, though data may tell what it multiplies.
    """

    name: str
    index: int
    format: IntFormat
    granularity: Granularity
    pair_limit: int | None = None
    fixed: bool = False
    blind: bool = False

    @property
    def axis(self) -> int | None:
        """The channel axis, None for one scale."""
        return self.granularity.axis


@dataclass(frozen=True)
class NodePlan:
    """What happens to one node.

    `inputs` are the activation tensors it reads, `outputs` the tensors that leave the unit,
    `absorbed` the names of the nodes computed inside it, `inside` the unit it is itself computed
    in, and `bias` the name of its constant bias, if any, which is stored as int32 where
    `integer_bias`. A `bare` node runs on the integers themselves, without a conversion on either
    side. `further` are the weights of an operator that has more than one. `activation` is the
    format of what it reads and makes, None where that is not fixed.
    """

    name: str
    op_type: str
    quantized: bool
    reason: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    absorbed: tuple[str, ...] = ()
    inside: str | None = None
    weight: WeightPlan | None = None
    bias: str | None = None
    integer_bias: bool = True
    bare: bool = False
    further: tuple[WeightPlan, ...] = ()
    activation: IntFormat | None = None

    @property
    def weights(self) -> tuple[WeightPlan, ...]:
        """All its weights."""
        return (self.weight, *self.further) if self.weight else ()

    def in_bits(self, bits: int) -> NodePlan:
        """A copy whose weights are `bits` wide, but for those of a fixed width."""
        first, *further = (
            w if w.fixed else replace(w, format=replace(w.format, bits=bits)) for w in self.weights
        )
        return replace(self, weight=first, further=tuple(further))


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer `codes` of a weight, in the weight's shape, with their parameters."""

    codes: Array
    qparams: QParams


@dataclass(frozen=True)
class QuantPlan:
    """All decisions; `qparams` (by group), `weights` and `biases` (float32, by node) are filled in
    by the algorithms.

    `stored`, by node and input, are weights that are kept as codes but are floats again before use.
    `converted`, by tensor, is the other format that some of its readers compute in.
    """

    nodes: Mapping[str, NodePlan]
    tensors: Mapping[str, TensorPlan]
    qparams: Mapping[str, QParams] = field(default_factory=dict)
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)
    stored: Mapping[tuple[str, int], QuantizedWeight] = field(default_factory=dict)
    converted: Mapping[str, TensorPlan] = field(default_factory=dict)

    def units(self) -> list[NodePlan]:
        """The quantized nodes, in graph order."""
        return [node for node in self.nodes.values() if node.quantized]

    @property
    def outside(self) -> list[NodePlan]:
        """The nodes that stand in no other node's subgraph."""
        return [node for node in self.nodes.values() if not node.inside]

    def groups(self) -> dict[str, TensorPlan]:
        """The tensor each group is named by."""
        others = {plan.group: plan for plan in self.converted.values()}
        named = {**self.tensors, **others}
        members = (*self.tensors.values(), *others.values())
        return {plan.group: named[plan.group] for plan in members}

    def params(self, tensor: str) -> QParams:
        """Scale and zero point of an activation tensor, as it is made."""
        return self.qparams[self.tensors[tensor].group]

    def as_read(self, unit: NodePlan, tensor: str) -> TensorPlan:
        """A tensor in the format that `unit` reads it in."""
        other = self.converted.get(tensor)
        return other if other and other.format == unit.activation else self.tensors[tensor]

    def read_params(self, unit: NodePlan, tensor: str) -> QParams:
        """Scale and zero point of an activation tensor, as `unit` reads it."""
        return self.qparams[self.as_read(unit, tensor).group]

    def part(self, nodes: Collection[NodePlan], tensors: Iterable[str] = ()) -> QuantPlan:
        """A copy about `nodes` alone: with the tensors they read and make where they are quantized,
        and `tensors`.
        """
        units = [node for node in nodes if node.quantized]
        named = {
            *tensors,
            *(name for unit in units for name in (*unit.inputs, *unit.outputs)),
        }
        kept = {name: tensor for name, tensor in self.tensors.items() if name in named}
        read = {name: tensor for name, tensor in self.converted.items() if name in named}
        part = {node.name: node for node in nodes}
        return replace(self, nodes=part, tensors=kept, converted=read)

    def with_qparams(self, qparams: Mapping[str, QParams]) -> QuantPlan:
        """A copy with more parameters."""
        return replace(self, qparams={**self.qparams, **qparams})

    def with_weights(
        self, weights: Mapping[str, QuantizedWeight], biases: Mapping[str, Array]
    ) -> QuantPlan:
        """A copy with more weights and biases."""
        return replace(
            self,
            weights={**self.weights, **weights},
            biases={**self.biases, **biases},
        )

    def with_bits(self, bits: Mapping[str, int]) -> QuantPlan:
        """A copy in which the weights of the nodes named have other widths."""
        return replace(
            self,
            nodes={
                **self.nodes,
                **{name: self.nodes[name].in_bits(n) for name, n in bits.items()},
            },
        )
