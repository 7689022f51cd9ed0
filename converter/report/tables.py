"""The debug reports as tables, a header first, with the columns and names of the reference
converter's document.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, starmap
from pathlib import Path

import numpy as np

from calib.affine import INT32, Array, QParams
from converter.measure.errors import Tally, error_of
from converter.measure.pairing import Place
from converter.measure.results import LayerTime, NodeFinding
from converter.report.rounds import Figures, Key, key_of

Row = Sequence[object]
OUTPUTS: Row = ("Round", "TensorName", "CosineSimilarity")
STATISTICS = (
    "Min",
    "Q1",
    "Median",
    "Q3",
    "MAX",
    "Mean",
    "Var",
    "Sparsity",
    "Clip",
    "CosineSimilarity",
)
ROUND = (
    "NodeName",
    "NodeType",
    "TensorName",
    "InOutFlag",
    "DataTypeFlag",
    "TensorTypeFlag",
    *STATISTICS,
)
PARAMETERS = (
    *("NodeName", "NodeType", "TensorName", "ElementsNum", "Dims"),
    *("Scale", "ZeroPoint", "Bits", "CorrectionVar", "CorrectionMean"),
)
SENSITIVITY = (
    *("NodeName", "NodeType", "Bits", "CosineSimilarity", "SqnrDb"),
    *("OutputCosineSimilarity", "OutputSqnrDb", "Share", "Advice"),
)
TIME = (
    *("NodeName", "NodeType", "Contains", "FloatKernels", "QuantizedKernels"),
    *("FloatMicroseconds", "QuantizedMicroseconds"),
)


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """A CSV file; numbers in 9 significant digits, an empty cell for None and NaN, an
    apostrophe before a formula.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([_cell(x) for x in row] for row in rows)


def _cell(content: object) -> object:
    # A spreadsheet would compute what a model's author wrote into a name.
    if isinstance(content, str) and content.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{content}"
    if isinstance(content, float):
        return None if math.isnan(content) else f"{content:.9g}"
    return content


def round_rows(
    places: Sequence[Place], measured: Mapping[Key, Figures], first: bool
) -> Iterator[Row]:
    """For every place the float tensor's row and, if the quantized model has the tensor, that of
    its floats there; of weights, which are the same in all, only in the `first` round.
    """
    yield ROUND
    for place in places:
        figures = measured.get(key_of(place))
        if figures is None or (place.weight is not None and not first):
            continue
        flag = "Output" if place.output else "Input"
        kind = "Activation" if place.weight is None else "Weight"
        head = (place.node, place.op_type, place.name, flag)
        yield (*head, "Origin", kind, *figures.origin, 0.0, 1.0)
        if figures.dequant is not None:
            yield (
                *head,
                "Dequant",
                kind,
                *figures.dequant,
                figures.clip,
                figures.cosine,
            )


def output_rows(index: int, outputs: Mapping[str, Tally]) -> Iterator[Row]:
    """The cosine similarity of every graph output in a round; none where it cannot be compared."""
    for error in starmap(error_of, outputs.items()):
        yield index, error.name, error.cosine if error.compared else None


def parameter_rows(places: Sequence[Place], measured: Mapping[Key, Figures]) -> Iterator[Row]:
    """Scale and zero point of everything that became integers, a row for every channel; none of
    biases that have the product of an input's scale and a weight's, as kernels want it.
    """
    yield PARAMETERS
    scales: dict[str, list[Array]] = {}
    for place in places:
        if place.qparams and not place.output:
            scales.setdefault(place.node, []).append(place.qparams.scale)
    for place in places:
        figures, q = measured.get(key_of(place)), place.qparams
        if figures is None or q is None or _is_product(q, scales.get(place.node, [])):
            continue
        elements, dims = math.prod(figures.shape), " ".join(map(str, figures.shape))
        head = (place.node, place.op_type, place.name, elements, dims)
        channels = (x.ravel().tolist() for x in np.broadcast_arrays(q.scale, q.zero_point))
        for scale, zero_point in zip(*channels, strict=True):
            yield (*head, scale, zero_point, q.format.bits, 1.0, 0.0)


def _is_product(q: QParams, scales: Sequence[Array]) -> bool:
    """Whether sums have the scales of the products that they are made of."""
    pairs = combinations((x for x in scales if x is not q.scale), 2)
    return q.format == INT32 and any(
        (x * y).size == q.scale.size and np.allclose(x * y, q.scale, rtol=1e-6, atol=0)
        for x, y in pairs
    )


def sensitivity_rows(ranked: Iterable[NodeFinding]) -> Iterator[Row]:
    """What each node costs."""
    yield SENSITIVITY
    for node in ranked:
        own, output = (
            (e.cosine, e.sqnr_db) if e else (None, None) for e in (node.own, node.output)
        )
        yield (
            node.name,
            node.op_type,
            node.bits,
            *own,
            *output,
            node.share,
            node.advice,
        )


def time_rows(layers: Iterable[LayerTime]) -> Iterator[Row]:
    """What each layer takes in both models, with the nodes that are fused into it."""
    yield TIME
    for layer in layers:
        others = " + ".join(name for name in layer.nodes if name != layer.node)
        times = layer.before, layer.after
        yield (layer.node, layer.op_type, others, *layer.kernels, *times)
