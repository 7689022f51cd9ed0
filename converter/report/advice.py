"""What to do next, in words: for one node, and for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from converter.config import Config
from converter.config.left import against_saturation, left
from converter.measure.pairing import Place
from converter.measure.results import NodeFinding, Verification
from converter.plan.ops import rule
from converter.report.rounds import Figures

# How many times as large as others some inputs that share the codes of one range may be.
MIXED_RANGES = 4.0
# Shares of values cut off, of the range cut off, and of the outputs' error that deserve a word, as
# do a node's own noise and its noise at the outputs, in dB.
CLIPPED, SHORTENED, COSTLY, NOISY_DB, HEARD_DB = 0.01, 0.02, 0.1, 15.0, 40.0
# Settings that advice names where they would change something, and the most bits of a weight.
WIDEST = ("full_quant_param.activation_quant_method", "MAX_MIN")
ANY_METHOD = ("full_quant_param.activation_quant_method", None)
MOST_BITS = 16


def advice_for(
    node: NodeFinding,
    tensors: Sequence[tuple[Place, Figures]],
    saturates: bool,
    settings: Config,
) -> str:
    """What could make a quantized node better; empty if nothing needs to."""
    return " ".join(_advice(node, tensors, saturates, settings)) if node.quantized else ""


def _advice(
    node: NodeFinding,
    tensors: Sequence[tuple[Place, Figures]],
    saturates: bool,
    settings: Config,
) -> Iterator[str]:
    if saturates:
        yield "Its products can saturate in 16 bits: see the advice on the whole."
    ratio = _ratio([figures for place, figures in tensors if not place.output])
    if rule(node.op_type).merges and ratio > MIXED_RANGES:
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
        wider = "activation_quant_method = MAX_MIN or " if left(settings, *WIDEST) else ""
        yield f"{clip:.1%} of {name} is cut off: try {wider}skip_quant_node."
    more_bits = ["give it more bits (bit_num)"] if _may_have_more_bits(node, settings) else []
    if _is_costly(node):
        ways = ["leave it float (skip_quant_node)", *more_bits]
        yield f"It alone makes {node.share:.0%} of the error: {' or '.join(ways)}."
    elif node.own is not None and node.own.sqnr_db < NOISY_DB:
        method = ["try another activation_quant_method"] if left(settings, *ANY_METHOD) else []
        ways = [
            *(method if ranged else more_bits),
            "leave it float with skip_quant_node",
        ]
        yield f"Its output is noisy ({node.own.sqnr_db:.1f} dB): {', or '.join(ways)}."


def _may_have_more_bits(node: NodeFinding, settings: Config) -> bool:
    """Whether there is a key that gives a node more bits: only stored weights may have any."""
    stored = settings.mode in (None, "WEIGHT_QUANT")
    return stored and (node.bits is None or node.bits < MOST_BITS)


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


def overall_advice(
    nodes: Sequence[NodeFinding], verification: Verification | None, settings: Config
) -> Iterator[str]:
    """Sentences on the whole, the gravest first."""
    if verification and verification.saturated:
        yield (
            f"Saturation: the weights of {listed(verification.saturated)} let kernels that add two "
            "products in 16 bits, those of x86 processors without VNNI, cut sums off; "
            f"{against_saturation(settings)}."
        )
    if mixed := [node.name for node in nodes if "mixed ranges" in node.advice]:
        yield (
            f"Mixed ranges: the inputs of {listed(mixed)} differ much, small ones get few codes; "
            "try skip_quant_node."
        )
    if cut := [node.name for node in nodes if "cut off" in node.advice]:
        wider = "a wider range (activation_quant_method = MAX_MIN)"
        way = wider if left(settings, *WIDEST) else "leaving them float (skip_quant_node)"
        yield f"Much is cut off at {listed(cut)}: {way} may be better."
    costly = sorted(filter(_is_costly, nodes), key=lambda n: -(n.share or 0))
    if costly:
        names = listed([node.name for node in costly])
        yield f"Most of the outputs' error comes from {names}: {_floats(settings)}."
    if verification and verification.speed and verification.speed.high < 1:
        other = "; WEIGHT_QUANT may do" if settings.mode != "WEIGHT_QUANT" else ""
        yield (
            "It is not faster here than the float model: few operators have integer kernels"
            f"{other}."
        )


def _floats(settings: Config) -> str:
    """The keys that leave nodes float."""
    if not left(settings, "full_quant_param.max_drop", 0.0):
        return "skip_quant_node"
    return f"skip_quant_node, or {'a smaller ' if settings.full_quant.max_drop else ''}max_drop"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
