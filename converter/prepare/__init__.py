"""Graph passes that turn any exporter's float model into one normal form; the graph is read-only afterwards."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from converter.prepare.drop_identities import DropIdentitiesPass
from converter.prepare.fold_affine import FoldAffinePass
from converter.prepare.fold_constants import DropUnreadPass, fold_constants_pass
from converter.prepare.names import NameNodesPass
from converter.prepare.normal_gemm import NormalGemmPass
from converter.prepare.share_constants import ShareConstantsPass
from converter.prepare.share_shapes import ShareShapesPass
from converter.prepare.tie import TiePass


def plain_passes() -> list[ir.passes.PassBase]:
    """Those after which every node has a name and every constant is an initializer; what is computed stays."""
    return [
        NameNodesPass(),  # first: later passes and the user's config refer to nodes by name
        common.InlinePass(),  # functions become plain nodes
        common.RemoveInitializersFromInputsPass(),  # old exporters list weights as inputs
        _lift_constants(),  # one kind of constant
    ]


def passes() -> list[ir.passes.PassBase]:
    """All passes, in order."""
    return [
        *plain_passes(),
        common.ShapeInferencePass(),  # helps what follows, never required
        ShareShapesPass(),
        common.DeduplicateInitializersPass(size_limit=1),  # indices and axes, so that the next pass finds more
        common.CommonSubexpressionEliminationPass(),
        fold_constants_pass(),  # shapes computed from static inputs, scaled weights
        _lift_constants(),  # what was folded
        DropIdentitiesPass(),
        ShareConstantsPass(),
        TiePass(),  # a table is stored once
        NormalGemmPass(),
        FoldAffinePass(),  # BatchNorm and its kin into the operator before them
        common.RemoveUnusedNodesPass(),
        DropUnreadPass(),
        NameNodesPass(),  # what was inlined or folded
        common.TopologicalSortPass(),
    ]


def _lift_constants() -> ir.passes.PassBase:
    return common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)


def prepare(model: ir.Model) -> ir.Model:
    """Runs all passes over `model` in place and returns it; it computes the same function."""
    return ir.passes.Sequential(*passes())(model).model
