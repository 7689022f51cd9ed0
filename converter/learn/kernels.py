"""Gradients of the weights of convolutions: for each position of the kernel a product of dy and the
x it met.

Without strides these x are x shifted, and a shift along rows may as well be one of dy the other
way: so a kernel of 3 x 3 needs two more copies of each, not nine. Where channels are few, all
shifts are stacked into one product. With strides a depthwise gradient is a convolution of x with dy
as its kernel, every channel of every sample by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from converter.learn.terms import Shape, Term
from converter.learn.windows import Window, convolved, is_depthwise, reach

# Samples are multiplied as one, of longer rows, where fewer numbers than this are in a row.
SHORT_ROW = 256
# Shifts are stacked into one product of more channels where there are no more channels than this.
FEW_CHANNELS = 64


def weight_gradient(x: Term, dy: Term, window: Window, shape: Shape) -> Term:
    """The gradient of the weight of `shape` of a convolution from x to dy."""
    if is_depthwise(shape, window.group) and not window.dense:
        return _as_kernel(x, dy, window, shape)
    stacks = window.dense and window.group == 1 and len(window.kernel) == 2
    stacks = stacks and max(shape[:2]) <= FEW_CHANNELS
    rows = _Rows(window.group, _worth_joining(dy, shape, window.group, stacks))
    if stacks:
        return _stacked(x, dy, window, rows).reshape(*shape)
    x, dy = rows.arranged(x), rows.arranged(dy)
    meet = _shifted if window.dense else _strided
    places = itertools.product(*map(range, window.kernel))
    found = [rows.product(*meet(x, dy, window, place)) for place in places]
    by_place = x.scribe.concat(
        [part.reshape(1, *shape[:2]) for part in found],
        0,
    )
    return by_place.transpose(1, 2, 0).reshape(*shape)


@dataclass(frozen=True)
class _Rows:
    """How the channels of a group are multiplied: all samples in one row, or each by itself and
    then summed.
    """

    group: int
    joined: bool

    def arranged(self, term: Term) -> Term:
        """A tensor (samples, channels, …) with the channels first where samples are joined."""
        return term.transpose(1, 0, *range(2, term.rank)) if self.joined else term

    def stacked(self, terms: Sequence[Term]) -> Term:
        """Arranged tensors as one, every channel of all of them before the next one."""
        axis = 1 if self.joined else 2
        shape = terms[0].shape
        parts = [term.reshape(*shape[:axis], 1, *shape[axis:]) for term in terms]
        stack = terms[0].scribe.concat(parts, axis)
        return stack.reshape(
            *shape[: axis - 1],
            -1,
            *shape[axis:],
        )

    def product(self, dy: Term, x: Term) -> Term:
        """The sum over samples and places of every channel of dy with every one of x of its group:
        (channels of dy, channels of x a group).
        """
        found = self._by_group(dy).matmul(self._by_group(x).swapped())
        found = found if self.joined else found.sum([0])
        return found.reshape(-1, found.shape[-1])

    def _by_group(self, term: Term) -> Term:
        outer = () if self.joined else term.shape[:1]
        channels = term.shape[len(outer)] // self.group
        return term.reshape(*outer, self.group, channels, -1)


def _worth_joining(dy: Term, shape: Shape, group: int, stacks: bool) -> bool:
    """Whether it is cheaper to bring samples together than to add their products up."""
    places, (rows, columns) = math.prod(dy.shape[2:]), (shape[0] // group, shape[1])
    if stacks:
        rows, columns = rows * shape[2], columns * shape[3]
    if rows == columns == 1:
        return places < SHORT_ROW
    return dy.shape[0] > 1 and rows * columns > places * (rows + columns)


def _stacked(x: Term, dy: Term, window: Window, rows: _Rows) -> Term:
    """One product of all rows' shifts with all columns': (dy's channels, x's channels, *kernel)."""
    height, width = window.kernel
    if not rows.joined and _is_flat(x, dy, window):
        all_dy, all_x = _flat_stacks(x, dy, window)
    else:
        x, dy = rows.arranged(x), rows.arranged(dy)
        all_dy = rows.stacked([_row_shifted(dy, x, window, (i,)) for i in range(height)])
        all_x = rows.stacked([_column_shifted(x, dy, window, j) for j in range(width)])
    found = rows.product(all_dy, all_x)
    by_place = found.reshape(found.shape[0] // height, height, -1, width)
    return by_place.transpose(0, 2, 1, 3)


def _is_flat(x: Term, dy: Term, window: Window) -> bool:
    """Whether lines with zeros between them, one behind the other, can be shifted as one."""
    padded = min(*window.before, *window.after) > 0
    return padded and dy.shape[-1] <= _pitch(x, window) and _lead(x, window) >= reach(window)[1] - 1


def _pitch(x: Term, window: Window) -> int:
    """From one line to the next; the zeros behind one are those before the next."""
    return x.shape[-1] + max(window.before[1], window.after[1])


def _lead(x: Term, window: Window) -> int:
    """Zeros before the first line."""
    return window.before[0] * _pitch(x, window) + window.before[1]


def _flat_stacks(x: Term, dy: Term, window: Window) -> tuple[Term, Term]:
    """All rows' shifts of dy and all columns' shifts of x, (samples, channels, length) each."""
    pitch, (down, right) = _pitch(x, window), window.dilations
    length = (dy.shape[2] + reach(window)[0] - 1) * pitch
    starts_dy = [i * down * pitch for i in range(window.kernel[0])]
    starts_x = [_lead(x, window) - j * right for j in range(window.kernel[1])]
    return _at(_lines(dy, pitch), starts_dy, length), _at(_lines(x, pitch), starts_x, length)


def _lines(term: Term, pitch: int) -> Term:
    """Pictures as one line each, zeros between their rows."""
    gap = pitch - term.shape[-1]
    padded = term.pad([0, 0, 0, 0], [0, 0, 0, gap])
    return padded.reshape(*term.shape[:2], -1)


def _at(line: Term, starts: Sequence[int], length: int) -> Term:
    """Lines of a `length`, each with the same numbers from another start on and zeros elsewhere."""
    parts: list[Term] = []
    end = 0
    for number, start in enumerate(starts):
        begin = number * length + start
        parts += [_zeros(line, begin - end), line]
        end = begin + line.shape[-1]
    parts.append(_zeros(line, len(starts) * length - end))
    stack = line.scribe.concat([part for part in parts if part.size], 2)
    return stack.reshape(line.shape[0], -1, length)


def _zeros(line: Term, count: int) -> Term:
    return line.like(0).expand(*line.shape[:2], count)


def _shifted(x: Term, dy: Term, window: Window, place: Shape) -> tuple[Term, Term]:
    """dy and x as they meet at a place of a kernel without strides."""
    return _row_shifted(dy, x, window, place[:-1]), _column_shifted(x, dy, window, place[-1])


def _column_shifted(x: Term, dy: Term, window: Window, column: int) -> Term:
    """x as the kernel's `column` meets it along dy's last axis."""
    before = window.before[-1] - column * window.dilations[-1]
    after = dy.shape[-1] - x.shape[-1] - before
    rest = [0] * (x.rank - 1)
    return x.pad([*rest, before], [*rest, after])


def _row_shifted(dy: Term, x: Term, window: Window, place: Shape) -> Term:
    """dy where x is that the kernel's `place`, but for the column, meets."""
    axes = zip(
        place,
        window.dilations[:-1],
        window.before[:-1],
        strict=True,
    )
    before = [
        0,
        0,
        *(k * d - b for k, d, b in axes),
        0,
    ]
    after = [n - m - b for n, m, b in zip(x.shape, dy.shape, before, strict=True)]
    return dy.pad(before, [0, 0, *after[2:-1], 0])


