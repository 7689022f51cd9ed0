"""Quotes in a value: `'…'` or `"…"` around a whole value, or around a whole item of a list."""

from __future__ import annotations

import re

# NUL stands for quoted text: it cannot occur in a configuration file.
_FILLER = "\0"
_QUOTED = re.compile(r"""((?:^|[,:])\s*)('[^']*'|"[^"]*")""")
_STRAY = re.compile(r"""(?:^|[,:])\s*['"]|\0\s*[^\0\s,:]""")


def mask(text: str) -> str:
    """Return `text` with quoted parts, quotes included, overwritten: a separator found in it is a real one."""
    return _QUOTED.sub(lambda match: match[1] + _FILLER * len(match[2]), text)


def has_stray_quote(text: str) -> bool:
    """Whether a quote is left open, or closes before the end of its value or item."""
    return _STRAY.search(mask(text)) is not None


def unquote(text: str) -> str:
    """Return `text` without surrounding blanks, and without its quotes if one pair encloses all of it."""
    text = text.strip()
    if len(text) > 1 and text[0] in "'\"" and text.find(text[0], 1) == len(text) - 1:
        return text[1:-1]
    return text


def split_items(text: str) -> list[str]:
    """Split at the commas outside quotes; items are trimmed, and keep their quotes.

    Raises:
        ValueError: an item is empty.
    """
    masked = mask(text)
    cuts = [i for i, char in enumerate(masked) if char == ","]
    items = [text[a + 1 : b].strip() for a, b in zip([-1, *cuts], [*cuts, len(text)], strict=True)]
    if not all(unquote(item) for item in items):
        raise ValueError
    return items
