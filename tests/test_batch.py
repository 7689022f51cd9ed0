"""Batches: which jobs there are, what runs again, what one job's end does to others, and that
results are the same.
"""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from command_line import CONFIG, DIGITS, MODEL, Command, Result, changed
from evidence import CONSTANTS, EVERYTHING, GRAPH, SAMPLES, assert_equal
from graphs import prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Ear, InMemory, resources

from converter import QConvertError, UsageError, convert
from converter.batch import isolated, run, summary
from converter.batch.isolated import Result as Ended
from converter.batch.isolated import Task, run_isolated
from converter.batch.manifest import Entry, read_entries
from converter.batch.run import Record
from converter.calibrate.cache import merge, observe_with_cache, part_path
from converter.calibrate.observe import Wanted, observe
from converter.config import load_config
from converter.job import Job

# Seconds that nothing takes on any machine, so that a test that waits in vain ends some time.
PATIENCE = 600
METHOD = "full_quant_param.activation_quant_method"
# What the process of a job does at its start, by a word in its output's name. Who sleeps is to be
# ended long before it wakes.
SABOTAGE = """
import os, signal, sys, time
if "serve(sys.argv[1])" in " ".join(sys.orig_argv):
    import pickle
    load = pickle.load
    def sabotaged(stream):
        task = load(stream)
        name = task.job.output.name
        if "killed" in name: os.kill(os.getpid(), signal.SIGKILL)
        if "broken" in name: os.kill(os.getpid(), signal.SIGSEGV)
        if "leaving" in name: os._exit(7)
        if "greedy" in name: raise MemoryError
        if "odd" in name: raise ZeroDivisionError("a bug")
        if "slow" in name:
            common = task.job.config.common
            for path in filter(None, (task.job.output, common.debug_info_save_path, common.calibration_cache)):
                draft = path.parent / f".{path.name}.abcdefgh"
                draft.mkdir(parents=True)
                (draft / "half").write_text("")
            time.sleep(1000)
            open("woken", "x").close()
        return task
    pickle.load = sabotaged
"""


@pytest.fixture
def qconvert(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Command]:
    """The command in an empty folder with a model `m.onnx` and a config `c.cfg` with ten
    pictures.
    """
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    shutil.copy(MODEL, tmp_path / "m.onnx")
    changed(tmp_path / "c.cfg", ("calibrate_size = 100", "calibrate_size = 10"))
    yield Command(capsys)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sabotage")
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    )


