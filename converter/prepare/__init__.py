"""Graph passes that turn any exporter's float model into one normal form; the graph is read-only
afterwards.
"""

from __future__ import annotations

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
from converter.prepare.widen import widen

MAKERS_OF_MAPS = {"ZipMap", "CastMap"}


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
    widen(model)
    _infer_shapes(model)  # helps what follows, never required
    share_shapes(model)
    common.DeduplicateInitializersPass(size_limit=1)(
        model
    )  # indices and axes, so that the next pass finds more
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
    return model


def _infer_shapes(model: ir.Model) -> None:
    """Types and shapes as ONNX infers them, but for what makes maps, which onnx_ir cannot hold."""
    hidden = [node for node in model.graph.all_nodes() if node.op_type in MAKERS_OF_MAPS]
    domains = [node.domain for node in hidden]
    for node in hidden:
        node.domain = "hidden"
    common.ShapeInferencePass()(model)
    for node, domain in zip(hidden, domains, strict=True):
        node.domain = domain


def _lift_constants(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
