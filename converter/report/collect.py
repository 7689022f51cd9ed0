"""What is known of a quantized model: every tensor measured, every node judged, and what to do
next.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from calib import CalibError
from calib.samples import Dataset
from converter.calibrate.data import synthetic_data
from converter.errors import ConfigError
from converter.graph.edit import not_none
from converter.graph.files import naming
from converter.measure.both import Both
from converter.measure.errors import Tally, error_of
from converter.measure.pairing import Pairing, Place
from converter.measure.results import Findings, LayerTime, NodeFinding, Verification
from converter.measure.sensitivity import RANKED_ON, Alone, alone
from converter.measure.times import layer_times
from converter.measure.verify import COMPARED_SAMPLES
from converter.plan.plan import NodePlan
from converter.plan.result import Quantized
from converter.report.advice import advice_for, overall_advice
from converter.report.page import page
from converter.report.rounds import Figures, Key, Summary, key_of, rounds
from converter.report.shown import Shown
from converter.report.tables import (
    OUTPUTS,
    output_rows,
    parameter_rows,
    round_rows,
    sensitivity_rows,
    time_rows,
    write_table,
)

# Nodes in summary.json.
WORST = 10
# Samples that histograms and, where no tables are wanted, figures are made of.
SHOWN_SAMPLES = 8
# Samples that the tables have a file for.
MOST_ROUNDS = 12
# So much above the signal is all noise.
MOST_DB = 300.0


def check_folder(folder: Path, where: str) -> None:
    """Raises ConfigError where no folder of reports can be; `where` names the line that asks for
    it.
    """
    stands = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if stands.is_file():
        msg = f"{where}: {stands} is a file; give the path of a folder."
        raise ConfigError(msg)
    if not os.access(stands, os.W_OK):
        msg = f"{where}: {stands} cannot be written to; give a folder that you may write to."
        raise ConfigError(msg)


def write_reports(folder: Path, title: str, both: Both, given: Findings) -> Findings:
    """The tables, summary.json and report.html in `folder`, in place of those of an earlier run;
    what they tell.

    All of the folder's reports are new, or none of them is touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        naming(folder),
        TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary,
    ):
        tables = Path(temporary)
        told = findings(both, given, tables)
        (tables / "summary.json").write_text(_summary(told), encoding="utf-8")
        (tables / "report.html").write_text(page(told, title), encoding="utf-8")
        for old in folder.iterdir():
            if re.fullmatch(r"round_\d+\.csv", old.name):
                old.unlink()
        for new in sorted(tables.iterdir()):
            new.replace(folder / new.name)
    return told


def _summary(told: Findings) -> str:
    """For programs; a number that is not finite is null."""
    before, after = told.sizes
    found = told.verification
    content = {
        "facts": dict(told.facts),
        "bytes": {"before": before, "after": after},
        "verification": asdict(replace(found, views=())) if found else None,
        "worst_nodes": [asdict(node) for node in told.ranked[:WORST]],
        "advice": told.advice,
    }
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2, ensure_ascii=False) + "\n"


def findings(both: Both, given: Findings, tables: Path | None = None) -> Findings:
    """What is `given` of a pair of models, with all that a look inside tells.

    The plan may be empty, as for what another tool made. Without data there is one random sample.
    The tables of all samples are written into the folder `tables`.
    """
    pairing, result = both.pairing, both.result
    data = result.data if len(result.data) else synthetic_data(result.reference, 1)
    count = min(len(data), MOST_ROUNDS if tables else SHOWN_SAMPLES)
    shown = Shown(pairing, SHOWN_SAMPLES)
    totals: dict[Key, Figures] = {}
    outputs, tallies = [OUTPUTS], list[list[Tally]]()
    # What was trained is held against another float model.
    pairs = both.tensors if both.reference is both.floats else {}
    measured = rounds(both, data, count, shown.see)
    for index, seen in enumerate(both.watch.track(measured, "Measuring tensors", count)):
        totals |= {key: _both(totals.get(key), x) for key, x in seen.figures.items()}
        if index < COMPARED_SAMPLES:
            tallies.append([seen.tally(*pair) for pair in pairs.items()])
        if tables:
            write_table(
                tables / f"round_{index}.csv",
                round_rows(pairing.places, seen.figures, first=not index),
            )
            outputs += output_rows(index, seen.outputs)
    totals = {key: replace(figures, clip=figures.clip / count) for key, figures in totals.items()}
    threads = both.resources.threads
    by_itself = (
        {} if both.big else alone(pairing, both.floats, data, count=RANKED_ON, threads=threads)
    )
    nodes = _nodes(pairing, result, totals, by_itself=by_itself, verification=given.verification)
    told = replace(
        given,
        nodes=nodes,
        tensors=tuple(shown.findings()),
        advice=tuple(overall_advice(nodes, given.verification, result.settings)),
        errors=tuple(map(error_of, pairs, np.sum(tallies, axis=0))),
        edges=tuple(_edges(pairing.reference)),
        layers=tuple(_layers(both, data)) if tables else (),
    )
    if tables:
        write_table(tables / "output_summary.csv", outputs)
        write_table(tables / "quant_param.csv", parameter_rows(pairing.places, totals))
        write_table(tables / "sensitivity.csv", sensitivity_rows(told.ranked))
        write_table(tables / "time.csv", time_rows(told.layers))
    return told


