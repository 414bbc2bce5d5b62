"""lorimer config: the settings, explained."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The settings of a run: `explain` one, print the `schema`.")


@app.command()
def explain(
    key: Annotated[
        str | None,
        typer.Argument(help="A setting (train.batch_size), or a block (lora).", show_default=False),
    ] = None,
) -> None:
    """What a setting does, its values, its default and an example.

    Example: lorimer config explain train.batch_size

    Without a name all settings are listed. Names from other tools (lora_alpha, micro_batch_size) are
    answered with ours.
    """
    from lorimer import config

    typer.echo("\n".join(config.SETTINGS) if key is None else config.explain(key))


@app.command()
def schema() -> None:
    """The JSON Schema of a config file, for editors.

    Example: lorimer config schema > lorimer.schema.json
    """
    from lorimer import config

    typer.echo(json.dumps(config.json_schema(), indent=2))
