"""lorimer doctor: what this machine has for training, and what to fix."""

from __future__ import annotations

import json as json_text
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorimer.bases.store import home
from lorimer.kernels.native import library
from lorimer.machine import Check, Kernels, check, look

WIDTH = 60
NAME = 12
MARKS = {"ok": "ok ", "fix": "fix", "block": "NO "}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print every fact and check as JSON.")] = False,
) -> None:
    """This machine: CPU, memory, disk, torch, GPU, and what to fix.

    Example: lorimer doctor

    Ends with 1 if something stands in the way of training, else with 0.
    """
    machine = look(Path.cwd())
    kernels = Kernels(library.active() != library.REFERENCE, library.status())
    checks = check(machine, home=home(), work=Path.cwd(), kernels=kernels)
    blocked = any(item.level == "block" for item in checks)
    if json:
        facts = {
            "machine": machine.to_dict(),
            "kernels": asdict(kernels),
            "checks": [asdict(item) for item in checks],
        }
        typer.echo(json_text.dumps(facts | {"can_train": not blocked}, indent=2))
    else:
        typer.echo("\n".join(report(checks)))
    raise typer.Exit(1 if blocked else 0)


def report(checks: list[Check]) -> list[str]:
    """The checks as lines of at most 60 columns, the verdict last."""
    lines = [line for item in checks for line in _lines(item)]
    blocks, fixes = (sum(item.level == level for item in checks) for level in ("block", "fix"))
    verdict = "ready to train" if not blocks else f"{blocks} in the way of training"
    return [*lines, "", f"{verdict}; {fixes} could be better" if fixes else verdict]


def _lines(item: Check) -> list[str]:
    first = f"{MARKS[item.level]} {item.name:<{NAME}}"
    rest = " " * len(first)
    lines = textwrap.wrap(item.found, WIDTH, initial_indent=first, subsequent_indent=rest) or [
        first.rstrip()
    ]
    if item.fix:
        lines += textwrap.wrap(item.fix, WIDTH, initial_indent=rest + "-> ", subsequent_indent=rest + "   ")
    return lines
