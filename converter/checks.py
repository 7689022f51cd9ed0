"""The last look at a finished graph: what its target's runtime, or kernels elsewhere, would not
compute exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.algorithms.matrices import view_of
from converter.algorithms.rounding import breaks_bound
from converter.errors import ModelError
from converter.model import constant, operand
from converter.pairs import codes_behind, parameters
from converter.plan import QuantPlan
from converter.targets import Target

# Two codes of one sign may sum up to this: 128 * 255 fits into 16 bits.
PAIR_LIMIT = 128
# Products that kernels compute in pairs: input and weight among the operands, and the operator they
# stand for.
PRODUCTS = {
    **{name: (0, 1, name) for name in ("Conv", "MatMul", "Gemm")},
    **{"QLinearConv": (0, 3, "Conv"), "QLinearMatMul": (0, 3, "MatMul"), "QGemm": (0, 3, "Gemm")},
    **dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat"), (0, 1, "MatMul")),
}


def check(model: ir.Model, plan: QuantPlan, target: Target) -> None:
    """Raises ModelError, naming the tensor or node, where the target would compute wrongly or
    refuse.
    """
    for violation in (*_pairs(model, plan), *_parameters(model, target)):
        msg = f"The converted model does not suit target {target.name}: {violation}."
        raise ModelError(msg)


def _pairs(model: ir.Model, plan: QuantPlan) -> Iterator[str]:
    """Weights whose products a kernel that adds in 16 bits would not add exactly."""
    nodes = {node.name: node for node in model.graph}
    for unit in plan.units():
        if unit.weight is None or unit.weight.pair_limit is None:
            continue
        codes = plan.weights[unit.name].codes
        view = view_of(nodes[unit.name], codes.shape, unit.weight.index)
        if breaks_bound(
            view.matrix(codes) if view else codes.reshape(1, 1, -1), unit.weight.pair_limit
        ).any():
            yield f"two weights of {unit.name} can overflow together"


def _parameters(model: ir.Model, target: Target) -> Iterator[str]:
    allowed = {
        target.activation.dtype,
        target.weight.dtype,
        *([np.dtype(np.int32)] if target.integer_bias else []),
    }
    for node in model.graph:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        codes, scale, zero_point = (operand(node, index) for index in range(3))
        dtype = (
            zero_point.dtype
            if zero_point is not None
            else codes.dtype
            if codes is not None
            else None
        )
        if dtype is not None and dtype not in allowed:
            yield f"{node.name} uses the type {dtype}"
        if target.symmetric and zero_point is not None and zero_point.any():
            yield f"{node.name} has a zero point that is not 0"
        if scale is None or not np.all(np.isfinite(scale) & (scale > 0)):
            yield f"{node.name} has a scale that is not a positive number"


def saturating(model: ir.Model) -> Iterator[str]:
    """Nodes whose weights let kernels that add products in 16 bits, those of x86 without VNNI,
    saturate.
    """
    kinds = {codes: found for node in model.graph for codes, found in parameters(node)}

    def integers(value: ir.Value | None) -> tuple[ir.Value | None, ir.DataType | None]:
        codes = codes_behind(value) or value
        zero_point = kinds[codes][1] if codes in kinds else None
        return codes, (
            zero_point.dtype
            if zero_point is not None
            else codes.dtype
            if codes is not None
            else None
        )

    for node in model.graph:
        first, second, op_type = PRODUCTS.get(node.op_type, (0, 0, ""))
        data, kind = (
            integers(node.inputs[first]) if op_type else (None, None)
        )  # a Constant has no inputs
        if kind == ir.DataType.UINT8:
            # Fewer codes of the data, which a Clip bounds, leave those of the weights more room.
            clip = data.producer() if data is not None else None
            high = constant(clip.inputs[2]) if clip is not None and clip.op_type == "Clip" else None
            limit = PAIR_LIMIT if high is None else PAIR_LIMIT * 255 // int(high)
            codes, kind = integers(node.inputs[second])
            array = constant(codes)
            if (
                kind == ir.DataType.INT8
                and array is not None
                and _may_saturate(node, op_type, array, limit)
            ):
                yield node.name or ""


def _may_saturate(node: ir.Node, op_type: str, codes: Array, limit: int) -> bool:
    if (
        op_type == "Conv"
        and codes.shape[1] == 1
        and codes.shape[0] == node.attributes.get_int("group", 1)
    ):
        return False  # depthwise kernels add in 32 bits
    view = view_of(ir.Node("", op_type, [], list(node.attributes.values())), codes.shape, 1)
    return view is not None and bool(breaks_bound(view.matrix(codes), limit).any())
