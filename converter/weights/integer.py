"""Integer weights: scales and codes of a matrix that is multiplied as integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calib.affine import Array, QParams
from converter.plan.plan import QuantizedWeight, WeightPlan
from converter.weights.gptq import (
    Grid,
    compensated,
    kept_weights,
    nearest,
    search_scales,
)
from converter.weights.moments import second_moments, with_mean_squares

# |bias| / scale stays below this, half of int32, leaving room for what the products add.
BIAS_LIMIT = 2.0**30
# Longer rows are rounded to the nearest code: the second moments of more columns take gigabytes and
# minutes.
MOST_COMPENSATED = 8192


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded: with error compensation or to nearest codes; whether scales are
    powers of two.
    """

    compensate: bool = True
    power_of_two: bool = False


@dataclass(frozen=True)
class Inputs:
    """Inputs drawn for a product: float32 (groups, drawn, columns), in units of `scale`, and the
    mean squares of all there are: float64 (groups, columns). A share `even` of them is unknown, and
    taken to be alike in all columns.
    """

    drawn: Array
    squares: Array
    scale: float
    threads: int
    even: float = 0.0

    @property
    def importance(self) -> Array:
        """Mean square of each column: float64 (groups, columns)."""
        unknown = self.squares.mean(axis=1, keepdims=True)
        squares: Array = (1 - self.even) * self.squares + self.even * unknown
        return squares * self.scale**2

    @property
    def moments(self) -> Array:
        """Second moments of the columns: float64 (groups, columns, columns)."""
        some = second_moments(self.drawn, self.threads)
        whole = with_mean_squares(some, self.squares) * (self.scale**2 * (1 - self.even))
        columns = np.arange(whole.shape[1])
        whole[:, columns, columns] = self.importance
        return whole


def rounded(
    matrix: Array,
    inputs: Inputs | None,
    wanted: WeightPlan,
    *,
    least: Array,
    rounding: Rounding,
) -> tuple[Array, Array]:
    """Codes of a float64 `matrix` (groups, rows, columns) and scales (groups, rows), none below
    `least`.

    Without inputs, as where the weight is no matrix product's: least squares in the weights.
    """
    grid = Grid(wanted.format, wanted.pair_limit)
    importance = np.ones(matrix.shape[::2]) if inputs is None else inputs.importance
    best = search_scales(matrix, importance, grid, wanted.axis is not None)
    scale = np.maximum(best, least).astype(np.float32).astype(np.float64)
    if rounding.power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    if inputs is None or not rounding.compensate or matrix.shape[2] > MOST_COMPENSATED:
        return nearest(matrix / scale[..., None], grid), scale
    moments, kept = inputs.moments, kept_weights(matrix)
    fixed = None if kept is None else np.where(kept, np.nan, 0.0)
    return compensated(matrix, scale, moments, grid, fixed=fixed), scale


def least_scales(bias: Array, data: QParams, shape: tuple[int, ...], per_channel: bool) -> Array:
    """The least scale of each row for which the int32 `bias`, of scale data scale * weight scale,
    cannot overflow.
    """
    floor = np.abs(bias) / (float(data.scale) * BIAS_LIMIT)
    return floor.reshape(shape) if per_channel else np.full(shape, floor.max())


def packed(codes: Array, scale: Array, wanted: WeightPlan) -> QuantizedWeight:
    """Whole-number `codes` in the weight's shape with the scales (groups, rows) of the rows they
    are columns of.
    """
    scales = np.asarray(
        scale.reshape(-1) if wanted.axis is not None else scale.flat[0],
        np.float32,
    )
    q = QParams(
        scales,
        np.zeros(scales.shape, wanted.format.dtype),
        wanted.format,
        wanted.axis,
    )
    return QuantizedWeight(np.ascontiguousarray(codes).astype(wanted.format.dtype), q)
