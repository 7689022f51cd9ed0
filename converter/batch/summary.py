"""What a batch has done: a line and a table for people, JSON and CSV for programs, JUnit XML for
build servers.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement

from converter.batch.run import Record

SHOWN = (
    "name",
    "status",
    "seconds",
    "size_before",
    "size_after",
    "cosine",
    "agreement",
    "speedup",
)
FAILURES = {"failed": "error", "missed": "failure", "skipped": "skipped"}
# Characters that XML 1.0 cannot hold.
UNWRITABLE = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def row(record: Record) -> dict[str, Any]:
    """Everything about a record and a manifest's settings, flat; it has figures where it was
    converted.
    """
    entry, result = record.entry, record.result
    files = {"model": str(entry.job.model), "output": str(entry.job.output)} if entry.job else {}
    cost = {
        "seconds": round(result.seconds, 3),
        "memory_mb": round(result.megabytes, 1),
    }
    figures = asdict(result.figures) if result.figures else {}
    told = {"warnings": " ".join(result.warnings), "message": record.message}
    about = {
        "name": entry.name,
        "status": record.status,
        "config": str(entry.config),
    }
    return {**about, **files, **cost, **figures, **told, **entry.settings}


def write(records: Sequence[Record], folder: Path, junit: Path | None) -> None:
    """Writes batch_summary.json and batch_summary.csv into the folder, and JUnit XML."""
    rows = [row(record) for record in records]
    (folder / "batch_summary.json").write_text(
        json.dumps(rows, indent=2) + "\n",
        encoding="utf-8",
    )
    with (folder / "batch_summary.csv").open(
        "w", encoding="utf-8", errors="backslashreplace", newline=""
    ) as file:
        writer = csv.DictWriter(file, _names(rows))
        writer.writeheader()
        writer.writerows(rows)
    if junit:
        junit.parent.mkdir(parents=True, exist_ok=True)
        ElementTree(_suite(records)).write(junit, encoding="utf-8", xml_declaration=True)


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _suite(records: Sequence[Record]) -> Element:
    """One test case a record: a failed job is an error, a missed gate a failure."""
    statuses = Counter(record.status for record in records)
    totals = {
        "errors": statuses["failed"],
        "failures": statuses["missed"],
        "skipped": statuses["skipped"],
    }
    counts = {name: str(count) for name, count in {"tests": len(records), **totals}.items()}
    suite = Element("testsuite", {"name": "qconvert", **counts})
    for record in records:
        about = {"classname": str(record.entry.config), "name": record.entry.name}
        seconds = f"{record.result.seconds:.3f}"
        case = SubElement(
            suite,
            "testcase",
            {name: _xml(text) for name, text in about.items()},
            time=seconds,
        )
        if record.status in FAILURES:
            SubElement(case, FAILURES[record.status], message=_xml(record.message))
    return suite


def _xml(text: str) -> str:
    return UNWRITABLE.sub("?", text)


def progress(record: Record, number: int, total: int) -> str:
    """The line that says that a job is done."""
    warnings = f", warnings: {len(record.result.warnings)}" if record.result.warnings else ""
    message = f": {record.message}" if record.message else ""
    cost = f"{record.result.seconds:.1f} s{warnings}"
    return (
        f"[{number:{len(str(total))}}/{total}] {record.status} {record.entry.name}, {cost}{message}"
    )


def table(records: Sequence[Record]) -> Iterator[str]:
    """Every job with its figures and the settings that a manifest overrides."""
    names = [*SHOWN, *_names(record.entry.settings for record in records)]
    rows = [[_cell(row(record).get(name)) for name in names] for record in records]
    lines = [[name.rpartition(".")[2] for name in names], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
