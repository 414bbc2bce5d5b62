"""lorimer quickstart."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def quickstart(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value: settings put over the recipe's.", show_default=False),
    ] = None,
    recipe: Annotated[str, typer.Option(help="What is learned: home or address.")] = "home",
    dir: Annotated[str, typer.Option(help="Folder that the run is put in.")] = "quickstart",
) -> None:
    """Train a real model on this machine with rows that come along: no account, no hub, no GPU.

    Example: lorimer quickstart

    Brings the base here if it is not kept yet, trains, answers the held-out rows before and after,
    and says how to use the adapter. The recipe `home` turns spoken home commands into JSON.
    """
    from lorimer.bases.pull import KNOWN, pull
    from lorimer.cli.progress import open_progress
    from lorimer.config import read_config
    from lorimer.recipes import recipe as find_recipe
    from lorimer.train.loop import train

    found = find_recipe(recipe)
    # As JSON, since a folder's name may look like something else in YAML.
    config = read_config(found.config, [f"output.dir={json.dumps(dir)}", *(settings or [])])
    if config.base in KNOWN:
        pull(config.base, lambda text: print(text, file=sys.stderr))
    with open_progress() as reporter:
        train(config, reporter=reporter)