def _layers(both: Both, data: Dataset) -> list[LayerTime]:
    """What the runtime spends its time on; nothing, but a word, where it does not tell."""
    if both.big:
        both.watch.say("Time by layer is not measured: the model has too many weights.")
        return []
    try:
        return layer_times(both.pairing.reference, both.result.model, data)
    except CalibError as error:
        both.watch.warn(f"Time by layer is not measured: {error}")
        return []


def _edges(model: ir.Model) -> Iterator[tuple[str, str]]:
    """Which node reads what which other makes, in the main graph."""
    for node in model.graph:
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            if maker is not None:
                yield maker.name or "", node.name or ""


def _both(first: Figures | None, second: Figures) -> Figures:
    """Figures of several samples: extremes, tally and the sum of the shares."""
    if first is None:
        return second
    return replace(
        second,
        origin=_extremes(first.origin, second.origin),
        dequant=_extremes(first.dequant, second.dequant)
        if first.dequant and second.dequant
        else None,
        clip=first.clip + second.clip,
        tally=tuple(np.add(first.tally, second.tally).tolist()),
    )


def _extremes(first: Summary, second: Summary) -> Summary:
    """`second` with the least and the greatest value of both; NaN where neither has any."""
    least, greatest = np.fmin(first[0], second[0]), np.fmax(first[4], second[4])
    return (float(least), *second[1:4], float(greatest), *second[5:])


def _nodes(
    pairing: Pairing,
    result: Quantized,
    totals: Mapping[Key, Figures],
    *,
    by_itself: Mapping[str, Alone],
    verification: Verification | None,
) -> tuple[NodeFinding, ...]:
    """A finding for every node of the float model that is computed, in its order."""
    places: dict[str, list[Place]] = {}
    for place in pairing.places:
        places.setdefault(place.node, []).append(place)
    noise = {
        name: 10 ** (-max(cost.output.sqnr_db, -MOST_DB) / 10) for name, cost in by_itself.items()
    }
    whole = sum(noise.values()) or 1.0
    # Some tools name an operator on integers like the float one, with this word behind it.
    saturated = (
        {name.removesuffix("_quant") for name in verification.saturated} if verification else set()
    )
    nodes = []
    for name, own_places in places.items():
        cost, unit = by_itself.get(name), result.plan.nodes.get(name)
        node = _node(name, own_places, unit, totals)
        if cost:
            node = replace(
                node,
                own=cost.own,
                output=cost.output,
                share=noise[name] / whole,
            )
        inputs = [(place, totals[key_of(place)]) for place in own_places if key_of(place) in totals]
        advice = advice_for(node, inputs, name in saturated, result.settings)
        nodes.append(replace(node, advice=advice))
    return tuple(nodes)


def _node(
    name: str, places: list[Place], unit: NodePlan | None, totals: Mapping[Key, Figures]
) -> NodeFinding:
    read = [place for place in places if not place.output]
    weights = [place for place in read if place.weight is not None]
    bits = [place.bits for place in weights if place.bits] or [
        place.bits for place in read if place.bits
    ]
    quantized = unit.quantized if unit else bool(bits)
    written = (totals.get(key_of(place)) for place in places if place.output)
    error = next((error_of(name, f.tally) for f in written if f and f.dequant), None)
    return NodeFinding(
        name,
        places[0].op_type,
        quantized,
        unit.reason if unit else "",
        min(bits, default=None) if quantized else None,
        sum(place.weight.nbytes for place in weights if place.weight is not None),
        sum(map(_bytes_after, weights)),
        error if quantized else None,
        inside=bool(unit and unit.inside),
    )


def _bytes_after(place: Place) -> int:
    """Bytes of a constant with its parameters, as codes if it has any."""
    weight, q = not_none(place.weight), place.qparams
    return (
        -(-weight.size * q.format.bits // 8) + q.scale.nbytes + q.zero_point.nbytes
        if q
        else weight.nbytes
    )
