"""The jobs of a batch: a folder of configs with a [job] section, or a CSV file with a line a job."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path

from converter.config import Config, load_config
from converter.errors import ConfigError, QConvertError, UsageError
from converter.job import Job

COLUMNS = ("model", "config", "output")
SUFFIXES = (".cfg", ".ini")
# A job of a model, an output (None: the default) and a config.
MakeJob = Callable[[Path, str | None, Config], Job]


@dataclass(frozen=True)
class Entry:
    """One job by its name, which is its output's path; without a `job`, `problem` says why there is none.

    It stands on `line` (0: the whole file) of `source`; `settings` are the override columns there.
    """

    name: str
    source: Path
    line: int
    config: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    job: Job | None = None
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else str(self.source)


def read_entries(path: Path, make: MakeJob) -> list[Entry]:
    """All jobs in order; one that is wrong has a problem, a list that is itself wrong raises QConvertError."""
    entries = list(_of_folder(path, make) if path.is_dir() else _of_manifest(path, make))
    if not entries:
        msg = f"{path}: there are no jobs; give a folder of configs or a CSV file with a line below its header."
        raise UsageError(msg)
    writers: dict[Path, Entry] = {}
    for number, entry in enumerate(entries):
        first = writers.setdefault(entry.job.output.resolve(), entry) if entry.job else entry
        if first is not entry:
            problem = f"{entry}: {first} writes {entry.name}.onnx already; give each job its own output."
            entries[number] = replace(entry, job=None, problem=problem)
    return entries


def _of_folder(path: Path, make: MakeJob) -> Iterator[Entry]:
    for config in sorted(found for found in path.iterdir() if found.suffix in SUFFIXES):
        yield from _entries(Entry(config.stem, config, 0, config), path, "", "", make)


def _of_manifest(path: Path, make: MakeJob) -> Iterator[Entry]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or ())
            if {*COLUMNS} - {*names} or len({*names}) < len(names) or not all("." in n for n in {*names} - {*COLUMNS}):
                msg = (
                    f"{path}:1: the header must be {','.join(COLUMNS)} and columns named section.key; write each once."
                )
                raise ConfigError(msg)
            for row in reader:
                if None in row or None in row.values() or not row["config"]:
                    msg = f"{path}:{reader.line_num}: the config or a cell is missing or too many; check the line."
                    raise ConfigError(msg)
                model, config, output = (row.pop(name).strip() for name in COLUMNS)
                settings = {name: text for name, text in row.items() if text.strip()}
                entry = Entry(f"line {reader.line_num}", path, reader.line_num, path.parent / config, settings)
                yield from _entries(entry, path.parent, model, output, make)
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: this is no CSV file in UTF-8 ({error}); give such a file or a folder of configs."
        raise ConfigError(msg) from error


def _entries(entry: Entry, folder: Path, model: str, output: str, make: MakeJob) -> Iterator[Entry]:
    """The jobs of one place, one for every model that matches; the config says what is empty there."""
    try:
        config = load_config(entry.config, entry.settings, entry.source, entry.line)
        models = _models(entry, folder / model if model else config.job.model)
        target = folder / output if output else config.job.output
        if target and len(models) > 1 and "*" not in str(target):
            msg = f"{entry}: {len(models)} models would be written to {target}; write * for the model's name."
            raise ConfigError(msg)
        for found in models:
            job = make(found, str(target).replace("*", found.stem) if target else None, config)
            name = Path(os.path.relpath(job.output, folder)).with_suffix("").as_posix()
            yield replace(entry, name=name, job=job)
    except QConvertError as error:
        yield replace(entry, problem=str(error))


def _models(entry: Entry, pattern: Path | None) -> list[Path]:
    if pattern is None:
        msg = f"{entry}: no model is named; write model = model.onnx under [job], or fill the column model."
        raise ConfigError(msg)
    found = [pattern] if pattern.exists() else [Path(name) for name in sorted(glob(str(pattern)))]  # noqa: PTH207
    if not found:
        msg = f"{entry}: there is no model file {pattern}; check the path."
        raise ConfigError(msg)
    return found
