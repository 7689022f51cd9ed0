"""What is in a model and what each mode would make of it, found without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from converter.config import Config, DataPreprocessParam
from converter.config.keys import QUANT_TYPES, QuantType, default_config
from converter.graph import files as models
from converter.graph.edit import constant, initializers_of, nodes_of, operand
from converter.graph.qdq import codes_behind, is_conversion
from converter.job import Job, Watch
from converter.modes import MODES
from converter.pipeline.convert import read
from converter.plan.plan import NodePlan, QuantPlan
from converter.prepare.opset import opset_of

Row = dict[str, Any]


def inspect(path: Path) -> dict[str, int | str | list[Row]]:
    """A document fit for JSON: figures, and tables as lists of rows with equal keys; raises
    ModelError.

    Layers are those of the normal form that a conversion works on, with BatchNorm folded and
    constants computed.
    """
    model = models.load(path)
    job = Job(path, path.with_suffix(".quantized"), _defaults("WEIGHT_QUANT"))
    prepared = read(job, Watch())
    plans: dict[str, QuantPlan] = {
        mode: MODES[mode].make_plan(prepared, replace(job, config=_defaults(mode)))
        for mode in QUANT_TYPES
    }
    nodes = nodes_of(model)
    return {
        "model": str(path),
        "bytes": models.file_bytes(path),
        "opset": opset_of(model),
        "inputs": [_tensor(value) for value in model.graph.inputs if not value.is_initializer()],
        "outputs": [_tensor(value) for value in model.graph.outputs],
        "operators": [
            {"operator": name, "count": n}
            for name, n in Counter(n.op_type for n in nodes).most_common()
        ],
        "layers": _layers(prepared.model, plans),
        "modes": [_mode(name, plan) for name, plan in plans.items()],
        "left_float": [row for name, plan in plans.items() for row in _left(name, plan)],
        "integer_weights": _integer_weights(model),
        "quantization_parameters": list(_parameters(nodes).values()),
    }


def _defaults(mode: QuantType) -> Config:
    """The default settings, and data as if there were some."""
    return replace(
        default_config(mode),
        preprocess=DataPreprocessParam((("", Path()),)),
    )


def _tensor(value: ir.Value) -> Row:
    dtype = str(value.dtype.numpy()) if value.dtype else "?"
    shape = (
        None
        if value.shape is None
        else [d if isinstance(d, int) else d.value or "?" for d in value.shape]
    )
    return {"name": value.name, "type": dtype, "shape": shape}


def _layers(model: ir.Model, plans: Mapping[str, QuantPlan]) -> list[Row]:
    """The nodes with constant matrices or vectors of floats."""
    rows = []
    for node in nodes_of(model):
        constants = (constant(codes_behind(value) or value) for value in node.inputs)
        if arrays := [
            x
            for x in constants
            if x is not None and x.size > 1 and (x.ndim > 1 or x.dtype.kind == "f")
        ]:
            largest = max(arrays, key=lambda array: array.nbytes)
            row = {
                "layer": node.name,
                "operator": node.op_type,
                "weights": list(largest.shape),
                "bytes": sum(array.nbytes for array in arrays),
            }
            own = {mode: plan.nodes.get(node.name or "") for mode, plan in plans.items()}
            rows.append({**row, **{mode: _becomes(unit) for mode, unit in own.items()}})
    return rows


def _becomes(node: NodePlan | None) -> str:
    """Weights that are only stored as integers belong to a node without outputs in the plan."""
    if node is None or not node.quantized:
        return "inside" if node and node.inside else "float"
    return "integer" if node.outputs else "stored"


def _mode(name: str, plan: QuantPlan) -> Row:
    kinds = Counter(map(_becomes, plan.outside))
    return {
        "mode": name,
        "nodes": len(plan.outside),
        **{kind: kinds[kind] for kind in ("integer", "stored", "float")},
    }


def _left(name: str, plan: QuantPlan) -> list[Row]:
    left = Counter(node.reason for node in plan.outside if not node.quantized)
    return [
        {"mode": name, "nodes": count, "reason": reason} for reason, count in left.most_common()
    ]


def _integer_weights(model: ir.Model) -> list[Row]:
    """Constant matrices of 8 bits or fewer."""
    values = (value for value in initializers_of(model) if len(value.shape or ()) > 1)
    return [_tensor(value) for value in values if value.dtype and value.dtype.bitwidth <= 8]


def _parameters(nodes: list[ir.Node]) -> dict[str | None, Row]:
    """Every tensor of integers that a node makes or reads as such, with the least and greatest of
    its scales.
    """
    rows = {}
    for node in (node for node in nodes if is_conversion(node)):
        scale, zero_point = operand(node, 1), operand(node, 2)
        value = codes_behind(node.outputs[0]) or node.outputs[0]
        scales = [] if scale is None else scale.ravel().tolist()
        rows[value.name] = {
            "tensor": value.name,
            "type": "uint8" if zero_point is None else str(zero_point.dtype),
            "scales": len(scales) or None,
            "least_scale": min(scales, default=None),
            "greatest_scale": max(scales, default=None),
        }
    return rows
