"""A configuration to begin with, made from the key table: every key that has an effect, most of
them commented out.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from calib.sources import IMAGE_AXES, PIXEL_DTYPES, InputSpec, as_item
from converter.config.keys import SECTIONS, Key, QuantType
from converter.errors import ModelError

# What the model cannot tell stands before these keys.
_FILL_IN = {
    "calibrate_path": "FILL IN: folders with 100 to 500 samples of the kind the model will see.",
    "normalize_mean": "FILL IN: what the model was trained with.",
}
_HEADER = """\
# A configuration for {mode}: lines marked FILL IN need you, the others may stay as they are.
# A key behind a # shows its default, or an example where it has none.
"""


def starter_config(inputs: Sequence[InputSpec], mode: QuantType) -> str:
    """The text of a configuration that loads as it is once its folders exist; data is optional but
    for FULL_QUANT.

    Raises ModelError for an input whose name cannot be written in a configuration.
    """
    data, text = _data_values(inputs), _HEADER.format(mode=mode)
    values = {"quant_type": mode, **(data if mode == "FULL_QUANT" else {})}
    for section in SECTIONS.values():
        keys = {name: key for name, key in section.keys.items() if mode in key.scope.modes}
        lines = [
            line
            for name, key in keys.items()
            for line in _lines(name, key, values.get(name), data.get(name))
        ]
        text += "\n".join(["", f"[{section.name}]", *lines, ""]) if keys else ""
    return text


def _lines(name: str, key: Key, value: str | None, example: str | None) -> Iterator[str]:
    """A key's meaning as a comment, and the key: behind a # where it has no value."""
    yield from (f"# {line}" for line in textwrap.wrap(key.meaning, 108))
    if value is None:
        default = key.kind.example if key.default_text == "-" else key.default_text
        yield f"# {name} = {example or default}"
        return
    if name in _FILL_IN:
        yield f"# {_FILL_IN[name]}"
    yield f"{name} = {value}"


def _data_values(inputs: Sequence[InputSpec]) -> dict[str, str]:
    """Pictures where every input takes them, else arrays; one folder an input."""
    names = [re.sub(r"[^\w.-]", "_", item.name) for item in inputs]
    pairs = [f"{_quoted(item.name)}:data/{name}" for item, name in zip(inputs, names, strict=True)]
    common = {"calibrate_path": ", ".join(pairs), "calibrate_size": "100"}
    pictures = {_picture(item) for item in inputs}
    if None in pictures or len(pictures) != 1:
        return {**common, "input_type": "NPY"}
    channels, height, width = pictures.pop() or (1, None, None)
    colours = {"image_to_format": "RGB" if channels == 3 else "GRAY"}
    normal = dict.fromkeys(
        ("normalize_mean", "normalize_std"),
        f"[{', '.join(['127.5'] * (channels or 1))}]",
    )
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
