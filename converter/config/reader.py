"""An INI file → `Config`: every section and key is known, every value allowed, and the rules
between keys hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from converter.config.grammar import (
    UNFILLED,
    Document,
    Place,
    override,
    read_document,
    unquote,
)
from converter.config.keys import (
    RECIPES,
    SECTIONS,
    Config,
    Key,
    Recipe,
    Section,
    section_named,
)
from converter.config.rules import RULES, Rule


def load_config(
    path: Path,
    overrides: Mapping[str, str] | None = None,
    *,
    source: Path = Path("overrides"),
    line: int = 0,
    rules: Sequence[Rule] = RULES,
) -> Config:
    """Read and check a configuration file.

    `overrides` maps names, written `section.key`, to texts that replace what the file says or add
    to it; they stand on `line` of the file `source`. Raises ConfigError if the file cannot be read,
    something is wrong or one of `rules` broken: the sentence names file, line, section and key.
    """
    document = read_document(path)
    for place in (override(source, line, name, text) for name, text in (overrides or {}).items()):
        document.places[place.section, place.key] = place
    for place in document.places.values():
        _check_section(place)
    keys = {name: _key_at(place) for name, place in document.places.items() if place.key}
    values = {name: _value(key, document.places[name]) for name, key in keys.items()}
    config = Config(
        path=path,
        **{row.attribute: _fill(row, values) for row in SECTIONS.values()},
    )
    config = replace(config, recipes=tuple(_recipes(config, keys, document, values)))
    for complaint in (complaint for rule in rules for complaint in rule(config)):
        document.place(complaint.section, complaint.key).reject(complaint.problem, complaint.advice)
    lines = {
        name: document.places[name].line for name in keys if document.places[name].file == path
    }
    return replace(config, warnings=tuple(_idle(config, keys, document)), lines=lines)


def _row(section: str) -> Section:
    row = section_named(section)
    assert row is not None
    return row


def _recipes(
    config: Config,
    keys: Mapping[tuple[str, str], Key],
    document: Document,
    values: Mapping[tuple[str, str], Any],
) -> Iterator[Recipe]:
    """The sections about some nodes or tensors, in the file's order, with what has an effect."""
    for (section, key), place in document.places.items():
        kind, _, pattern = section.partition(":")
        if key or section in SECTIONS:
            continue
        wishes = {
            name: values[of, name]
            for of, name in values
            if of == section and keys[of, name].scope.holds(config)
        }
        yield Recipe(section, place.line, kind.strip(), unquote(pattern), wishes)


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name` whatever its case, if any is."""
    spellings = {candidate.lower(): candidate for candidate in known}
    close = get_close_matches(name.lower(), spellings, n=1)
    return spellings[close[0]] if close else None


def _check_section(place: Place) -> None:
    if section_named(place.section) is None:
        known = [*SECTIONS, *(row.name for row in RECIPES.values())]
        near = _nearest(place.section, known)
        advice = (
            f"write [{near}]"
            if near
            else f"write one of {', '.join(f'[{name}]' for name in known)}"
        )
        place.reject("is not a section", advice)


def _key_at(place: Place) -> Key:
    keys = _row(place.section).keys
    if place.key not in keys:
        place.reject(
            f"is not a key of [{place.section}]",
            _advice_for_unknown(place.key, place.section),
        )
    return keys[place.key]


def _advice_for_unknown(name: str, section: str) -> str:
    """Look for the key of that very name in other sections, then for the nearest one in its own,
    then anywhere.
    """
    own = _row(section).keys
    homes = {key: home for home, other in SECTIONS.items() for key in other.keys}
    near = name if name in homes else _nearest(name, own) or _nearest(name, homes)
    if near is None:
        return f"write one of {', '.join(own)}"
    if near in own:
        return f"write {near}"
    return f"{'move the line' if near == name else f'write {near}'} under [{homes[near]}]"


def _value(key: Key, place: Place) -> Any:
    kind = key.kind
    with suppress(ValueError, KeyError):
        value = kind.parse(place.text)
        if kind.holds(value):
            return kind.locate(value, place.file.parent)
    if place.text == UNFILLED:
        place.reject("is not filled in yet", f"it must be {kind.allowed}")
    example = _nearest(place.text, kind.choices) or kind.example
    place.reject(f"must be {kind.allowed}", f"write for example {place.key} = {example}")


def _fill(section: Section, values: dict[tuple[str, str], Any]) -> Any:
    """Return the section's dataclass with the file's values and the table's defaults."""
    return section.table(
        **{key: value for (name, key), value in values.items() if name == section.name}
    )


def _idle(config: Config, keys: dict[tuple[str, str], Key], document: Document) -> Iterator[str]:
    for name, key in keys.items():
        if not key.scope.holds(config):
            yield document.places[name].says(
                f"has no effect, as it is for {key.scope}", "remove the line"
            )
