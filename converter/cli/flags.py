"""The flags that describe one job, shared by the commands that make jobs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.config import Config
from converter.errors import UsageError
from converter.job import Job, Shape

F = TypeVar("F", bound=Callable[..., Any])
TYPES = ("DEFAULT", "FLOAT", "FLOAT32", "UINT8", "INT8")
LAYOUT, TYPE, SWITCH = (click.Choice(names) for names in (("NCHW", "NHWC"), TYPES, ("on", "off")))
JOB_FLAGS = (
    click.option("--inputShape", "shapes", default="", help="Shapes of dynamic inputs: name:1,3,224,224;name2:…"),
    click.option("--inputDataFormat", "layout", type=LAYOUT, help="Layout of 4-D image inputs."),
    click.option("--inputDataType", "input_type", type=TYPE, help="Integers: the model takes pixels."),
    click.option("--outputDataType", "output_type", type=TYPE, help="Integers: the model gives codes."),
    click.option("--fp16", type=SWITCH, default="off", help="Store other constants as float16."),
)


def job_flags(command: F) -> F:
    """Adds the flags of JOB_FLAGS to a command, which hands them on to `job_of`."""
    for option in reversed(JOB_FLAGS):
        command = option(command)
    return command


def job_of(model: Path, output: str | None, config: Config, flags: dict[str, Any]) -> Job:
    """The job that the flags describe; raises UsageError."""
    return Job(
        model=model,
        output=output_path(model, output),
        config=config,
        input_shapes=input_shapes(flags["shapes"]),
        input_format=flags["layout"],
        input_type=flags["input_type"] or "DEFAULT",
        output_type=flags["output_type"] or "DEFAULT",
        fp16=flags["fp16"] == "on",
    )


def output_path(model: Path, given: str | None) -> Path:
    """The file to write, `.onnx` appended; raises UsageError, before any work is done, where none can be written."""
    output = model.parent / f"{model.stem}_quant.onnx" if given is None else Path(given)
    if not output.name or str(given).endswith(("/", os.sep)):
        msg = f"--outputFile '{given}' names no file; write for example {output / 'model_quant.onnx'}."
        raise UsageError(msg)
    output = output if output.suffix == ".onnx" else output.with_name(f"{output.name}.onnx")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        msg = f"--outputFile {output} cannot be written; give the path of a file in a folder that you may write to."
        raise UsageError(msg)
    return output


def input_shapes(text: str) -> dict[str, Shape]:
    """`name:1,3,224,224;other:1,10`: the last colon separates, as names may hold colons; 0 or -1 stays dynamic."""
    shapes: dict[str, Shape] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, _, dims = part.rpartition(":")
        try:
            numbers = [int(d) for d in dims.split(",")]
        except ValueError:
            numbers = []
        if not name or not numbers or min(numbers) < -1:
            msg = f"--inputShape: '{part}' is not of the form name:1,3,224,224; separate inputs by ';'."
            raise UsageError(msg)
        shapes[name.strip()] = tuple(d if d > 0 else None for d in numbers)
    return shapes
