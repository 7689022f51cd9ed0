"""The terminal's words: the plan for --dry-run, and the summary a person wants after a conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from converter.plan import NodePlan, QuantPlan

if TYPE_CHECKING:
    from converter.pipeline import Outcome

WORST = 5


def plan_lines(plan: QuantPlan) -> Iterator[str]:
    """Every node and every tensor with its bits and the reason."""
    yield from _columns(
        ("node", "operator", "becomes", "why"),
        ((n.name, n.op_type, _becomes(n), n.reason) for n in plan.nodes.values()),
    )
    yield ""
    yield from _columns(("tensor", "bits", "why"), _tensor_rows(plan))


def summary_lines(outcome: Outcome, output: Path) -> Iterator[str]:
    """What was quantized, what was left and why, sizes, and where it hurts most."""
    counted = [node for node in outcome.plan.nodes.values() if not node.inside]
    quantized = Counter(node.op_type for node in counted if node.quantized)
    yield f"Quantized {sum(quantized.values())} of {len(counted)} nodes: {_counts(quantized)}."
    for reason, nodes in _by_reason(node for node in counted if not node.quantized).items():
        yield f"Left float, {reason}: {_names(nodes)}."
    before, after = outcome.size_before, outcome.size_after
    yield f"Size {_megabytes(before)} -> {_megabytes(after)} ({after / before:.0%} of the float model)."
    if outcome.errors:
        yield "Tensors that changed most (cosine similarity, signal to quantization noise):"
        rows = ((f"  {e.name}", f"{e.cosine:.5f}", f"{e.sqnr_db:.1f} dB") for e in outcome.errors[:WORST])
        yield from _columns((), rows)
    yield f"Written to {output}"


def _becomes(node: NodePlan) -> str:
    return "integer" if node.quantized else "inside" if node.inside else "float"


def _tensor_rows(plan: QuantPlan) -> Iterator[tuple[str, str, str]]:
    for tensor in plan.tensors.values():
        shared = "" if tensor.group == tensor.name else f", shares the range of {tensor.group}"
        yield tensor.name, str(tensor.format), tensor.reason + shared
    for unit in plan.units():
        for weight in unit.weights:
            granularity = "one scale" if weight.axis is None else f"a scale a channel of axis {weight.axis}"
            yield weight.name, str(weight.format), f"weight of {unit.name}, {granularity}"
        if unit.bias:
            yield unit.bias, "int32", f"bias of {unit.name}"


def _by_reason(nodes: Iterable[NodePlan]) -> dict[str, list[NodePlan]]:
    groups: dict[str, list[NodePlan]] = {}
    for node in nodes:
        groups.setdefault(node.reason, []).append(node)
    return groups


def _names(nodes: list[NodePlan]) -> str:
    shown = [f"{node.name} ({node.op_type})" for node in nodes[:3]]
    return ", ".join(shown) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")


def _counts(types: Counter[str]) -> str:
    return ", ".join(f"{count} {op_type}" for op_type, count in types.most_common()) or "none"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _columns(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Left-aligned columns, the last one free."""
    table = [*([header] if header else []), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)] if table else []
    for row in table:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
