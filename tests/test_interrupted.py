"""Whatever stops a conversion, the output is the old file or the whole new one; an orderly stop
leaves no litter.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import MODEL, ROOT, Command
from hostile_models import external, plain
from running import write_config

from converter import model as models

# Weights go to a file of their own above so many bytes.
START = """
import sys
from converter import model
from converter.cli import main
model.EXTERNAL_DATA_ABOVE = int(sys.argv.pop(1))
print("ready", flush=True)
main()
"""
ONE_FILE, TWO_FILES = 1 << 40, 1000
ORDERLY = (signal.SIGINT, signal.SIGTERM)


class Place:
    """A folder with an old output, and one for temporary files."""

    def __init__(self, folder: Path, above: int = ONE_FILE) -> None:
        self.out, self.temp, self.above = folder / "out", folder / "temp", above
        self.out.mkdir()
        self.temp.mkdir()
        self.output = self.out / "q.onnx"
        self.config = write_config(
            folder / "c.cfg", common_quant={"quant_type": "WEIGHT_QUANT", "thread_num": 1}
        )

    def start(self, bits: int, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        config = self.config.with_name(f"{bits}.cfg")
        config.write_text(self.config.read_text() + f"bit_num = {bits}\n")
        flags = [f"--modelFile={MODEL}", f"--configFile={config}", f"--outputFile={self.output}"]
        environment = {**os.environ, "TMPDIR": str(self.temp), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", START, str(self.above), *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def convert(self, bits: int) -> dict[str, bytes]:
        """What a conversion that nothing stops leaves in the output's folder."""
        running = self.start(bits)
        _, said = running.communicate(timeout=60)
        assert (running.returncode, said) == (0, "")
        return self.files()

    def seconds(self, bits: int) -> float:
        """How long a conversion takes that nothing stops."""
        running = self.start(bits)
        _wait_until_ready(running)
        start = time.perf_counter()
        running.communicate(timeout=60)
        return time.perf_counter() - start

    def files(self) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in self.out.iterdir()
            if not path.name.startswith(".")
        }

    def litter(self) -> list[Path]:
        return [*self.temp.rglob("*"), *self.out.glob(".*")]


def _wait_until_ready(running: subprocess.Popen[str]) -> None:
    assert running.stdout
    assert running.stdout.readline() == "ready\n"


def _is_whole(place: Place, *wholes: dict[str, bytes]) -> bool:
    """Whether the model file is one of `wholes`, with its weights beside it."""
    files = place.files()
    return any(whole.items() <= files.items() for whole in wholes)


@pytest.mark.parametrize("above", [ONE_FILE, TWO_FILES], ids=["one file", "two files"])
def test_signals_at_any_moment(tmp_path: Path, above: int) -> None:
    place = Place(tmp_path, above)
    new = place.convert(3)
    old, seconds = place.convert(8), place.seconds(8)
    assert len(old) == len(new) == (1 if above == ONE_FILE else 2)
    stopped = 0
    for number, share in enumerate((0.5, 0.95, 0.8, 0.9)):
        how = (*ORDERLY, signal.SIGKILL, signal.SIGTERM)[number]
        running = place.start(3)
        _wait_until_ready(running)
        time.sleep(max(0.2, share * seconds))
        running.send_signal(how)
        _, said = running.communicate(timeout=60)
        assert _is_whole(place, old, new), how
        onnxruntime.InferenceSession(place.output)
        if how in ORDERLY:
            assert not place.litter()
            # Behind its last line, the interpreter has no handlers any more.
            assert running.returncode in (0, 130, -how)
            assert "Traceback" not in said
        stopped += running.returncode != 0
        shutil.rmtree(place.temp)
        place.temp.mkdir()
        for path in place.out.glob(".*"):
            shutil.rmtree(path)
        for path in place.out.iterdir():
            path.unlink()
        for name, content in old.items():
            (place.out / name).write_bytes(content)
    assert stopped


