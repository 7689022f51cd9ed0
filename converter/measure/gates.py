"""Quality gates: what a conversion must reach for a build to go on, and the figures they are held
against.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(%|KB|MB|GB)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Figures:
    """What gates look at, None where it was not measured.

    Bytes of both models, the least cosine similarity of an output, the share of samples with the
    same answer, how many times faster the quantized model is at the least (the lower end of the
    95 % interval), and the share of right answers that it lost. `unmeasured` says why there is no
    figure, where one reason holds for all; `noisy` is the interval of the speed where it is too
    wide to judge.
    """

    size_before: int
    size_after: int
    cosine: float | None = None
    agreement: float | None = None
    speedup: float | None = None
    accuracy_drop: float | None = None
    unmeasured: str = ""
    noisy: str = ""


# Which figure a gate holds its bound against, and whether it must be at least that.
FIGURES = {
    "min_cosine": ("cosine", True),
    "min_agreement": ("agreement", True),
    "min_speedup": ("speedup", True),
    "max_accuracy_drop": ("accuracy_drop", False),
}


@dataclass(frozen=True)
class Gates:
    """The bounds that were given. `max_size` is a number with KB, MB, GB, or % of the float model
    behind it.
    """

    min_cosine: float | None = None
    min_agreement: float | None = None
    min_speedup: float | None = None
    max_accuracy_drop: float | None = None
    max_size: str | None = None

    def missed(self, figures: Figures) -> str:
        """The bounds that the figures miss, in words; a figure that was not measured misses. Empty
        if none is.
        """
        words = list(self._missed_figures(figures))
        before, after = figures.size_before, figures.size_after
        if self.max_size and after > size_limit(self.max_size, before):
            share = f"{after / 1e6:.6g} MB, {100 * after / before:.4g}% of the float model"
            words.append(f"size {share}, is more (--max-size {self.max_size})")
        return "; ".join(words)

    def _missed_figures(self, figures: Figures) -> Iterator[str]:
        measured, bounds = asdict(figures), asdict(self)
        absent = f"was not measured{figures.unmeasured and f' ({figures.unmeasured})'}"
        for gate, (name, at_least) in FIGURES.items():
            figure, bound, word = measured[name], bounds[gate], name.replace("_", " ")
            if bound is None:
                continue
            flag = f"(--{gate.replace('_', '-')} {bound:g})"
            if figure is None:
                yield f"{word} {absent} {flag}"
            elif name == "speedup" and figures.noisy and figure < bound:
                yield f"{word} cannot be judged on so busy a machine: {figures.noisy} {flag}"
            elif not (figure >= bound if at_least else figure <= bound):  # NaN misses
                yield f"{word} {figure:.6g} is {'less' if at_least else 'more'} {flag}"


def size_limit(text: str, size_before: int) -> float:
    """The bytes that `5MB` or `30%` of a float model stand for; ValueError for any other text."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        msg = f"'{text}' is no size; write for example 5MB, or 30% of the float model"
        raise ValueError(msg)
    return float(match[1]) * (size_before / 100 if match[2] == "%" else _UNITS[match[2].upper()])
