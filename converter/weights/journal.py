"""What a long search has measured, in a file beside the output, so that an interrupted one goes on
where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Journal:
    """Results by name; those in the file count if they were measured for the same `job`, any text
    that tells it.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path, self.job = path, job
        self.known: dict[str, Any] = {}
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            self.known = dict(document["known"]) if document["job"] == job else {}
        except (OSError, ValueError, KeyError, TypeError):
            # None yet, or none of ours: measured anew.
            return

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """The result of that name, measured and written down if it is not known."""
        if name not in self.known:
            self.known[name] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_name(f".{self.path.name}.new")
            unfinished.write_text(
                json.dumps({"job": self.job, "known": self.known}), encoding="utf-8"
            )
            unfinished.replace(self.path)
        result: T = self.known[name]
        return result

    def close(self) -> None:
        """Removes the file, as the search has ended."""
        self.path.unlink(missing_ok=True)
