"""What one conversion is asked to do, and whom it tells how far it is; plain data without heavy
imports.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from converter.config import Config
from converter.errors import UsageError

T = TypeVar("T")
Shape = tuple[int | None, ...]
# What input_type and output_type say for floats.
FLOATS = {"FLOAT", "FLOAT32"}


@dataclass(frozen=True)
class Job:
    """One conversion: the files, the config and the flags.

    `part` (index, count) asks for that part of the calibration alone, see `pipeline.calibrate`.
    """

    model: Path
    output: Path
    config: Config
    input_shapes: Mapping[str, Shape] = field(default_factory=dict)
    input_format: str | None = None
    input_type: str = "DEFAULT"
    output_type: str = "DEFAULT"
    fp16: bool = False
    verify: bool = True
    part: tuple[int, int] | None = None

    @property
    def mode(self) -> str:
        """What is done to the model, the config's mode or what flags ask for without one."""
        return self.config.mode or "FLOAT16"


@dataclass(frozen=True)
class Resources:
    """What a run may use: worker threads, ONNX Runtime's execution providers, bytes of activations
    at a time.
    """

    threads: int
    providers: tuple[str, ...]
    memory: int


class Watch:
    """Receives progress and remarks while a job runs, and shows nothing of them; others show what
    they override.
    """

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Hands the items on and shows how many of `total` are done."""
        yield from items

    def say(self, text: str) -> None:
        """A detail for those who want to follow."""

    def tell(self, text: str) -> None:
        """A sentence that belongs to the result."""

    def warn(self, text: str) -> None:
        """One sentence the user should know."""


def output_path(model: Path, given: str | None) -> Path:
    """The file to write, `.onnx` appended; raises UsageError, before any work is done, where none
    can be written.
    """
    output = model.parent / f"{model.stem}_quant.onnx" if given is None else Path(given)
    if not output.name or str(given).endswith(("/", os.sep)):
        msg = (
            f"--outputFile '{given}' names no file; write for example "
            f"{output / 'model_quant.onnx'}."
        )
        raise UsageError(msg)
    output = output if output.suffix == ".onnx" else output.with_name(f"{output.name}.onnx")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        msg = (
            f"--outputFile {output} cannot be written; give the path of a file in a folder that "
            "you may write to."
        )
        raise UsageError(msg)
    return output


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def processors() -> int:
    """Processors that this process may use, or, on systems that do not say, that there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
