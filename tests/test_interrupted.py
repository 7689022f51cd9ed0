"""Whatever stops a conversion, the output is the old file or the whole new one; an orderly stop
leaves no litter.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from command_line import MODEL, Command
from hostile_models import external, plain, written
from running import write_config
from stoppable import Ended, Stop, convert

from converter.graph import files as models

# Weights go to a file of their own above so many bytes.
ONE_FILE, TWO_FILES = 1 << 40, 1000
ORDERLY = (signal.SIGINT, signal.SIGTERM)


class Place:
    """A folder with an old output, and one for temporary files."""

    def __init__(self, folder: Path, model: Path = MODEL, above: int = ONE_FILE) -> None:
        self.model, self.above = model, above
        self.out, self.temp = folder / "out", folder / "temp"
        self.out.mkdir()
        self.temp.mkdir()
        self.output = self.out / "q.onnx"
        self.configs = folder

    def convert(self, bits: int, stop: Stop | None = None, file_size: int | None = None) -> Ended:
        """A conversion to so many bits, which may be stopped or find no space for its files."""
        config = write_config(
            self.configs / f"{bits}.cfg",
            common_quant={"quant_type": "WEIGHT_QUANT", "thread_num": 1, "bit_num": bits},
        )
        flags = [
            f"--modelFile={self.model}",
            f"--configFile={config}",
            f"--outputFile={self.output}",
        ]
        return convert(flags, self.temp, self.above, stop, file_size)

    def files(self) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in self.out.iterdir()
            if not path.name.startswith(".")
        }

    def put(self, files: dict[str, bytes]) -> None:
        """Makes the folders what they were after a conversion that left these files."""
        for folder in (self.out, self.temp):
            shutil.rmtree(folder)
            folder.mkdir()
        for name, content in files.items():
            (self.out / name).write_bytes(content)

    def litter(self) -> list[Path]:
        return [*self.temp.rglob("*"), *self.out.glob(".*")]


def _is_whole(place: Place, *wholes: dict[str, bytes]) -> bool:
    """Whether the model file is one of `wholes`, with its weights beside it."""
    files = place.files()
    return any(whole.items() <= files.items() for whole in wholes)


@pytest.mark.parametrize("above", [ONE_FILE, TWO_FILES], ids=["one file", "two files"])
def test_signals_at_any_moment(tmp_path: Path, above: int) -> None:
    place = Place(tmp_path, written(tmp_path, plain()), above)
    undisturbed = place.convert(3)
    assert (undisturbed.code, undisturbed.said) == (0, "")
    new, saved = place.files(), undisturbed.saved
    assert saved
    assert place.convert(8).code == 0
    old = place.files()
    assert len(old) == len(new) == (1 if above == ONE_FILE else 2)
    stopped = 0
    for stop in (
        Stop(signal.SIGINT, int(0.7 * saved)),
        Stop(signal.SIGTERM, saved - 500),  # what is to be put in place is there
        Stop(signal.SIGKILL, saved - 500),
        Stop(signal.SIGKILL, saved + 50),  # of two files, one is in place
        Stop(signal.SIGTERM, saved + 50),
        Stop(signal.SIGINT, saved + 2000),
    ):
        place.put(old)
        ended = place.convert(3, stop)
        assert _is_whole(place, old, new), stop
        onnxruntime.InferenceSession(place.output)
        if stop.signal in ORDERLY:
            assert not place.litter()
            # Python loses an interrupt that comes while it clears away an object.
            assert ended.code in (0, 130)
            assert "Traceback" not in ended.said
            assert ended.code == 0 or ended.said.startswith("\nERROR: Interrupted")
        else:
            assert ended.code == -stop.signal
        stopped += ended.code != 0
    assert stopped > 4


@pytest.mark.parametrize("kilobytes", [1, 35])
def test_a_full_disk_is_said(tmp_path: Path, kilobytes: int) -> None:
    place = Place(tmp_path)
    assert place.convert(8).code == 0
    old, size = place.files(), kilobytes << 10
    assert size < len(old["q.onnx"])
    ended = place.convert(8, file_size=size)
    assert ended.code == 1
    assert ended.said.startswith("ERROR: ")
    assert ended.said.count("\n") == 1
    assert "space on the disk" in ended.said
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
