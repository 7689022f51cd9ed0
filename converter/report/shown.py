"""What the page shows of everything that became integers with known ranges: histograms, and the
ranges of channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock

import numpy as np

from calib.affine import Array, QParams
from calib.stats import Histogram, TensorStats
from converter.graph.edit import not_none
from converter.measure.pairing import Pairing, Place
from converter.measure.results import TensorFinding
from converter.prepare.fake_quant_ranges import span_of

# Rank of pictures and maps, whose channels are axis 1; those of others are the last.
MAPS = 4


class Shown:
    """Takes in tensors of the first samples, in any order."""

    def __init__(self, pairing: Pairing, samples: int) -> None:
        self.samples, self.lock = samples, Lock()
        self.places = {place.name: place for place in pairing.places if place.bits}
        self.nodes: dict[str, list[str]] = {}
        for place in pairing.places:
            self.nodes.setdefault(place.name, []).append(place.node)
        self.floats = {name: TensorStats(histogram=True) for name in self.places}
        self.restored = {name: TensorStats(histogram=True) for name in self.places}
        self.channels: dict[str, Array] = {}
        for name, place in self.places.items():
            if place.weight is not None and place.restored is not None:
                self.floats[name].update(place.weight, 0)
                self.restored[name].update(place.restored, 0)

    def see(
        self, index: int, names: Sequence[str], x: Mapping[str, Array], y: Mapping[str, Array]
    ) -> None:
        """Takes in the named float tensors of a sample, and what became of them in `y`."""
        places = (self.places.get(name) for name in names) if index < self.samples else ()
        for place in filter(None, places):
            spans = _spans(x[place.name], _axis(x[place.name]))
            other = y.get(place.counterpart or "")
            with self.lock:
                self.floats[place.name].update(x[place.name], index)
                known = self.channels.get(place.name, spans)
                self.channels[place.name] = _wider(known, spans)
                if other is not None:
                    self.restored[place.name].update(other, index)

    def findings(self) -> Iterator[TensorFinding]:
        """What was seen."""
        for name, place in self.places.items():
            if self.floats[name].count:
                yield self._finding(place, not_none(place.qparams))

    def _finding(self, place: Place, q: QParams) -> TensorFinding:
        statistics, restored = self.floats[place.name], self.restored[place.name]
        histogram, span = statistics.histogram(), span_of(q)
        edges, low, high = histogram.edges, float(span.lo.min()), float(span.hi.max())
        if q.format.trellis and place.restored is not None:
            low, high = float(place.restored.min()), float(place.restored.max())
        near = float(q.scale.max()) / 2  # rounding alone moves values so far
        outside = histogram.counts[(edges[1:] <= low - near) | (edges[:-1] > high + near)].sum()
        channels, held = self.channels.get(place.name), None
        if place.weight is not None and place.restored is not None:
            axis = _axis_of_weight(place.weight, q)
            channels, held = _spans(place.weight, axis), _spans(place.restored, axis)
        return TensorFinding(
            place.name,
            place.node,
            q.format.bits,
            histogram.counts,
            float(edges[0]),
            float(edges[-1]),
            (low, high),
            float(outside) / statistics.count,
            restored=_counted(restored.histogram(), edges) if restored.count else None,
            channels=channels if channels is not None and len(channels) > 1 else None,
            held=held,
            nodes=tuple(dict.fromkeys(self.nodes[place.name])),
        )


def _axis(x: Array) -> int:
    return 1 if x.ndim >= MAPS else -1


def _axis_of_weight(weight: Array, q: QParams) -> int:
    """The axis that has parameters of its own, else that of the outputs, as operators mostly have
    it.
    """
    if q.axis is not None:
        return q.axis
    return 0 if weight.ndim >= MAPS else -1


def _spans(x: Array, axis: int) -> Array:
    """The least and the greatest value of each index of an axis (indices, 2); none of a number."""
    if x.ndim == 0 or not x.size:
        return np.zeros((0, 2), np.float32)
    others = tuple(k for k in range(x.ndim) if k != axis % x.ndim)
    return np.stack(
        [x.min(axis=others), x.max(axis=others)],
        axis=1,
    )


def _wider(first: Array, second: Array) -> Array:
    """Spans that contain both; none where the samples differ in size."""
    if first.shape != second.shape:
        return np.zeros((0, 2), np.float32)
    least = np.minimum(first[:, 0], second[:, 0])
    return np.stack(
        [least, np.maximum(first[:, 1], second[:, 1])],
        axis=1,
    )


def _counted(histogram: Histogram, edges: Array) -> Array:
    """The values of a histogram in the bins of another; what lies outside is in the end bins."""
    centres = histogram.edges[:-1] + histogram.width / 2
    places = np.searchsorted(edges, centres, side="right") - 1
    last = edges.size - 2
    return np.bincount(places.clip(0, last), histogram.counts, last + 1).astype(np.int64)
