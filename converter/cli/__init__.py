"""The command line: the only package that prints or exits. This module converts; each subcommand
has one of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Any

import click

from converter.cli.batch import batch_command
from converter.cli.compare import compare_command
from converter.cli.doctor import doctor_command
from converter.cli.flags import gate_flags, gates_of, job_flags, job_of
from converter.cli.init import init_command
from converter.cli.inspect import inspect_command
from converter.cli.terminal import Terminal, columns_of, show
from converter.config import load_config
from converter.config.keys import default_config
from converter.config.rules import conversion_rules
from converter.errors import GateError, QConvertError, UsageError
from converter.job import Job
from converter.measure.gates import Gates
from converter.version import __version__

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT, invoke_without_command=True)
@click.option(
    "--fmk",
    default="ONNX",
    show_default=True,
    help="Format of the float model; only ONNX.",
)
@click.option(
    "--modelFile",
    "model",
    type=click.Path(path_type=Path),
    help="Float ONNX model.  [required]",
)
@click.option(
    "--outputFile",
    "output",
    type=click.Path(),
    help="Default: MODEL_quant.onnx beside it.",
)
@click.option(
    "--configFile",
    "config",
    type=click.Path(path_type=Path),
    help="INI file, see README.  [required without --fp16=on]",
)
@job_flags
@gate_flags
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan, every node and tensor with its reason; run nothing.",
)
@click.option("--quiet", is_flag=True, help="Print the result line, warnings and errors only.")
@click.option("--verbose", is_flag=True, help="Print more on the way.")
@click.version_option(__version__, prog_name="qconvert")
@click.pass_context
def command(
    context: click.Context,
    /,
    *,
    fmk: str,
    model: Path | None,
    output: str | None,
    config: Path | None,
    **flags: Any,
) -> None:
    """Turn a float ONNX model into a quantized one that ordinary runtimes execute."""
    # Our own workers use the cores; one thread in BLAS also makes sums the same on any machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Libraries log tracebacks of what is handled here.
    logging.disable(logging.CRITICAL)
    # What a model computes beyond all numbers is told in sentences.
    warnings.simplefilter("ignore", RuntimeWarning)
    # Pillow warns of pictures that are too large, which is told in a sentence as well.
    warnings.filterwarnings("ignore", message=".*decompression bomb")
    if context.invoked_subcommand:
        return
    if fmk.upper() != "ONNX":
        msg = (
            f"--fmk={fmk}: only ONNX models are read; export the model to ONNX and write "
            "--fmk=ONNX."
        )
        raise UsageError(msg)
    half = flags["fp16"] == "on"
    loaded = (
        load_config(config, rules=conversion_rules(half))
        if config
        else default_config()
        if half
        else None
    )
    model = model or (loaded.job.model if loaded else None)
    if model is None or loaded is None:
        missing = "--modelFile" if model is None else "--configFile"
        msg = f"Missing option '{missing}'; run qconvert --help for the flags."
        raise UsageError(msg)
    if output is None and loaded.job.output:
        output = str(loaded.job.output)
    job = job_of(model, output, loaded, flags)
    run(
        job,
        Terminal(flags["quiet"], flags["verbose"]),
        gates_of(flags),
        dry=flags["dry_run"],
    )


def run(job: Job, terminal: Terminal, gates: Gates, dry: bool) -> None:
    """Converts and holds the result against the gates, or shows what a conversion would do."""
    from converter.pipeline import (
        convert as pipeline,  # imports what takes long, which --help must not wait for
    )
    from converter.report.text import plan_lines, summary_lines

    if dry:
        for line in plan_lines(pipeline.make_plan(job, terminal), columns_of(sys.stdout)):
            terminal.tell(line)
        return
    outcome = pipeline.convert(job, terminal)
    for line in summary_lines(outcome, job.output):
        terminal.tell(line)
    if missed := gates.missed(outcome.figures):
        msg = f"The model was written, but misses a quality gate: {missed}."
        raise GateError(msg)
    click.echo("CONVERT RESULT SUCCESS:0")


COMMANDS = (batch_command, compare_command, doctor_command, init_command, inspect_command)
for subcommand in COMMANDS:
    command.add_command(subcommand)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script: exits with 0, or as the error says (see
    converter.errors).
    """
    # Whoever stops the process in order finds no litter.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _check_repeated(sys.argv[1:] if arguments is None else arguments)
        command.main(arguments, prog_name="qconvert", standalone_mode=False)
    except QConvertError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(
            f"{error.format_message().rstrip('.')}; run qconvert --help for the flags.",
            2,
        )
    except (click.Abort, KeyboardInterrupt) as error:
        # Click takes an interrupt for its own, and keeps what it says as the cause.
        _fail(str(error.__cause__ or error) or "Interrupted; nothing was written.", 130)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        _fail(
            f"{error.filename or 'A file'}: {reason}; check the path, your rights and the "
            "space on the disk.",
            1,
        )
    except MemoryError:
        _fail(
            "There is not enough memory; lower thread_num in the config and, for FULL_QUANT, "
            "calibration_memory.",
            1,
        )
    except Exception as error:
        if "--verbose" in (arguments or sys.argv):
            traceback.print_exception(error)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _fail(
            f"Something unforeseen, {what:.200}; please report it with what --verbose shows.",
            1,
        )


def _check_repeated(arguments: list[str]) -> None:
    """Raises UsageError for a flag that is given twice, of which the last would win."""
    before_dashes = takewhile(lambda text: text != "--", arguments)
    flags = Counter(text.partition("=")[0] for text in before_dashes if text.startswith("--"))
    if twice := next((flag for flag, count in flags.items() if count > 1), None):
        msg = f"{twice} is given more than once; keep one of them."
        raise UsageError(msg)


def _fail(message: str, code: int) -> None:
    show(f"ERROR: {message}", err=True)
    sys.exit(code)
