"""`qconvert inspect`: what is in a model and what could become of it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from converter.cli.terminal import show


@click.command(name="inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def inspect_command(model: Path, as_json: bool) -> None:
    """Show operators, sizes and what could be quantized."""
    from converter.pipeline.inspect import inspect  # imports what takes long
    from converter.report.text import columns, short

    document = inspect(model)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    for title, content in document.items():
        if not isinstance(content, list):
            show(f"{_words(title)}: {content}")
            continue
        click.echo(f"\n{_words(title)}{'' if content else ': none'}")
        names = [list(map(_words, row)) for row in content[:1]]
        for line in columns(
            [*names, *([short(_text(cell)) for cell in row.values()] for row in content)]
        ):
            show(f"  {line}")


def _words(name: str) -> str:
    """`integer_weights` as a heading; the modes keep their names."""
    return name if name.isupper() else name.replace("_", " ").capitalize()


def _text(cell: object) -> str:
    return (
        f"[{', '.join(map(str, cell))}]"
        if isinstance(cell, list)
        else "-"
        if cell is None
        else str(cell)
    )
