"""One form for a matrix product with bias: Gemm(x, W, b) with alpha = beta = 1 and one bias a
column.

1. MatMul of a matrix x and a constant matrix W, followed by Add of one constant a column, becomes a
Gemm under the
   MatMul's name: integer kernels know the product with its bias only in that form.
2. alpha and beta of a Gemm with constant operands are multiplied into them, and a bias that
broadcasts along the
   columns is written out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converter.graph.edit import (
    Names,
    graph_of,
    input_at,
    nodes_of,
    not_none,
    operand,
    replace_constant,
)
from converter.plan.ops import bias_add, is_transposed


def normal_gemm(model: ir.Model) -> None:
    """Does both rewrites over the nodes of every graph, in place."""
    names = Names(model)
    for operator, rewrite in (("MatMul", _join), ("Gemm", _scale)):
        for node in nodes_of(model):
            if node.op_type == operator and not node.domain:
                rewrite(node, names)


def _join(matmul: ir.Node, names: Names) -> None:
    add, x = bias_add(matmul), not_none(matmul.inputs[0])
    if add is None or x.dtype != ir.DataType.FLOAT or x.shape is None or x.shape.rank() != 2:
        return
    bias = next(value for value in add.inputs if value is not matmul.outputs[0])
    gemm = ir.node(
        "Gemm",
        [*matmul.inputs, bias],
        name=matmul.name,
        outputs=[ir.Value()],
    )
    graph = graph_of(matmul)
    ir.convenience.replace_nodes_and_values(
        graph, add, [matmul, add], [gemm], add.outputs, gemm.outputs
    )


def _scale(gemm: ir.Node, names: Names) -> None:
    weight, bias = operand(gemm, 1), operand(gemm, 2)
    if weight is None or (bias is None and input_at(gemm, 2)):
        return
    if bias is not None and bias.ndim == 2 and bias.shape[0] > 1:
        return
    alpha, beta = (gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    columns = weight.shape[0 if is_transposed(gemm) else 1]
    if alpha != 1.0:
        replace_constant(
            gemm,
            1,
            (weight * np.float64(alpha)).astype(weight.dtype),
            names,
        )
    if bias is not None and (beta != 1.0 or bias.shape != (columns,)):
        scaled = np.broadcast_to(
            bias.reshape(-1) * np.float64(beta),
            (columns,),
        )
        replace_constant(gemm, 2, scaled.astype(weight.dtype), names)
    gemm.attributes.pop("alpha", None)
    gemm.attributes.pop("beta", None)
