"""The first moments of the command, and terminals that are none."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CONFIG, MODEL, changed

from converter.cli.terminal import Terminal

DRY = (f"--modelFile={MODEL}", f"--configFile={CONFIG}", "--dry-run")


def test_an_interrupt_before_the_command_is_there_is_one_sentence():
    """Also one that what is half imported would take for its own."""
    importing = """if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from converter import start
        def interrupted():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                print("swallowed")
        start._open_streams = interrupted
        start.main()
    """
    done = subprocess.run([sys.executable, "-c", importing], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr == "ERROR: Interrupted; nothing was written.\n"


def test_nothing_is_imported_before_an_interrupt_is_heard():
    program = """if True:
        import os, sys
        before = set(sys.modules)
        import converter.start
        print(sorted(set(sys.modules) - before))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "['converter', 'converter.start']\n"


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_changes_nothing_else(closed, tmp_path):
    config = changed(tmp_path / "c.cfg", ("calibrate_size = 100", "calibrate_size = 20"))
    words = [sys.executable, "-m", "converter", DRY[0], f"--configFile={config}"]
    words.append(f"--outputFile={tmp_path / 'out.onnx'}")
    shell = " ".join(words) + f" {closed}{'<' if closed == 0 else '>'}&-"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out.onnx").exists()
    assert closed == 1 or done.stdout.endswith("CONVERT RESULT SUCCESS:0\n")
    assert not done.stderr


@pytest.mark.parametrize(
    ("term", "columns", "bar"), [("xterm", 80, True), ("dumb", 80, False), ("xterm", 24, False)]
)
def test_a_terminal_that_cannot_draw_gets_no_bar(monkeypatch, term, columns, bar):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("COLUMNS", str(columns))
        assert list(Terminal(False, False).track(range(3), "Calibrating", 3)) == [0, 1, 2]
        stream.write("end")
        stream.flush()
        written = os.read(leader, 4096)
    os.close(leader)
    assert (b"Calibrating" in written) == bar
    assert all(len(part) < columns + 10 for part in written.split(b"\r"))


def test_a_dry_run_names_wrong_inputs_and_missing_folders(qconvert, tmp_path):
    for old, new, words in (
        ("image:", "picture:", "the model has no input 'picture'"),
        (f"{MODEL.parent}/calib", "/nowhere", "/nowhere: is not a readable folder"),
    ):
        config = changed(tmp_path / "c.cfg", (old, new))
        result = qconvert(DRY[0], f"--configFile={config}", "--dry-run")
        assert result.code == 1 and words in result.err


def test_a_report_folder_that_may_not_be_written_to_is_told_before_the_work(
    qconvert, tmp_path, monkeypatch
):
    (tmp_path / "mine").mkdir()
    config = changed(
        tmp_path / "c.cfg",
        (
            "[common_quant_param]",
            f"[common_quant_param]\ndebug_info_save_path = {tmp_path / 'mine'}",
        ),
    )
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path / "mine" and allowed(path, mode)
    )
    result = qconvert(DRY[0], f"--configFile={config}", "--dry-run")
    assert result.code == 1 and "mine cannot be written to" in result.err


def test_a_full_disk_is_named_with_the_file(qconvert, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    config = changed(tmp_path / "c.cfg", ("calibrate_size = 100", "calibrate_size = 20"))
    monkeypatch.setattr(Path, "replace", full)
    result = qconvert(DRY[0], f"--configFile={config}", f"--outputFile={tmp_path / 'out.onnx'}")
    assert result.code == 1
    assert result.err.startswith(f"ERROR: {tmp_path / 'out.onnx'}: no space left on device;")


def test_the_command_is_the_one_that_is_installed():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'qconvert = "converter.start:main"' in text
