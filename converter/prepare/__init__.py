"""Graph passes that turn any exporter's float model into one normal form; the graph is read-only afterwards."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from converter.prepare.drop_identities import DropIdentitiesPass
from converter.prepare.fold_affine import FoldAffinePass
from converter.prepare.fold_constants import fold_constants_pass
from converter.prepare.names import NameNodesPass
from converter.prepare.normal_gemm import NormalGemmPass


def passes() -> list[ir.passes.PassBase]:
    """The passes, in order."""
    lift_constants = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    return [
        NameNodesPass(),  # first: later passes and the user's config refer to nodes by name
        common.InlinePass(),  # functions become plain nodes
        common.RemoveInitializersFromInputsPass(),  # old exporters list weights as inputs
        lift_constants,  # one kind of constant
        common.ShapeInferencePass(),  # helps constant folding, never required
        fold_constants_pass(),  # shapes computed from static inputs, scaled weights
        lift_constants,  # what was folded
        DropIdentitiesPass(),
        NormalGemmPass(),
        FoldAffinePass(),  # BatchNorm and its kin into the operator before them
        common.RemoveUnusedNodesPass(),
        NameNodesPass(),  # what was inlined or folded
        common.TopologicalSortPass(),
    ]


def prepare(model: ir.Model) -> ir.Model:
    """Runs all passes over `model` in place and returns it; it computes the same function."""
    return ir.passes.Sequential(*passes())(model).model
