"""The jobs of a batch: a folder of configs with a [job] section, or a CSV file with a line a
job.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path

from converter.config import Config, load_config
from converter.config.rules import RULES, Rule
from converter.errors import ConfigError, QConvertError, UsageError
from converter.job import Job

COLUMNS = ("model", "config", "output")
SUFFIXES = (".cfg", ".ini")
# A job of a model, an output (None: the default) and a config.
MakeJob = Callable[[Path, str | None, Config], Job]


@dataclass(frozen=True)
class Entry:
    """One job by its name, which is its output's path; without a `job`, `problem` says why there is
    none.

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


# A place with the model and the output that it names, which may be empty.
Line = tuple[Entry, str, str]


def read_entries(path: Path, make: MakeJob, rules: Sequence[Rule] = RULES) -> list[Entry]:
    """All jobs in order; one that is wrong has a problem, a list that is itself wrong raises
    QConvertError.

    `rules` are those that every config keeps.
    """
    folder, lines = (path, _of_folder(path)) if path.is_dir() else (path.parent, _of_manifest(path))
    entries = [
        entry for line in lines for entry in _entries(*line, folder=folder, make=make, rules=rules)
    ]
    if not entries:
        msg = (
            f"{path}: there are no jobs; give a folder of configs or a CSV file with a line "
            "below its header."
        )
        raise UsageError(msg)
    writers: dict[Path, Entry] = {}
    for number, entry in enumerate(entries):
        first = writers.setdefault(entry.job.output.resolve(), entry) if entry.job else entry
        if first is not entry:
            problem = (
                f"{entry}: {first} writes {entry.name}.onnx already; give each job its own output."
            )
            entries[number] = replace(entry, job=None, problem=problem)
    return entries


def _of_folder(path: Path) -> Iterator[Line]:
    for config in sorted(file for file in path.iterdir() if file.suffix in SUFFIXES):
        yield Entry(config.stem, config, 0, config), "", ""


def _of_manifest(path: Path) -> Iterator[Line]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or ())
            if (
                {*COLUMNS} - {*names}
                or len({*names}) < len(names)
                or not all("." in n for n in {*names} - {*COLUMNS})
            ):
                msg = (
                    f"{path}:1: the header must be {','.join(COLUMNS)} and columns named "
                    "section.key; write each once."
                )
                raise ConfigError(msg)
            for row in reader:
                if None in row or None in row.values() or not row["config"]:
                    msg = (
                        f"{path}:{reader.line_num}: the config or a cell is missing or too many; "
                        "check the line."
                    )
                    raise ConfigError(msg)
                model, config, output = (row.pop(name).strip() for name in COLUMNS)
                settings = {name: text for name, text in row.items() if text.strip()}
                number = reader.line_num
                yield (
                    Entry(f"line {number}", path, number, path.parent / config, settings),
                    model,
                    output,
                )
    except (UnicodeDecodeError, csv.Error) as error:
        msg = (
            f"{path}: this is no CSV file in UTF-8 ({error}); give such a file or a folder of "
            "configs."
        )
        raise ConfigError(msg) from error


def _entries(
    entry: Entry,
    model: str,
    output: str,
    *,
    folder: Path,
    make: MakeJob,
    rules: Sequence[Rule],
) -> Iterator[Entry]:
    """The jobs of one place, one for every model that matches; the config says what is empty
    there.
    """
    try:
        config = load_config(
            entry.config, entry.settings, source=entry.source, line=entry.line, rules=rules
        )
        models = _models(entry, folder / model if model else config.job.model)
        target = folder / output if output else config.job.output
        if target and len(models) > 1 and "*" not in str(target):
            msg = (
                f"{entry}: {len(models)} models would be written to {target}; write * for the "
                "model's name."
            )
            raise ConfigError(msg)
        jobs = [
            make(file, str(target).replace("*", file.stem) if target else None, config)
            for file in models
        ]
        # A pattern finds what it wrote last time as well.
        results = {job.output.resolve() for job in jobs if len(jobs) > 1}
        for job in (job for job in jobs if job.model.resolve() not in results):
            name = Path(os.path.relpath(job.output, folder)).with_suffix("").as_posix()
            yield replace(entry, name=name, job=job)
    except QConvertError as error:
        yield replace(entry, problem=str(error))


def _models(entry: Entry, pattern: Path | None) -> list[Path]:
    if pattern is None:
        msg = (
            f"{entry}: no model is named; write model = model.onnx under [job], or fill the "
            "column model."
        )
        raise ConfigError(msg)
    models = [pattern] if pattern.exists() else [Path(name) for name in sorted(glob(str(pattern)))]  # noqa: PTH207
    if not models:
        msg = f"{entry}: there is no model file {pattern}; check the path."
        raise ConfigError(msg)
    return models
