"""Takes the quantization out of a model that was trained with it: what is left is float, what was
learnt is kept.

Known are QuantizeLinear and DequantizeLinear with constant parameters, in pairs around floats or on
integer weights, with a Clip for fewer bits and operators that only move values in between; and the
same written out as arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from calib.affine import Array, IntFormat, QParams, dequantize, quantize
from converter.graph.edit import (
    Names,
    add_constant,
    constant,
    input_at,
    not_none,
    operand,
    readers_of,
    replace_constant,
)
from converter.graph.qdq import is_dequantize, is_quantize, qparams_of
from converter.job import FLOATS, Job
from converter.plan.ops import rule_of
from converter.plan.plan import QuantizedWeight
from converter.prepare import prepare
from converter.prepare.fake_quant_chains import Chain, chain_from, format_of
from converter.prepare.fake_quant_ranges import following, same, spread
from converter.prepare.fold_affine import Moments


@dataclass(frozen=True)
class Trained:
    """What training found: parameters of activations by tensor, weights by the node that multiplies
    with them. `follows` are parameters of tensors that training left open, from bounds that follow
    from the others: data knows better.
    """

    tensors: Mapping[str, QParams] = field(default_factory=dict)
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    follows: Mapping[str, QParams] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.weights)


def take_trained(
    model: ir.Model, float_inputs: bool = False, float_outputs: bool = False
) -> Trained:
    """What a prepared model knows of its quantization, which is taken out of it in place; empty if
    it has none.

    Weights keep the values that training saw, those of their codes; activations are rounded no
    more. A DequantizeLinear stays where it makes floats of the model's integer inputs, unless these
    shall be floats, and a QuantizeLinear before its outputs.
    """
    trained = _Taker(model).run(float_inputs, float_outputs)
    if not trained:
        return trained
    common.RemoveUnusedNodesPass()(model)
    prepare(model)
    tensors = spread(model.graph, trained.tensors)
    return replace(trained, tensors=tensors, follows=following(model.graph, tensors))


@dataclass(frozen=True)
class Prepared:
    """A model in normal form, which nobody changes: `model` as it came, `floats` without the
    quantization that it was trained with, and what was known of that; `moments` are what is known
    of tensors on the data of training.
    """

    model: ir.Model
    floats: ir.Model
    trained: Trained
    moments: Mapping[str, Moments] = field(default_factory=dict)


def without_training(
    model: ir.Model, job: Job, moments: Mapping[str, Moments] | None = None
) -> Prepared:
    """A prepared model beside a copy without its quantization."""
    floats = model.clone()
    trained = take_trained(floats, job.input_type in FLOATS, job.output_type in FLOATS)
    return Prepared(model, floats if trained else model, trained, moments or {})


class _Taker:
    def __init__(self, model: ir.Model) -> None:
        self.graph, self.names = model.graph, Names(model)
        self.tensors: dict[str, QParams] = {}
        self.weights: dict[str, QuantizedWeight] = {}

    def run(self, float_inputs: bool, float_outputs: bool) -> Trained:
        nodes = list(self.graph)
        for value in self.graph.inputs if float_inputs else ():
            self._float_input(value)
        for value in list(self.graph.outputs) if float_outputs else ():
            node = value.producer()
            if is_quantize(node) and (q := _qparams(node)) and _may_hand_over(node.inputs[0]):
                _join(value, node.inputs[0])
                self.tensors[value.name or ""] = q
        for node in nodes:
            if is_quantize(node) and (q := _qparams(node)):
                self._pairs(node, q)
            elif chain := chain_from(node):
                self._chain(chain)
        for node in nodes:
            if is_dequantize(node) and (q := _qparams(node)):
                self._restored(node, q)
        return Trained(self.tensors, self.weights)

    def _pairs(self, node: ir.Node, q: QParams) -> None:
        """Takes out a QuantizeLinear, every DequantizeLinear that reads its codes and what stands
        between.
        """
        source, reach = not_none(node.inputs[0]), _reach(node.outputs[0])
        array = constant(source)
        if reach is None or not reach.ends:
            if q.axis is None:
                self.tensors.setdefault(source.name or "", q)
            return
        fmt = format_of(*reach.narrowed(q.format))
        earlier = self.tensors.get(source.name or "")
        if (
            fmt is None
            or (array is None and q.axis is not None)
            or (array is not None and reach.moved)
        ):
            return
        q = replace(q, format=fmt)
        if not all(same(_qparams(end), q) for end in reach.ends) or (
            earlier and not same(earlier, q)
        ):
            return
        if array is not None:
            for end in reach.ends:
                self._constant(end.outputs[0], quantize(array, q), q)
            return
        if _may_hand_over(source) or not any(
            end.outputs[0].is_graph_output() for end in reach.ends
        ):
            reach.release(source)
            _join(node.outputs[0], source)
        self.tensors.setdefault(source.name or "", q)

    def _float_input(self, value: ir.Value) -> None:
        """An integer input becomes one of the floats that it stands for."""
        reach = _reach(value)
        if reach and reach.ends and (q := _qparams(reach.ends[0])) and q.axis is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            reach.release(value)
            self.tensors[value.name or ""] = q

    def _chain(self, chain: Chain) -> None:
        readers, array = readers_of(chain.output), constant(chain.source)
        if array is not None and not chain.codes:
            self._constant(chain.output, quantize(array, chain.qparams), chain.qparams)
        if (
            array is not None
            or chain.output.is_graph_output()
            or (chain.codes and not all(map(_multiplies, readers)))
        ):
            return
        for node in readers if chain.codes else ():
            index = rule_of(node).weight or 0
            replace_constant(
                node,
                index,
                not_none(operand(node, index)) / chain.qparams.scale,
                self.names,
            )
        chain.output.replace_all_uses_with(chain.source)
        self.tensors.setdefault(chain.source.name or "", chain.qparams)

    def _restored(self, node: ir.Node, q: QParams) -> None:
        codes, output = operand(node, 0), node.outputs[0]
        if codes is not None:
            self._constant(output, codes, q)
        elif q.axis is None:
            # These floats come from integers.
            self.tensors.setdefault(output.name or "", q)

    def _constant(self, value: ir.Value, codes: Array, q: QParams) -> None:
        """A constant of the floats that `codes` stand for takes the place of `value`."""
        if value.is_graph_output():
            return
        name = self.names.fresh(f"{value.name}_trained")
        written = add_constant(self.graph, name, dequantize(codes, q))
        if q.axis is None:
            self.tensors[name] = q
        for use in value.uses():
            self._weight(use.node, use.idx, codes, q)
        value.replace_all_uses_with(written)

    def _weight(self, node: ir.Node, index: int, codes: Array, q: QParams) -> None:
        """Keeps the codes of a weight, also of one that is transposed on its way."""
        if node.op_type == "Transpose":
            order = list(node.attributes.get_ints("perm", range(codes.ndim)[::-1]))
            turned = replace(
                q,
                axis=None if q.axis is None else order.index(q.axis % codes.ndim),
            )
            for use in node.outputs[0].uses():
                self._weight(use.node, use.idx, codes.transpose(order), turned)
        elif rule_of(node).weight == index:
            self.weights[node.name or ""] = QuantizedWeight(codes, q)


def _qparams(node: ir.Node) -> QParams | None:
    """The constant parameters of a QuantizeLinear or DequantizeLinear; None for computed ones and
    other types.
    """
    codes = node.outputs[0] if is_quantize(node) else not_none(node.inputs[0])
    scale = not_none(node.inputs[1])
    zero_point = input_at(node, 2)
    kind = (codes if zero_point is None else zero_point).dtype
    if node.domain or scale.dtype != ir.DataType.FLOAT or kind is None or not kind.is_integer():
        return None
    if zero_point is not None and constant(zero_point) is None:
        return None
    q = qparams_of(codes, scale, zero_point, node.attributes.get_int("axis", 1))
    return q and replace(q, zero_point=q.zero_point.astype(np.int64))


@dataclass(frozen=True)
class _Reach:
    """Where codes go: the DequantizeLinear nodes at the `ends`, the `clips` and the values `moved`
    on the way.
    """

    ends: list[ir.Node]
    clips: list[ir.Node]
    moved: list[ir.Value]

    def narrowed(self, fmt: IntFormat) -> tuple[int, int]:
        """The least and the largest code that the clips leave of those of `fmt`."""
        lows, highs = (
            [constant(v) for clip in self.clips for v in clip.inputs[i : i + 1]] for i in (1, 2)
        )
        low = max([fmt.qmin, *(int(bound) for bound in lows if bound is not None)])
        return low, min([fmt.qmax, *(int(bound) for bound in highs if bound is not None)])

    def release(self, source: ir.Value) -> None:
        """Lets floats like `source` go where codes went."""
        for value in self.moved:
            value.type = source.type
        for node in (*self.clips, *self.ends):
            _join(node.outputs[0], node.inputs[0])


def _reach(codes: ir.Value) -> _Reach | None:
    """Everything that reads `codes`; None if something else than moves, clips and DequantizeLinear
    does.
    """
    reach, values = _Reach([], [], []), [codes]
    while values:
        value = values.pop()
        if value.is_graph_output():
            return None
        for use in value.uses():
            node = use.node
            if is_dequantize(node) and use.idx == 0 and _qparams(node):
                reach.ends.append(node)
            elif node.op_type == "Clip" and all(
                v is None or constant(v) is not None for v in node.inputs[1:]
            ):
                reach.clips.append(node)
                values += node.outputs
            elif rule_of(node).moves and use.idx == 0:
                reach.moved.extend(node.outputs)
                values += node.outputs
            else:
                return None
    return reach


def _may_hand_over(value: ir.Value | None) -> bool:
    """Whether `value` could be a graph output under another name."""
    return value is not None and value.producer() is not None and not value.is_graph_output()


def _join(gone: ir.Value, kept: ir.Value | None) -> None:
    """What read `gone` reads `kept`, which takes the name of a graph output."""
    kept, output = not_none(kept), gone.is_graph_output()
    gone.replace_all_uses_with(kept, replace_graph_outputs=True)
    if output:
        name, gone.name = gone.name, None
        kept.name = name


def _multiplies(node: ir.Node) -> bool:
    """Whether all that `node` reads but its constant weight is the data it multiplies."""
    index = rule_of(node).weight
    return index is not None and operand(node, index) is not None
