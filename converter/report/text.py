"""The terminal's words: the plan for --dry-run, and the summary a person wants after a
conversion.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converter.measure.errors import TensorError
from converter.measure.results import Findings, Verification
from converter.plan.payoff import stays_float
from converter.plan.plan import NodePlan, QuantPlan
from converter.report.advice import listed

if TYPE_CHECKING:
    from converter.measure.results import Outcome

WORST = 5
RANDOM = "Random samples mislead, often by 10 dB and more: give calibrate_path to see what is lost."
DISTILLED = "No real data was seen: on real samples more may be lost than on these."
# Longer names lose their middle where a person reads them; reports and --json have them whole.
LONGEST = 72
# Kinds of operators, and nodes left float for one reason, that the summary names.
SHOWN, NAMED = 4, 3


def plan_lines(plan: QuantPlan, width: int | None = None) -> Iterator[str]:
    """Every node and every tensor with its bits and the reason, in lines of at most `width`
    characters; None for any.
    """
    nodes = ((node.name, node.op_type, _becomes(node), node.reason) for node in plan.nodes.values())
    yield from fitted([("node", "operator", "becomes", "why"), *nodes], width)
    yield ""
    yield from fitted([("tensor", "bits", "why"), *_tensor_rows(plan)], width)


def summary_lines(outcome: Outcome, output: Path) -> Iterator[str]:
    """What was quantized, what was left and why, sizes, and where it hurts most."""
    counted = outcome.plan.outside
    quantized = Counter(node.op_type for node in counted if not stays_float(node))
    yield f"Quantized {sum(quantized.values())} of {len(counted)} nodes: {_counts(quantized)}."
    left = list(filter(stays_float, counted))
    for reason in dict.fromkeys(node.reason for node in left):
        names = [f"{node.name} ({node.op_type})" for node in left if node.reason == reason]
        yield f"Left float, {reason}: {listed(names, NAMED)}."
    yield _size_line(outcome.size_before, outcome.size_after)
    if outcome.errors:
        yield "Tensors that changed most (cosine similarity, signal to quantization noise):"
        yield from columns(
            (f"  {short(e.name)}", f"{e.cosine:.5f}", f"{e.sqnr_db:.1f} dB")
            for e in outcome.errors[:WORST]
        )
    yield from verification_lines(outcome.verification) if outcome.verification else ()
    yield f"Written to {output}"


def verification_lines(verification: Verification) -> Iterator[str]:
    """What running both models told."""
    parts = _closeness(verification.worst, verification.agreement)
    if verification.agreement is not None:
        low, high = verification.agreement_interval
        parts[-1] += f" (95%: {low:.1%} to {high:.1%})"
    if verification.top1 and verification.drop:
        before, after = verification.top1
        least, most = verification.drop
        lost = f"loss, 95%: {least:+.1%} to {most:+.1%}"
        parts.append(f"right answers {before:.1%} -> {after:.1%} ({lost})")
    yield f"Verified on {verification.where}: {', '.join(parts) or 'no output can be compared'}."
    if verification.random:
        yield RANDOM
    if verification.distilled:
        yield DISTILLED
    if left_out := "; ".join(verification.left_out):
        yield f"Not compared: {left_out}."
    if verification.here:
        yield (
            "On this processor, whose kernels lose bits, the file gives other answers: "
            f"{', '.join(_closeness(verification.here.worst, verification.here.agreement))}."
        )
    if speed := verification.speed:
        sure = "" if speed.sure else "; the machine is too busy to tell"
        yield (
            f"Speed {speed.ratio:.2f} times the float file's (95%: {speed.low:.2f} to "
            f"{speed.high:.2f}{sure}), in ONNX Runtime on one thread of this machine."
        )
    if verification.kernels:
        common = Counter(verification.kernels).most_common()
        more = f" and {len(common) - SHOWN} other kinds" if len(common) > SHOWN else ""
        yield f"ONNX Runtime executes {_counts(Counter(dict(common[:SHOWN])))}{more}."


def _closeness(worst: TensorError | None, agreement: float | None) -> list[str]:
    """How much is as in the float model."""
    parts = [_of_output(worst)] if worst else []
    return parts + ([] if agreement is None else [f"same answer on {agreement:.1%}"])


def _of_output(error: TensorError) -> str:
    """How much of an output, or of which slice, and of its few answers is as in the float model."""
    few, whole = error.few, f"cosine {error.cosine:.5f}, {error.sqnr_db:.1f} dB"
    where = f" ({error.title})" if error.where else ""
    peaks = f", peaks {few.sqnr_db:.1f} dB" if few else ""
    return whole + where + peaks


def comparison_lines(findings: Findings) -> Iterator[str]:
    """Size, verification, the nodes that cost most, and advice."""
    yield _size_line(*findings.sizes)
    yield from verification_lines(findings.verification) if findings.verification else ()
    costly = [node for node in findings.ranked if node.share]
    changed = [(node, node.own) for node in findings.nodes if node.own]
    if costly:
        yield "Nodes that cost the outputs most, each by itself (share of the error, bits):"
        yield from columns(
            (f"  {short(n.name)}", f"{n.share:.1%}", f"{n.bits} bits") for n in costly[:WORST]
        )
    elif changed:
        yield "Nodes that changed most (signal to quantization noise, bits):"
        worst = sorted(changed, key=lambda pair: pair[1].sqnr_db)[:WORST]
        yield from columns(
            (f"  {short(n.name)}", f"{own.sqnr_db:.1f} dB", f"{n.bits} bits") for n, own in worst
        )
    yield from (f"- {sentence}" for sentence in findings.advice)


def short(name: str, most: int = LONGEST) -> str:
    """At most `most` characters of `name`, without its middle."""
    head = most * 2 // 7
    return name if len(name) <= most else f"{name[:head]}…{name[head + 1 - most :]}"


def _size_line(before: int, after: int) -> str:
    return (
        f"Size {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.0%} of the float "
        "model)."
    )


def _becomes(node: NodePlan) -> str:
    return "integer" if node.quantized else "inside" if node.inside else "float"


def _tensor_rows(plan: QuantPlan) -> Iterator[tuple[str, str, str]]:
    for tensor in plan.tensors.values():
        shared = "" if tensor.group == tensor.name else f", shares the range of {tensor.group}"
        yield tensor.name, str(tensor.format), tensor.reason + shared
    for tensor in plan.converted.values():
        yield tensor.name, str(tensor.format), f"converted, as {tensor.reason}"
    for unit in plan.units():
        for weight in unit.weights:
            granularity = (
                "one scale" if weight.axis is None else f"a scale a channel of axis {weight.axis}"
            )
            yield (
                weight.name,
                str(weight.format),
                f"weight of {unit.name}, {granularity}",
            )
        if unit.bias:
            yield unit.bias, "int32", f"bias of {unit.name}"


def _counts(types: Counter[str]) -> str:
    return ", ".join(f"{count} {op_type}" for op_type, count in types.most_common()) or "none"


def fitted(table: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """The rows as `columns` has them; in a narrow terminal names lose their middle, and reasons go
    on below.
    """
    if width is None:
        yield from columns(table)
        return
    middle = sum(2 + max(map(len, column)) for column in list(zip(*table, strict=True))[1:-1])
    first = max(8, (width - middle) * 2 // 5)
    last = max(8, width - middle - first - 2)
    rows = list[Sequence[str]]()
    for name, *cells, reason in table:
        parts = textwrap.wrap(reason, last) or [""]
        rows.append((short(name, first), *cells, parts[0]))
        rows += [("", *[""] * len(cells), part) for part in parts[1:]]
    yield from columns(rows)


def columns(table: Iterable[Sequence[str]]) -> Iterator[str]:
    """The rows with their cells one below the other."""
    rows = list(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()