class Patient:
    """The process of a task, whose time is up when it is slow and has begun to write, by no clock."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def __getattr__(self, name: str) -> object:
        return getattr(self._process, name)

    def communicate(self, task: bytes, timeout: float) -> tuple[bytes, bytes]:
        output, unsent = pickle.loads(task).job.output, task
        while True:
            try:
                return self._process.communicate(unsent, 0.1)
            except subprocess.TimeoutExpired:
                if "slow" in output.name and list(Path().glob(f".{output.name}.*/half")):
                    raise
                unsent = None


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each job the time that this machine needs for it."""
    hurried = isolated._process

    @contextmanager
    def unhurried(*folders: str) -> Iterator[Patient]:
        with hurried(*folders) as process:
            yield Patient(process)

    monkeypatch.setattr(isolated, "_process", unhurried)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs jobs in this process, where how they end does not matter: it saves their start."""

    def run_inline(task: Task, timeout: float | None, directory: str) -> Ended:
        notes = isolated._Notes()
        return Ended(
            figures=isolated._work(task, notes),
            seconds=0.1,
            megabytes=20,
            warnings=tuple(notes.warnings),
        )

    monkeypatch.setattr(run, "run_isolated", run_inline)


def manifest(*lines: str, header: str = "model,config,output") -> Path:
    path = Path("jobs.csv")
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def statuses() -> dict[str, str]:
    return {
        row["name"]: row["status"] for row in json.loads(Path("batch_summary.json").read_text())
    }


def messages() -> dict[str, str]:
    return {
        row["name"]: row["message"] for row in json.loads(Path("batch_summary.json").read_text())
    }


def converted_alone(qconvert: Command, config: str = "c.cfg", model: str = "m.onnx") -> bytes:
    assert qconvert.convert(Path(config), Path("alone.onnx"), Path(model), "--quiet").code == 0
    return Path("alone.onnx").read_bytes()


def graph(path: str) -> bytes:
    """All of a model but its metadata, which names the config."""
    return onnx.load(path).graph.SerializeToString()


# --- which jobs there are


def test_configs_need_no_mode_where_constants_alone_become_half(
    qconvert: Command, inline: None
) -> None:
    Path("half.cfg").write_text("[job]\nmodel = m.onnx\n")
    manifest(",half.cfg,half.onnx")
    assert qconvert("batch", "jobs.csv", "--fp16=on").code == 0
    assert statuses() == {"half": "converted"}
    assert Path("half.onnx").stat().st_size < 0.6 * Path("m.onnx").stat().st_size
    assert qconvert("batch", "jobs.csv").code == 1
    assert "quant_type: is missing" in messages()["line 2"]


def test_a_folder_of_configs_is_a_batch(qconvert: Command) -> None:
    folder = Path("nightly")
    folder.mkdir()
    for name in ("b", "a"):
        job = f"[job]\nmodel = ../m.onnx\noutput = out/{name}_int8.onnx\n"
        changed(folder / f"{name}.cfg", ("calibrate_size = 100", "calibrate_size = 10"))
        (folder / f"{name}.cfg").write_text((folder / f"{name}.cfg").read_text() + job)
    (folder / "notes.txt").write_text("not a config")
    result = qconvert("batch", folder)
    assert (result.code, result.err) == (0, "")
    rows = json.loads((folder / "batch_summary.json").read_text())
    assert [(row["name"], row["status"]) for row in rows] == [
        ("out/a_int8", "converted"),
        ("out/b_int8", "converted"),
    ]
    converted_alone(qconvert)
    assert graph("nightly/out/a_int8.onnx") == graph("alone.onnx")


def test_a_manifest_overrides_keys_and_takes_patterns(qconvert: Command, inline: None) -> None:
    Path("zoo").mkdir()
    for name in ("one", "two"):
        shutil.copy("m.onnx", f"zoo/{name}.onnx")
    manifest(
        "zoo/*.onnx,c.cfg,out/*_kl.onnx,KL",
        "m.onnx,c.cfg,,",
        header=f"model,config,output,{METHOD}",
    )
    result = qconvert("batch", "jobs.csv")
    assert (result.code, result.err) == (0, "")
    assert list(statuses().values()) == ["converted"] * 3
    assert list(statuses()) == ["out/one_kl", "out/two_kl", "m_quant"]
    with Path("batch_summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row[METHOD] for row in rows] == ["KL", "KL", ""]
    assert {int(row["size_after"]) for row in rows[:2]} == {Path("out/one_kl.onnx").stat().st_size}
    assert all(float(row["seconds"]) > 0 and float(row["memory_mb"]) > 10 for row in rows)
    changed(Path("kl.cfg"), ("calibrate_size = 100", "calibrate_size = 10"), ("MAX_MIN\n", "KL\n"))
    converted_alone(qconvert, "kl.cfg")
    assert graph("out/two_kl.onnx") == graph("alone.onnx")
    assert Path("m_quant.onnx").read_bytes() == converted_alone(qconvert)


def test_one_line_a_job_and_a_table(qconvert: Command, inline: None) -> None:
    manifest(
        "m.onnx,c.cfg,a.onnx,", "m.onnx,c.cfg,b.onnx,KL", header=f"model,config,output,{METHOD}"
    )
    lines = qconvert("batch", "jobs.csv", "-j1").lines
    assert [line[:17] for line in lines[:2]] == ["[1/2] converted a", "[2/2] converted b"]
    assert lines[2].split()[:3] == ["name", "status", "seconds"]
    assert lines[2].split()[-1] == "activation_quant_method"
    assert [line.split()[0] for line in lines[3:5]] == ["a", "b"]
    assert lines[4].split()[-1] == "KL"
    assert lines[5:] == ["2 job(s): 2 converted."]
    assert qconvert("batch", "jobs.csv", "--quiet", "--resume").lines[0].startswith("name ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "",
            (
                "jobs.csv:1: the header must be model,config,output and columns named "
                "section.key; write each once."
            ),
        ),
        ("model,config\nm.onnx,c.cfg\n", "the header must be"),
        ("model,config,output,extra\n", "the header must be"),
        ("model,config,output,output\n", "the header must be"),
        (
            "model,config,output\n",
            "jobs.csv: there are no jobs; give a folder of configs or a CSV file with a line",
        ),
        (
            "model,config,output\nm.onnx,c.cfg\n",
            "jobs.csv:2: the config or a cell is missing or too many",
        ),
        (
            "model,config,output\nm.onnx,c.cfg,a.onnx,b\n",
            "jobs.csv:2: the config or a cell is missing or too",
        ),
        ("model,config,output\nm.onnx,,a.onnx\n", "jobs.csv:2: the config or a cell is missing"),
        (
            'model,config,output\n"m.onnx,c.cfg,a.onnx\n',
            "jobs.csv: this is no CSV file in UTF-8 (unexpected end of",
        ),
        (
            "model,config,output\n\udce9,c.cfg,a.onnx\n",
            "jobs.csv: this is no CSV file in UTF-8 ('utf-8' codec",
        ),
    ],
)
def test_a_list_that_is_wrong_runs_nothing(qconvert: Command, text: str, words: str) -> None:
    Path("jobs.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = qconvert("batch", "jobs.csv")
    assert result.code in (1, 2)
    assert result.err.startswith("ERROR: jobs.csv")
    assert words in result.err
    assert not Path("batch_summary.json").exists()


def test_a_list_that_does_not_exist(qconvert: Command) -> None:
    assert qconvert("batch", "none.csv") == Result(
        1,
        "",
        "ERROR: none.csv: no such file or directory; check the path, your rights and the "
        "space on the disk.\n",
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x.onnx,c.cfg,a.onnx,", "jobs.csv:3: there is no model file x.onnx; check the path."),
        ("z/*.onnx,c.cfg,a.onnx,", "jobs.csv:3: there is no model file z/*.onnx; check the path."),
        (
            ",c.cfg,a.onnx,",
            (
                "jobs.csv:3: no model is named; write model = model.onnx under [job], or fill "
                "the column"
            ),
        ),
        (
            "*.onnx,c.cfg,a.onnx,",
            "jobs.csv:3: 2 models would be written to a.onnx; write * for the model's name.",
        ),
        ("m.onnx,none.cfg,a.onnx,", "none.cfg: cannot be read (no such file or directory)"),
        (
            "m.onnx,c.cfg,a.onnx,best",
            f"jobs.csv:3: [full_quant_param] {METHOD.split('.')[1]} = best: must be MAX_MIN,",
        ),
        (
            "m.onnx,c.cfg,good.onnx,",
            "jobs.csv:3: jobs.csv:2 writes good.onnx already; give each job its own output.",
        ),
    ],
)
def test_a_job_that_is_wrong_is_a_failed_job(qconvert: Command, line: str, words: str) -> None:
    shutil.copy("m.onnx", "n.onnx")
    manifest("m.onnx,c.cfg,good.onnx,", line, header=f"model,config,output,{METHOD}")
    good, bad = read_entries(
        Path("jobs.csv"), lambda model, output, config: Job(model, Path(str(output)), config)
    )
    assert good.job and not good.problem
    assert bad.job is None
    assert words in bad.problem


def test_an_unknown_key_in_a_column(qconvert: Command) -> None:
    manifest("m.onnx,c.cfg,a.onnx,1", header="model,config,output,full_quant_param.nonsense")
    assert qconvert("batch", "jobs.csv").code == 1
    assert messages() == {
        "line 2": "jobs.csv:2: [full_quant_param] nonsense = 1: is not a key of [full_quant_param]; "
        "write one of " + messages()["line 2"].split("write one of ")[1]
    }


# --- what runs again


@pytest.fixture
def two_jobs(qconvert: Command, inline: None, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Two jobs that were run; calling it runs them again with --resume."""
    shutil.copytree(DIGITS / "calib", "pictures", ignore=lambda _, names: sorted(names)[12:])
    for name in ("a", "b"):
        text = changed(
            tmp_path / f"{name}.cfg", ("calibrate_size = 100", "calibrate_size = 8")
        ).read_text()
        Path(f"{name}.cfg").write_text(text.replace(str(DIGITS / "calib"), "pictures"))
    manifest("m.onnx,a.cfg,out/a.onnx", "m.onnx,b.cfg,out/b.onnx")
    assert qconvert("batch", "jobs.csv").code == 0

    def again(*flags: str) -> dict[str, str]:
        assert qconvert("batch", "jobs.csv", "--resume", *flags).code == 0
        return statuses()

    return again


