"""The terminal's words: the plan for --dry-run, and the summary a person wants after a conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from converter.findings import Findings, Verification
from converter.plan import NodePlan, QuantPlan

if TYPE_CHECKING:
    from converter.pipeline import Outcome

WORST = 5
# Kinds of operators that the summary names.
SHOWN = 4


def plan_lines(plan: QuantPlan) -> Iterator[str]:
    """Every node and every tensor with its bits and the reason."""
    yield from columns(
        ("node", "operator", "becomes", "why"),
        ((n.name, n.op_type, _becomes(n), n.reason) for n in plan.nodes.values()),
    )
    yield ""
    yield from columns(("tensor", "bits", "why"), _tensor_rows(plan))


def summary_lines(outcome: Outcome, output: Path) -> Iterator[str]:
    """What was quantized, what was left and why, sizes, and where it hurts most."""
    counted = [node for node in outcome.plan.nodes.values() if not node.inside]
    quantized = Counter(node.op_type for node in counted if node.quantized)
    yield f"Quantized {sum(quantized.values())} of {len(counted)} nodes: {_counts(quantized)}."
    for reason, nodes in _by_reason(node for node in counted if not node.quantized).items():
        yield f"Left float, {reason}: {_names(nodes)}."
    yield _size_line(outcome.size_before, outcome.size_after)
    if outcome.errors:
        yield "Tensors that changed most (cosine similarity, signal to quantization noise):"
        rows = ((f"  {e.name}", f"{e.cosine:.5f}", f"{e.sqnr_db:.1f} dB") for e in outcome.errors[:WORST])
        yield from columns((), rows)
    yield from verification_lines(outcome.verification) if outcome.verification else ()
    yield f"Written to {output}"


def verification_lines(found: Verification) -> Iterator[str]:
    """What running both models told."""
    worst = min(found.outputs, key=lambda error: error.cosine, default=None)
    parts = [f"cosine {worst.cosine:.5f}, {worst.sqnr_db:.1f} dB"] if worst else []
    parts += [] if found.agreement is None else [f"same answer on {found.agreement:.1%}"]
    parts += [] if found.top1 is None else [f"right answers {found.top1[0]:.1%} -> {found.top1[1]:.1%}"]
    yield f"Verified on {found.where}: {', '.join(parts)}."
    if found.speedup is not None:
        yield f"Speed {found.speedup:.2f} times the float model's, in ONNX Runtime on one thread of this machine."
    if found.kernels:
        common = Counter(found.kernels).most_common()
        more = f" and {len(common) - SHOWN} other kinds" if len(common) > SHOWN else ""
        yield f"ONNX Runtime executes {_counts(Counter(dict(common[:SHOWN])))}{more}."


def comparison_lines(found: Findings) -> Iterator[str]:
    """Size, verification, the nodes that cost most, and advice."""
    yield _size_line(*found.sizes)
    yield from verification_lines(found.verification) if found.verification else ()
    costly = sorted((node for node in found.nodes if node.share), key=lambda node: -(node.share or 0))
    changed = [(node, node.own) for node in found.nodes if node.own]
    if costly:
        yield "Nodes that cost the outputs most, each by itself (share of the error, bits):"
        yield from columns((), ((f"  {n.name}", f"{n.share:.1%}", f"{n.bits} bits") for n in costly[:WORST]))
    elif changed:
        yield "Nodes that changed most (signal to quantization noise, bits):"
        worst = sorted(changed, key=lambda pair: pair[1].sqnr_db)[:WORST]
        yield from columns((), ((f"  {n.name}", f"{own.sqnr_db:.1f} dB", f"{n.bits} bits") for n, own in worst))
    yield from (f"- {sentence}" for sentence in found.advice)


def _size_line(before: int, after: int) -> str:
    return f"Size {_megabytes(before)} -> {_megabytes(after)} ({after / before:.0%} of the float model)."


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


def columns(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Left-aligned columns, the last one free."""
    table = [*([header] if header else []), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)] if table else []
    for row in table:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
