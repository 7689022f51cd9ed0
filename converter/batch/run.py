"""Runs a batch: what is up to date is left, what can share a calibration waits for it, and the rest
goes to a pool.

A pool is any `concurrent.futures.Executor`. The local one has a thread a job, which starts a
process for it and waits: where a process is killed, a pool of processes loses all of its jobs, and
this one the job. Dask's client is the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any

from converter.batch import stamp
from converter.batch.isolated import Result, Task, kill_all, run_isolated
from converter.batch.manifest import Entry
from converter.errors import UsageError
from converter.job import processors
from converter.measure.gates import Gates

# Where a batch keeps stamps and calibration caches, inside its folder.
STATE = ".qconvert"
# Each task with those that it comes after.
Order = dict[Hashable, set[Hashable]]


@dataclass(frozen=True)
class Options:
    """How a batch runs: its folder, local jobs at once (None on a cluster), seconds a job may
    take.
    """

    folder: Path
    workers: int | None
    timeout: float | None
    resume: bool
    fail_fast: bool
    parts: int
    gates: Gates


@dataclass(frozen=True)
class Record:
    """What became of an entry: `status` is converted, up to date, missed (a gate), failed or
    skipped.
    """

    entry: Entry
    status: str
    message: str
    result: Result


@contextmanager
def open_pool(scheduler: str | None, workers: int) -> Iterator[Executor]:
    """The Dask cluster at that address or, without one, `workers` local jobs at once; raises
    UsageError.
    """
    if scheduler is None:
        with ThreadPoolExecutor(workers) as pool:
            yield pool
        return
    try:
        from distributed import Client

        client = Client(scheduler)
    except ImportError as error:
        msg = "--scheduler needs Dask; install it with pip install 'qconvert[cluster]'."
        raise UsageError(msg) from error
    except (OSError, ValueError) as error:
        msg = (
            f"--scheduler {scheduler}: no Dask scheduler answers; write its address, for example "
            "tcp://host:8786."
        )
        raise UsageError(msg) from error
    with client:
        yield client.get_executor(pure=False)


def run_batch(
    entries: Sequence[Entry],
    pool: Executor,
    options: Options,
    done: Callable[[Record], None],
) -> None:
    """Runs all entries and hands each record to `done` as soon as it is known."""
    known = {number: _known(entry, options) for number, entry in enumerate(entries)}
    todo = {number: task for number, task in known.items() if isinstance(task, Task)}
    left = dict(enumerate(entries))
    with closing(_results(*_arranged(todo, options), pool, options.timeout)) as results:
        early = (
            (number, outcome) for number, outcome in known.items() if isinstance(outcome, Record)
        )
        late = (
            (key, _record(entries[key], outcome, options.gates))
            for key, outcome in results
            if isinstance(key, int)
        )
        for number, record in chain(early, late):
            del left[number]
            done(record)
            if options.fail_fast and record.status in ("failed", "missed"):
                break
    for entry in left.values():
        done(Record(entry, "skipped", "an earlier job failed", Result()))


def _known(entry: Entry, options: Options) -> Task | Record:
    """The record of an entry that need not or cannot run, else its task."""
    if entry.job is None:
        return Record(entry, "failed", entry.problem, Result())
    file = options.folder / STATE / f"{_short(entry.job.output.resolve())}.json"
    figures = stamp.up_to_date(file, entry.job) if options.resume else None
    if figures is None:
        return Task(entry.job, file, stamp.identity(entry.job))
    return _record(entry, Result(figures=figures), options.gates, "up to date")


def _record(entry: Entry, result: Result, gates: Gates, status: str = "converted") -> Record:
    missed = gates.missed(result.figures) if result.figures else ""
    status = "failed" if result.problem else "missed" if missed else status
    return Record(entry, status, result.problem or missed, result)


def _arranged(todo: Mapping[int, Task], options: Options) -> tuple[dict[Hashable, Task], Order]:
    """Tasks that share the processors and, where they calibrate alike, a cache that the first of
    them makes.
    """
    threads = max(1, processors() // min(options.workers, len(todo) or 1)) if options.workers else 1
    caches = {key: _cache(task, options.folder) for key, task in todo.items()}
    tasks: dict[Hashable, Task] = {}
    order: Order = {}
    for cache in dict.fromkeys(caches.values()):
        group = [key for key in todo if caches[key] == cache]
        shared = cache if len(group) > 1 or options.parts > 1 else None
        for key in group:
            common = todo[key].job.config.common
            path = shared or common.calibration_cache
            count = common.thread_num or threads
            tasks[key] = _with(todo[key], calibration_cache=path, thread_num=count)
            order[key] = {first for first in group[:1] if cache and first != key}
        if cache and options.parts > 1:
            _split(cache, group[0], options.parts, tasks=tasks, order=order)
    return tasks, order


def _split(
    cache: Path, leader: Hashable, parts: int, *, tasks: dict[Hashable, Task], order: Order
) -> None:
    """Adds the parts of a calibration, which the leader merges."""
    for old in cache.parent.glob(f"{cache.name}.part*"):
        old.unlink()
    for number in range(parts):
        tasks[cache, number] = replace(
            tasks[leader], job=replace(tasks[leader].job, part=(number, parts))
        )
        order[leader].add((cache, number))
    tasks[leader] = replace(tasks[leader], parts=parts)


def _with(task: Task, **common: Any) -> Task:
    config = replace(
        task.job.config,
        common=replace(task.job.config.common, **common),
    )
    return replace(task, job=replace(task.job, config=config))


def _cache(task: Task, folder: Path) -> Path | None:
    """The config's calibration cache or one for all jobs that calibrate the same model with the
    same data.
    """
    job, config, full = task.job, task.job.config, task.job.config.full_quant
    if config.mode != "FULL_QUANT" or not config.preprocess.calibrate_path:
        return None
    flags = (
        job.input_shapes,
        job.input_format,
        job.input_type,
        full.equalize and not full.per_channel,
    )
    name = _short(job.model.resolve(), config.preprocess, flags)
    return config.common.calibration_cache or folder / STATE / f"{name}.npz"


def _short(*what: object) -> str:
    """A file name for what a file is about."""
    return hashlib.sha256(str(what).encode()).hexdigest()[:16]


def _results(
    tasks: dict[Hashable, Task], order: Order, pool: Executor, timeout: float | None
) -> Generator[tuple[Hashable, Result], None, None]:
    """What comes of every task, in the order in which they end; closed early, it ends those under
    way.
    """
    sorter, running = TopologicalSorter(order), dict[Future[Result], Hashable]()
    sorter.prepare()
    try:
        while sorter.is_active():
            for key in sorter.get_ready():
                running[pool.submit(run_isolated, tasks[key], timeout, str(Path.cwd()))] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                sorter.done(key)
                yield key, _result(future)
    finally:
        under_way = [future for future in running if not future.cancel()]
        while wait(under_way, timeout=0.1).not_done:
            kill_all()


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except Exception as error:  # of the pool: whatever happens inside a task is in its result
        return Result(
            f"it could not be run ({type(error).__name__}: {error}); see the logs of the machine."
        )
