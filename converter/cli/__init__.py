"""The command line: the only package that prints or exits. This module converts; each subcommand has one of its own."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from converter import __version__
from converter.cli.flags import job_flags, job_of
from converter.cli.terminal import Terminal
from converter.config import load_config
from converter.errors import QConvertError, UsageError
from converter.job import Job

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT, invoke_without_command=True)
@click.option("--fmk", default="ONNX", show_default=True, help="Format of the float model; only ONNX.")
@click.option("--modelFile", "model", type=click.Path(path_type=Path), help="Float ONNX model.  [required]")
@click.option("--outputFile", "output", type=click.Path(), help="Default: MODEL_quant.onnx beside it.")
@click.option("--configFile", "config", type=click.Path(path_type=Path), help="INI file, see README.  [required]")
@job_flags
@click.option("--dry-run", is_flag=True, help="Print the plan, every node and tensor with its reason; run nothing.")
@click.option("--quiet", is_flag=True, help="Print the result line, warnings and errors only.")
@click.option("--verbose", is_flag=True, help="Print more on the way.")
@click.version_option(__version__, prog_name="qconvert")
@click.pass_context
def command(
    context: click.Context, /, fmk: str, model: Path | None, output: str | None, config: Path | None, **flags: Any
) -> None:
    """Turn a float ONNX model into a quantized one that ordinary runtimes execute."""
    if context.invoked_subcommand:
        return
    if fmk != "ONNX":
        msg = f"--fmk={fmk}: only ONNX models are read; export the model to ONNX and write --fmk=ONNX."
        raise UsageError(msg)
    if model is None or config is None:
        missing = "--modelFile" if model is None else "--configFile"
        msg = f"Missing option '{missing}'; run qconvert --help for the flags."
        raise UsageError(msg)
    job = job_of(model, output, load_config(config), flags)
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
