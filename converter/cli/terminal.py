"""What a person at a terminal sees while a job runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

import click

from converter.job import Watch

T = TypeVar("T")
# What stands beside a progress bar, at its longest.
BESIDE_BAR = "  [] 100%  00:00:00"


def show(text: str, err: bool = False) -> None:
    """Prints one line: names from models and folders cannot break it or command the terminal."""
    click.echo(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text),
        err=err,
    )


def columns_of(stream: TextIO) -> int | None:
    """The width of the terminal that a stream writes to; None where it is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


class Terminal(Watch):
    """Shows progress on a terminal only, remarks when verbose, and warnings always."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        self.quiet, self.verbose = quiet, verbose

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Hands the items on under a progress bar with the estimated time left."""
        columns = shutil.get_terminal_size().columns
        room = columns - len(label) - len(BESIDE_BAR)
        dumb = os.environ.get("TERM") == "dumb" or room < 1
        if self.quiet or dumb or not sys.stderr.isatty():
            yield from items
            return
        with click.progressbar(
            items, length=total, label=label, file=sys.stderr, show_eta=True, width=min(36, room)
        ) as bar:
            yield from bar

    def say(self, text: str) -> None:
        """A line for --verbose."""
        if self.verbose:
            show(text, err=True)

    def tell(self, text: str) -> None:
        """A line of the result, unless quiet."""
        if not self.quiet:
            show(text)

    def warn(self, text: str) -> None:
        """A line that starts with WARNING."""
        show(f"WARNING: {text}", err=True)