def _strided(x: Term, dy: Term, window: Window, place: Shape) -> tuple[Term, Term]:
    """dy and x as they meet at a place of a kernel with strides."""
    padded = x.pad(
        [0, 0, *window.before],
        [0, 0, *window.after],
    )
    steps = zip(
        place,
        window.dilations,
        dy.shape[2:],
        window.strides,
        strict=True,
    )
    met = padded.slice({i + 2: (k * d, n, s) for i, (k, d, n, s) in enumerate(steps)})
    return dy, met


def _as_kernel(x: Term, dy: Term, window: Window, shape: Shape) -> Term:
    """Every channel of every sample convolved with its dy, strides and dilations in each other's
    place.
    """
    size, samples = x.shape[2:], x.shape[0]
    axes = zip(
        dy.shape[2:],
        window.strides,
        reach(window),
        size,
        window.before,
        strict=True,
    )
    after = [(o - 1) * s + r - n - b for o, s, r, n, b in axes]
    x = x.pad(
        [0] * x.rank,
        [0, 0, *(min(a, 0) for a in after)],
    )
    swapped = Window(
        kernel=dy.shape[2:],
        strides=window.dilations,
        dilations=window.strides,
        before=window.before,
        after=tuple(max(a, 0) for a in after),
        group=samples * x.shape[1],
    )
    image = x.reshape(1, swapped.group, *x.shape[2:])
    kernels = dy.reshape(swapped.group, 1, *dy.shape[2:])
    found = convolved(image, kernels, swapped, (1, swapped.group, *window.kernel))
    return found.reshape(samples, *shape).sum([0])
