"""One task in a process of its own: its crash, its memory and its time are its own."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from shutil import rmtree

from converter.batch import stamp
from converter.errors import QConvertError
from converter.job import Job, Watch
from converter.measure.gates import Figures

SERVE = "import sys; from converter.batch.isolated import serve; serve(sys.argv[1])"
_children: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Task:
    """A conversion, or with `job.part` a part of its calibration; as many `parts` are merged before
    it begins.

    `identity` is what the file `stamp` will say the output was made of.
    """

    job: Job
    stamp: Path
    identity: str
    parts: int = 0


@dataclass(frozen=True)
class Result:
    """What came of a task; `problem` is empty if it went well. Seconds and megabytes are its
    process's.
    """

    problem: str = ""
    figures: Figures | None = None
    seconds: float = 0.0
    megabytes: float = 0.0
    warnings: tuple[str, ...] = ()


def run_isolated(task: Task, timeout: float | None, directory: str) -> Result:
    """Runs a task for at most `timeout` seconds, from the folder `directory` that its paths are
    relative to.
    """
    start, answer = time.perf_counter(), b""
    with (
        tempfile.TemporaryDirectory(prefix="qconvert-job-") as folder,
        _process(folder, directory) as process,
    ):
        try:
            answer = process.communicate(pickle.dumps(task), timeout)[0]
            result: Result = pickle.loads(answer) if answer else Result(_death(process.returncode))
        except subprocess.TimeoutExpired:
            result = Result(
                f"it took more than {timeout:g} seconds and was stopped; allow more with --timeout."
            )
    if not answer:
        _remove_drafts(task.job, Path(directory))
    return replace(result, seconds=time.perf_counter() - start)


@contextmanager
def _process(temporary: str, directory: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves one task; it does not outlive the block."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SERVE, temporary],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env={**os.environ, "TMPDIR": temporary, "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for this process alone
    ) as process:
        _children.add(process)
        try:
            yield process
        finally:
            process.kill()
            _children.discard(process)


def _remove_drafts(job: Job, directory: Path) -> None:
    """What a process that was killed was about to write, which is in hidden folders beside the
    places for it.
    """
    common = job.config.common
    for path in filter(None, (job.output, common.debug_info_save_path, common.calibration_cache)):
        for draft in (directory / path).parent.glob(f".{escape(path.name)}.*"):
            rmtree(draft, ignore_errors=True)


def kill_all() -> None:
    """Ends the tasks of this process."""
    for process in list(_children):
        process.kill()


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "its process was killed, most likely for want of memory; let fewer jobs run at once "
            "with --jobs."
        )
    return (
        f"its process crashed ({signal.Signals(-code).name if code < 0 else code}); convert it "
        "alone to see more."
    )


class _Notes(Watch):
    """A watch that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def serve(temporary: str) -> None:
    """The other process: reads a task from stdin and writes its result to stdout."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else is written there
    logging.disable(logging.CRITICAL)
    notes = _Notes()
    try:
        result = Result(figures=_work(pickle.load(sys.stdin.buffer), notes))
    except QConvertError as error:
        result = Result(str(error))
    except MemoryError:
        result = Result("memory ran out; let fewer jobs run at once with --jobs.")
    except Exception as error:
        result = Result(f"{type(error).__name__}: {error}")
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KB
    rmtree(temporary, ignore_errors=True)  # whoever made the folder may have died
    with answer:
        pickle.dump(
            replace(result, megabytes=megabytes, warnings=tuple(notes.warnings)),
            answer,
        )


def _work(task: Task, notes: _Notes) -> Figures | None:
    """Does what is asked for and stamps it; a part of a calibration has no figures."""
    from converter.calibrate import cache
    from converter.graph import files as model
    from converter.pipeline import convert as pipeline

    job, path = task.job, task.job.config.common.calibration_cache
    if job.part:
        pipeline.calibrate(job, notes)
        return None
    files = stamp.states([*stamp.inputs(job), *model.external_files(job.model)])
    if task.parts and path:
        cache.merge(
            [cache.part_path(path, number, task.parts) for number in range(task.parts)],
            path,
        )
    figures = pipeline.convert(job, notes).figures
    files |= stamp.states([job.output, *model.external_files(job.output)])
    stamp.write(task.stamp, task.identity, files, figures)
    return figures
