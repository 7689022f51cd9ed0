"""The kinds of values a key can have: what is allowed, in words, and how the text becomes a Python value."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.config.quotes import mask, split_items, unquote

InputFolders = tuple[tuple[str, Path], ...]

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_BEFORE_DRIVE = re.compile(r":\s*[A-Za-z]:[\\/]")


def _stay(value: Any, folder: Path) -> Any:
    """Leave a value that holds no path as it is."""
    return value


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    `allowed` completes the sentence "must be …"; `example` is a text that is allowed; `parse` turns a text into the
    value and raises ValueError for a text that is not allowed; `locate` resolves the value's relative paths against
    the configuration file's folder; `choices` are the names to look for a near miss in.
    """

    allowed: str
    example: str
    parse: Callable[[str], Any]
    locate: Callable[[Any, Path], Any] = _stay
    choices: tuple[str, ...] = ()


def one_of(*names: str, **aliases: str) -> Kind:
    """One of a few names, whatever the case and with or without underscores; an alias stands for a name."""
    known = {_folded(name): name for name in names} | {_folded(alias): name for alias, name in aliases.items()}

    def parse(text: str) -> str:
        name = known.get(_folded(unquote(text)))
        if name is None:
            raise ValueError
        return name

    *others, last = names
    return Kind(f"{', '.join(others)} or {last}", names[0], parse, choices=names)


def _folded(name: str) -> str:
    return name.upper().replace("_", "")


def boolean() -> Kind:
    """`true` or `false`, in any case."""
    choice = one_of("true", "false")
    return Kind(choice.allowed, choice.example, lambda text: choice.parse(text) == "true", choices=choice.choices)


def integer(low: int, high: int, example: int | None = None) -> Kind:
    """A decimal integer from `low` to `high`, both included."""

    def parse(text: str) -> int:
        text = unquote(text)
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Kind(f"an integer from {low} to {high}", str(low if example is None else example), parse)


def power_of_two(low: int, high: int, example: int) -> Kind:
    """A power of two from `low` to `high`, both included."""
    whole = integer(low, high)

    def parse(text: str) -> int:
        value: int = whole.parse(text)
        if value & (value - 1):
            raise ValueError
        return value

    return Kind(f"a power of two from {low} to {high}", str(example), parse)


def _finite(text: str) -> float:
    text = unquote(text)
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def number_between(low: float, high: float, example: float) -> Kind:
    """A number above `low` and below `high`, neither included."""

    def parse(text: str) -> float:
        value = _finite(text)
        if not low < value < high:
            raise ValueError
        return value

    return Kind(f"a number above {low:g} and below {high:g}", f"{example:g}", parse)


def channel_values(nonzero: bool = False) -> Kind:
    """One number a channel, 1 or 3 channels: `[127.5]`, `[104, 117, 123]`; the brackets may be left out."""

    def parse(text: str) -> tuple[float, ...]:
        text = unquote(text)
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        numbers = tuple(_finite(item) for item in text.split(","))
        if len(numbers) not in (1, 3) or (nonzero and 0 in numbers):
            raise ValueError
        return numbers

    return Kind(f"1 or 3 finite numbers{' other than 0' if nonzero else ''}", "[127.5, 127.5, 127.5]", parse)


def names(example: str) -> Kind:
    """A comma list of names, each trimmed; a name in quotes may hold commas."""

    def parse(text: str) -> tuple[str, ...]:
        return tuple(unquote(item) for item in split_items(text))

    return Kind("names separated by commas", example, parse)


def path(example: str) -> Kind:
    """A path; a relative one starts at the current folder."""
    return Kind("a path", example, lambda text: Path(unquote(text)))


def input_folders() -> Kind:
    r"""A comma list of `input_name:folder`, each input once.

    The last `:` outside quotes separates, so that `input:0:/data` names the input `input:0`; a single letter between
    that `:` and a slash is a drive, as in `image:C:\data`. A folder in quotes may hold commas, colons and blanks.
    """

    def parse(text: str) -> InputFolders:
        pairs = tuple(_input_folder(item) for item in split_items(unquote(text)))
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError
        return pairs

    return Kind("input_name:folder pairs separated by commas, each input once", "image:calib", parse, _located)


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
    return tuple((name, _near(path, folder)) for name, path in pairs)


def _near(path: Path, folder: Path) -> Path:
    """Return the path seen from `folder` if it exists there, else the path as it is, seen from the current folder."""
    # Path.exists raises where a name is too long for the file system; os.path.exists says no.
    return folder / path if os.path.exists(folder / path) else path  # noqa: PTH110
