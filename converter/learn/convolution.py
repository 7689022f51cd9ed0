"""Gradients of convolutions, in the forms that ONNX Runtime's CPU kernels compute fastest.

y[m, o] = sum over c and k of x[c, o stride + k dilation - before] W[m, c, k].

The input's is a transposed convolution; without strides a convolution with the flipped kernel, for
which there are better kernels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from converter.learn.kernels import weight_gradient
from converter.learn.reducing import channel_sum
from converter.learn.site import Rule, Site, by_input
from converter.learn.terms import NoGradientError, Shape, Term
from converter.learn.windows import Window, convolved, is_depthwise, reach, window_of


def conv_input(site: Site) -> Term:
    """The gradient of Conv's input."""
    x, weight = site.x(0), site.x(1)
    window = _window(site, x)
    if window.plain and window.group == 1:
        order = (1, 0, *range(2, weight.rank))
        return convolved(site.dy, weight.transpose(*order), window, x.shape)
    flipped = _flipped(window)
    depthwise = is_depthwise(weight.shape, window.group)
    reaches = min(*flipped.before, *flipped.after) >= 0
    if window.dense and reaches and (depthwise or window.group == 1):
        order = (0, 1) if depthwise else (1, 0)
        turned = weight.transpose(*order, *range(2, weight.rank))
        return convolved(site.dy, _mirrored(turned), flipped, x.shape)
    return spread_back(site.dy, weight, window, x.shape)


def _mirrored(weight: Term) -> Term:
    """Every kernel back to front: a product with ones, which is faster than to copy one by one."""
    places = math.prod(weight.shape[2:])
    ones = weight.like(np.eye(places)[::-1])
    return weight.reshape(-1, places).matmul(ones).reshape(*weight.shape)


def _flipped(window: Window) -> Window:
    """The window that goes back from outputs to inputs where it moves by one place."""
    spans = reach(window)
    before = tuple(r - 1 - b for r, b in zip(spans, window.before, strict=True))
    after = tuple(r - 1 - a for r, a in zip(spans, window.after, strict=True))
    return replace(window, before=before, after=after)


def spread_back(dy: Term, weight: Term, window: Window, shape: Shape) -> Term:
    """A transposed convolution to `shape`."""
    axes = zip(
        dy.shape[2:],
        window.strides,
        reach(window),
        strict=True,
    )
    full = [(o - 1) * s + r for o, s, r in axes]
    sides = zip(
        shape[2:],
        full,
        window.before,
        window.after,
        strict=True,
    )
    more = [n + b + a - f for n, f, b, a in sides]
    attributes = {**window.attributes(), "output_padding": more}
    return dy.scribe.op("ConvTranspose", [dy, weight], shape, **attributes)


def conv_weight(site: Site) -> Term:
    """The gradient of Conv's weight."""
    x = site.x(0)
    return weight_gradient(
        x,
        site.dy,
        _window(site, x),
        site.x(1).shape,
    )


def transposed_input(site: Site) -> Term:
    """The gradient of ConvTranspose's input: the convolution with the same weight."""
    x, weight = site.x(0), site.x(1)
    return convolved(site.dy, weight, _transposed_window(site), x.shape)


def transposed_weight(site: Site) -> Term:
    """The gradient of ConvTranspose's weight: as of the convolution from its output to its
    input.
    """
    return weight_gradient(
        site.dy,
        site.x(0),
        _transposed_window(site),
        site.x(1).shape,
    )


def _transposed_window(site: Site) -> Window:
    """Of the convolution that goes back from a ConvTranspose's output to its input."""
    x, y, kernel = site.x(0), site.y, site.x(1).shape[2:]
    window = window_of(site, kernel, y.shape[2:])
    if site.ints("output_shape") or site.text("auto_pad", "NOTSET").startswith("SAME"):
        window = _shared_out(site, window)
    if _places(window, y.shape[2:]) != x.shape[2:]:
        msg = "its output_padding is not below its strides"
        raise NoGradientError(msg)
    return window


def _shared_out(site: Site, window: Window) -> Window:
    """With the padding that a given output_shape makes, an odd one more at the end only for
    SAME_UPPER.
    """
    more = site.ints("output_padding") or (0,) * len(window.kernel)
    places = site.x().shape[2:], site.y.shape[2:]
    axes = zip(*places, reach(window), window.strides, more, strict=True)
    total = [(o - 1) * s + r + m - n for o, n, r, s, m in axes]
    less = tuple(t // 2 for t in total)
    rest = tuple(t - t // 2 for t in total)
    upper = site.text("auto_pad", "NOTSET") == "SAME_UPPER"
    before, after = (less, rest) if upper else (rest, less)
    return replace(window, before=before, after=after)


def _places(window: Window, size: Shape) -> Shape:
    """How many places a window takes over `size`."""
    axes = zip(
        size,
        window.before,
        window.after,
        reach(window),
        window.strides,
        strict=True,
    )
    return tuple((n + b + a - r) // s + 1 for n, b, a, r, s in axes)


def _window(site: Site, x: Term) -> Window:
    return window_of(
        site,
        site.x(1).shape[2:],
        x.shape[2:],
    )


RULES: dict[str, Rule] = {
    "Conv": by_input(conv_input, conv_weight, lambda s: channel_sum(s.dy)),
    "ConvTranspose": by_input(transposed_input, transposed_weight, lambda s: channel_sum(s.dy)),
}
