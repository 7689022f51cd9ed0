"""What a configuration wants of single nodes and tensors: its sections in the file's order, of
which later ones win.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.affine import Range
from calib.sources import as_item
from converter.config import Config
from converter.config.keys import Recipe
from converter.errors import ConfigError

# The pattern of all names.
EVERY = "*"


def is_named(name: str, pattern: str) -> bool:
    """Whether a name is what the user wrote, literally (brackets and all) or as a glob pattern."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Wish:
    """The value of a key, and the section that it stands in."""

    value: Any
    section: str


def wishes_for(recipes: Iterable[Recipe], name: str, op_type: str) -> dict[str, Wish]:
    """What the sections want of a node, by key."""
    wanted = {}
    for recipe in recipes:
        about = {"node": is_named(name, recipe.pattern), "type": op_type == recipe.pattern}
        if about.get(recipe.kind):
            wanted.update({k: Wish(v, recipe.section) for k, v in recipe.wishes.items()})
    return wanted


def told(wanted: Mapping[str, Wish], keys: Collection[str]) -> str:
    """What the sections decided, in words to put behind a reason."""
    parts = [
        f"{key} = {str(wish.value).lower() if isinstance(wish.value, bool) else wish.value} in "
        f"[{wish.section}]"
        for key, wish in wanted.items()
        if key in keys
    ]
    return f"; {', '.join(parts)}" if parts else ""


def ranges_of(recipes: Iterable[Recipe], tensors: Collection[str]) -> dict[str, Range]:
    """The ranges that are given, by tensor."""
    given = ((recipe.pattern, recipe.wishes.get("range")) for recipe in recipes)
    found = {name: span for name, span in given if span is not None and name in tensors}
    return {name: Range(np.array(low), np.array(high)) for name, (low, high) in found.items()}


def check_recipes(
    config: Config, nodes: Collection[tuple[str, str]], tensors: Collection[str]
) -> None:
    """Raises ConfigError for a section about none of the `nodes` (name, operator type) and
    `tensors`.
    """
    there = {
        "node": ("no node is named", sorted({name for name, _ in nodes})),
        "type": ("no node is of type", sorted({op_type for _, op_type in nodes})),
        "tensor": ("no tensor is named", sorted(tensors)),
    }
    for recipe in config.recipes:
        what, names = there[recipe.kind]
        matches = is_named if recipe.kind == "node" else str.__eq__
        if not any(matches(name, recipe.pattern) for name in names):
            where = f"{config.path}:{recipe.line}: [{recipe.section}]"
            raise nearest_error(where, f"{what} '{recipe.pattern}'", recipe.pattern, names)


def nearest_error(where: str, what: str, wish: str, there: Sequence[str]) -> ConfigError:
    """The error that nothing in the model is called so, with the nearest name that is."""
    nearest = difflib.get_close_matches(wish, there, 1, cutoff=0.0)[0]
    item = written(nearest)
    so = "" if item == nearest else f", written {item}"
    return ConfigError(f"{where}: {what} in this model; the nearest is '{nearest}'{so}.")


def written(name: str) -> str:
    """A name as a configuration holds it; what no quotes can hold becomes a pattern."""
    return as_item(name) or str(as_item("".join(c if c.isalnum() else "?" for c in name)))


def recipe_text(wanted: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """The lines of sections about nodes, by name or `*`; `wanted` are keys with their values."""
    for name, keys in wanted.items():
        yield f"[node:{name if name == EVERY else written(name)}]"
        yield from (f"{key} = {value}" for key, value in keys.items())
        yield ""
