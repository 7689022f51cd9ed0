"""The INI grammar: bytes → sections and entries with their lines. It knows no key.

    [section]            # a trailing comment starts with a blank and `#` key = value          the
    first `=` separates; quotes around a value, or around an item of a list, are taken off #
    comment, ; comment whole lines, blanks before them allowed

UTF-8 with or without a byte order mark; lines end in LF, CR LF or CR.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from converter.errors import ConfigError

MAX_BYTES = 1_000_000
_LONGEST_SHOWN = 80
_COMMENT = re.compile(r"\s#")
_QUOTED = re.compile(r"""((?:^|[,:])\s*)('[^']*'|"[^"]*")""")
_STRAY_QUOTE = re.compile(r"""(?:^|[,:])\s*['"]|\0\s*[^\0\s,:]""")


# What stands where only the user can know the value.
UNFILLED = "FILL_IN"


@dataclass(frozen=True)
class Place:
    """A place in the file as every message names it; line 0 and empty names are left out."""

    file: Path
    line: int = 0
    section: str = ""
    key: str = ""
    text: str = ""

    def says(self, problem: str, advice: str) -> str:
        """Return the message: `full_quant.cfg:7: [common_quant_param] bit_num = 9: must be 8; write
        bit_num = 8.`.
        """
        where = f"{self.file}:{self.line}" if self.line else str(self.file)
        section = f"[{_shown(self.section)}]" if self.section else ""
        entry = " = ".join(_shown(part) for part in (self.key, self.text) if part)
        subject = " ".join(part for part in (section, entry) if part)
        return ": ".join(part for part in (where, subject, f"{problem}; {advice}.") if part)

    def reject(self, problem: str, advice: str) -> NoReturn:
        """Raise the message as a ConfigError."""
        raise ConfigError(self.says(problem, advice))


@dataclass(frozen=True)
class Document:
    """A file that follows the grammar: the place of every (section, key), in its order; a section's
    own key is "".
    """

    file: Path
    places: dict[tuple[str, str], Place]

    def place(self, section: str, key: str) -> Place:
        """Return the place of a key; one that is not set belongs at its section's line, if there is
        one.
        """
        header = self.places.get(
            (section, ""),
            Place(self.file, section=section),
        )
        return self.places.get((section, key)) or replace(header, key=key)

    def add(self, place: Place) -> None:
        """Add a section or an entry; ConfigError if it is there already."""
        first = self.places.setdefault((place.section, place.key), place)
        if first is not place:
            what = "key" if place.key else "section"
            place.reject(
                f"the {what} is already on line {first.line}",
                f"keep one of the two {what}s",
            )


def read_document(file: Path) -> Document:
    """Read a configuration file; ConfigError if it is unreadable, too large, not UTF-8 or breaks
    the grammar.
    """
    document = Document(file, {})
    section = ""
    for number, line in enumerate(_lines(_text(file)), start=1):
        statement = Place(file, number, text=line.strip())
        if statement.text.startswith("["):
            section = _section_name(statement)
            document.add(Place(file, number, section))
        elif statement.text and statement.text[0] not in "#;":
            document.add(_entry(statement, section))
    return document


def override(file: Path, line: int, name: str, text: str) -> Place:
    """Return the entry that sets `section.key`, the `name`, from outside the file; ConfigError like
    that of a line.
    """
    section, _, key = name.rpartition(".")
    return _entry(Place(file, line, text=f"{key} = {text}"), section)


def mask(text: str) -> str:
    """Return `text` with quoted parts overwritten by NUL, which no file holds: a separator left in
    it is a real one.
    """
    return _QUOTED.sub(
        lambda match: match[1] + "\0" * len(match[2]),
        text,
    )


def unquote(text: str) -> str:
    """Return `text` without surrounding blanks, and without its quotes if one pair encloses all of
    it.
    """
    text = text.strip()
    if len(text) > 1 and text[0] in "'\"" and text.find(text[0], 1) == len(text) - 1:
        return text[1:-1]
    return text


def _shown(text: str) -> str:
    """Return `text` fit for a terminal: control characters escaped, and cut where it is long."""
    cut = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut
    )


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        Place(file).reject(f"cannot be read ({reason})", "give the path of a readable INI file")
    if len(data) > MAX_BYTES:
        Place(file).reject("is larger than 1 MB", "give a configuration file, not a model or data")
    return _decoded(file, data)


def _decoded(file: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(_lines(error.object[: error.start].decode()))
        Place(file, line).reject("is not UTF-8 text", "save the file as UTF-8")
    before, nul, _ = text.partition("\0")
    if nul:
        Place(file, len(_lines(before))).reject(
            "holds a NUL character", "save the file as plain UTF-8 text"
        )
    return text


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n?|\n", text)


def _section_name(statement: Place) -> str:
    header = _without_comment(statement.text)
    name = header[1:-1].strip()
    if not header.endswith("]"):
        statement.reject("has no closing bracket", f"write {_shown(header)}]")
    if not name:
        statement.reject("names no section", "write the section's name between the brackets")
    return name


def _entry(statement: Place, section: str) -> Place:
    key, separator, value = statement.text.partition("=")
    key, value = key.strip(), _without_comment(value)
    if not separator or not key:
        statement.reject(
            "is neither a section nor a key with a value",
            "write [section] or key = value",
        )
    place = replace(statement, section=section, key=key, text=value)
    if not section:
        place.reject("stands before any section", "put it under its [section] line")
    if _STRAY_QUOTE.search(mask(value)):
        place.reject(
            "has a quote that does not enclose a whole value or item",
            "close the quote or remove it",
        )
    if not unquote(value):
        place.reject("has no value", f"write {_shown(key)} = value, or remove the line")
    return place


def _without_comment(text: str) -> str:
    comment = _COMMENT.search(mask(text))
    return text[: comment.start() if comment else None].strip()
