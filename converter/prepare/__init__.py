"""Graph passes that turn any exporter's float model into one normal form; the graph is read-only
afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common

from converter.model import drop_unread
from converter.prepare.drop_identities import drop_identities
from converter.prepare.fold_affine import fold_affine
from converter.prepare.fold_constants import fold_constants
from converter.prepare.full_axes import full_axes
from converter.prepare.names import name_nodes
from converter.prepare.normal_gemm import normal_gemm
from converter.prepare.share import share_constants, share_shapes
from converter.prepare.tie import tie
from converter.prepare.types import complete_types, infer_types
from converter.prepare.widen import widen

# What onnx_ir cannot hold the output of, and what gives other numbers every time.
MAKERS_OF_MAPS = {"ZipMap", "CastMap"}
RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
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
    make_plain(model)
    with _dimensions_of_their_own(model):
        with _hidden(model, MAKERS_OF_MAPS):
            infer_types(model)  # helps what follows, never required
        complete_types(model)
        widen(model)
        share_shapes(model)
        # Indices and axes, so that the next pass finds more.
        common.DeduplicateInitializersPass(size_limit=1)(model)
        with _hidden(model, RANDOM | OF_TYPES):
            common.CommonSubexpressionEliminationPass()(model)
            fold_constants(model)  # shapes computed from static inputs, scaled weights
    _lift_constants(model)  # what was folded
    drop_identities(model)
    full_axes(model)
    share_constants(model)
    tie(model)  # a table is stored once
    normal_gemm(model)
    fold_affine(model)  # BatchNorm and its kin into the operator before them
    common.RemoveUnusedNodesPass()(model)
    drop_unread(model)
    name_nodes(model)  # what was inlined or folded
    common.TopologicalSortPass()(model)
    complete_types(model)
    return model


@contextmanager
def _hidden(model: ir.Model, op_types: Collection[str]) -> Iterator[None]:
    """While it lasts, no pass knows the operators, nor takes two for the same."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type in op_types]
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
    """While it lasts, no two inputs have a dimension of one name.

    A name stands for one size, but exporters write N on inputs that differ in fact.
    """
    shapes = {value: value.shape for value in model.graph.inputs if value.shape is not None}
    for number, (value, shape) in enumerate(shapes.items()):
        value.shape = ir.Shape(
            [d if isinstance(d, int) or d.value is None else f"{d.value}@{number}" for d in shape]
        )
    yield
    for value, shape in shapes.items():
        value.shape = shape


def _lift_constants(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
