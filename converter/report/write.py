"""The folder of reports: all of it new, or none of it touched."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from converter.errors import ConfigError
from converter.findings import Findings, Verification
from converter.job import Resources, Watch
from converter.quantized import Quantized
from converter.report.findings import findings
from converter.report.page import page

WORST = 10


def check_folder(folder: Path, where: str) -> None:
    """Raises ConfigError where no folder of reports can be; `where` names the line that asks for it."""
    if (stands := next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)).is_file():
        msg = f"{where}: {stands} is a file; give the path of a folder."
        raise ConfigError(msg)


def write_reports(
    folder: Path,
    title: str,
    result: Quantized,
    facts: Mapping[str, str],
    sizes: tuple[int, int],
    verification: Verification | None,
    resources: Resources,
    watch: Watch,
) -> Findings:
    """The tables, summary.json and report.html in `folder`, in place of those of an earlier run; what they tell."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        tables = Path(temporary)
        found = findings(result, facts, sizes, verification, resources, watch, tables)
        (tables / "summary.json").write_text(_summary(found), encoding="utf-8")
        (tables / "report.html").write_text(page(found, title), encoding="utf-8")
        for old in folder.iterdir():
            if re.fullmatch(r"round_\d+\.csv", old.name):
                old.unlink()
        for new in sorted(tables.iterdir()):
            new.replace(folder / new.name)
    return found


def _summary(found: Findings) -> str:
    """For programs; a number that is not finite is null."""
    before, after = found.sizes
    worst = sorted((node for node in found.nodes if node.quantized), key=lambda node: -(node.share or 0.0))[:WORST]
    content = {
        "facts": dict(found.facts),
        "bytes": {"before": before, "after": after},
        "verification": asdict(found.verification) if found.verification else None,
        "worst_nodes": [asdict(node) for node in worst],
        "advice": found.advice,
    }
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2, ensure_ascii=False) + "\n"
