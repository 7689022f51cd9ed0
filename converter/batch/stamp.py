"""What an output was made of, so that it is made again only if that has changed, as a build tool
does.

A stamp is a JSON file with the job's settings and size, time and SHA-256 of every file it read and
wrote. A file of the same size and time is taken as unchanged; of any other the content decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converter.job import Job, sha256
from converter.measure.gates import Figures
from converter.version import __version__

LIBRARIES = ("numpy", "onnx", "onnxruntime")
# Paths in a config that are written to; any other is read.
WRITTEN = ("output", "debug_info_save_path", "calibration_cache")


def identity(job: Job) -> str:
    """Everything but the contents of files that the output follows from: versions, flags and the
    config's values.
    """
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    plain = replace(
        job,
        config=replace(job.config, path=Path(), warnings=(), lines={}),
    )
    return hashlib.sha256(f"qconvert {__version__} {versions} {plain}".encode()).hexdigest()


def inputs(job: Job) -> Iterator[Path]:
    """The config, and the files that it and a job's flags name, those of folders included."""
    for path in (
        job.model,
        *(folder for _, folder in job.config.preprocess.calibrate_path),
        *_paths(job.config),
    ):
        yield from (
            file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()
        )


def _paths(table: Any) -> Iterator[Path]:
    for name, value in ((row.name, getattr(table, row.name)) for row in fields(table)):
        if is_dataclass(value):
            yield from _paths(value)
        elif isinstance(value, Path) and name not in WRITTEN:
            yield value


def states(files: Iterable[Path]) -> dict[str, list[Any]]:
    """Size, time in ns and SHA-256 of every file."""
    return {str(path): [*_look(path), sha256(path)] for path in files}


def _look(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def write(stamp: Path, made_of: str, files: dict[str, list[Any]], figures: Figures) -> None:
    """Writes what an output was made of: the job's `identity` and the `states` of its files."""
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(
        json.dumps({"identity": made_of, "files": files, "figures": asdict(figures)}),
        encoding="utf-8",
    )


def up_to_date(stamp: Path, job: Job) -> Figures | None:
    """The figures of an output that the job would write again as it is; None if it has to run."""
    try:
        known = json.loads(stamp.read_text(encoding="utf-8"))
        listed = known["identity"] == identity(job) and all(
            str(path) in known["files"] for path in inputs(job)
        )
        same = listed and all(
            _is_same(Path(name), *state) for name, state in known["files"].items()
        )
        return Figures(**known["figures"]) if same else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_same(path: Path, size: int, time: int, digest: str) -> bool:
    today = _look(path)
    return today == [size, time] or (today[0] == size and sha256(path) == digest)
