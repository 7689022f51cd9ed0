"""How much of a product is left by the codes of what it multiplies."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from calib.samples import Dataset
from converter.calibrate.runs import passes
from converter.job import Resources

# Samples that tell how large products are.
PROBED = 4


def product_spreads(
    model: ir.Model, axes: Mapping[str, int], data: Dataset, resources: Resources
) -> dict[str, float]:
    """The variance of each float tensor around its channels' means, over some samples; `axes` are
    the channels' by tensor.
    """
    memory, count = resources.memory, min(PROBED, len(data))
    totals = dict.fromkeys(axes, 0.0)
    for group, tapped in passes(
        model, list(axes), data.sample(0), budget=memory, providers=resources.providers
    ):
        for index in range(count):
            tensors = tapped.fetch(group, data.sample(index))
            for name in group:
                totals[name] += _spread(tensors[name], axes[name]) / count
    return totals


def _spread(x: Array, axis: int) -> float:
    rows = np.moveaxis(x, axis, 0).reshape(
        x.shape[axis],
        -1,
    )
    with np.errstate(over="ignore", invalid="ignore"):
        return float(rows.var(axis=1, dtype=np.float64).mean()) if x.size else 0.0


def decibels_left(spread: float, matrix: Array, step: float) -> float:
    """Signal to noise of the products of a float64 `matrix` (groups, rows, columns) with inputs
    that are rounded to multiples of `step`: the error of each is uniform, of variance step^2 / 12,
    and those of a row's columns add up.

    Infinite where nothing is known: of no spread, or no finite one.
    """
    noise = step**2 / 12 * float(np.square(matrix).sum(axis=-1).mean())
    if not (noise > 0 and spread > 0 and math.isfinite(spread)):
        return math.inf
    return 10 * math.log10(spread / noise)
