"""What kernels cover, and convolutions with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converter.learn.site import Site
from converter.learn.terms import Shape, Term


@dataclass(frozen=True)
class Window:
    """What a kernel covers, axis by axis."""

    kernel: Shape
    strides: Shape
    dilations: Shape
    before: Shape
    after: Shape
    group: int = 1

    @property
    def plain(self) -> bool:
        """Whether it covers one place and every place once."""
        return not any((*self.before, *self.after)) and {*self.kernel, *self.strides} == {1}

    @property
    def dense(self) -> bool:
        """Whether it moves by one place."""
        return set(self.strides) == {1}

    def attributes(self) -> dict[str, Any]:
        """Those of a convolution."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "pads": [*self.before, *self.after],
            "group": self.group,
        }


def window_of(site: Site, kernel: Shape, size: Shape) -> Window:
    """The window of a convolution or pooling over `size` places, its padding in numbers."""
    ones = (1,) * len(kernel)
    strides, dilations = site.ints("strides") or ones, site.ints("dilations") or ones
    pads = site.ints("pads") or (0,) * (2 * len(kernel))
    before, after = pads[: len(kernel)], pads[len(kernel) :]
    if (auto := site.text("auto_pad", "NOTSET")).startswith("SAME"):
        total = [
            max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        ]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
    return Window(kernel, strides, dilations, before, after, site.whole("group", 1))


def reach(window: Window) -> list[int]:
    """How many places a kernel spans."""
    return [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]


def convolved(x: Term, weight: Term, window: Window, shape: Shape) -> Term:
    """A convolution whose output has a `shape`."""
    return x.scribe.op(
        "Conv",
        [x, weight],
        shape,
        **window.attributes(),
    )


def is_depthwise(shape: Shape, group: int) -> bool:
    """Whether a weight of `shape` has one channel for each of several groups."""
    return group > 1 and shape[0] == group and shape[1] == 1
