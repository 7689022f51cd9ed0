"""Gradients of operators that move or choose numbers: each goes back to where it came from."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from calib.affine import Array
from converter.learn.site import Rule, Site, by_input
from converter.learn.terms import NoGradientError, Term

# What np.pad calls the ways to pad with values of the tensor itself.
PAD_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
INT64 = ir.DataType.INT64


def reshaped(site: Site) -> Term:
    """Whatever the new shape was."""
    return site.dy.reshape(*site.x().shape)


def transpose(site: Site) -> Term:
    """The axes in their old order; without an attribute they were reversed."""
    order = site.ints("perm") or tuple(reversed(range(site.dy.rank)))
    return site.dy.transpose(*(order.index(i) for i in range(len(order))))


def concat(site: Site, index: int) -> Term:
    """The part that an input was."""
    axis = site.whole("axis", 0) % site.dy.rank
    sizes = [site.x(i).shape[axis] for i in range(index + 1)]
    return site.dy.slice({axis: (sum(sizes[:-1]), sizes[-1], 1)})


def split(site: Site) -> Term:
    """All parts, zeros for those that nothing depends on."""
    parts = [
        gradient or site.scribe.read(out).like(0).expand(*site.scribe.read(out).shape)
        for gradient, out in zip(site.gradients, site.node.outputs, strict=True)
    ]
    return site.scribe.concat(parts, site.whole("axis", 0))


def sliced(site: Site) -> Term:
    """Zeros where nothing was taken."""
    x, dy = site.x(), site.dy
    for axis, (start, _, step) in _ranges(site).items():
        count = dy.shape[axis]
        if step < 0:
            dy = dy.slice({axis: (count - 1, count, -1)})
            start, step = start + (count - 1) * step, -step
        dy = spread(dy, axis, step)
        before = [start if i == axis else 0 for i in range(x.rank)]
        after = [x.shape[i] - dy.shape[i] - before[i] if i == axis else 0 for i in range(x.rank)]
        dy = dy.pad(before, after)
    return dy


def spread(term: Term, axis: int, step: int) -> Term:
    """`step` - 1 zeros between numbers that were neighbours along an axis."""
    if step == 1 or term.shape[axis] == 1:
        return term
    outer, count, inner = term.shape[:axis], term.shape[axis], term.shape[axis + 1 :]
    zeros = term.like(0).expand(*outer, count, step - 1, *inner)
    # Concat, as Pad is slow where the last axis is short.
    apart = term.scribe.concat(
        [term.reshape(*outer, count, 1, *inner), zeros],
        axis + 1,
    )
    line = apart.reshape(*outer, count * step, *inner)
    return line.slice({axis: (0, (count - 1) * step + 1, 1)})


def _ranges(site: Site) -> dict[int, tuple[int, int, int]]:
    """What Slice takes along each axis, as Python counts it."""
    x = site.x()
    starts, ends = (site.array(i).tolist() for i in (1, 2))
    axes = site.array(3).tolist() if site.has(3) else list(range(len(starts)))
    steps = site.array(4).tolist() if site.has(4) else [1] * len(starts)
    found = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # ONNX lets an end lie before the first one, as Python does by leaving it out.
        size = x.shape[axis]
        stop = None if step < 0 and end < -size else end
        found[axis % x.rank] = slice(start, stop, step).indices(size)
    if math.prod(site.dy.shape) == 0:
        msg = "it takes nothing"
        raise NoGradientError(msg)
    return found


def pad(site: Site) -> Term:
    """What was not added; copies at the edges go back to what they are copies of."""
    x, mode, amounts = site.x(), site.text("mode", "constant"), site.array(1).tolist()
    axes = site.array(3).tolist() if site.has(3) else list(range(x.rank))
    half = len(amounts) // 2
    pairs = {axis % x.rank: (amounts[i], amounts[half + i]) for i, axis in enumerate(axes)}
    if mode == "constant":
        before, after = ([-pairs.get(i, (0, 0))[end] for i in range(x.rank)] for end in (0, 1))
        return site.dy.pad(before, after)
    dy = site.dy
    for axis, (before_, after_) in pairs.items():
        if before_ or after_:
            dy = dy.along(
                axis,
                _copies(x.shape[axis], before_, after_, mode).T,
            )
    return dy


def _copies(size: int, before: int, after: int, mode: str) -> Array:
    """The matrix that pads a line of `size` numbers."""
    if min(before, after) < 0:
        msg = f"it cuts off with mode {mode}"
        raise NoGradientError(msg)
    rows = np.pad(
        np.arange(size),
        (before, after),
        mode=PAD_MODES[mode],
    )  # type: ignore[call-overload]
    return np.asarray(np.eye(size)[rows])


def gather(site: Site) -> Term:
    """Every row adds up what was read from it."""
    data, indices, axis = site.x(0), site.x(1), site.whole("axis", 0) % site.x(0).rank
    outer, row = data.shape[:axis], data.shape[axis + 1 :]
    # The axis that is read comes first, as ScatterND wants it; those before it are part of a row.
    order = range(axis, axis + indices.rank)
    dy = site.dy.transpose(
        *order,
        *range(axis),
        *range(axis + indices.rank, site.dy.rank),
    )
    updates = dy.reshape(indices.size, *outer, *row)
    # Not a constant, which every session would keep.
    zeros = (data * 0).transpose(axis, *range(axis), *range(axis + 1, data.rank))
    places = indices.reshape(indices.size, 1).cast(INT64)
    # ScatterND counts negative indices from the end, as Gather does.
    summed = site.scribe.op(
        "ScatterND",
        [zeros, places, updates],
        zeros.shape,
        reduction="add",
    )
    return summed.transpose(
        *range(1, axis + 1),
        0,
        *range(axis + 1, data.rank),
    )


def tile(site: Site) -> Term:
    """The sum of all copies."""
    x, repeats = site.x(), site.array(1).tolist()
    pairs = [d for pair in zip(repeats, x.shape, strict=True) for d in pair]
    return site.dy.reshape(*pairs).sum(range(0, 2 * x.rank, 2))


def depth_to_space(site: Site) -> Term:
    """The blocks of pixels become channels again."""
    (n, c, h, w), size = site.x().shape, site.whole("blocksize", 1)
    blocks = site.dy.reshape(
        n,
        c // size**2,
        h,
        size,
        w,
        size,
    )
    order = (0, 3, 5, 1, 2, 4) if site.text("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.transpose(*order).reshape(n, c, h, w)


def space_to_depth(site: Site) -> Term:
    """The channels become blocks of pixels again."""
    (n, c, h, w), size = site.x().shape, site.whole("blocksize", 1)
    blocks = site.dy.reshape(
        n,
        size,
        size,
        c,
        h // size,
        w // size,
    )
    return blocks.transpose(0, 3, 4, 1, 5, 2).reshape(
        n,
        c,
        h,
        w,
    )


_RESHAPING: Callable[[Site, int], Term] = by_input(reshaped)

RULES: dict[str, Rule] = {
    "Reshape": _RESHAPING,
    "Flatten": _RESHAPING,
    "Squeeze": _RESHAPING,
    "Unsqueeze": _RESHAPING,
    "Transpose": by_input(transpose),
    "Concat": concat,
    "Split": by_input(split),
    "Slice": by_input(sliced),
    "Pad": by_input(pad),
    "Gather": by_input(gather),
    "Tile": by_input(tile),
    "DepthToSpace": by_input(depth_to_space),
    "SpaceToDepth": by_input(space_to_depth),
}
