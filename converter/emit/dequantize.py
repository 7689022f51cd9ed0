"""Weights that stay integers in memory, behind a DequantizeLinear.

ONNX Runtime turns the one before a MatMul into MatMulNBits, which is faster than float for few
rows; elsewhere it is computed anew at every run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from calib.affine import Array, QParams
from converter.graph.edit import Names, add_constant, not_none
from converter.plan.plan import QuantizedWeight

# Bits up to which a type serves, the type, and the opset that DequantizeLinear takes it from.
TYPES = (
    (2, ir.DataType.UINT2, 25),
    (4, ir.DataType.UINT4, 21),
    (8, ir.DataType.UINT8, 13),
    (16, ir.DataType.UINT16, 21),
)
# Parameters a block came with the same opset as the 4-bit types.
BLOCK_OPSET = 21
NEWEST_OPSET = max(opset for _, _, opset in TYPES)


def type_for(bits: int, blocks: bool, newest: int) -> tuple[ir.DataType, int] | None:
    """The narrowest type for codes of so many bits, and the opset it needs, `newest` at most; None
    if there is no such type.
    """
    least = BLOCK_OPSET if blocks else 0
    fitting = ((kind, max(opset, least)) for wide, kind, opset in TYPES if bits <= wide)
    return next((pair for pair in fitting if pair[1] <= newest), None)


def type_of(weight: QuantizedWeight, newest: int = NEWEST_OPSET) -> tuple[ir.DataType, int]:
    """The type for the codes of `weight` and the opset it needs, where there is one."""
    q = weight.qparams
    return not_none(type_for(q.format.bits, q.scale.ndim > 1, newest))


class DequantizeWriter:
    """Writes weights with integer zero points into the graphs of one model."""

    def __init__(self, model: ir.Model, newest: int = NEWEST_OPSET) -> None:
        self.names, self.newest = Names(model), newest

    def __call__(self, graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Value:
        """The value of the weight `name` as floats, restored from its codes by a node at the start
        of `graph`.
        """
        q, (kind, _) = weight.qparams, type_of(weight, self.newest)
        arrays = (weight.codes, q.scale, q.zero_point.astype(weight.codes.dtype))
        inputs = [
            add_constant(
                graph,
                self.names.fresh(f"{name}_{what}"),
                array,
                None if what == "scale" else kind,
            )
            for what, array in zip(("codes", "scale", "zero"), arrays, strict=True)
        ]
        node = self.names.node(
            "DequantizeLinear", inputs, name, "restored", attributes=_attributes(weight.codes, q)
        )
        graph.insert_before(graph[0], node)
        return node.outputs[0]


def _attributes(codes: Array, q: QParams) -> dict[str, int]:
    if q.axis is None:
        return {}
    if q.scale.ndim == 1:
        return {"axis": q.axis}
    ratios = np.floor_divide(codes.shape, q.scale.shape)
    return {"axis": int(ratios.argmax()), "block_size": int(ratios.max())}
