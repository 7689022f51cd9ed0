"""What a conversion decided, as sections of a configuration and, whole, for programs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from converter.config.keys import SECTIONS
from converter.job import Job
from converter.plan.plan import NodePlan, QuantPlan
from converter.plan.recipes import recipe_text
from converter.plan.result import Quantized
from converter.version import __version__

HEADER = """\
# What a conversion decided by itself. Put these sections behind the others of its configuration, as
# they are or changed: the next conversion decides nothing that stands here. Later sections win.

"""


# The section of every key, and a line that a sentence names: at its end, in brackets or before
# another; its section where that is another one.
OWNERS = {key: name for name, section in SECTIONS.items() for key in section.keys}
_KEYS = "|".join(OWNERS)
LINE = re.compile(
    rf"\b(?P<key>{_KEYS}) = (?P<value>.+?)(?: in a section (?P<section>\[.+?\]))?"
    rf"(?=,? or (?:{_KEYS}) = |,? or leav|\) may be|\.?$)"
)


def write_recipe(path: Path, result: Quantized) -> None:
    """Writes the sections to `path` and the plan beside it, with the suffix .json."""
    path.write_text(HEADER + "\n".join(recipe_text(result.decided)), encoding="utf-8")
    plan = plan_as_json(result.plan, result.decided)
    path.with_suffix(".json").write_text(
        json.dumps(plan, indent=1),
        encoding="utf-8",
    )


def how_made(job: Job, result: Quantized) -> str:
    """The command, the configuration's file and what the conversion decided, to do it again."""
    command = ["qconvert", f"--modelFile={job.model.name}", f"--configFile={job.config.path.name}"]
    if job.fp16:
        command.append("--fp16=on")
    lines = [f"# {shlex.join(command)}", ""]
    if job.config.path.is_file():
        text = job.config.path.read_text(encoding="utf-8-sig", errors="replace")
        lines += [text.strip(), ""]
    if result.decided:
        lines += [*HEADER.splitlines(), *recipe_text(result.decided)]
    return "\n".join(lines).strip() + "\n"


def lines_in(advice: Iterable[str]) -> list[str]:
    """The lines of a configuration that advice names, each below its section, to be pasted."""
    found = (match for sentence in advice for match in LINE.finditer(sentence))
    lines = [
        (match["section"] or f"[{OWNERS[match['key']]}]", match["key"], match["value"].strip())
        for match in found
    ]
    return [f"{section}\n{key} = {value}" for section, key, value in dict.fromkeys(lines)]


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
