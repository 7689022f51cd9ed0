#!/usr/bin/env python3
"""The tests that compute, on a processor that this machine is not: they are to pass on every one.

    python benchmarks/emulated_tests.py [--cpu Haswell] [--each 3] [--jobs 2] [TEST ...]

Needs `qemu-x86_64` (Debian: qemu-user), which is some 30 times slower. Of the parameters of a test
`--each` are taken, spread evenly (0: all); named tests (a file, or tests/test_x.py::name) replace
the files that compute. Processes that tests start are emulated as well. Prints what fails and, file
by file, what passed and its processor time; exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

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
# Hypothesis tries few examples, and pytest's own words give way to those of Summary.
FLAGS = ("--hypothesis-profile=few", "-pno:terminal", "-pno:cacheprovider", "-oaddopts=")


HARMLESS = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}


class Summary:
    """Takes so many of each test's parameters, the first and the last among them, and says how they
    fared.
    """

    def __init__(self, each: int, title: str) -> None:
        self._each, self._title = each, title
        self._outcomes: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Called by pytest with all tests."""
        functions: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            functions[item.nodeid.partition("[")[0]].append(item)
        items[:] = [item for found in functions.values() for item in self._taken(found)]

    def _taken(self, found: list[pytest.Item]) -> list[pytest.Item]:
        quick = [item for item in found if not item.get_closest_marker("slow")]
        if not self._each or len(quick) <= self._each:
            return quick
        step = (len(quick) - 1) / max(1, self._each - 1)
        return [quick[round(number * step)] for number in range(self._each)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest with what came of each part of a test."""
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = " ".join(str(crash.message if crash else report.longrepr).split())
            print(f"FAILED {report.nodeid}: {said:.400}", flush=True)

    def pytest_sessionfinish(self) -> None:
        """Called by pytest behind the last test."""
        fared = [f"{count} {what}" for what, count in sorted(self._outcomes.items())]
        print(f"{self._title}: {', '.join(fared)}, {sum(os.times()[:4]):.0f} s", flush=True)


def inside(each: int, tests: Sequence[str]) -> None:
    """What an emulated process does: it branches off one for each file, and a second one where the
    first dies, since the emulator crashes now and then; a test that crashes does so twice.
    """
    import converter.pipeline  # noqa: F401 - takes long to import, so it is done once

    codes = [_forked(each, test) for test in tests]
    died = [number for number, code in enumerate(codes) if code < 0]
    for number in died:
        codes[number] = _forked(each, tests[number])
    sys.exit(bool(set(codes) - HARMLESS))


def _forked(each: int, test: str) -> int:
    """How pytest ends in a process of its own; minus a signal if that dies."""
    child = os.fork()
    if child == 0:
        os._exit(pytest.main([*FLAGS, test], plugins=[Summary(each, Path(test).name)]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        print(f"DIED {Path(test).name}: {signal.Signals(-code).name}", flush=True)
    return code


def named(cpu: str, emulator: str) -> str:
    """The processor without the features that the emulator lacks, so that it does not warn."""
    tried = subprocess.run(
        [emulator, "-cpu", cpu, sys.executable, "-c", ""],
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    lacking = re.findall(r"requested feature: \S+\.(\S+) \[bit", tried.stderr)
    return ",".join([cpu, *(f"-{feature}" for feature in lacking)])


def programs(folder: Path, emulator: str, cpu: str) -> Path:
    """Makes Python and the installed command in `folder`, emulated; Python's path."""
    command = Path(sys.executable).with_name("qconvert")
    for name, script in (("python", ""), ("qconvert", f'"{command}"')):
        text = EMULATED.format(emulator=emulator, cpu=cpu, python=sys.executable, script=script)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder / "python"


def start(python: Path, tests: Sequence[str], each: int, core: int) -> subprocess.Popen[bytes]:
    """Starts an emulated process that runs tests on one core, which the emulator bears best."""
    command = [python, "-c", INSIDE, python, Path(__file__).parent, each, *tests]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=TESTS.parent,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--cpu", default="Haswell", help="See qemu-x86_64 -cpu help.")
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        sys.exit("qemu-x86_64 is not installed (Debian: apt-get install qemu-user).")
    files = sorted(path for path in TESTS.glob("test_*.py"))
    tests = args.tests or [str(f) for f in files if f.stem[5:] not in NO_ARITHMETIC]
    with tempfile.TemporaryDirectory() as name:
        python = programs(Path(name), emulator, named(args.cpu, emulator))
        cores, jobs = sorted(os.sched_getaffinity(0)), min(args.jobs, len(tests))
        running = [
            start(python, tests[job::jobs], args.each, cores[job % len(cores)])
            for job in range(jobs)
        ]
        codes = [process.wait() for process in running]
    print(f"{args.cpu}: {'something failed' if any(codes) else 'all passed'}.")
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
