"""Weights that are stored as codes and are floats again before use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from calib import trellis
from calib.affine import Array, QParams
from calib.search import fewest
from converter.plan.matrices import plain_matrix, plain_weight
from converter.plan.plan import (
    PerAxis,
    PerBlock,
    PerTensor,
    QuantizedWeight,
    WeightPlan,
)
from converter.weights import block_grids
from converter.weights.gptq import kept_weights
from converter.weights.grids import Grids, Rows, fit, with_variance
from converter.weights.moments import second_moments

# Share of the inputs' mean second moment that holds a layer's target near its float weights.
RIDGE = 0.1
# What is added to second moments, as a share of their mean: at the least, as inputs from one sample
# are alike, and at the most, of few inputs. At 2 bits the divergence of unseen outputs of resnet20
# is .143 with 0 and a ridge of 1, .105 so; of mobilenet_v1 1.87 and 1.60 (three draws of samples).
LEAST_SHRINKAGE, MOST_SHRINKAGE = 0.3, 4.0
# The most bits that a relative error is turned into.
WIDEST = 16
# Numbers whose moments are taken at a time.
JOINED = 1 << 20
# A trellis may pay for codes of these widths, where most weights differ.
TRELLIS_BITS = range(2, 8)
# Weights from which a long memory saves more bytes than the nodes that undo it take.
LONG_PAYS = 1 << 14


@dataclass(frozen=True)
class Storage:
    """How weights are fitted.

    `by_outputs` needs data; `correct` keeps means and, by weights, variances; `integer_zero` is for
    DequantizeLinear, and `symmetric` for one whose zero is 0; `max_error` chooses the fewest bits
    with no more relative error a weight, None keeps the plan's.
    """

    by_outputs: bool = False
    correct: bool = True
    integer_zero: bool = False
    max_error: float | None = None
    symmetric: bool = False


def _for(wanted: WeightPlan, storage: Storage) -> Storage:
    return replace(storage, max_error=None) if wanted.fixed else storage


def fitted_alone(
    weight: Array, wanted: WeightPlan, storage: Storage, importance: Array | None = None
) -> QuantizedWeight:
    """The weight fitted to itself; `importance` tells how much each of its columns counts."""
    storage = _for(wanted, storage)
    blockwise = storage.integer_zero and storage.max_error is None and not storage.symmetric
    if blockwise and wanted.axis is not None:
        return block_grids.fitted(weight, wanted, importance)
    matrix = plain_matrix(weight, wanted.axis)
    if isinstance(wanted.granularity, PerBlock):
        matrix = matrix.reshape(1, -1, wanted.granularity.size)  # blocks have grids of their own
    kept = kept_weights(matrix)
    rows = _fewest_bits(matrix, None, wanted, storage, kept=kept)
    if storage.correct and not storage.integer_zero and kept is None:
        rows = with_variance(matrix, rows, Grids(rows.format))
    return packed(
        rows,
        plain_weight(rows.codes(), weight.shape, wanted.axis),
        wanted,
    )


def fitted_to_outputs(
    matrix: Array, pair: Inputs, wanted: WeightPlan, storage: Storage, *, threads: int
) -> Rows:
    """The points of a float64 `matrix` (groups, rows, columns) that on the quantized inputs come
    nearest to what the matrix makes of the float ones.
    """
    moments, cross = _joint(pair, threads)
    extra = _shrinkage(moments, pair.own.shape[1])
    target = _target(matrix, moments + extra, cross + extra)
    return _fewest_bits(
        target, moments + extra, wanted, storage, kept=kept_weights(matrix), judged=moments
    )


@dataclass(frozen=True)
class Inputs:
    """Inputs of a product, float32 (groups, drawn, columns): its `own` and the float model's
    `reference`, looked at about their means where a bias makes up for these.
    """

    own: Array
    reference: Array
    centered: bool


def _fewest_bits(
    weight: Array,
    moments: Array | None,
    wanted: WeightPlan,
    storage: Storage,
    *,
    kept: Array | None,
    judged: Array | None = None,
) -> Rows:
    """The fit of a matrix in the planned bits or in the fewest that keep an error, which `judged`
    moments measure.
    """
    bound, integer_zero = _for(wanted, storage).max_error, storage.integer_zero or kept is not None
    grids = Grids(wanted.format, wanted.axis is not None, integer_zero, storage.symmetric)
    varied = grids.per_row and not integer_zero and _varied(weight)
    long = moments is not None and weight.size >= LONG_PAYS
    memory = trellis.LONG if long else trellis.SHORT

    def fitted(bits: int) -> Rows:
        coded = memory if varied and bits in TRELLIS_BITS else 0
        fmt = replace(wanted.format, bits=bits, trellis=coded)
        return fit(weight, moments, replace(grids, format=fmt), kept)

    def within(bits: int) -> Rows | None:
        rows = fitted(bits)
        close = bits == WIDEST or rows.relative_error(weight, judged) <= (bound or 0)
        return rows if close else None

    return fitted(wanted.format.bits) if bound is None else fewest(WIDEST, within)


def _varied(weight: Array) -> bool:
    """Whether weights are not repeated, which fewer bits would store as well."""
    some = weight.reshape(-1)[:: max(1, weight.size >> 16)]
    return len(np.unique(some)) > min(some.size // 2, 1024)


def _joint(pair: Inputs, threads: int) -> tuple[Array, Array]:
    """E[x x'] and E[reference x'] over drawn inputs x, a few groups at a time in memory."""
    groups, drawn, size = pair.own.shape
    step = max(1, JOINED // (drawn * size))
    parts = [slice(start, start + step) for start in range(0, groups, step)]
    sums = np.concatenate([_joint_part(pair, part, threads) for part in parts])
    return sums[:, :size, :size], sums[:, size:, :size]


def _joint_part(pair: Inputs, groups: slice, threads: int) -> Array:
    both = np.concatenate(
        [pair.own[groups], pair.reference[groups]],
        axis=2,
    )
    if pair.centered:
        both -= both.mean(axis=1, keepdims=True)
    # One product of an array with itself: BLAS has a fast way for it, for many small groups above
    # all.
    return second_moments(both, threads)


def _shrinkage(moments: Array, drawn: int) -> Array:
    """What is added to second moments, as few inputs say little about how many columns go
    together.
    """
    size = moments.shape[1]
    share = np.clip((size / drawn) ** 2, LEAST_SHRINKAGE, MOST_SHRINKAGE)
    added = share * np.einsum("gkk->g", moments) / size
    return np.asarray(added[:, None, None] * np.eye(size))


def _target(weight: Array, moments: Array, cross: Array) -> Array:
    """The weights V that on inputs x come nearest to `weight` W on the reference r: V = W E[r x']
    E[x x']^-1.

    A ridge draws V to W: V = W + W (E[r x'] - E[x x']) (E[x x'] + ridge)^-1.
    """
    size = moments.shape[1]
    ridge = RIDGE * np.einsum("gkk->g", moments)[:, None, None] / size
    damped = moments + np.where(ridge > 0, ridge, 1.0) * np.eye(size)
    change = np.matmul(weight, cross - moments)
    target: Array = weight + np.linalg.solve(damped, change.swapaxes(1, 2)).swapaxes(1, 2)
    return target


def packed(rows: Rows, codes: Array, wanted: WeightPlan) -> QuantizedWeight:
    """`codes` in the weight's shape with the scales and zeros of its rows."""
    scale, zero = (
        _as_stored(x.astype(np.float32), codes.shape, wanted) for x in (rows.scale, rows.zero)
    )
    q = QParams(scale, zero, rows.format, wanted.axis)
    return QuantizedWeight(np.ascontiguousarray(codes).astype(rows.format.dtype), q)


def _as_stored(numbers: Array, shape: tuple[int, ...], wanted: WeightPlan) -> Array:
    """A number a row as it stands along the weight: one, one a channel, or one a block with a
    weight's axes.
    """
    match wanted.granularity:
        case PerTensor():
            # One number for all rows.
            return numbers[0, 0, ...]
        case PerAxis():
            return numbers.reshape(-1)
        case PerBlock(axis, _):
            return np.moveaxis(numbers.reshape(shape[axis], -1), 0, axis)
