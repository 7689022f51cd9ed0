"""`qconvert batch`: many jobs with one command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from converter.batch import summary
from converter.batch.manifest import read_entries
from converter.batch.run import Options, Record, open_pool, run_batch
from converter.cli.flags import gate_flags, gates_of, job_flags, job_of
from converter.cli.terminal import show
from converter.config.rules import conversion_rules
from converter.errors import GateError, QConvertError, StoppedError
from converter.job import processors


@click.command("batch")
@click.argument("jobs", type=click.Path(path_type=Path))
@click.option(
    "--jobs",
    "-j",
    "workers",
    type=click.IntRange(1),
    help="Jobs at once; default: the processors.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    help="Seconds that one job may take.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Leave what is up to date: model, config, data and version as they were.",
)
@click.option(
    "--keep-going/--fail-fast",
    default=True,
    show_default=True,
    help="What to do when a job fails.",
)
@click.option(
    "--calibration-parts",
    "parts",
    type=click.IntRange(1),
    default=1,
    help="Split calibrations by samples.",
)
@click.option(
    "--scheduler",
    help="Dask cluster that shares this file system, for example tcp://host:8786.",
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML, too.")
@click.option("--quiet", is_flag=True, help="Print the table and errors only.")
@job_flags
@gate_flags
def batch_command(
    jobs: Path,
    scheduler: str | None,
    workers: int | None,
    junit: Path | None,
    **flags: Any,
) -> None:
    """Run all JOBS: a folder of configs with a [job] section, or a CSV file.

    The CSV file has the columns model, config and output, and columns named section.key that change
    the config. Its paths are relative to it; a pattern in model stands for many models, and * in
    output for the model's name. Results go to batch_summary.json and batch_summary.csv beside the
    jobs.
    """
    rules = conversion_rules(flags["fp16"] == "on")
    entries = read_entries(
        jobs, lambda model, output, config: job_of(model, output, config, flags), rules
    )
    folder = jobs if jobs.is_dir() else jobs.parent
    at_once = None if scheduler else workers or processors()
    given = (
        flags["timeout"],
        flags["resume"],
        not flags["keep_going"],
        flags["parts"],
        gates_of(flags),
    )
    records: list[Record] = []

    def done(record: Record) -> None:
        records.append(record)
        if not flags["quiet"]:
            show(summary.progress(record, len(records), len(entries)))

    try:
        with open_pool(scheduler, at_once or 1) as pool:
            run_batch(entries, pool, Options(folder, at_once, *given), done)
    except KeyboardInterrupt:
        msg = (
            f"Interrupted after {len(records)} of {len(entries)} jobs; run it with --resume for "
            "the others."
        )
        raise StoppedError(msg) from None
    _report(
        sorted(records, key=lambda record: entries.index(record.entry)),
        folder,
        junit,
    )


def _report(records: list[Record], folder: Path, junit: Path | None) -> None:
    """Writes and prints the summaries; raises QConvertError where a job failed, GateError where one
    missed a gate.
    """
    summary.write(records, folder, junit)
    for line in summary.table(records):
        show(line)
    counts = Counter(record.status for record in records)
    total = (
        f"{len(records)} job(s): "
        + ", ".join(f"{count} {status}" for status, count in counts.items())
        + "."
    )
    if counts["failed"]:
        raise QConvertError(total)
    if counts["missed"]:
        raise GateError(total)
    click.echo(total)
