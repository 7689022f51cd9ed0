"""What to do next, in words: for one node, and for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from converter.findings import NodeFinding, Verification
from converter.pairs import Place
from converter.report.rounds import Figures

# Operators whose inputs share the codes of one range, and how many times as large as others some
# may be.
MERGES, MIXED_RANGES = {"Add", "Sub", "Concat", "Max", "Min"}, 4.0
# Shares of values cut off, of the range cut off, and of the outputs' error that deserve a word, as
# do a node's own noise and its noise at the outputs, in dB.
CLIPPED, SHORTENED, COSTLY, NOISY_DB, HEARD_DB = 0.01, 0.02, 0.1, 15.0, 40.0


def advice_for(node: NodeFinding, tensors: Sequence[tuple[Place, Figures]], saturates: bool) -> str:
    """What could make a quantized node better; empty if nothing needs to."""
    return " ".join(_advice(node, tensors, saturates)) if node.quantized else ""


def _advice(
    node: NodeFinding, tensors: Sequence[tuple[Place, Figures]], saturates: bool
) -> Iterator[str]:
    if saturates:
        yield "Its products can saturate in 16 bits: see the advice on the whole."
    ratio = _ratio([figures for place, figures in tensors if not place.output])
    if node.op_type in MERGES and ratio > MIXED_RANGES:
        yield (
            f"Its inputs differ {ratio:.1f} times in size (mixed ranges): leave it float with "
            "skip_quant_node."
        )
    ranged = [
        (place.name, figures)
        for place, figures in tensors
        if place.qparams and place.weight is None
    ]
    clip, name = max(((f.clip, name) for name, f in ranged if _is_shortened(f)), default=(0.0, ""))
    if clip > CLIPPED and _is_heard(node):
        yield (
            f"{clip:.1%} of {name} is cut off: try activation_quant_method = MAX_MIN or "
            "skip_quant_node."
        )
    if _is_costly(node):
        yield (
            f"It alone makes {node.share:.0%} of the error: leave it float (skip_quant_node) or "
            "give it more bits."
        )
    elif node.own is not None and node.own.sqnr_db < NOISY_DB:
        more = "try another activation_quant_method" if ranged else "give it more bits (bit_num)"
        yield (
            f"Its output is noisy ({node.own.sqnr_db:.1f} dB): {more}, or leave it float with "
            "skip_quant_node."
        )


def _is_costly(node: NodeFinding) -> bool:
    return node.share is not None and node.share > COSTLY and _is_heard(node)


def _is_heard(node: NodeFinding) -> bool:
    error = node.output or node.own
    return error is None or error.sqnr_db < HEARD_DB


def _is_shortened(figures: Figures) -> bool:
    """Whether the quantized range is much shorter: the outermost half code is cut off
    everywhere.
    """
    dequant, span = figures.dequant, figures.origin[4] - figures.origin[0]
    return dequant is not None and span - (dequant[4] - dequant[0]) > SHORTENED * span


def _ratio(figures: Sequence[Figures]) -> float:
    """How many times as large as the smallest tensor the largest is, as root mean squares."""
    sizes = [math.hypot(f.origin[5], math.sqrt(f.origin[6])) for f in figures]
    sizes = [size for size in sizes if size > 0]
    return max(sizes) / min(sizes) if sizes else 1.0


def overall_advice(nodes: Sequence[NodeFinding], found: Verification | None) -> Iterator[str]:
    """Sentences on the whole, the gravest first."""
    if found and found.saturated:
        yield (
            f"Saturation: the weights of {listed(found.saturated)} let kernels that add two "
            "products in 16 bits, those of x86 processors without VNNI, cut sums off; convert with "
            "target_device = CPU and overflow_safe = true (in other tools: 7-bit weights, "
            "reduce_range)."
        )
    for word, sentence in (
        (
            "mixed ranges",
            (
                "Mixed ranges: the inputs of {} differ much, small ones get few codes; try "
                "skip_quant_node."
            ),
        ),
        (
            "cut off",
            (
                "Much is cut off at {}: a wider range (activation_quant_method = MAX_MIN) may be "
                "better."
            ),
        ),
    ):
        if named := [node.name for node in nodes if word in node.advice]:
            yield sentence.format(listed(named))
    costly = sorted(filter(_is_costly, nodes), key=lambda n: -(n.share or 0))
    if costly:
        yield (
            f"Most of the outputs' error comes from {listed([n.name for n in costly])}: "
            "skip_quant_node, or max_drop."
        )
    if found and found.speedup is not None and found.speedup < 1:
        yield (
            "It is not faster here than the float model: few operators have integer kernels; "
            "WEIGHT_QUANT may do."
        )


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
