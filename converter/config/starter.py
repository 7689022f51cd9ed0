"""A configuration to begin with, made from the key table: every key that has an effect, most of
them commented out.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from calib.sources import IMAGE_AXES, PIXEL_DTYPES, InputSpec, as_item
from converter.config.grammar import UNFILLED
from converter.config.keys import SECTIONS, Key, QuantType
from converter.errors import ModelError

# What the model cannot tell stands before these keys.
_FILL_IN = {
    "calibrate_path": "FILL IN: folders with 100 to 500 samples of the kind the model will see.",
    "normalize_mean": "FILL IN: what the model was trained with, a number for each channel.",
}
_HEADER = """\
# A configuration for {mode}: lines marked FILL IN need you, the others may stay as they are.
# A key behind a # shows its default, or an example where it has none.
"""


@dataclass(frozen=True)
class Scaling:
    """Lists of numbers as they are written, and why a model wants them."""

    mean: str
    std: str
    reason: str


@dataclass(frozen=True)
class Known:
    """What is known of a model: the inputs that data is for, the `[job]` of its files, and how its
    pictures are scaled, None where that does not show.
    """

    inputs: Sequence[InputSpec]
    job: Mapping[str, str] = field(default_factory=dict)
    scaling: Scaling | None = None


def starter_config(known: Known, mode: QuantType) -> str:
    """The text of a configuration. It loads once its folders exist and what only the user can know
    is filled in; data is optional but for FULL_QUANT.

    Raises ModelError for an input whose name cannot be written in a configuration.
    """
    data, text = _data_values(known), _HEADER.format(mode=mode)
    values = {
        "quant_type": mode,
        **known.job,
        **(data if mode == "FULL_QUANT" else {}),
    }
    remarks = dict(_FILL_IN)
    if known.scaling:
        remarks["normalize_mean"] = known.scaling.reason
    for section in SECTIONS.values():
        keys = {name: key for name, key in section.keys.items() if mode in key.scope.modes}
        lines = [
            line
            for name, key in keys.items()
            for line in _lines(name, key, values.get(name), remarks.get(name))
        ]
        text += "\n".join(["", f"[{section.name}]", *lines, ""]) if keys else ""
    return text


def _lines(name: str, key: Key, value: str | None, remark: str | None) -> Iterator[str]:
    """A key's meaning as a comment, and the key: behind a # where it has no value."""
    yield from (f"# {line}" for line in textwrap.wrap(key.meaning, 108))
    if value is None:
        default = key.kind.example if key.default_text == "-" else key.default_text
        yield f"# {name} = {default}"
        return
    yield from (f"# {line}" for line in textwrap.wrap(remark or "", 108))
    yield f"{name} = {value}"


def _data_values(known: Known) -> dict[str, str]:
    """Pictures where every input takes them, else arrays; one folder an input."""
    inputs = known.inputs
    names = [re.sub(r"[^\w.-]", "_", item.name) for item in inputs]
    pairs = [f"{_quoted(item.name)}:data/{name}" for item, name in zip(inputs, names, strict=True)]
    common = {"calibrate_path": ", ".join(pairs), "calibrate_size": "100"}
    pictures = {_picture(item) for item in inputs}
    if None in pictures or len(pictures) != 1:
        return {**common, "input_type": "NPY"}
    channels, height, width = pictures.pop() or (1, None, None)
    colours = {"image_to_format": "RGB" if channels == 3 else "GRAY"}
    scaling = known.scaling or Scaling(UNFILLED, UNFILLED, "")
    normal = {"normalize_mean": scaling.mean, "normalize_std": scaling.std}
    size = {"resize_width": str(width), "resize_height": str(height)} if width and height else {}
    return {**common, "input_type": "IMAGE", **colours, **normal, **size}


def _picture(spec: InputSpec) -> tuple[int | None, ...] | None:
    """Channels, height and width of an input that takes pictures."""
    fits = [
        axes
        for axes in IMAGE_AXES
        if len(spec.shape) == 4 and spec.shape[axes.index("C")] in (1, 3)
    ]
    if not fits or spec.dtype.name not in PIXEL_DTYPES:
        return None
    return tuple(spec.shape[fits[0].index(axis)] for axis in "CHW")


def _quoted(name: str) -> str:
    """The name as an item of a list."""
    if (item := as_item(name)) is None:
        msg = (
            f"The model's input {name!r} has a name that no configuration can hold; rename it in "
            "the model."
        )
        raise ModelError(msg)
    return item
