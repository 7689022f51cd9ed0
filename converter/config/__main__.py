"""`python -m converter.config` writes the Markdown reference of the configuration file, made from
the key table.
"""

import sys
from collections.abc import Iterator

from converter.config.keys import RECIPES, SECTIONS


def reference() -> Iterator[str]:
    """One table a section: key, default, allowed, applies to, meaning."""
    for section in (*SECTIONS.values(), *RECIPES.values()):
        yield f"### `[{section.name}]`\n"
        yield _row("Key", "Default", "Allowed", "Applies to", "Meaning")
        yield _row(*["---"] * 5)
        for name, key in section.keys.items():
            yield _row(
                f"`{name}`",
                key.default_text,
                key.kind.allowed,
                str(key.scope),
                key.meaning,
            )
        yield ""


def _row(*cells: str) -> str:
    return " ".join(["|", " | ".join(cell.replace("|", r"\|") for cell in cells), "|"])


sys.stdout.writelines(f"{line}\n" for line in reference())
