"""lorimer train."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorimer.config import RunConfig
    from lorimer.train.loop import RunResult


def train(
    config: Annotated[
        str | None, typer.Argument(help="The config file; not needed with --resume.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value: settings put over the file's.", show_default=False),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run: its folder, its name, or last.")
    ] = None,
    finish_by: Annotated[
        str | None,
        typer.Option(metavar="HH:MM", help="Be done by this time of day.", show_default=False),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where a step's time goes, and write a trace.")
    ] = False,
    profile_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Profile so many steps in place of 5.", show_default=False),
    ] = None,
    skip_preflight: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave out a check before the first step.", show_default=False),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and progress to stderr.")
    ] = False,
) -> None:
    """Train an adapter as a config file says, and prove it on held-out rows.

    Example: lorimer train home.yaml train.epochs=3 lora.r=32

    Example: lorimer train --resume last

    Example: lorimer train home.yaml --profile

    A profile takes 5 steps after 2 to warm up, and the run goes on.

    `lorimer config explain` lists the settings. Ctrl-C saves and says how to go on.
    """
    from lorimer.cli.progress import open_progress
    from lorimer.train.loop import train as run_training
    from lorimer.train.profile import DEFAULT_STEPS

    given = [text for text in (config, *(settings or [])) if text is not None]
    if finish_by is not None:
        given.append(budget_until(finish_by, given))
    chosen = read_settings(given, resume)
    steps = profile_steps or (DEFAULT_STEPS if profile else None)
    with open_progress(sys.stderr if json else None) as reporter:
        result = run_training(
            chosen, resume=resume, reporter=reporter, profile=steps, skip_preflight=skip_preflight or ()
        )
    if json:
        typer.echo(json_text.dumps(summary(result), indent=2))


def budget_until(finish_by: str, given: list[str]) -> str:
    """The setting that ends the run by this time of day. Raises UserError."""
    from datetime import datetime

    from lorimer.errors import UserError
    from lorimer.train.deadline import seconds_until

    if any(text.startswith("train.budget=") for text in given):
        raise UserError("--finish-by and train.budget exclude each other", fix="Give one.")
    return f"train.budget={seconds_until(finish_by, datetime.now()):.0f}s"


def read_settings(given: list[str], resume: str | None) -> RunConfig | None:
    """The settings of `[CONFIG] [key=value...]`; None leaves a resumed run as it was."""
    from lorimer.config import read_config
    from lorimer.errors import ConfigError
    from lorimer.run import find_run

    if given and ("=" not in given[0] or Path(given[0]).is_file()):
        return read_config(given[0], given[1:])
    if resume is None:
        fix = "Give a YAML file, or see: lorimer quickstart"
        raise ConfigError("no config file is given", fix=fix)
    if not given:
        return None
    return read_config(find_run(resume, Path("runs")).config, given)


def summary(result: RunResult) -> dict[str, Any]:
    """A result as JSON."""
    compared = result.comparison
    return {
        "run": str(result.path),
        "adapter": str(result.adapter),
        "report": str(result.path / "report.html"),
        "steps": result.steps,
        "loss": result.loss,
        "valid_loss": result.valid_loss,
        "comparison": None if compared is None else compared.to_json(),
    }
