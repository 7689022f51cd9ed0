"""What a conversion decided, as sections of a configuration and, whole, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from converter.plan.plan import NodePlan, QuantPlan
from converter.plan.recipes import recipe_text
from converter.plan.result import Quantized
from converter.version import __version__

HEADER = """\
# What a conversion decided by itself. Put these sections behind the others of its configuration, as
# they are or changed: the next conversion decides nothing that stands here. Later sections win.

"""


def write_recipe(path: Path, result: Quantized) -> None:
    """Writes the sections to `path` and the plan beside it, with the suffix .json."""
    path.write_text(HEADER + "\n".join(recipe_text(result.decided)), encoding="utf-8")
    plan = plan_as_json(result.plan, result.decided)
    path.with_suffix(".json").write_text(json.dumps(plan, indent=1), encoding="utf-8")


def plan_as_json(plan: QuantPlan, decided: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The plan as plain data: nodes and tensors in the order of the graph, and what was decided."""
    tensors = [
        {
            "name": tensor.name,
            "format": str(tensor.format),
            "group": tensor.group,
            "why": tensor.reason,
            **_parameters(plan, tensor.group),
        }
        for tensor in (*plan.tensors.values(), *plan.converted.values())
    ]
    nodes = [_node(node) for node in plan.nodes.values()]
    return {"version": __version__, "nodes": nodes, "tensors": tensors, "recipe": decided}


def _node(node: NodePlan) -> dict[str, object]:
    return {
        "name": node.name,
        "operator": node.op_type,
        "quantized": node.quantized,
        "inside": node.inside,
        "why": node.reason,
        "activations": None if node.activation is None else str(node.activation),
        "weights": [{"name": w.name, "format": str(w.format)} for w in node.weights],
    }


def _parameters(plan: QuantPlan, group: str) -> dict[str, float | int]:
    q = plan.qparams.get(group)
    return {} if q is None else {"scale": float(q.scale), "zero_point": int(q.zero_point)}
