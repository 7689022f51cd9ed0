"""The kinds of values a key can have: what is allowed, in words, and how the text becomes a Python
value.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from converter.config.grammar import mask, unquote

InputFolders = tuple[tuple[str, Path], ...]
NamePairs = tuple[tuple[str, str], ...]

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BEFORE_DRIVE = re.compile(r":\s*[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    `allowed` completes the sentence "must be …"; `example` is a text that is allowed; `parse` turns
    a text into a value, or raises ValueError or KeyError; `holds` says whether the value is
    allowed; `locate` resolves its relative paths against the configuration file's folder; `choices`
    are the names to look for a near miss in.
    """

    allowed: str
    example: str
    parse: Callable[[str], Any]
    holds: Callable[[Any], bool] = lambda value: True
    locate: Callable[[Any, Path], Any] = lambda value, folder: value
    choices: tuple[str, ...] = ()


def one_of(*names: str, **aliases: str) -> Kind:
    """One of a few names, whatever the case and with or without underscores; an alias stands for a
    name.
    """
    known = {_folded(name): name for name in names} | {
        _folded(alias): name for alias, name in aliases.items()
    }
    *others, last = names
    return Kind(
        f"{', '.join(others)} or {last}",
        names[0],
        lambda text: known[_folded(unquote(text))],
        choices=names,
    )


def _folded(name: str) -> str:
    return name.upper().replace("_", "")


def boolean() -> Kind:
    """`true` or `false`, in any case."""
    choice = one_of("true", "false")
    return replace(choice, parse=lambda text: choice.parse(text) == "true")


def integer(low: int, high: int, example: int | None = None) -> Kind:
    """A decimal integer from `low` to `high`, both included."""
    example = low if example is None else example
    return Kind(
        f"an integer from {low} to {high}",
        str(example),
        _integer,
        lambda value: low <= value <= high,
    )


def power_of_two(low: int, high: int, example: int) -> Kind:
    """A power of two from `low` to `high`, both included."""
    allowed = f"a power of two from {low} to {high}"
    return Kind(
        allowed,
        str(example),
        _integer,
        lambda value: low <= value <= high and value.bit_count() == 1,
    )


def _integer(text: str) -> int:
    text = unquote(text)
    if not _INTEGER.fullmatch(text):
        raise ValueError
    return int(text)


def number_between(low: float, high: float, example: float) -> Kind:
    """A number above `low` and below `high`, neither included."""
    return Kind(
        f"a number above {low:g} and below {high:g}",
        f"{example:g}",
        _finite,
        lambda value: low < value < high,
    )


def _finite(text: str) -> float:
    text = unquote(text)
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def interval() -> Kind:
    """Two numbers, the lower one first: `[-1, 1]`."""
    return Kind(
        "two finite numbers in brackets, the lower one first",
        "[-1, 1]",
        lambda text: tuple(map(_finite, _bracketed(text))),
        lambda value: len(value) == 2 and value[0] < value[1],
    )


def _bracketed(text: str) -> list[str]:
    text = unquote(text)
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError
    return text[1:-1].split(",")


def channel_values(nonzero: bool = False) -> Kind:
    """One number a channel, 1 or 3 channels: `[127.5]`, `[104, 117, 123]`; the brackets may be left
    out.
    """

    def parse(text: str) -> tuple[float, ...]:
        text = unquote(text)
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        return tuple(_finite(item) for item in text.split(","))

    def holds(numbers: tuple[float, ...]) -> bool:
        return len(numbers) in (1, 3) and not (nonzero and 0 in numbers)

    allowed = f"1 or 3 finite numbers{' other than 0' if nonzero else ''}"
    return Kind(allowed, "[127.5, 127.5, 127.5]", parse, holds)


def names(example: str) -> Kind:
    """A comma list of names, each trimmed; a name in quotes may hold commas."""
    return Kind(
        "names separated by commas",
        example,
        lambda text: tuple(unquote(item) for item in _items(text)),
    )


def _items(text: str) -> list[str]:
    """Split at the commas outside quotes; ValueError if an item, which keeps its quotes, is
    empty.
    """
    cuts = [
        -1,
        *(i for i, char in enumerate(mask(text)) if char == ","),
        len(text),
    ]
    items = [text[start + 1 : end].strip() for start, end in pairwise(cuts)]
    if not all(unquote(item) for item in items):
        raise ValueError
    return items


def path(example: str) -> Kind:
    """A path; see `_seen` for where a relative one starts."""
    return Kind("a path", example, lambda text: Path(unquote(text)), locate=_seen)


def path_beside(example: str) -> Kind:
    """A path; a relative one starts at the configuration file's folder."""
    return replace(path(example), locate=lambda value, folder: folder / value)


def input_folders() -> Kind:
    r"""A comma list of `input_name:folder`, each input once.

    The last `:` outside quotes separates, so that `input:0:/data` names the input `input:0`; a
    single letter between that `:` and a slash is a drive, as in `image:C:\data`. A folder in quotes
    may hold commas, colons and blanks.
    """

    def parse(text: str) -> InputFolders:
        return tuple(_input_folder(item) for item in _items(unquote(text)))

    def holds(pairs: InputFolders) -> bool:
        return len(dict(pairs)) == len(pairs)

    allowed = "input_name:folder pairs separated by commas, each input once"
    return Kind(allowed, "image:calib", parse, holds, _located)


def name_pairs(example: str) -> Kind:
    """A comma list of `name:name`, each name once; the last `:` outside quotes separates."""

    def parse(text: str) -> NamePairs:
        return tuple(_name_pair(item) for item in _items(unquote(text)))

    def holds(pairs: NamePairs) -> bool:
        return all(len(set(names)) == len(pairs) for names in zip(*pairs, strict=True))

    allowed = "input_name:output_name pairs separated by commas, each name once"
    return Kind(allowed, example, parse, holds)


def _name_pair(item: str) -> tuple[str, str]:
    item = unquote(item)
    cut = mask(item).rfind(":")
    left, right = unquote(item[: max(cut, 0)]), unquote(item[cut + 1 :])
    if not left or not right:
        raise ValueError
    return left, right


def _input_folder(item: str) -> tuple[str, Path]:
    item = unquote(item)
    masked = mask(item)
    drive = _BEFORE_DRIVE.search(masked)
    cut = drive.start() if drive else masked.rfind(":")
    name, folder = unquote(item[: max(cut, 0)]), unquote(item[cut + 1 :])
    is_bare_drive = len(name) == 1 and folder.startswith("\\")
    if not name or not folder or is_bare_drive:
        raise ValueError
    return name, Path(folder)


def _located(pairs: InputFolders, folder: Path) -> InputFolders:
    return tuple((name, _seen(path, folder)) for name, path in pairs)


def _seen(path: Path, folder: Path) -> Path:
    """See a path from `folder` if it exists there, else as it is, from the current folder."""
    # Path.exists raises where a name is too long for the file system.
    return folder / path if os.path.exists(folder / path) else path  # noqa: PTH110
