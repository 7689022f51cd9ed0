"""`qconvert doctor`: whether a model is fed as it was trained, before anything is converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converter.cli.flags import INPUT_FLAGS, with_flags
from converter.cli.terminal import Terminal, show
from converter.config import load_config
from converter.config.rules import DATA_RULES
from converter.errors import ConfigError
from converter.job import Job


@click.command(name="doctor")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--configFile",
    "config",
    type=click.Path(path_type=Path),
    required=True,
    help="INI file with [data_preprocess_param].",
)
@with_flags(*INPUT_FLAGS)
@click.option("--verbose", is_flag=True, help="Print what each check measures.")
def doctor_command(model: Path, config: Path, *, verbose: bool, **flags: Any) -> None:
    """Check that a model is fed as it was trained, with the lines to write."""
    from converter.doctor.checks import HOW  # these import what takes long
    from converter.doctor.examine import examine, findings

    wanted = load_config(config, rules=DATA_RULES)
    if not wanted.preprocess.calibrate_path:
        where = wanted.at("data_preprocess_param", "calibrate_path")
        msg = f"{where}: is missing, and without data nothing can be checked; write it."
        raise ConfigError(msg)
    job = Job(model, model, wanted, flags["input_shapes"], flags["input_format"])
    examined = examine(job, Terminal(False, verbose), cheap=False)
    for check, found in examined:
        if verbose:
            show(f"{check.title}: {check.measures}; a finding: {check.warns}.")
        for finding in found:
            show(f"{check.title}: {finding.text.replace(HOW, '.')}")
            for line in finding.lines.splitlines():
                show(f"    {line}")
    count = len(findings(examined))
    show(
        f"{count} finding(s) of {len(examined)} checks."
        if count
        else f"Nothing is wrong as far as {len(examined)} checks tell."
    )
