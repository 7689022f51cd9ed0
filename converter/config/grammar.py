"""The INI grammar: bytes → sections and entries with their lines. It knows no key.

    [section]            # a trailing comment starts with a blank and `#`
    key = value          the first `=` separates; quotes around a value, or around an item of a list, are taken off
    # comment, ; comment whole lines, blanks before them allowed

UTF-8 with or without a byte order mark; lines end in LF, CR LF or CR.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from converter.config.quotes import has_stray_quote, mask, unquote
from converter.errors import ConfigError

MAX_BYTES = 1_000_000
_Name = TypeVar("_Name")
_COMMENT = re.compile(r"\s#")
_LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Place:
    """A place in the file as every message names it; line 0 and empty names are left out."""

    file: Path
    line: int = 0
    section: str = ""
    key: str = ""
    text: str = ""

    def says(self, problem: str, advice: str) -> str:
        """Return the message: `full_quant.cfg:7: [common_quant_param] bit_num = 9: must be 8; write bit_num = 8.`."""
        where = f"{self.file}:{self.line}" if self.line else str(self.file)
        return ": ".join(part for part in (where, self._subject(), f"{problem}; {advice}.") if part)

    def reject(self, problem: str, advice: str) -> NoReturn:
        """Raise the message as a ConfigError."""
        raise ConfigError(self.says(problem, advice))

    def _subject(self) -> str:
        section = f"[{shown(self.section)}]" if self.section else ""
        entry = " = ".join(shown(part) for part in (self.key, self.text) if part)
        return " ".join(part for part in (section, entry) if part)


def shown(text: str) -> str:
    """Return `text` fit for a terminal: control characters escaped, and cut where it is long."""
    cut = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)


@dataclass(frozen=True)
class Document:
    """A file that follows the grammar: a place for every section and for every entry, in the file's order."""

    file: Path
    sections: dict[str, Place]
    entries: dict[tuple[str, str], Place]

    def place(self, section: str, key: str) -> Place:
        """Return the place of a key; one that is not set belongs at its section's line, if there is one."""
        header = self.sections.get(section, Place(self.file, section=section))
        return self.entries.get((section, key)) or replace(header, key=key)


def read_document(file: Path) -> Document:
    """Read a configuration file.

    Raises:
        ConfigError: the file cannot be read, is too large, is not UTF-8 text or breaks the grammar.
    """
    document = Document(file, {}, {})
    section = ""
    for number, line in enumerate(_lines(_text(file, _bytes(file))), start=1):
        statement = Place(file, number, text=line.strip())
        if statement.text.startswith("["):
            section = _section_name(statement)
            _add(document.sections, section, Place(file, number, section))
        elif statement.text and statement.text[0] not in "#;":
            entry = _entry(statement, section)
            _add(document.entries, (section, entry.key), entry)
    return document


def _bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        Place(file).reject(f"cannot be read ({reason})", "give the path of a readable INI file")
    if len(data) > MAX_BYTES:
        Place(file).reject("is larger than 1 MB", "give a configuration file, not a model or data")
    return data.removeprefix(codecs.BOM_UTF8)


def _text(file: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(_lines(data[: error.start].decode("utf-8")))
        Place(file, line).reject("is not UTF-8 text", "save the file as UTF-8")
    if "\0" in text:
        line = len(_lines(text[: text.index("\0")]))
        Place(file, line).reject("holds a NUL character", "save the file as plain UTF-8 text")
    return text


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _section_name(statement: Place) -> str:
    header = _without_comment(statement.text)
    name = header[1:-1].strip()
    if not header.endswith("]"):
        statement.reject("has no closing bracket", f"write {shown(header)}]")
    if not name:
        statement.reject("names no section", "write the section's name between the brackets")
    return name


def _entry(statement: Place, section: str) -> Place:
    key, separator, value = statement.text.partition("=")
    key, value = key.strip(), _without_comment(value)
    if not separator or not key:
        statement.reject("is neither a section nor a key with a value", "write [section] or key = value")
    place = Place(statement.file, statement.line, section, key, value)
    if not section:
        place.reject("stands before any section", "put it under its [section] line")
    if has_stray_quote(value):
        place.reject("has a quote that does not enclose a whole value or item", "close the quote or remove it")
    if not unquote(value):
        place.reject("has no value", f"write {shown(key)} = value, or remove the line")
    return place


def _without_comment(text: str) -> str:
    comment = _COMMENT.search(mask(text))
    return text[: comment.start() if comment else None].strip()


def _add(places: dict[_Name, Place], name: _Name, place: Place) -> None:
    """Add a place under its name, which must be new."""
    if name in places:
        what = "key" if place.key else "section"
        place.reject(f"the {what} is already on line {places[name].line}", f"keep one of the two {what}s")
    places[name] = place
