"""From a model to one that computes a loss and its gradients: the backward pass as ONNX nodes.

Nodes are visited from the loss back, and every rule of `converter.learn.rules` writes what it makes
of the gradient that has arrived. The graph is written for inputs of known shapes, which makes all
shapes constants and the nodes few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from converter.errors import ModelError
from converter.graph.edit import drop_unread, not_none, values_by_name, values_read
from converter.learn import fake_quant
from converter.learn.losses import LOSS, Loss
from converter.learn.rules import FLAT, RULES
from converter.learn.site import Rule, Site
from converter.learn.terms import NoGradientError, Scribe, Term
from converter.prepare.fold_constants import fold_constants
from converter.prepare.opset import raise_opset

# ScatterND and ScatterElements, which sum what is read more than once, add from here on.
LEAST_OPSET = 16


@dataclass(frozen=True)
class Gap:
    """A node through which no gradient goes, and why; what lies behind it gets less or none."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Gradients:
    """A `model` that computes the output `loss` and, as the outputs named in `outputs` by tensor,
    its gradients.

    Constants whose gradients are wanted have become inputs of the model under their own names. A
    tensor that the loss does not depend on has no output.
    """

    model: ir.Model
    loss: str
    outputs: Mapping[str, str]
    gaps: tuple[Gap, ...]


def gradient_model(
    model: ir.Model,
    loss: str | Loss,
    wanted: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    *,
    keep: Sequence[str] = (),
) -> Gradients:
    """The gradients of the tensor `loss` with respect to the tensors `wanted`.

    `model` is prepared and stays as it is. `shapes` are those of all its inputs, `keep` further
    tensors to hand out. A loss may be written behind the model, see `converter.learn.losses`. Where
    it is more than one number, the model gets an input `LOSS_seed` of its shape that says how much
    each one counts. Raises KeyError for names that the model does not have, ModelError for a loss
    of unknown shape.
    """
    model = loss_model(model, loss, wanted, shapes, keep=keep)
    values, aim = values_by_name(model.graph), model.graph.outputs[0]
    backward = _Backward(model, [values[name] for name in wanted])
    found = backward.run(aim)
    named = {
        name: backward.scribe.named(found[values[name]], f"{name}_gradient")
        for name in dict.fromkeys(wanted)
        if values[name] in found
    }
    model.graph.outputs.extend(named.values())
    common.RemoveUnusedNodesPass()(model)
    drop_unread(model)
    outputs = {tensor: value.name or "" for tensor, value in named.items()}
    return Gradients(model, aim.name or "", outputs, tuple(backward.gaps))


def loss_model(
    model: ir.Model,
    loss: str | Loss,
    free: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    *,
    keep: Sequence[str] = (),
) -> ir.Model:
    """A copy that hands out the loss, first, and tensors to `keep`; constants `free` are inputs."""
    model = raise_opset(model.clone(), LEAST_OPSET)
    _free(model, free)
    fix_shapes(model, shapes)
    if isinstance(loss, str):
        aim = values_by_name(model.graph)[loss]
    else:
        scribe = Scribe(model)
        aim = scribe.named(loss(scribe), LOSS)
    values = values_by_name(model.graph)  # a loss may have named some of its own
    model.graph.outputs[:] = dict.fromkeys([aim, *(values[name] for name in keep)])
    common.RemoveUnusedNodesPass()(model)
    return model


def _free(model: ir.Model, wanted: Sequence[str]) -> None:
    """Makes constants inputs."""
    for name in wanted:
        value = model.graph.initializers.pop(name, None)
        if value is not None:
            tensor = not_none(value.const_value)
            value.shape, value.dtype = ir.Shape(tensor.numpy().shape), tensor.dtype
            value.const_value = None
            model.graph.inputs.append(value)


def fix_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Gives inputs their shapes, and through them all other tensors, in place."""
    for value in model.graph.inputs:
        if (shape := shapes.get(value.name or "")) is not None:
            value.shape = ir.Shape(shape)
    for value in (v for node in model.graph.all_nodes() for v in node.outputs):
        value.shape = None
    common.ShapeInferencePass()(model)
    before = -1
    while (unknown := _unknown_shapes(model)) != before:
        before = unknown
        fold_constants(model)  # shapes that are computed
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.ShapeInferencePass()(model)  # what they reshape


def _unknown_shapes(model: ir.Model) -> int:
    values = (value for node in model.graph for value in node.outputs)
    return sum(value.shape is None or not value.shape.is_static() for value in values)


class _Backward:
    """One walk from a loss back over a model, to whose graph it appends."""

    def __init__(self, model: ir.Model, wanted: Sequence[ir.Value]) -> None:
        self.scribe, self.gaps = Scribe(model), list[Gap]()
        self._nodes = list(model.graph)
        self._gradients = dict[ir.Value, list[Term]]()
        self._moving = set(wanted)
        for node in self._nodes:
            if node.op_type not in FLAT and self._moving.intersection(values_read(node)):
                self._moving.update(out for out in node.outputs if _is_real(out))

    def run(self, loss: ir.Value) -> dict[ir.Value, Term]:
        """The gradients of all values that moved with what is wanted and that the loss depends
        on.
        """
        self._gradients[loss] = [self._seed(loss)]
        for node in reversed(self._nodes):
            arrived = tuple(self._arrived(out) for out in node.outputs)
            if any(arrived) and node.op_type not in FLAT:
                self._back(Site(node, self.scribe, arrived))
        return {value: not_none(self._arrived(value)) for value in self._gradients}

    def _seed(self, loss: ir.Value) -> Term:
        try:
            term = self.scribe.read(loss)
        except NoGradientError as error:
            msg = f"No gradients can be computed, as {error}; give --inputShape."
            raise ModelError(msg) from error
        if term.size == 1:
            return term.like(1).reshape(*term.shape)
        return self.scribe.fed(f"{loss.name}_seed", term.shape, term.dtype)

    def _arrived(self, value: ir.Value) -> Term | None:
        """The sum of the gradients from all readers."""
        parts = self._gradients.get(value)
        if parts is None:
            return None
        while len(parts) > 1:
            parts[:] = [parts[0] + parts[1], *parts[2:]]
        return parts[0]

    def _back(self, site: Site) -> None:
        node, rule = site.node, _rule_of(site)
        moving = [i for i, value in enumerate(node.inputs) if value in self._moving]
        hidden = self._moving.intersection(values_read(node)).difference(node.inputs)
        if rule is None or hidden:
            return self._gap(node, "no gradient is known for it")
        for index in moving:
            value = not_none(node.inputs[index])
            try:
                gradient = rule(site, index).sum_to(self.scribe.read(value).shape)
                self._gradients.setdefault(value, []).append(gradient)
            except NoGradientError as error:
                self._gap(node, str(error))

    def _gap(self, node: ir.Node, reason: str) -> None:
        self.gaps.append(Gap(node.name or "", node.op_type, reason))


def _is_real(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _rule_of(site: Site) -> Rule | None:
    node = site.node
    if node.domain not in {"", fake_quant.DOMAIN}:
        return None
    # Only Split has a rule for more outputs than the first.
    return (
        RULES.get(node.op_type) if node.op_type == "Split" or not any(site.gradients[1:]) else None
    )
