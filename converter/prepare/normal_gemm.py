"""One form for a matrix product with bias: Gemm(x, W, b) with alpha = beta = 1 and one bias a column.

1. MatMul of a matrix x and a constant matrix W, followed by Add of one constant a column, becomes a Gemm under the
   MatMul's name: integer kernels know the product with its bias only in that form.
2. alpha and beta of a Gemm with constant operands are multiplied into them, and a bias that broadcasts along the
   columns is written out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converter.model import Names, bias_add, constant, replace_constant


class NormalGemmPass(ir.passes.InPlacePass):
    """Shell around the two rewrites, over the nodes of every graph of the model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites in place."""
        names = Names(model)
        nodes = [node for graph in model.graphs() for node in graph if not node.domain]
        joined = [_join(node) for node in nodes if node.op_type == "MatMul"]
        nodes = [node for graph in model.graphs() for node in graph if not node.domain]
        scaled = [_scale(node, names) for node in nodes if node.op_type == "Gemm"]
        return ir.passes.PassResult(model, any(joined) or any(scaled))


def _join(matmul: ir.Node) -> bool:
    add, x, graph = bias_add(matmul), matmul.inputs[0], matmul.graph
    if (
        graph is None
        or add is None
        or x is None
        or x.dtype != ir.DataType.FLOAT
        or x.shape is None
        or x.shape.rank() != 2
    ):
        return False
    bias = next(value for value in add.inputs if value is not matmul.outputs[0])
    gemm = ir.node("Gemm", [*matmul.inputs, bias], name=matmul.name, outputs=[ir.Value()])
    ir.convenience.replace_nodes_and_values(graph, add, [matmul, add], [gemm], add.outputs, gemm.outputs)
    return True


def _scale(gemm: ir.Node, names: Names) -> bool:
    weight, bias = constant(gemm.inputs[1]), constant(gemm.inputs[2]) if len(gemm.inputs) > 2 else None
    if weight is None or (bias is None and len(gemm.inputs) > 2 and gemm.inputs[2] is not None):
        return False
    if bias is not None and bias.ndim == 2 and bias.shape[0] > 1:
        return False
    alpha, beta = (gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    columns = weight.shape[0 if gemm.attributes.get_int("transB", 0) else 1]
    if alpha != 1.0:
        replace_constant(gemm, 1, (weight * np.float64(alpha)).astype(weight.dtype), names)
    if widened := bias is not None and (beta != 1.0 or bias.shape != (columns,)):
        scaled = np.broadcast_to(bias.reshape(-1) * np.float64(beta), (columns,))
        replace_constant(gemm, 2, scaled.astype(weight.dtype), names)
    gemm.attributes.pop("alpha", None)
    gemm.attributes.pop("beta", None)
    return alpha != 1.0 or widened
