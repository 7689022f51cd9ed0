"""What the documents say is what the program does."""

from __future__ import annotations

import re
import runpy
import tomllib
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import pytest
from command_line import CONFIG, MODEL, ROOT, Command

from converter import __version__
from converter.cli import command
from converter.config.keys import SECTIONS

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.+?)\n```", README)
TENSOR_ROW = re.compile(r"^  \S")


@pytest.fixture(scope="module")
def updated() -> str:
    return str(runpy.run_path(str(ROOT / "docs" / "update_readme.py"))["updated"](README))


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> list[str]:
    """What the README's example prints, without the tensors' rows, whose order may differ between
    machines.
    """
    lines = Command(capsys).convert(CONFIG, tmp_path / "digits_cnn_quant.onnx", MODEL).lines
    return [line for line in lines if not TENSOR_ROW.match(line)]


def test_generated_parts_are_current(updated: str) -> None:
    assert updated == README, "Run: python docs/update_readme.py"


def test_every_flag_and_key_is_described(updated: str) -> None:
    flags = [name for option in command.params for name in option.opts]
    assert "--modelFile" in flags
    assert not [flag for flag in flags if f"  {flag}" not in updated and f", {flag}" not in updated]
    keys = [key for section in SECTIONS.values() for key in section.keys]
    assert not [key for key in keys if f"| `{key}` |" not in updated]


def test_two_commands_do_everything() -> None:
    assert [line.rsplit("&&", 1)[1].split()[0] for line in COMMANDS] == [
        ".venv/bin/qconvert",
        ".venv/bin/python",
    ]
    assert all(
        line.startswith("python3 -m venv .venv && .venv/bin/pip install ") for line in COMMANDS
    )
    files = re.findall(r"--\w+File=(\S+)", COMMANDS[0])
    assert [(ROOT / file).resolve() for file in files] == [MODEL.resolve(), CONFIG.resolve()]


def test_ci_runs_the_commands_of_the_readme() -> None:
    patterns = re.findall(r"\$\(readme '(.+)'\)", (ROOT / ".ci" / "run").read_text())
    found = [
        [line for line in README.splitlines() if re.match(f"python3 -m venv .*{p}", line)]
        for p in patterns
    ]
    assert sorted(found) == sorted([line] for line in COMMANDS)


def test_ci_runs_the_tests_that_the_readme_leaves_out() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "-m 'not slow'" in options["addopts"]
    assert re.search(r'^run ".*pytest .* -m slow"$', (ROOT / ".ci" / "run").read_text(), re.M)


def test_every_line_of_the_summary_is_explained(printed: list[str]) -> None:
    table = README.partition("| Line |")[2].partition("\n\n")[0]
    beginnings = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert beginnings
    assert all(any(line.startswith(start) for line in printed) for start in beginnings)
    assert all(any(line.startswith(start) for start in beginnings) for line in printed)


def _picture_lines() -> list[str]:
    """The text of the picture, line by line from the top."""
    lines: dict[float, str] = defaultdict(str)
    for text in ET.parse(ROOT / "docs" / "terminal.svg").iter("{http://www.w3.org/2000/svg}text"):
        if "clip-path" in text.attrib:
            lines[float(text.attrib["y"])] += (text.text or "").replace("\xa0", " ")
    return [line.rstrip() for _, line in sorted(lines.items()) if line.strip()]


def _without_numbers(lines: list[str]) -> list[str]:
    return [
        re.sub(r"\d+(\.\d+)?", "0", re.sub(r"^Written to .*/", "Written to ", line))
        for line in lines
    ]


def test_picture_shows_what_the_example_prints(printed: list[str]) -> None:
    prompt, *shown = _picture_lines()
    assert prompt == "$ " + COMMANDS[0].rpartition(".venv/bin/")[2]
    shown = [line for line in shown if not TENSOR_ROW.match(line)]
    assert _without_numbers(shown) == _without_numbers(printed), (
        "Run: python docs/make_terminal_picture.py"
    )


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text(encoding="utf-8"))
    assert not [
        link for link in links if not link.startswith("https://") and not (ROOT / link).exists()
    ]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    released = re.findall(
        r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert project["version"] == __version__ == released[0]
