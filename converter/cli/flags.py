"""The flags that describe one job, shared by the commands that make jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.config import Config
from converter.errors import UsageError
from converter.job import Job, Shape, output_path
from converter.measure.gates import Gates, size_limit

F = TypeVar("F", bound=Callable[..., Any])
LAYOUT, SWITCH = click.Choice(["NCHW", "NHWC"]), click.Choice(["on", "off"])
TYPE: dict[str, Any] = {
    "type": click.Choice(["DEFAULT", "FLOAT", "FLOAT32", "UINT8", "INT8"]),
    "default": "DEFAULT",
}


def with_flags(*options: Callable[[F], F]) -> Callable[[F], F]:
    """A decorator that adds all of the options to a command."""

    def decorated(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def _shapes(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> dict[str, Shape]:
    """`name:1,3,224,224;other:1,10`: the last colon separates, as names may hold colons; 0 or -1
    stays dynamic.
    """
    shapes: dict[str, Shape] = {}
    for part in filter(None, (piece.strip() for piece in (text or "").split(";"))):
        name, _, dims = part.rpartition(":")
        try:
            numbers = [int(d) for d in dims.split(",")]
        except ValueError:
            numbers = []
        if not name or not numbers or min(numbers) < -1:
            msg = (
                f"--inputShape: '{part}' is not of the form name:1,3,224,224; separate inputs by "
                "';'."
            )
            raise UsageError(msg)
        shapes[name.strip()] = tuple(d if d > 0 else None for d in numbers)
    return shapes


def _size(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    try:
        size_limit(text or "0%", 1)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return text


def _share(_context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is None or -1 <= value <= 1:
        return value
    near = f", as in {option.opts[0]}={value / 100:g} for {value:g} %" if value <= 100 else ""
    msg = f"{value:g} is no share; write a number up to 1{near}"
    raise click.BadParameter(msg)


# The names are those of the fields of Job and Gates.
INPUT_FLAGS = (
    click.option(
        "--inputShape",
        "input_shapes",
        callback=_shapes,
        help="Shapes of dynamic inputs: name:1,3,224,224;name2:…",
    ),
    click.option(
        "--inputDataFormat",
        "input_format",
        type=LAYOUT,
        help="Layout of 4-D image inputs.",
    ),
)
job_flags = with_flags(
    *INPUT_FLAGS,
    click.option(
        "--inputDataType",
        "input_type",
        **TYPE,
        help="Integers: the model takes pixels.",
    ),
    click.option(
        "--outputDataType",
        "output_type",
        **TYPE,
        help="Integers: the model gives codes.",
    ),
    click.option(
        "--fp16",
        type=SWITCH,
        default="off",
        help="Store other constants as float16; all, without a quant_type.",
    ),
    click.option(
        "--verify",
        type=SWITCH,
        default="on",
        show_default=True,
        help="Run both models and compare them.",
    ),
)
gate_flags = with_flags(
    click.option(
        "--min-cosine",
        type=float,
        callback=_share,
        help="Exit with 3 if an output's cosine similarity is less.",
    ),
    click.option(
        "--min-agreement",
        type=float,
        callback=_share,
        help="Exit with 3 if a smaller share of answers stays the same.",
    ),
    click.option(
        "--min-speedup",
        type=float,
        help="Exit with 3 if the model is less times faster.",
    ),
    click.option(
        "--max-accuracy-drop",
        type=float,
        callback=_share,
        help="Exit with 3 if a larger share of answers is no longer right: 0.01.",
    ),
    click.option(
        "--max-size",
        callback=_size,
        help="Exit with 3 if the model is larger: 5MB, or 30% of the float one.",
    ),
)


def job_of(model: Path, output: str | None, config: Config, flags: dict[str, Any]) -> Job:
    """The job that `job_flags` describe; raises UsageError."""
    plain = {
        name: flags[name] for name in ("input_shapes", "input_format", "input_type", "output_type")
    }
    switches = {name: flags[name] == "on" for name in ("fp16", "verify")}
    return Job(model, output_path(model, output), config, **plain, **switches)


def gates_of(flags: dict[str, Any]) -> Gates:
    """The quality gates that `gate_flags` describe."""
    return Gates(**{gate.name: flags[gate.name] for gate in fields(Gates)})
