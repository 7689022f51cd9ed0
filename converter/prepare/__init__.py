"""Graph passes that turn any exporter's float model into one normal form; the graph is read-only
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common

from converter.graph.edit import drop_unread
from converter.graph.files import MAKERS_OF_MAPS
from converter.plan.ops import draws
from converter.prepare.drop_identities import drop_identities
from converter.prepare.fold_affine import Moments, fold_affine
from converter.prepare.fold_constants import fold_constants
from converter.prepare.full_axes import full_axes
from converter.prepare.hard_sigmoid import name_hard_sigmoids
from converter.prepare.names import name_nodes
from converter.prepare.normal_gemm import normal_gemm
from converter.prepare.share import share_constants, share_shapes
from converter.prepare.tie import tie
from converter.prepare.types import complete_types, infer_types
from converter.prepare.widen import widen

# The library's pass cannot compare what they have as an attribute: a type.
OF_TYPES = {"Optional"}


def make_plain(model: ir.Model) -> None:
    """Names every node and makes every constant an initializer, in place; what is computed
    stays.
    """
    name_nodes(model)  # first: later passes and the user's config refer to nodes by name
    common.InlinePass()(model)  # functions become plain nodes
    common.RemoveInitializersFromInputsPass()(model)  # old exporters list weights as inputs
    _lift_constants(model)  # one kind of constant


def prepare(model: ir.Model) -> ir.Model:
    """Runs all passes over `model` in place and returns it; it computes the same function."""
    normal_form(model)
    return model


def normal_form(model: ir.Model) -> Mapping[str, Moments]:
    """Runs all passes over `model` in place; what it knew of the data of training, by tensor."""
    make_plain(model)
    with _dimensions_of_their_own(model):
        with _hidden(model, lambda node: node.op_type in MAKERS_OF_MAPS):
            infer_types(model)  # helps what follows, never required
        complete_types(model)
        widen(model)
        share_shapes(model)
        # Indices and axes, so that the next pass finds more.
        common.DeduplicateInitializersPass(size_limit=1)(model)
        with _hidden(model, _is_kept):
            common.CommonSubexpressionEliminationPass()(model)
            fold_constants(model)  # shapes computed from static inputs, scaled weights
    _lift_constants(model)  # what was folded
    drop_identities(model)
    full_axes(model)
    share_constants(model)
    tie(model)  # a table is stored once
    normal_gemm(model)
    name_hard_sigmoids(model)
    moments = fold_affine(model)  # BatchNorm and its kin into the operator before them
    common.RemoveUnusedNodesPass()(model)
    drop_unread(model)
    name_nodes(model)  # what was inlined or folded
    common.TopologicalSortPass()(model)
    complete_types(model)
    return moments


def _is_kept(node: ir.Node) -> bool:
    """Whether no pass may fold the node or merge it with another."""
    return bool(node.domain) or draws(node) or node.op_type in OF_TYPES


@contextmanager
def _hidden(model: ir.Model, is_secret: Callable[[ir.Node], bool]) -> Iterator[None]:
    """While it lasts, no pass knows the operators of these nodes, nor takes two for the same."""
    nodes = [node for node in model.graph.all_nodes() if is_secret(node)]
    domains = [node.domain for node in nodes]
    types = [(node, node.attributes.pop("type")) for node in nodes if "type" in node.attributes]
    for number, node in enumerate(nodes):
        node.domain = f"hidden.{number}"
    yield
    for node, domain in zip(nodes, domains, strict=True):
        node.domain = domain
    for node, kind in types:
        node.attributes["type"] = kind


@contextmanager
def _dimensions_of_their_own(model: ir.Model) -> Iterator[None]:
    """While it lasts, no two dimensions of inputs have one name, and names stand for equal sizes.

    A name should do so anyway, but exporters write N on dimensions that differ in fact, inside of
    the model too.
    """
    graphs = list(model.graphs())
    edges = {v: v.shape for graph in graphs for v in (*graph.inputs, *graph.outputs)}
    inside = (v for graph in graphs for node in graph for v in node.outputs)
    for value in {**edges, **dict.fromkeys(inside)}:
        value.shape = _with_names(value.shape, lambda axis: None)
    for number, value in enumerate(model.graph.inputs):
        value.shape = _with_names(value.shape, f"dimension{number}_{{}}".format)
    yield
    for value, shape in edges.items():
        value.shape = shape or _with_names(value.shape, lambda axis: None)


def _with_names(shape: ir.Shape | None, name: Callable[[int], str | None]) -> ir.Shape | None:
    """The shape with other names of its open dimensions, by axis."""
    if shape is None:
        return None
    return ir.Shape([d if isinstance(d, int) else name(axis) for axis, d in enumerate(shape)])


def _lift_constants(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
