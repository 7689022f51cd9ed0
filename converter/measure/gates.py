"""Quality gates: what a conversion must reach for a build to go on, and the figures they are held
against.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(%|KB|MB|GB)", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Figures:
    """What gates look at, None where it was not measured.

    Bytes of both models, the least cosine similarity of an output, the share of samples with the
    same answer, and how many times faster the quantized model is. `unmeasured` says why there is no
    figure, where one reason holds for all.
    """

    size_before: int
    size_after: int
    cosine: float | None = None
    agreement: float | None = None
    speedup: float | None = None
    unmeasured: str = ""


@dataclass(frozen=True)
class Gates:
    """The bounds that were given. `max_size` is a number with KB, MB, GB, or % of the float model
    behind it.
    """

    min_cosine: float | None = None
    min_agreement: float | None = None
    min_speedup: float | None = None
    max_size: str | None = None

    def missed(self, figures: Figures) -> str:
        """The bounds that the figures miss, in words; a figure that was not measured misses. Empty
        if none is.
        """
        measured, bounds, words = asdict(figures), asdict(self), []
        absent = f"was not measured{figures.unmeasured and f' ({figures.unmeasured})'}"
        for name in ("cosine", "agreement", "speedup"):
            figure, bound = measured[name], bounds[f"min_{name}"]
            if bound is not None and not (figure is not None and figure >= bound):
                value = absent if figure is None else f"{figure:.6g} is less"
                words.append(f"{name} {value} (--min-{name} {bound:g})")
        before, after = figures.size_before, figures.size_after
        if self.max_size and after > size_limit(self.max_size, before):
            share = f"{after / 1e6:.6g} MB, {100 * after / before:.4g}% of the float model"
            words.append(f"size {share}, is more (--max-size {self.max_size})")
        return "; ".join(words)


def size_limit(text: str, size_before: int) -> float:
    """The bytes that `5MB` or `30%` of a float model stand for; ValueError for any other text."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        msg = f"'{text}' is no size; write for example 5MB, or 30% of the float model"
        raise ValueError(msg)
    return float(match[1]) * (size_before / 100 if match[2] == "%" else _UNITS[match[2].upper()])
