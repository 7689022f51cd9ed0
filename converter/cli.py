"""The command line: the only place that prints or exits."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from converter import __version__
from converter.config import load_config
from converter.errors import QConvertError, UsageError
from converter.job import Job, Shape

T = TypeVar("T")
DATA_TYPES = ("DEFAULT", "FLOAT", "FLOAT32", "UINT8", "INT8")


class Terminal:
    """Shows progress on a terminal only, remarks when verbose, and warnings always."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        self.quiet, self.verbose = quiet, verbose

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Hands the items on under a progress bar with the estimated time left."""
        if self.quiet or not sys.stderr.isatty():
            yield from items
            return
        with click.progressbar(items, length=total, label=label, file=sys.stderr, show_eta=True) as bar:
            yield from bar

    def say(self, text: str) -> None:
        """A line for --verbose."""
        if self.verbose:
            click.echo(text, err=True)

    def tell(self, text: str) -> None:
        """A line of the result, unless quiet."""
        if not self.quiet:
            click.echo(text)

    def warn(self, text: str) -> None:
        """A line that starts with WARNING."""
        click.echo(f"WARNING: {text}", err=True)


def _output(model: Path, given: str | None) -> Path:
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


def _shapes(text: str) -> dict[str, Shape]:
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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--fmk", default="ONNX", show_default=True, help="Format of the float model; only ONNX.")
@click.option("--modelFile", "model", required=True, type=click.Path(path_type=Path), help="Float ONNX model.")
@click.option("--outputFile", "output", type=click.Path(), help="Default: MODEL_quant.onnx beside it.")
@click.option("--configFile", "config", required=True, type=click.Path(path_type=Path), help="INI file, see README.")
@click.option("--inputShape", "shapes", default="", help="Shapes of dynamic inputs: name:1,3,224,224;name2:…")
@click.option("--inputDataFormat", "layout", type=click.Choice(["NCHW", "NHWC"]), help="Layout of 4-D image inputs.")
@click.option("--inputDataType", "input_type", type=click.Choice(DATA_TYPES), help="Integers: the model takes pixels.")
@click.option("--outputDataType", "output_type", type=click.Choice(DATA_TYPES), help="Integers: the model gives codes.")
@click.option("--fp16", type=click.Choice(["on", "off"]), default="off", help="Store other constants as float16.")
@click.option("--dry-run", is_flag=True, help="Print the plan, every node and tensor with its reason; run nothing.")
@click.option("--quiet", is_flag=True, help="Print the result line, warnings and errors only.")
@click.option("--verbose", is_flag=True, help="Print more on the way.")
@click.version_option(__version__, prog_name="qconvert")
def command(fmk: str, model: Path, output: str | None, config: Path, shapes: str, **flags: Any) -> None:
    """Turn a float ONNX model into a quantized one that ordinary runtimes execute."""
    if fmk != "ONNX":
        msg = f"--fmk={fmk}: only ONNX models are read; export the model to ONNX and write --fmk=ONNX."
        raise UsageError(msg)
    job = Job(
        model=model,
        output=_output(model, output),
        config=load_config(config),
        input_shapes=_shapes(shapes),
        input_format=flags["layout"],
        input_type=flags["input_type"] or "DEFAULT",
        output_type=flags["output_type"] or "DEFAULT",
        fp16=flags["fp16"] == "on",
    )
    run(job, Terminal(flags["quiet"], flags["verbose"]), dry=flags["dry_run"])


def run(job: Job, terminal: Terminal, dry: bool) -> None:
    """Converts, or shows what a conversion would do."""
    # Our own workers use the cores; one thread in BLAS also makes sums the same on any machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Libraries log tracebacks of what is handled here.
    logging.disable(logging.CRITICAL)
    from converter import pipeline  # imports what takes long, which --help must not wait for
    from converter.report.text import plan_lines, summary_lines

    if dry:
        lines = plan_lines(pipeline.make_plan(job, terminal))
    else:
        lines = summary_lines(pipeline.convert(job, terminal), job.output)
    for line in [] if terminal.quiet else lines:
        click.echo(line)
    if not dry:
        click.echo("CONVERT RESULT SUCCESS:0")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script: exits with 0, 1 for bad input or 2 for bad usage."""
    try:
        command.main(arguments, prog_name="qconvert", standalone_mode=False)
    except QConvertError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(f"{error.format_message().rstrip('.')}; run qconvert --help for the flags.", 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted; nothing was written.", 130)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        _fail(f"{error.filename or 'A file'}: {reason}; check the path, your rights and the space on the disk.", 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"ERROR: {message}", err=True)
    sys.exit(code)
