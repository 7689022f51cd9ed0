"""Which nodes cost the output most, and which few of them to keep float so that it stays within a bound."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from calib.samples import Dataset
from calib.session import open_session, over_samples, run
from converter.compare import compare, output_errors
from converter.emit.qdq import emit
from converter.errors import DataError
from converter.job import Resources, Watch
from converter.layerwise import Emit
from converter.model import saved
from converter.plan import NodePlan, QuantPlan

T = TypeVar("T")
# Samples that rank the nodes; the bound itself is measured on all.
RANKED_ON = 8


@dataclass(frozen=True)
class Sensitivity:
    """What one quantized node does to the model's outputs while everything else is float; worst output."""

    node: NodePlan
    cosine: float
    sqnr_db: float


def sensitivities(
    model: ir.Model, plan: QuantPlan, data: Dataset, resources: Resources, watch: Watch, write: Emit = emit
) -> list[Sensitivity]:
    """Every unit's sensitivity, the most harmful first."""
    found = []
    outputs = {value.name or "": value.name or "" for value in model.graph.outputs}
    with saved(model) as reference:
        for unit in watch.track(plan.units(), "Ranking nodes", len(plan.units())):
            alone = model.clone()
            write(alone, only(plan, unit))
            with saved(alone) as path:
                errors = compare(reference, path, outputs, data, RANKED_ON, resources.threads)
            found.append(Sensitivity(unit, min(e.cosine for e in errors), min(e.sqnr_db for e in errors)))
    return sorted(found, key=lambda sensitivity: sensitivity.sqnr_db)


def only(plan: QuantPlan, unit: NodePlan) -> QuantPlan:
    """The part of `plan` that quantizes one unit."""
    return plan.part([replace(unit, bare=False)])


def output_drop(
    model: ir.Model, quantized: ir.Model, data: Dataset, labels: Mapping[str, int] | None, resources: Resources
) -> float:
    """What the quantized model loses over all samples: top-1 share with `labels` by file name, else 1 - cosine."""
    if labels is None:
        return 1 - min(error.cosine for error in output_errors(model, quantized, data, resources.threads))
    with saved(model) as reference, saved(quantized) as other:
        return top1(reference, data, labels, resources) - top1(other, data, labels, resources)


def top1(path: Path, data: Dataset, labels: Mapping[str, int], resources: Resources) -> float:
    """Share of the samples whose first output, of one row, is largest at the label of their first file."""
    session = open_session(path)
    output = session.get_outputs()[0].name

    def right(index: int) -> bool:
        scores = run(session, [output], data.sample(index))[output]
        if scores.ndim > 1 and len(scores) > 1:
            msg = f"label_file: output '{output}' has {len(scores)} rows a sample; give --inputShape with a batch of 1."
            raise DataError(msg)
        return int(np.argmax(scores)) == labels[data.files(index)[0].name]

    return float(np.mean(list(over_samples(len(data), right, resources.threads))))


def read_labels(path: Path, data: Dataset) -> dict[str, int]:
    """The class index of every sample's file from a CSV with the columns file and label; raises DataError."""
    try:
        with path.open(newline="", encoding="utf-8") as table:
            labels = {row["file"]: int(row["label"]) for row in csv.DictReader(table)}
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        msg = f"{path}: the label file needs a header 'file,label' and an integer class a line ({error!r})."
        raise DataError(msg) from error
    for file, times in Counter(data.files(index)[0] for index in range(len(data))).items():
        if file.name not in labels:
            msg = f"{path}: there is no label for {file.name}; add a line '{file.name},<class>'."
            raise DataError(msg)
        if times > 1:
            msg = f"{path}: {file} holds {times} samples, which one label cannot serve; give each a file of its own."
            raise DataError(msg)
    return labels


def fewest(most: int, attempt: Callable[[int], T | None]) -> T:
    """attempt(n) for the least n of 1..most for which it is not None, found by bisection; attempt(most) must not be."""
    low, high = 0, most
    best = attempt(high)
    assert best is not None
    while high - low > 1:
        middle = (low + high) // 2
        result = attempt(middle)
        low, high, best = (middle, high, best) if result is None else (low, middle, result)
    return best
