"""Trained weights in a plan: their own codes where the target's kernels take them, else the nearest
that they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from calib.affine import Array, QParams, along
from converter.job import Watch
from converter.plan.matrices import breaks_bound, plain_matrix, plain_weight
from converter.plan.plan import QuantizedWeight, QuantPlan, WeightPlan
from converter.plan.units import Weighted
from converter.prepare.fake_quant import Trained
from converter.weights.gptq import Grid, nearest, search_scales
from converter.weights.integer import least_scales, packed

# A weight is a code times a scale where it is to within this of a code: float32 rounding, folded
# operators included.
CLOSE = 1e-3
# Two scales are the same to within float32 rounding.
SAME = 1e-6
# Steps of a bias that the largest product of a channel has at the least, if its codes allow.
BIAS_STEPS = 1 << 10
# Columns on which most scales are found out not to be one.
PROBED = 32


@dataclass(frozen=True)
class Kept:
    """How much of a weight was kept: channels in all, those rounded `anew`, and the error of these
    relative to them.
    """

    channels: int
    anew: int
    error: float


def with_trained_weights(
    units: Iterable[Weighted], plan: QuantPlan, trained: Trained, everything: bool
) -> tuple[QuantPlan, dict[str, Kept]]:
    """The plan with the trained weights and their biases, and how much of each was kept.

    Weights on no grid are left out, or, with `everything`, rounded for least error of the weights.
    """
    kept: dict[str, Kept] = {}
    for own in units if trained else ():
        unit = own.unit
        bias = own.bias
        rows = _Rows.of(own, trained.weights)
        if not (everything or rows.scale.any()):
            continue
        tensor = plan.tensors.get(unit.inputs[0])
        data = None
        if bias is not None and tensor and tensor.group in plan.qparams:
            data = plan.read_params(unit, tensor.name)
        weight, how_much = rows.decided(own.wanted, bias, data)
        if rows.scale.any():
            kept[unit.name] = how_much
        biases = {} if bias is None else {unit.name: bias}
        plan = plan.with_weights({unit.name: weight}, biases)
    return plan, kept


def tell_kept(kept: Mapping[str, Kept], watch: Watch) -> None:
    """Says how many weights are what training made them, and what the others lost."""
    channels = sum(each.channels for each in kept.values())
    anew = sum(each.anew for each in kept.values())
    if kept:
        watch.tell(
            f"Trained weights of {channels - anew} of {channels} channels are kept bit for bit."
        )
    if anew:
        worst = max(kept, key=lambda name: kept[name].error)
        watch.tell(
            f"The other {anew} are rounded anew, as the target's kernels would not compute "
            "exactly with their codes; "
            f"they change most in {worst}, by {kept[worst].error:.2%}."
        )


@dataclass(frozen=True)
class _Rows:
    """A weight as rows (groups, rows, columns) with its `codes`; `scale` (groups, rows) is 0 where
    they are unknown.

    `weight_of` brings rows back into the weight's shape.
    """

    weight_of: Callable[[Array], Array]
    matrix: Array
    codes: Array
    scale: Array

    @classmethod
    def of(cls, own: Weighted, trained: Mapping[str, QuantizedWeight]) -> _Rows:
        view, axis = own.view, own.wanted.axis
        shape = own.weight.shape
        taught = trained.get(own.unit.name)
        rows = view.matrix if view else partial(plain_matrix, axis=axis)
        weight_of = view.weight if view else partial(plain_weight, shape=shape, axis=axis)
        matrix = rows(own.weight.astype(np.float64))
        if taught is not None and taught.codes.shape == shape:
            q = taught.qparams
            scales = along(q.scale.astype(np.float64), q.axis, shape)
            scales = np.broadcast_to(scales, shape)
            codes = taught.codes.astype(np.float64) - along(q.zero_point, q.axis, shape)
            scale, codes = _as_taught(matrix, rows(codes), rows(scales))
        else:
            scale, codes = _found_out(matrix)
        if axis is None and np.ptp(scale):
            scale[:] = 0  # one scale must serve them all
        return cls(weight_of, matrix, codes, scale)

    def decided(
        self, wanted: WeightPlan, bias: Array | None, data: QParams | None
    ) -> tuple[QuantizedWeight, Kept]:
        """The weight as the kernel takes it, beside a `bias` (channels,) where `data` are the
        parameters of its input.

        An int32 bias counts products of two steps: these must neither be so small that it overflows
        nor, with few codes, so large that it is coarse.
        """
        grid = Grid(wanted.format, wanted.pair_limit)
        whole = wanted.axis is None
        scale = self.scale.copy()
        codes = self.codes.copy()
        floor = np.zeros_like(self.scale)
        if bias is not None and data is not None:
            floor = least_scales(bias, data, scale.shape, not whole)
            factor = _refinement(codes, data.format.qmax - data.format.qmin, grid)
            if whole:
                factor = np.full_like(scale, factor.min())
            scale = scale / factor
            codes = codes * factor[..., None]
        anew = ~((scale > 0) & (scale >= floor) & _taken(codes, grid))
        if anew.any():
            if whole:
                anew[:] = True
            codes[anew], scale[anew] = _rounded(
                self.matrix[anew], scale[anew], floor[anew], grid=grid, per_channel=not whole
            )
        error = np.square(self.matrix - codes * scale[..., None])[anew].sum()
        power = np.square(self.matrix)[anew].sum()
        relative = float(np.sqrt(error / power)) if power else 0.0
        kept = Kept(anew.size, int(anew.sum()), relative)
        return packed(self.weight_of(codes), scale, wanted), kept


def _found_out(matrix: Array) -> tuple[Array, Array]:
    """Scales and codes of a weight that is on grids of which training told nothing."""
    scale = np.array([[_recovered(row) for row in group] for group in matrix])
    divisor = np.where(scale > 0, scale, 1.0)
    codes = np.rint(matrix / divisor[..., None])
    used = codes.any(axis=2)
    if not scale.all():
        scale[:] = 0  # it is by chance that some rows lie on a grid
    elif used.any():
        # A channel without weights may have any scale; that of its bias follows from it.
        scale[~used] = scale[used].min()
    return scale, codes


def _as_taught(matrix: Array, codes: Array, trained: Array) -> tuple[Array, Array]:
    """Scales and codes where `matrix` is the trained codes times one factor a row, which folding
    may have changed.
    """
    power = np.square(codes).sum(axis=2)
    scale = trained[..., 0]
    shared = (matrix * codes).sum(axis=2)
    ratio = np.divide(
        shared,
        power,
        out=scale.copy(),
        where=power > 0,
    )
    size = np.abs(ratio)
    error = np.abs(matrix - ratio[..., None] * codes).max(axis=2)
    right = error <= CLOSE * size
    size = np.where(np.abs(size - scale) <= SAME * scale, scale, size)
    size = np.where(right, size, 0.0).astype(np.float32)
    return size.astype(np.float64), codes * np.sign(ratio)[..., None]


def _recovered(row: Array) -> float:
    """The largest scale that `row` is whole multiples of, -128 to 127; 0 if there is none."""
    order = np.argsort(-np.abs(row))
    row, largest = row[order], float(np.abs(row).max(initial=0.0))
    if not largest:
        return 1.0
    peaks = np.arange(1, 129)
    for part in (row[:PROBED], row):
        codes = np.outer(peaks / largest, part)
        peaks = peaks[np.abs(codes - np.rint(codes)).max(axis=1) <= CLOSE]
    if not peaks.size:
        return 0.0
    codes = np.rint(row * (peaks[0] / largest))
    return _stored(row, codes, largest / peaks[0])


def _stored(row: Array, codes: Array, scale: float) -> float:
    """The float32 next to `scale` that gives the weights bit for bit, if there is one."""
    near = np.float32(scale)
    below = np.nextafter(near, np.float32(0))
    above = np.nextafter(near, np.float32(np.inf))
    wanted = row.astype(np.float32)

    def is_exact(tried: np.float32) -> bool:
        restored = codes * np.float64(tried)
        return np.array_equal(restored.astype(np.float32), wanted)

    return float(next(filter(is_exact, (near, below, above)), near))


def _taken(codes: Array, grid: Grid) -> Array:
    """Whether kernels compute exactly with the codes of a row."""
    taken = (codes.min(axis=2) >= -128) & (codes.max(axis=2) <= grid.format.qmax)
    if grid.pair_limit is not None:
        taken &= ~breaks_bound(codes, grid.pair_limit)
    return np.asarray(taken)


def _refinement(codes: Array, levels: int, grid: Grid) -> Array:
    """The power of two that each row's codes may be multiplied by, and should be for the bias's
    sake.
    """
    peak = np.maximum(np.abs(codes).max(axis=2), 1)
    wanted = np.ceil(np.log2(BIAS_STEPS / (peak * levels)))
    possible = np.floor(np.log2(grid.format.qmax / peak)).clip(0)
    factor = np.exp2(np.clip(wanted, 0, possible))
    return np.where(_taken(codes * factor[..., None], grid), factor, 1.0)


def _rounded(
    matrix: Array, scale: Array, floor: Array, *, grid: Grid, per_channel: bool
) -> tuple[Array, Array]:
    """Codes and scales of rows (n, columns): at the scale they have, or at the best there is if
    that errs less.
    """
    alike = np.ones((1, matrix.shape[1]))
    best = search_scales(matrix[None], alike, grid, per_channel)[0]
    starts = np.where(scale > 0, scale, best), best
    tried = [np.maximum(start, floor).astype(np.float32).astype(np.float64) for start in starts]
    codes = [nearest(matrix / s[:, None], grid) for s in tried]
    own, other = (
        np.square(matrix - c * s[:, None]).sum(axis=1) for c, s in zip(codes, tried, strict=True)
    )
    first = own <= other
    if not per_channel:
        first = np.full(scale.shape, own.sum() <= other.sum())
    return np.where(first[:, None], *codes), np.where(first, *tried)