SAME, NEW = "up to date", "converted"


def test_nothing_changed_runs_nothing(two_jobs: Callable[..., dict[str, str]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert two_jobs() == {"out/a": SAME, "out/b": SAME}
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before


def test_a_new_date_is_no_change(two_jobs: Callable[..., dict[str, str]]) -> None:
    for path in ("m.onnx", "a.cfg", next(Path("pictures").iterdir()), "out/a.onnx"):
        os.utime(path, (1, 1))
    assert two_jobs() == {"out/a": SAME, "out/b": SAME}


def test_one_config_changed_runs_one_job(two_jobs: Callable[..., dict[str, str]]) -> None:
    Path("a.cfg").write_text(Path("a.cfg").read_text().replace("MAX_MIN\n", "KL\n"))
    assert two_jobs() == {"out/a": NEW, "out/b": SAME}
    assert two_jobs() == {"out/a": SAME, "out/b": SAME}


def test_a_changed_output_is_made_again(two_jobs: Callable[..., dict[str, str]]) -> None:
    good = Path("out/a.onnx").read_bytes()
    Path("out/a.onnx").write_bytes(good[:-1] + b"x")
    Path("out/b.onnx").unlink()
    assert two_jobs() == {"out/a": NEW, "out/b": NEW}
    assert Path("out/a.onnx").read_bytes() == good


def replaced_model() -> None:
    data = Path("m.onnx").read_bytes()
    Path("m.onnx").write_bytes(data.replace(b"pytorch", b"PYTORCH", 1))
    assert data != Path("m.onnx").read_bytes()
    os.utime("m.onnx", (1, 1))


def another_version() -> None:
    for stamp in Path(".qconvert").glob("*.json"):
        stamp.write_text(stamp.read_text().replace('"identity": "', '"identity": "0'))


@pytest.mark.parametrize(
    "change",
    [
        replaced_model,
        another_version,
        lambda: sorted(Path("pictures").iterdir())[0].unlink(),
        lambda: shutil.copy(sorted(Path("pictures").iterdir())[3], "pictures/digit_0000.png"),
        lambda: sorted(Path("pictures").iterdir())[1].rename("pictures/digit_9999.png"),
        lambda: [stamp.write_text("{") for stamp in Path(".qconvert").glob("*.json")],
    ],
    ids=["model", "version", "a picture less", "a picture more", "a name", "stamps"],
)
def test_what_every_job_reads_runs_every_job(
    two_jobs: Callable[..., dict[str, str]], change: Callable[[], object]
) -> None:
    change()
    assert two_jobs() == {"out/a": NEW, "out/b": NEW}


def test_flags_and_versions_are_part_of_what_an_output_is_made_of(
    two_jobs: Callable[..., dict[str, str]],
) -> None:
    assert two_jobs("--fp16=on") == {"out/a": NEW, "out/b": NEW}
    assert two_jobs("--fp16=on") == {"out/a": SAME, "out/b": SAME}


def test_resuming_imports_nothing_heavy(qconvert: Command, inline: None) -> None:
    manifest("m.onnx,c.cfg,a.onnx")
    assert qconvert("batch", "jobs.csv").code == 0
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "converter",
        "batch",
        "jobs.csv",
        "--resume",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in found.stderr.splitlines()}
    assert not imported & {"numpy", "onnx", "onnx_ir", "onnxruntime", "PIL"}
    assert "up to date a" in found.stdout


# --- gates and reports


def test_missed_gates_exit_with_3_and_are_failures_for_junit(
    qconvert: Command, inline: None
) -> None:
    manifest("m.onnx,c.cfg,a.onnx", "m.onnx,c.cfg,b.onnx")
    result = qconvert("batch", "jobs.csv", "--max-size=1KB", "--junit=reports/junit.xml")
    assert (result.code, result.err) == (3, "ERROR: 2 job(s): 2 missed.\n")
    assert Path("a.onnx").exists()
    assert "of the float model, is more (--max-size 1KB)" in messages()["a"]
    suite = ElementTree.parse("reports/junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "2", "0")
    assert qconvert("batch", "jobs.csv", "--max-size=1KB", "--resume").code == 3
    assert qconvert("batch", "jobs.csv", "--max-size=90%", "--resume").code == 0
    assert statuses() == {"a": SAME, "b": SAME}


def test_a_failure_weighs_more_than_a_missed_gate(qconvert: Command, inline: None) -> None:
    manifest("m.onnx,c.cfg,a.onnx", "x.onnx,c.cfg,b.onnx")
    assert qconvert("batch", "jobs.csv", "--max-size=1KB").code == 1


def test_junit_is_well_formed_whatever_messages_hold(tmp_path: Path) -> None:
    hostile = "<&\"'>\x00\x1b[31m\ud800é\U0001f600]]>"
    entry = Entry(hostile, tmp_path, 0, tmp_path / "c.cfg")
    results = [
        ("failed", "error"),
        ("missed", "failure"),
        ("skipped", "skipped"),
        ("converted", None),
    ]
    records = [Record(entry, status, hostile, Ended(seconds=1.5)) for status, _ in results]
    summary.write([], tmp_path, tmp_path / "empty.xml")
    assert ElementTree.parse(tmp_path / "empty.xml").getroot().get("tests") == "0"
    summary.write(records, tmp_path, tmp_path / "j.xml")
    cases = ElementTree.parse(tmp_path / "j.xml").getroot().findall("testcase")
    assert [child.tag for case in cases for child in case] == ["error", "failure", "skipped"]
    assert cases[0].get("name") == cases[0][0].get("message") == "<&\"'>??[31m?é\U0001f600]]>"
    assert cases[0].get("time") == "1.500"


# --- one job's end is its own


ENDS = {
    "killed": (
        "its process was killed, most likely for want of memory; let fewer jobs run at once with "
        "--jobs."
    ),
    "broken": "its process crashed (SIGSEGV); convert it alone to see more.",
    "leaving": "its process crashed (7); convert it alone to see more.",
    "greedy": "memory ran out; let fewer jobs run at once with --jobs.",
    "odd": "ZeroDivisionError: a bug",
    "slow": "it took more than 6 seconds and was stopped; allow more with --timeout.",
}


def test_one_job_s_end_is_its_own(qconvert: Command, sabotage: None, patience: None) -> None:
    manifest(*(f"m.onnx,c.cfg,{name}.onnx" for name in ENDS), "m.onnx,weights.cfg,good.onnx")
    Path("weights.cfg").write_text("[common_quant_param]\nquant_type = WEIGHT_QUANT\n")
    assert qconvert("batch", "jobs.csv", "--timeout=6").code == 1
    assert statuses() == {**dict.fromkeys(ENDS, "failed"), "good": "converted"}
    assert messages() == {**ENDS, "good": ""}
    assert not [path for path in Path().iterdir() if path.name.startswith((".slow", "woken"))]


def test_a_task_that_never_ends_is_ended(qconvert: Command, sabotage: None) -> None:
    task = Task(Job(Path("m.onnx"), Path("slow.onnx"), load_config(Path("c.cfg"))), Path("s"), "")
    assert run_isolated(task, 0.3, str(Path.cwd())).problem == (
        "it took more than 0.3 seconds and was stopped; allow more with --timeout."
    )
    assert not list(Path().glob(".slow*"))


def test_what_shares_a_calibration_runs_though_the_first_fails(
    qconvert: Command, sabotage: None
) -> None:
    manifest("m.onnx,c.cfg,broken.onnx", "m.onnx,c.cfg,good.onnx")
    assert qconvert("batch", "jobs.csv", "--calibration-parts=2").code == 1
    assert statuses() == {"broken": "failed", "good": "converted"}
    assert Path("good.onnx").read_bytes() == converted_alone(qconvert)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    config = tmp_path / "c.cfg"
    config.write_text("[common_quant_param]\nquant_type = WEIGHT_QUANT\n")
    task = Task(Job(MODEL, tmp_path / "a.onnx", load_config(config)), tmp_path / "stamp.json", "")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_isolated(task, None, str(tmp_path / "nowhere"))


def test_what_the_pool_cannot_run_is_a_failed_job() -> None:
    future: Future[Ended] = Future()
    future.set_exception(RuntimeError("all workers died"))
    words = "it could not be run (RuntimeError: all workers died); see the logs of the machine."
    assert run._result(future) == Ended(words)


def test_fail_fast_ends_the_others(qconvert: Command, sabotage: None) -> None:
    manifest("m.onnx,c.cfg,leaving.onnx", *(f"m.onnx,c.cfg,slow{i}.onnx" for i in range(3)))
    result = qconvert("batch", "jobs.csv", "--fail-fast", "-j2")
    assert (result.code, result.err) == (1, "ERROR: 4 job(s): 1 failed, 3 skipped.\n")
    assert messages()["slow2"] == "an earlier job failed"
    assert not [path for path in Path().iterdir() if path.name.startswith((".slow", "woken"))]


def test_fail_fast_starts_nothing_after_a_job_that_is_wrong(qconvert: Command) -> None:
    manifest("m.onnx,c.cfg,a.onnx", "x.onnx,c.cfg,b.onnx")
    assert qconvert("batch", "jobs.csv", "--fail-fast").code == 1
    assert statuses() == {"a": "skipped", "line 3": "failed"}
    assert not Path("a.onnx").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_and_leaves_no_litter(
    qconvert: Command, sabotage: None, tmp_path: Path, number: int
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    manifest("m.onnx,d.cfg,slow1.onnx", "m.onnx,weights.cfg,slow2.onnx", "m.onnx,c.cfg,good.onnx")
    Path("weights.cfg").write_text("[common_quant_param]\nquant_type = WEIGHT_QUANT\n")
    debug = "[common_quant_param]\ndebug_info_save_path = debug\ncalibration_cache = cache.npz"
    Path("d.cfg").write_text(Path("c.cfg").read_text().replace("[common_quant_param]", debug))
    command = [sys.executable, "-m", "converter", "batch", "jobs.csv", "-j2"]
    before = {path.name for path in Path().iterdir()}
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    wait_for(lambda: len(list(Path().glob(".slow*"))) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (
        130,
        "ERROR: Interrupted after 0 of 3 jobs; run it with --resume for the others.\n",
    )
    assert {path.name for path in Path().iterdir()} == before
    assert not list(temporary.iterdir())
    assert str(temporary) not in "".join(environments())


def environments() -> Iterator[str]:
    """The environments of all processes there are."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            yield path.read_text(errors="replace")
        except OSError:
            continue


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


# --- calibration, shared and split


def test_a_sweep_calibrates_once(qconvert: Command, inline: None) -> None:
    methods = ("MAX_MIN", "KL", "MSE")
    manifest(
        *(f"m.onnx,c.cfg,{m}.onnx,{m}" for m in methods), header=f"model,config,output,{METHOD}"
    )
    assert qconvert("batch", "jobs.csv").code == 0
    caches = list(Path(".qconvert").glob("*.npz"))
    assert len(caches) == 1
    for method in methods:
        cached = changed(
            Path("cached.cfg"),
            ("calibrate_size = 100", "calibrate_size = 10"),
            ("MAX_MIN\n", f"{method}\n"),
        )
        converted_alone(qconvert, "cached.cfg")
        assert graph(f"{method}.onnx") == graph("alone.onnx")
        cached.write_text(
            cached.read_text().replace(
                "[full_quant", f"calibration_cache = {caches[0]}\n[full_quant"
            )
        )
        result = qconvert.convert(cached, Path("again.onnx"), Path("m.onnx"), "--verbose")
        assert "All ranges come from the calibration cache" in result.err
        assert graph("again.onnx") == graph("alone.onnx")


def test_jobs_of_other_data_do_not_share(qconvert: Command, inline: None) -> None:
    key = "data_preprocess_param.calibrate_size"
    manifest("m.onnx,c.cfg,a.onnx,10", "m.onnx,c.cfg,b.onnx,9", header=f"model,config,output,{key}")
    assert qconvert("batch", "jobs.csv").code == 0
    assert not list(Path(".qconvert").glob("*.npz"))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 11])
def test_parts_together_see_every_sample_once_and_means_in_one(parts: int) -> None:
    for count, first in ((1000, 64), (100, 64), (10, 64), (7, 3), (1, 1)):
        found = [
            Wanted((), (("m", 1),), True, True, first, (k, parts)).indices(count)
            for k in range(parts)
        ]
        assert [index for part in found for index in part] == list(range(count))
        assert len(found[0]) >= min(first, count)
    assert [len(Wanted((), (), True, True, 64, (k, 4)).indices(100)) for k in range(4)] == [25] * 4


@settings(deadline=None, max_examples=20)
@given(parts=st.integers(2, 9), first=st.integers(1, 9), threads=st.integers(1, 2))
def test_a_split_calibration_equals_the_whole_one(
    tmp_path_factory, parts: int, first: int, threads: int
) -> None:
    path = tmp_path_factory.mktemp("cache") / "cache.npz"
    model, data = prepared(GRAPH, **CONSTANTS), InMemory(SAMPLES)
    wanted = with_first(first)
    whole = observe(model, wanted, data, resources=resources(), watch=Ear())
    for number in range(parts):
        part = with_first(first, (number, parts))
        observe_with_cache(model, part, data, resources=resources(threads), watch=Ear(), path=path)
    assert not path.exists()
    merge([part_path(path, number, parts) for number in range(parts)], path)
    assert [found.name for found in path.parent.iterdir()] == ["cache.npz"]
    ear = Ear()
    assert_equal(
        observe_with_cache(model, wanted, data, resources=resources(), watch=ear, path=path), whole
    )
    assert ear.said == [f"All ranges come from the calibration cache {path}."]


def with_first(first: int, part: tuple[int, int] = (0, 1)) -> Wanted:
    return Wanted(EVERYTHING.tensors, EVERYTHING.means, True, True, first, part)


def test_a_part_that_is_missing_or_of_other_data_makes_no_cache(tmp_path: Path) -> None:
    path, model = tmp_path / "cache.npz", prepared(GRAPH, **CONSTANTS)
    files = [part_path(path, number, 2) for number in range(2)]
    for number, samples in enumerate((SAMPLES, SAMPLES[1:])):
        part = with_first(2, (number, 2))
        observe_with_cache(
            model, part, InMemory(samples), resources=resources(), watch=Ear(), path=path
        )
    merge(files, path)
    assert not path.exists()
    observe_with_cache(
        model,
        with_first(2, (0, 2)),
        InMemory(SAMPLES),
        resources=resources(),
        watch=Ear(),
        path=path,
    )
    merge(files, path)
    assert not path.exists()


def test_oddities_are_told_of_a_split_calibration_too(tmp_path: Path) -> None:
    samples = [{"x": np.full((3, 4), np.nan, np.float32)}, *SAMPLES]
    path, model = tmp_path / "cache.npz", prepared(GRAPH, **CONSTANTS)
    whole, split, early = Ear(), Ear(), Ear()
    observe(model, EVERYTHING, InMemory(samples), resources=resources(), watch=whole)
    for number in range(2):
        observe_with_cache(
            model,
            with_first(2, (number, 2)),
            InMemory(samples),
            resources=resources(),
            watch=early,
            path=path,
        )
    merge([part_path(path, number, 2) for number in range(2)], path)
    observe_with_cache(
        model, with_first(2), InMemory(samples), resources=resources(), watch=split, path=path
    )
    assert len(whole.warned) > 0
    assert split.warned == whole.warned
    assert early.warned == []


def test_a_split_batch_equals_the_command(qconvert: Command, inline: None) -> None:
    manifest("m.onnx,c.cfg,a.onnx", "m.onnx,weights.cfg,b.onnx")
    Path("weights.cfg").write_text("[common_quant_param]\nquant_type = WEIGHT_QUANT\n")
    assert qconvert("batch", "jobs.csv", "--calibration-parts=3").code == 0
    assert Path("a.onnx").read_bytes() == converted_alone(qconvert)
    assert [path.suffix for path in sorted(Path(".qconvert").iterdir()) if "npz" in path.name] == [
        ".npz"
    ]


# --- a cluster


CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pids = [nanny.pid for nanny in cluster.workers.values()]
        print(cluster.scheduler_address, *pids, flush=True)
        sys.stdin.read()
"""


def test_a_cluster_that_loses_a_worker_gives_the_same_results(
    qconvert: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    Path("cluster.py").write_text(CLUSTER)
    methods = ("MAX_MIN", "KL", "MSE")
    manifest(
        *(f"m.onnx,c.cfg,{m}.onnx,{m}" for m in methods), header=f"model,config,output,{METHOD}"
    )
    assert qconvert("batch", "jobs.csv").code == 0
    expected = {method: Path(f"{method}.onnx").read_bytes() for method in methods}
    Path("tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "cluster.py"], text=True, **pipes) as cluster:
        address, first, _ = cluster.stdout.readline().split()
        shutil.rmtree(".qconvert")
        flags = [f"--scheduler={address}", "--calibration-parts=2"]
        batch = subprocess.Popen([sys.executable, "-m", "converter", "batch", "jobs.csv", *flags])
        wait_for(Path(".qconvert").exists)
        os.kill(int(first), signal.SIGKILL)
        assert batch.wait(PATIENCE) == 0
        cluster.stdin.close()
    wait_for(lambda: not list(Path("tmp").glob("qconvert-*")))
    assert statuses() == dict.fromkeys(methods, "converted")
    assert {method: Path(f"{method}.onnx").read_bytes() for method in methods} == expected


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x"])
def test_a_cluster_that_does_not_answer(
    qconvert: Command, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    manifest("m.onnx,c.cfg,a.onnx")
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    command = [sys.executable, "-m", "converter", "batch", "jobs.csv", f"--scheduler={address}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == (
        f"ERROR: --scheduler {address}: no Dask scheduler answers; write its address, for "
        "example tcp://host:8786.\n"
    )


def test_a_cluster_needs_dask(qconvert: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    manifest("m.onnx,c.cfg,a.onnx")
    result = qconvert("batch", "jobs.csv", "--scheduler=tcp://x:1")
    assert (result.code, result.out) == (2, "")
    assert (
        result.err
        == "ERROR: --scheduler needs Dask; install it with pip install 'qconvert[cluster]'.\n"
    )


# --- the same from Python


def test_python_does_what_the_command_does(qconvert: Command) -> None:
    outcome = convert("m.onnx", "c.cfg", "p.onnx", overrides={METHOD: "KL"}, output_type="UINT8")
    assert outcome.size_after == Path("p.onnx").stat().st_size
    changed(Path("kl.cfg"), ("calibrate_size = 100", "calibrate_size = 10"), ("MAX_MIN\n", "KL\n"))
    qconvert.convert(Path("kl.cfg"), Path("c.onnx"), Path("m.onnx"), "--outputDataType=UINT8")
    assert graph("p.onnx") == graph("c.onnx")
    convert("m.onnx", "c.cfg", verify=False)
    assert Path("m_quant.onnx").exists()
    convert("m.onnx", None, "half.onnx", fp16=True)
    assert qconvert("--modelFile=m.onnx", "--fp16=on", "--outputFile=h.onnx").code == 0
    assert graph("half.onnx") == graph("h.onnx")


def test_python_gets_the_command_s_messages(qconvert: Command) -> None:
    with pytest.raises(UsageError, match=r"--outputFile m.onnx is the float model itself"):
        convert("m.onnx", "c.cfg", "m.onnx")
    with pytest.raises(
        QConvertError,
        match=r"^overrides: \[full_quant_param\] activation_quant_method = X: must be",
    ):
        convert("m.onnx", "c.cfg", overrides={METHOD: "X"})
    with pytest.raises(QConvertError, match=r"^overrides: x = 1: stands before any section"):
        convert("m.onnx", "c.cfg", overrides={"x": "1"})
    with pytest.raises(UsageError, match=r"^Without a config only fp16=True is possible"):
        convert("m.onnx", None)


def test_the_command_takes_files_from_the_config_s_job_section(qconvert: Command) -> None:
    Path("c.cfg").write_text(Path("c.cfg").read_text() + "[job]\nmodel = m.onnx\noutput = j.onnx\n")
    assert qconvert("--configFile=c.cfg", "--quiet").code == 0
    assert Path("j.onnx").exists()
    assert qconvert("--configFile=c.cfg", "--outputFile=k.onnx", "--quiet").code == 0
    assert Path("k.onnx").exists()


def test_tasks_travel() -> None:
    task = Task(Job(MODEL, Path("a.onnx"), load_config(CONFIG)), Path("stamp"), "identity")
    assert pickle.loads(pickle.dumps(task)) == task
