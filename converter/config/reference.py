"""The reference of the configuration file in Markdown, made from the key table."""

from __future__ import annotations

from typing import Any

from converter.config.keys import SECTIONS, Section


def reference_markdown() -> str:
    """Return one table a section: key, default, allowed, applies to, meaning."""
    return "\n".join(_table(section) for section in SECTIONS.values())


def _table(section: Section) -> str:
    head = [("Key", "Default", "Allowed", "Applies to", "Meaning"), ("---",) * 5]
    rows = [
        (f"`{name}`", default_text(key.default), key.kind.allowed, str(key.scope), key.meaning)
        for name, key in section.keys.items()
    ]
    return "\n".join([f"### `[{section.name}]`", "", *(_row(*cells) for cells in [*head, *rows]), ""])


def default_text(value: Any) -> str:
    """Return a default as it is written in the file; an empty one is a dash."""
    if value is None or value == ():
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _row(*cells: str) -> str:
    return " ".join(["|", " | ".join(cell.replace("|", r"\|") for cell in cells), "|"])
