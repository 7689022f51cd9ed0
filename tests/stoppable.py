"""Conversions that are stopped in the midst: each in a process of its own, at a moment that is
counted in calls, so that it is the same one however busy the machine is.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Processes branch off one that has imported all of it.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["converter.pipeline.convert", "converter.report.text", "onnxruntime"]
)
# Seconds that nothing takes on any machine, so that a test that waits in vain ends some time.
PATIENCE = 600


@dataclass(frozen=True)
class Stop:
    """A signal to the process itself when it has called so many functions."""

    signal: int
    calls: int


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal that killed it; what it said on stderr;
    how many calls went before the output was put in its place, if it came to that.
    """

    code: int
    said: str
    saved: int | None


def convert(
    arguments: list[str],
    temporary: Path,
    external_above: int,
    stop: Stop | None = None,
    file_size: int | None = None,
) -> Ended:
    """Runs the command, which keeps temporary files in a folder, writes weights to a file of their
    own above so many bytes, and cannot write files above `file_size` bytes.
    """
    with tempfile.TemporaryDirectory() as name:
        process = _PROCESSES.Process(
            target=_serve,
            args=(Path(name), arguments, str(temporary), external_above, stop, file_size),
        )
        process.start()
        process.join(PATIENCE)
        assert process.exitcode is not None, "it never ended"
        said, saved = (Path(name, part) for part in ("said", "saved"))
        return Ended(
            process.exitcode, said.read_text(), int(saved.read_text()) if saved.exists() else None
        )


def _serve(
    folder: Path,
    arguments: list[str],
    temporary: str,
    external_above: int,
    stop: Stop | None,
    file_size: int | None,
) -> None:
    from converter.cli import main
    from converter.graph import files as model

    tempfile.tempdir, model.EXTERNAL_DATA_ABOVE = temporary, external_above
    for descriptor, name in ((1, "printed"), (2, "said")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    replace, calls, saved = Path.replace.__code__, 0, 0
    counts = folder / "saved"

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls, saved
        calls += 1
        if frame.f_code is replace and not saved:
            saved = calls
        if stop and calls == stop.calls:
            os.kill(os.getpid(), stop.signal)

    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        sys.setprofile(count)
        main(arguments)
    finally:
        sys.setprofile(None)
        if saved:
            counts.write_text(str(saved))
