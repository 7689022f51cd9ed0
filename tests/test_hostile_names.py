"""Names in a model are anybody's text: no report, page or terminal takes them for anything else."""

from __future__ import annotations

import csv
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import hostile_models
import numpy as np
import onnx
import pytest
from command_line import Command, Result
from running import write_config

from converter.report.tables import write_table

NAMES = [
    "<script>alert(1)</script>",
    '=HYPERLINK("http://a.b","x")',
    '"><img src=x onerror=alert(1)>',
    "two\nlines\r\x1b]0;title\x07\x1b[31m",
    '../../../etc/passwd,"a";b',
]


def _named() -> onnx.ModelProto:
    """The plain model with NAMES for its nodes and for the tensors that they compute."""
    model = hostile_models.plain()
    for node, name in zip(model.graph.node, NAMES, strict=True):
        node.name = name
        for other in model.graph.node:
            other.input[:] = [name if value == node.output[0] else value for value in other.input]
        if node.output[0] != "y":
            node.output[0] = name
    return model


class _Tags(HTMLParser):
    """The elements of a page, and those of them that run something, by what they run on."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count.update([tag, *(f"{tag} {name}" for name, _ in attrs if name.startswith("on"))])


def _tags(page: Path) -> Counter[str]:
    found = _Tags()
    found.feed(page.read_text(encoding="utf-8"))
    return found.count


def _converted(qconvert: Command, folder: Path, model: onnx.ModelProto) -> Result:
    """Converts with all reports, in a folder of its own."""
    (folder / "data").mkdir(parents=True)
    for number in range(3):
        np.save(folder / "data" / f"{number}.npy", hostile_models.normal(1, 3, 8, 8, seed=number))
    config = write_config(
        folder / "c.cfg",
        common_quant={
            "quant_type": "FULL_QUANT",
            "thread_num": 1,
            "debug_info_save_path": folder / "reports",
        },
        data_preprocess={
            "calibrate_path": f"x:{folder}/data",
            "calibrate_size": 3,
            "input_type": "NPY",
        },
    )
    path = hostile_models.written(folder, model)
    return qconvert.convert(config, folder / "q.onnx", path, "--verbose")


def test_names_stay_text_everywhere(qconvert: Command, tmp_path: Path) -> None:
    assert _converted(qconvert, tmp_path / "plain", hostile_models.plain()).code == 0
    result = _converted(qconvert, tmp_path / "named", _named())
    assert result.code == 0, result.err
    # The terminal gets no control characters.
    assert all(line.isprintable() for line in (result.out + result.err).split("\n"))
    assert "two\\nlines" in result.out
    # No file elsewhere.
    plain, named = (
        {path.relative_to(root) for path in root.rglob("*")}
        for root in sorted(tmp_path.iterdir())[::-1]
    )
    assert plain == named
    tables = list((tmp_path / "named" / "reports").glob("*.csv"))
    assert tables
    for table in tables:
        with table.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file))
        assert rows
        assert all(len(row) == len(header) for row in rows)
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "@", "\t"))]
    # The page has the elements that it has for any model.
    pages = [tmp_path / kind / "reports" / "report.html" for kind in ("plain", "named")]
    assert _tags(pages[0]) == _tags(pages[1])
    assert "alert(1)" in pages[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_formula_in_a_table_stays_text(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / "t.csv", [("Name", "Value"), (name, -1.5)])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [f"'{name}", "-1.5"]
