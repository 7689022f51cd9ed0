"""`qconvert compare`: what any quantized model lost, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from converter.cli.flags import INPUT_FLAGS, gate_flags, gates_of, with_flags
from converter.cli.terminal import Terminal, show
from converter.config import load_config
from converter.config.keys import default_config
from converter.config.rules import DATA_RULES
from converter.errors import GateError
from converter.job import Job

PATH = click.Path(path_type=Path)


@click.command(name="compare")
@click.argument("reference", metavar="FLOAT", type=PATH)
@click.argument("other", metavar="QUANT", type=PATH)
@click.option(
    "--configFile",
    "config",
    type=PATH,
    help="INI file with [data_preprocess_param]; unset: random data.",
)
@click.option("--report", type=PATH, help="Folder for the debug reports.")
@with_flags(*INPUT_FLAGS)
@click.option("--verbose", is_flag=True, help="Print more on the way.")
@gate_flags
def compare_command(
    reference: Path, other: Path, config: Path | None, report: Path | None, **flags: Any
) -> None:
    """Compare a quantized model, whoever made it, with the float one."""
    wanted = load_config(config, rules=DATA_RULES) if config else default_config()
    wanted = replace(wanted, common=replace(wanted.common, debug_info_save_path=report))
    from converter.measure.results import figures_of  # these import what takes long
    from converter.pipeline.compare import compare
    from converter.report.text import comparison_lines

    job = Job(reference, other, wanted, flags["input_shapes"], flags["input_format"])
    findings = compare(job, Terminal(False, flags["verbose"]))
    for line in comparison_lines(findings):
        show(line)
    if report and findings.nodes:
        click.echo(f"Reports in {report}")
    if missed := gates_of(flags).missed(figures_of(*findings.sizes, findings.verification)):
        msg = f"{other} misses a quality gate: {missed}."
        raise GateError(msg)
