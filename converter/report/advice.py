"""What to do next, in words: for one node, and for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from calib.sources import as_item
from converter.config import Config
from converter.config.left import against_saturation, left
from converter.measure.pairing import Place
from converter.measure.results import NodeFinding, Verification
from converter.plan.ops import rule
from converter.plan.recipes import written
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
# Nodes that a line names, and a loss that most can afford.
NAMED, MAX_DROP = 5, 0.01


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
            f"Its inputs differ {ratio:.1f} times in size (mixed ranges): leave it float, "
            f"{skip_line([node.name], settings)}"
        )
    ranged = [
        (place.name, figures)
        for place, figures in tensors
        if place.qparams and place.weight is None
    ]
    clip, name = max(((f.clip, name) for name, f in ranged if _is_shortened(f)), default=(0.0, ""))
    if clip > CLIPPED and _is_heard(node):
        wider = "activation_quant_method = MAX_MIN or " if left(settings, *WIDEST) else ""
        yield f"{clip:.1%} of {name} is cut off: try {wider}{skip_line([node.name], settings)}"
    more_bits = _more_bits(node, settings)
    if _is_costly(node):
        ways = [*more_bits, f"leave it float, {skip_line([node.name], settings)}"]
        yield f"It alone makes {node.share:.0%} of the error: {' or '.join(ways)}"
    elif node.own is not None and node.own.sqnr_db < NOISY_DB:
        other = _other_method(settings)
        method = [f"try activation_quant_method = {other}"] if left(settings, *ANY_METHOD) else []
        float_one = f"leave it float, {skip_line([node.name], settings)}"
        ways = [*(method if ranged else more_bits), float_one]
        yield f"Its output is noisy ({node.own.sqnr_db:.1f} dB): {', or '.join(ways)}"


def skip_line(names: Sequence[str], settings: Config) -> str:
    """The line of a configuration that leaves these nodes float as well as those that are already;
    the key alone where no line can hold a name.
    """
    skipped = [*settings.common.skip_quant_node, *names]
    items = [as_item(name) for name in dict.fromkeys(skipped)]
    held = [item for item in items if item is not None]
    whole = f"skip_quant_node = {','.join(held)}"
    return whole if len(held) == len(items) else "skip_quant_node with a pattern for its name"


def _other_method(settings: Config) -> str:
    """A range method that is not the given one."""
    return "PERCENTILE" if settings.full_quant.activation_quant_method == "MSE" else "MSE"


def _more_bits(node: NodeFinding, settings: Config) -> list[str]:
    """The line that gives a node's weights more bits: only stored ones may have any."""
    bits = settings.common.bit_num
    if settings.mode != "WEIGHT_QUANT" or not bits or (node.bits or 0) >= MOST_BITS:
        return []
    more, section = min(MOST_BITS, (node.bits or bits) + 2), f"[node:{written(node.name)}]"
    return [f"give it more bits, bit_num = {more} in a section {section}"]


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
            f"try {skip_line(mixed[:NAMED], settings)}"
        )
    if cut := [node.name for node in nodes if "cut off" in node.advice]:
        wider = "a wider range (activation_quant_method = MAX_MIN)"
        float_ones = f"leaving them float may, {skip_line(cut[:NAMED], settings)}"
        way = f"{wider} may be better." if left(settings, *WIDEST) else float_ones
        yield f"Much is cut off at {listed(cut)}: {way}"
    costly = sorted(
        filter(_is_costly, nodes),
        key=lambda n: -(n.share or 0),
    )
    if costly:
        names = [node.name for node in costly]
        yield f"Most of the outputs' error comes from {listed(names)}: {_floats(names, settings)}"
    if verification and verification.speed and verification.speed.high < 1:
        other = "; WEIGHT_QUANT may do" if settings.mode != "WEIGHT_QUANT" else ""
        yield (
            "It is not faster here than the float model: few operators have integer kernels"
            f"{other}."
        )


def _floats(names: Sequence[str], settings: Config) -> str:
    """The lines that leave nodes float."""
    line, bound = skip_line(names[:NAMED], settings), settings.full_quant.max_drop
    if not left(settings, "full_quant_param.max_drop", 0.0):
        return line
    return f"max_drop = {(bound or 2 * MAX_DROP) / 2:g}, or {line}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