@pytest.mark.parametrize("kilobytes", [1, 35])
def test_a_full_disk_is_said(tmp_path: Path, kilobytes: int) -> None:
    place = Place(tmp_path)
    old = place.convert(8)
    size = kilobytes << 10
    assert size < len(old["q.onnx"])
    running = place.start(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert said.startswith("ERROR: ")
    assert said.count("\n") == 1
    assert "space on the disk" in said
    assert place.files() == old
    assert not place.litter()


# --- every step of saving, one by one


@pytest.fixture
def qconvert(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(models, "EXTERNAL_DATA_ABOVE", TWO_FILES)
    return Command(capsys)


def _failing(
    original: Callable[..., object], when: int, error: BaseException
) -> Callable[..., object]:
    calls = iter(range(1000))

    def call(*arguments: object, **keywords: object) -> object:
        # Other models are written on the way: only the output counts.
        if any("/.q.onnx." in str(argument) for argument in arguments) and next(calls) == when:
            raise error
        return original(*arguments, **keywords)

    return call


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
STEPS = [
    (ir, "save", 0),
    (models, "check", 0),
    (Path, "replace", 0),
    (Path, "replace", 1),
]


@pytest.mark.parametrize(
    ("error", "code"), [(FULL_DISK, 1), (KeyboardInterrupt(), 130), (MemoryError(), 1)]
)
@pytest.mark.parametrize(
    ("owner", "name", "when"), STEPS, ids=lambda x: str(getattr(x, "__name__", x))
)
def test_no_step_of_saving_breaks_the_old_model(
    qconvert: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, when: int,
    error: BaseException, code: int,
) -> None:  # fmt: skip
    model = tmp_path / "m.onnx"
    model.write_bytes(plain().SerializeToString())
    configs = {}
    for bits in (4, 8):
        configs[bits] = write_config(
            tmp_path / f"{bits}.cfg", common_quant={"quant_type": "WEIGHT_QUANT", "bit_num": bits}
        )
    output = tmp_path / "out" / "q.onnx"
    assert qconvert.convert(configs[4], output, model).code == 0
    old = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    others = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _failing(getattr(owner, name), when, error))
        result = qconvert.convert(configs[8], output, model)
    assert result.code == code
    assert result.err.strip().startswith("ERROR: ")
    kept = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    assert old.items() <= kept.items()
    assert not [name for name in kept if name.startswith(".")]
    assert set(tmp_path.iterdir()) == others
    # The next conversion clears away the weights of one that was stopped between two files.
    assert qconvert.convert(configs[8], output, model).code == 0
    assert len(list(output.parent.iterdir())) == 2
    onnxruntime.InferenceSession(output)


# --- the float model


def _same(folder: Path, model: Path) -> Path:
    return model


def _symbolic(folder: Path, model: Path) -> Path:
    (folder / "link.onnx").symlink_to(model)
    return folder / "link.onnx"


def _hard(folder: Path, model: Path) -> Path:
    (folder / "hard.onnx").hardlink_to(model)
    return folder / "hard.onnx"


def _around(folder: Path, model: Path) -> Path:
    (folder / "other").mkdir()
    return folder / "other" / ".." / model.name


def _weights(folder: Path, model: Path) -> Path:
    return folder / "weights.onnx"


@pytest.mark.parametrize("as_output", [_same, _symbolic, _hard, _around, _weights])
def test_the_float_model_is_never_overwritten(
    qconvert: Command, tmp_path: Path, as_output: Callable[[Path, Path], Path]
) -> None:
    model = tmp_path / "m.onnx"
    whole = external("weights.onnx")
    model.write_bytes(whole.SerializeToString())
    (tmp_path / "weights.onnx").write_bytes(
        onnx.numpy_helper.to_array(plain().graph.initializer[0]).tobytes()
    )
    config = write_config(tmp_path / "c.cfg", common_quant={"quant_type": "WEIGHT_QUANT"})
    output = as_output(tmp_path, model)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    result = qconvert.convert(config, output, model)
    assert result.code == 2
    assert "is the float model itself" in result.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
