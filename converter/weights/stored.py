"""Weights that are stored as codes and are floats again before use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from calib import trellis
from calib.affine import Array, QParams
from calib.rotation import Rotation, rotation
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
from converter.weights.gptq import kept_weights, row_parts
from converter.weights.grids import Grids, Rows, fit, with_variance
from converter.weights.moments import second_moments

# Share of the inputs' mean second moment that holds a layer's target near its float weights.
RIDGE = 0.1
# What is added to second moments, as a share of their mean: at the least, as inputs from one sample
# are alike, and at the most, of few inputs. At 2 bits the divergence of unseen outputs of resnet20
# is .143 with 0 and a ridge of 1, .105 with 0.3 and 0.1; of mobilenet_v1 1.87 and 1.60 (three draws
# of samples). At 4 bits it is .042 with 0.3, .036 and .039 with 0.6 and 1, .042 with 2 (six draws).
LEAST_SHRINKAGE, MOST_SHRINKAGE = 0.6, 4.0
# The most bits that a relative error is turned into.
WIDEST = 16
# Numbers whose moments are taken at a time.
JOINED = 1 << 20
# A trellis may pay for codes of these widths, where they cannot hold all different weights.
TRELLIS_BITS = range(2, 8)
# Weights from which a long memory saves more bytes than the nodes that undo it take.
LONG_PAYS = 1 << 14
# Numbers that a rotation must mix at the least. What it takes off the mean fourth power of weights,
# in squares of the mean square (normal numbers have 3), is worth about 0.4 dB at 2 bits, twice as
# much at 4; the nodes take about 150 bytes.
LEAST_MIXED, ROTATION_PAYS = 16, 1 << 14
# Bytes of the nodes that zeros take, and the most that may be lost for those of a weight.
ZERO_NODES, MOST_MEANS = 135, 0.1


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
    matrix, sides = plain_matrix(weight, wanted.axis), tuple[int, ...]()
    if isinstance(wanted.granularity, PerBlock):
        matrix = matrix.reshape(1, -1, wanted.granularity.size)  # blocks have grids of their own
    elif wanted.axis is not None:
        sides = tuple(np.delete(weight.shape, wanted.axis).tolist())
    kept = kept_weights(matrix)
    rows, seen = _fewest_bits(Aim(matrix), wanted, storage, kept=kept, sides=sides)
    if storage.correct and not storage.integer_zero and kept is None:
        grids = Grids(rows.format, symmetric=rows.format.rotated)
        rows = with_variance(seen.weight, rows, grids)
    return packed(
        rows,
        plain_weight(rows.codes(), weight.shape, wanted.axis),
        wanted,
    )


def fitted_to_outputs(
    matrix: Array,
    pair: Inputs,
    wanted: WeightPlan,
    storage: Storage,
    *,
    sides: tuple[int, ...],
    threads: int,
) -> Rows:
    """The points of a float64 `matrix` (groups, rows, columns) that on the quantized inputs come
    nearest to what the matrix makes of the float ones; its columns run along `sides`.
    """
    moments, cross = _joint(pair, threads)
    extra = _shrinkage(moments, pair.own.shape[1])
    target = _target(matrix, moments + extra, cross + extra)
    aim = Aim(target, moments + extra, moments)
    rows, _ = _fewest_bits(aim, wanted, storage, kept=kept_weights(matrix), sides=sides)
    return rows


@dataclass(frozen=True)
class Aim:
    """A weight (groups, rows, columns) and the moments of inputs (groups, columns, columns) that
    its fit and the error in the end are weighed with; None without inputs.
    """

    weight: Array
    moments: Array | None = None
    judged: Array | None = None

    def rotated(self, turn: Rotation) -> Aim | None:
        """The same in other coordinates; None where a few weights that are far larger than the
        others of their rows do not become so much less so that codes are worth the nodes.
        """
        if turn.mixed < LEAST_MIXED:
            return None
        weight = np.empty_like(self.weight)
        for part in row_parts(weight):
            weight[:, part] = turn.inverse(self.weight[:, part])
        if _largeness(self.weight) - _largeness(weight) <= ROTATION_PAYS / weight.size:
            return None
        seen = [m if m is None else turn.moments(m) for m in (self.moments, self.judged)]
        return Aim(weight, *seen)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a product, float32 (groups, drawn, columns): its `own` and the float model's
    `reference`, looked at about their means where a bias makes up for these.
    """

    own: Array
    reference: Array
    centered: bool


def _fewest_bits(
    aim: Aim,
    wanted: WeightPlan,
    storage: Storage,
    *,
    kept: Array | None,
    sides: tuple[int, ...],
) -> tuple[Rows, Aim]:
    """The fit of a matrix in the planned bits or in the fewest that keep an error, and what it was
    fitted to.
    """
    bound, integer_zero = _for(wanted, storage).max_error, storage.integer_zero or kept is not None
    grids = Grids(wanted.format, wanted.axis is not None, integer_zero, storage.symmetric)
    codable = grids.per_row and not integer_zero
    codable &= bound is not None or wanted.format.bits in TRELLIS_BITS
    distinct = _distinct(aim.weight) if codable else 0
    long = aim.moments is not None and aim.weight.size >= LONG_PAYS
    memory = trellis.LONG if long else trellis.SHORT
    turned = aim.rotated(rotation(sides)) if codable else None
    centered = codable and aim.moments is not None and not _zeros_pay(aim.weight)

    def fitted(bits: int) -> tuple[Rows, Aim]:
        coded = bits in TRELLIS_BITS and distinct > 1 << bits
        seen = turned if coded and turned else aim
        rotated = seen is turned
        fmt = replace(wanted.format, bits=bits, trellis=memory * coded, rotated=rotated)
        symmetric = grids.symmetric or rotated or (coded and centered)
        of_bits = replace(grids, format=fmt, symmetric=symmetric)
        return fit(seen.weight, seen.moments, of_bits, kept), seen

    def within(bits: int) -> tuple[Rows, Aim] | None:
        rows, seen = fitted(bits)
        close = bits == WIDEST or rows.relative_error(seen.weight, seen.judged) <= (bound or 0)
        return (rows, seen) if close else None

    return fitted(wanted.format.bits) if bound is None else fewest(WIDEST, within)


def _largeness(weight: Array) -> float:
    """The mean fourth power of what rows are about their means, in squares of the mean square."""
    fourths = squares = 0.0
    for part in row_parts(weight):
        rows = weight[:, part].astype(np.float64)
        energy = np.square(rows - rows.mean(axis=2, keepdims=True))
        fourths += float(np.square(energy).mean(axis=2).sum())
        squares += float(np.square(energy.mean(axis=2)).sum())
    return fourths / squares if squares else 0.0


def _zeros_pay(weight: Array) -> bool:
    """Whether zeros for the rows (groups, rows, columns) are worth their bytes: without them, what
    the means are of the weights' energy is lost, where more bits would leave a quarter for each.
    """
    means, all_but = np.square(weight.mean(axis=2)).sum(), weight.var(axis=2).sum()
    bits = 8 * (1 / weight.shape[2] + ZERO_NODES / weight.size)
    return bool(means > min(4**bits - 1, MOST_MEANS) * all_but)


def _distinct(weight: Array) -> float:
    """How many different weights there are, as far as they are repeated: infinite where most are
    not.
    """
    some = weight.reshape(-1)[:: max(1, weight.size >> 16)]
    found = len(np.unique(some))
    return found if found <= some.size // 2 else np.inf


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
