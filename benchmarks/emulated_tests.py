#!/usr/bin/env python3
"""The tests that compute, on a processor that this machine is not: they are to pass on every one.

    python benchmarks/emulated_tests.py [--cpu Haswell] [--each 4] [--jobs 2] [TEST ...]

Needs `qemu-x86_64` (Debian: qemu-user), which is some 30 times slower. Of the parameters of a test
`--each` are taken, spread evenly (0: all); named tests (a file, or tests/test_x.py::name) replace
the files that compute. Processes that tests start are emulated as well. Prints what passed and how
long it took, file by file, and exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).resolve().parents[1] / "tests"
# About texts, files and processes: no processor makes a difference to them.
NO_ARITHMETIC = (
    "architecture",
    "batch",
    "config",
    "hostile_data",
    "hostile_names",
    "interrupted",
    "page",
    "samples",
    "session",
    "sources",
)
INSIDE = """
import sys
sys.executable = sys.argv.pop(1)
sys.path.append(sys.argv.pop(1))
import emulated_tests
emulated_tests.inside(int(sys.argv.pop(1)), sys.argv[1:])
"""
EMULATED = '#!/bin/sh\nexec "{emulator}" -cpu "{cpu}" "{python}" {script} "$@"\n'


class Spread:
    """Keeps so many of each test's parameters, the first and the last among them."""

    def __init__(self, each: int) -> None:
        self._each = each

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Called by pytest with all tests."""
        functions: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            functions[item.nodeid.partition("[")[0]].append(item)
        for found in functions.values():
            last = len(found) - 1
            steps = max(1, min(self._each, len(found)) - 1)
            kept = {round(step * last / steps) for step in range(steps + 1)}
            for index, item in enumerate(found):
                if self._each and index not in kept:
                    items.remove(item)


def inside(each: int, arguments: Sequence[str]) -> None:
    """What the emulated process does."""
    sys.exit(pytest.main(list(arguments), plugins=[Spread(each)]))


def programs(folder: Path, emulator: str, cpu: str) -> Path:
    """Python and the installed command in `folder`, emulated; Python's path."""
    command = Path(sys.executable).with_name("qconvert")
    for name, script in (("python", ""), ("qconvert", f'"{command}"')):
        text = EMULATED.format(emulator=emulator, cpu=cpu, python=sys.executable, script=script)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder / "python"


def run(python: Path, tests: Sequence[str], each: int, report: Path) -> ElementTree.Element:
    """Runs tests in one emulated process; the suite of its report."""
    flags = ["-q", "-p", "no:cacheprovider", "--hypothesis-profile=few", f"--junitxml={report}"]
    command = [python, "-c", INSIDE, python, Path(__file__).parent, each, *flags, *tests]
    done = subprocess.run(
        list(map(str, command)),
        cwd=TESTS.parent,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not report.exists():
        sys.exit(f"Nothing came of {' '.join(tests)}:\n{done.stdout[-3000:]}")
    return ElementTree.parse(report).getroot()


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--cpu", default="Haswell", help="See qemu-x86_64 -cpu help.")
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        sys.exit("qemu-x86_64 is not installed (Debian: apt-get install qemu-user).")
    files = sorted(path for path in TESTS.glob("test_*.py"))
    tests = args.tests or [str(f) for f in files if f.stem[5:] not in NO_ARITHMETIC]
    failed = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        python = programs(Path(name), emulator, args.cpu)
        reports = [Path(name) / f"{number}.xml" for number in range(len(tests))]
        runs = [
            pool.submit(run, python, [test], args.each, report)
            for test, report in zip(tests, reports, strict=True)
        ]
        for test, future in zip(tests, runs, strict=True):
            cases = list(future.result().iter("testcase"))
            kinds = Counter(child.tag for case in cases for child in case)
            bad = [case for case in cases if {child.tag for child in case} & {"failure", "error"}]
            failed += len(bad)
            seconds = sum(float(case.get("time", 0)) for case in cases)
            print(
                f"{Path(test).name:32s} {len(cases) - sum(kinds.values()):4d} passed "
                f"{len(bad):3d} failed {kinds['skipped']:3d} skipped {seconds:6.0f} s",
                flush=True,
            )
            for case in bad:
                said = " ".join(case[0].get("message", "").split())
                print(f"    {case.get('name')}: {said[:300]}")
    print(f"{args.cpu}: {f'{failed} failed' if failed else 'all passed'}.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
