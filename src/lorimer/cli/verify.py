"""lorimer verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def verify(
    run: Annotated[str, typer.Argument(help="A run: its folder, its name, or last.")],
    replay: Annotated[
        bool, typer.Option("--replay", help="Do the steps since the checkpoint before the last again.")
    ] = False,
    dir: Annotated[Path, typer.Option(help="The folder that holds the runs.")] = Path("runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every file of a run: sizes, hashes, steps, and the base it was trained on.

    Example: lorimer verify last --replay

    --replay proves that training can be repeated: losses and checkpoint come out the same, bit for bit. It
    writes nothing into the run.
    """
    from lorimer.errors import LorimerError
    from lorimer.run import find_run
    from lorimer.train.verify import verify_run

    found = find_run(run, dir)
    parts = verify_run(found, replay=replay)
    if json_:
        value = [{"part": part.name, "damage": part.damage, "note": part.note} for part in parts]
        typer.echo(json.dumps({"run": str(found.path), "parts": value}, indent=2))
    else:
        width = max(len(part.name) for part in parts)
        for part in parts:
            state = "ok " if part.damage is None else "BAD"
            typer.echo(f"{state}  {part.name:<{width}}  {part.damage or part.note}".rstrip())
    damaged = sum(part.damage is not None for part in parts)
    if damaged:
        raise LorimerError(
            f"{damaged} of {len(parts)} parts of the run are not what they should be",
            fix="Resuming passes over a damaged checkpoint and goes on from the newest whole one.",
            path=found.path,
        )
