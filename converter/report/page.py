"""report.html: everything that is known of a conversion, in one file that needs no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from calib.affine import Array
from calib.images import thumbnail
from converter.measure.results import (
    Changed,
    Findings,
    LayerTime,
    NodeFinding,
    TensorFinding,
    View,
    Views,
)
from converter.report.drawn import drawn
from converter.report.layout import placed
from converter.report.recipe import lines_in
from converter.version import __version__

# More bars than this are not seen on a screen.
MOST_BINS, MOST_BARS, MOST_CHANNELS = 160, 12, 96
# Bits from which on codes are not told apart, and bins then.
MANY_CODES, BINS_OF_CODES = 7, 64
# Constants of fewer bytes are a shape or a Clip's bounds, not weights.
LEAST_BYTES = 64
# Pixels of a picture whose answer changed.
THUMBNAIL = 96
# Pictures as data, by title.
Drawn = list[tuple[str, str]]


def page(findings: Findings, title: str) -> str:
    """The page as HTML; whatever `findings` hold is text in it, never markup."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first = {tensor.node: index for index, tensor in reversed(list(enumerate(findings.tensors)))}
    return environment.get_template("page.html").render(
        title=title,
        version=__version__,
        findings=findings,
        found=findings.verification,
        first_tensor=first,
        least_bytes=LEAST_BYTES,
        infinity=math.inf,
        data=_drawn(findings),
        layers={layer.node: layer for layer in findings.layers if layer.node},
        changed=_changes(findings),
        looked_at=_looked_at(findings),
        to_paste=lines_in(findings.advice),
        plotly=Markup(charts_library()),
    )


def _changes(findings: Findings) -> list[tuple[Changed, str]]:
    """Samples whose answers changed, with their pictures as data, empty where they are none."""
    changed = findings.verification.changed if findings.verification else ()
    pictures = (thumbnail(Path(each.file), THUMBNAIL) if each.file else None for each in changed)
    encoded = (base64.b64encode(png).decode() if png else "" for png in pictures)
    return list(zip(changed, encoded, strict=True))


def _looked_at(findings: Findings) -> Iterator[tuple[Views, list[tuple[View, Drawn]]]]:
    """Outputs with their samples, and pictures of each by title."""
    for output in findings.verification.views if findings.verification else ():
        yield output, [(view, list(drawn(output.kind, view))) for view in output.shown]


def charts_library() -> str:
    """plotly.js, the part that draws bars and lines: plotly.js-basic-dist-min of its authors, under
    the MIT licence.
    """
    return (Path(__file__).parent / "plotly-basic.min.js").read_text(encoding="utf-8")


def _drawn(findings: Findings) -> dict[str, Any]:
    """What the charts show."""
    kernels = findings.verification.kernels if findings.verification else {}
    numbers = {node.name: number for number, node in enumerate(findings.nodes)}
    note, ranked = _sensitivity(findings.nodes)
    layers = (node for node in findings.nodes if node.bytes_before >= LEAST_BYTES)
    return {
        "weights": [(node.name, node.bits, node.bytes_before, node.bytes_after) for node in layers],
        "kernels": sorted(kernels.items(), key=lambda item: (-item[1], item[0])),
        "sensitivity": ranked,
        "sensitivity_note": note,
        "tensors": [
            {**_tensor(tensor), "nodes": [numbers[n] for n in tensor.nodes if n in numbers]}
            for tensor in findings.tensors
        ],
        "graph": _graph(findings, numbers),
        "layers": [_layer(layer, numbers) for layer in findings.layers],
    }


def _layer(layer: LayerTime, numbers: Mapping[str, int]) -> list[Any]:
    """Nodes by number, none for what computes none; microseconds and kernels of both models."""
    nodes = [numbers[name] for name in layer.nodes if name in numbers]
    return [
        numbers.get(layer.node),
        layer.op_type,
        nodes,
        layer.before,
        layer.after,
        layer.kernels,
    ]


def _graph(findings: Findings, numbers: Mapping[str, int]) -> dict[str, Any]:
    """Every node with its place, kind, whether it is integer, and its noise in dB; and the edges by
    number.
    """
    nodes = {node.name: node for node in findings.nodes}
    edges = [edge for edge in dict.fromkeys(findings.edges) if numbers.keys() >= {*edge}]
    places, rows = placed(list(nodes), edges), []
    for name, node in nodes.items():
        noise = node.own.sqnr_db if node.own and math.isfinite(node.own.sqnr_db) else None
        integer = node.quantized or node.inside
        rows.append([name, node.op_type, *places[name], integer, noise])
    return {"nodes": rows, "edges": [[numbers[end] for end in edge] for edge in edges]}


def _sensitivity(
    nodes: tuple[NodeFinding, ...],
) -> tuple[str, list[tuple[str, float, str]]]:
    """Name, length and label of the bars: what nodes cost the outputs or, where that is not known,
    lose themselves.
    """
    shares = [(node.name, node.share) for node in nodes if node.share and math.isfinite(node.share)]
    rows = [(name, share, f"{share:.1%}") for name, share in shares]
    note = "Share of the outputs' squared error that a node causes by itself, the largest first."
    if not rows:
        errors = [
            (node.name, node.own.sqnr_db)
            for node in nodes
            if node.own and math.isfinite(node.own.sqnr_db)
        ]
        rows = [(name, 10 ** (-decibels / 20), f"{decibels:.1f} dB") for name, decibels in errors]
        note = "Noise of a node's output relative to its signal, the largest first."
    return note, sorted(rows, key=lambda row: -row[1])[:MOST_BARS]


def _tensor(tensor: TensorFinding) -> dict[str, Any]:
    """The tensor with no more than MOST_BINS bins, neighbours added together."""
    restored = tensor.restored
    # Bins of hardly more than a code would hold now one of them, now two.
    most = MOST_BINS if restored is None or tensor.bits < MANY_CODES else BINS_OF_CODES
    together = -(-tensor.counts.size // most)
    width = (tensor.high - tensor.low) / tensor.counts.size * together
    return {
        "name": tensor.name,
        "node": tensor.node,
        "bits": tensor.bits,
        "low": float(tensor.low),
        "width": float(width),
        "clipped": float(tensor.clipped),
        "range": [float(end) for end in tensor.range],
        "counts": _added(tensor.counts, together),
        "restored": None if restored is None else _added(restored, together),
        **_channels(tensor),
    }


def _added(counts: Array, together: int) -> list[int]:
    """Counts with so many neighbours added together."""
    padded = np.pad(counts, (0, -counts.size % together))
    return list(padded.reshape(-1, together).sum(axis=1).tolist())


def _channels(tensor: TensorFinding) -> dict[str, Any]:
    """The ranges of no more than MOST_CHANNELS channels, of neighbours what holds them all."""
    if tensor.channels is None or not np.isfinite(tensor.channels).all():
        return {"channels": None}
    together = -(-len(tensor.channels) // MOST_CHANNELS)
    held = None if tensor.held is None else _widest(tensor.held, together)
    return {"channels": _widest(tensor.channels, together), "held": held, "together": together}


def _widest(spans: Array, together: int) -> list[list[float]]:
    starts = np.arange(0, len(spans), together)
    least = np.minimum.reduceat(spans[:, 0], starts).tolist()
    most = np.maximum.reduceat(spans[:, 1], starts).tolist()
    return [[float(f"{end:.4g}") for end in span] for span in zip(least, most, strict=True)]
