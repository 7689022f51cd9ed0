"""`qconvert init`: a configuration to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from converter.cli.terminal import show
from converter.config.keys import QUANT_TYPES, QuantType
from converter.errors import UsageError


@click.command(name="init")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--outputFile",
    "output",
    type=click.Path(path_type=Path),
    help="Default: MODEL.cfg beside it.",
)
@click.option("--mode", type=click.Choice(QUANT_TYPES), default="FULL_QUANT", show_default=True)
def init_command(model: Path, output: Path | None, mode: str) -> None:
    """Write a commented configuration fitted to a model's inputs."""
    from converter.config.starter import starter_config  # imports what takes long
    from converter.pipeline.starter import known_of

    output = output or model.with_suffix(".cfg")
    text = starter_config(known_of(model, output), cast("QuantType", mode))
    try:
        with output.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        msg = f"{output} exists already and is left as it is; give another name with --outputFile."
        raise UsageError(msg) from error
    show(f"Written to {output}; fill in what its comments ask for, then run")
    show(f"qconvert doctor {model} --configFile={output}")
    show(f"qconvert --configFile={output}")
