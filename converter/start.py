"""Entry point of the command: light, so that an interrupt in its first moments finds it ready."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command; without a terminal's streams where they were closed."""
    try:
        _open_streams()
        from converter.cli import main as command  # takes long to import

        command()
    except KeyboardInterrupt:
        sys.stderr.write("ERROR: Interrupted; nothing was written.\n")
        raise SystemExit(130) from None


def _open_streams() -> None:
    """Whoever closed a standard stream would have files of ours take its number, and get what is
    meant for it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: PTH123, SIM115
