"""The flags that describe one job, shared by the commands that make jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.config import Config
from converter.errors import UsageError
from converter.gates import Gates, size_limit
from converter.job import Job, Shape, output_path

F = TypeVar("F", bound=Callable[..., Any])
TYPES = ("DEFAULT", "FLOAT", "FLOAT32", "UINT8", "INT8")
LAYOUT, TYPE, SWITCH = (click.Choice(names) for names in (("NCHW", "NHWC"), TYPES, ("on", "off")))
JOB_FLAGS = (
    click.option("--inputShape", "shapes", default="", help="Shapes of dynamic inputs: name:1,3,224,224;name2:…"),
    click.option("--inputDataFormat", "layout", type=LAYOUT, help="Layout of 4-D image inputs."),
    click.option("--inputDataType", "input_type", type=TYPE, help="Integers: the model takes pixels."),
    click.option("--outputDataType", "output_type", type=TYPE, help="Integers: the model gives codes."),
    click.option(
        "--fp16", type=SWITCH, default="off", help="Store other constants as float16; all, without a quant_type."
    ),
    click.option("--verify", type=SWITCH, default="on", show_default=True, help="Run both models and compare them."),
)


def _size(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    try:
        size_limit(text or "0%", 1)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return text


GATE_FLAGS = (
    click.option("--min-cosine", type=float, help="Exit with 3 if an output's cosine similarity is less."),
    click.option("--min-agreement", type=float, help="Exit with 3 if a smaller share of answers stays the same."),
    click.option("--min-speedup", type=float, help="Exit with 3 if the model is less times faster."),
    click.option(
        "--max-size", callback=_size, help="Exit with 3 if the model is larger: 5MB, or 30% of the float one."
    ),
)


def job_flags(command: F) -> F:
    """Adds the flags of JOB_FLAGS to a command, which hands them on to `job_of`."""
    return _with(command, JOB_FLAGS)


def gate_flags(command: F) -> F:
    """Adds the flags of GATE_FLAGS to a command, which hands them on to `gates_of`."""
    return _with(command, GATE_FLAGS)


def _with(command: F, options: Sequence[Callable[[F], F]]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def gates_of(flags: dict[str, Any]) -> Gates:
    """The quality gates that the flags describe."""
    return Gates(flags["min_cosine"], flags["min_agreement"], flags["min_speedup"], flags["max_size"])


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
        verify=flags["verify"] == "on",
    )


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
