"""The table of commands against the commands, and every command's help."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorimer
from lorimer.cli.app import COMMANDS, load_command, overview

ROOT = Path(lorimer.__file__).parents[2]


def leaves() -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    for command in COMMANDS.values():
        built = load_command(command, 76)
        inner = getattr(built, "commands", None)
        for name, one in inner.items() if inner else [("", built)]:
            yield f"{command.name} {name}".strip(), one


def help_of(name: str, command: Any, width: int = 76) -> str:
    context = command.make_context(f"lorimer {name}", [], resilient_parsing=True, terminal_width=width)
    text: str = command.get_help(context)
    return text


LEAVES = dict(leaves())


@pytest.mark.parametrize("name", LEAVES)
def test_the_help_has_an_example_of_the_command_itself(name: str) -> None:
    assert f"Example: lorimer {name}" in " ".join(help_of(name, LEAVES[name]).split())


@pytest.mark.parametrize("name", LEAVES)
def test_the_help_fits_80_columns(name: str) -> None:
    assert max(map(len, help_of(name, LEAVES[name]).splitlines())) <= 80


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_and_argument_is_described(name: str) -> None:
    for parameter in LEAVES[name].params:
        assert getattr(parameter, "help", None), parameter.name


def test_examples_name_only_options_that_exist() -> None:
    for name, command in LEAVES.items():
        known = {
            option for parameter in command.params for option in parameter.opts + parameter.secondary_opts
        }
        for line in (command.help or "").splitlines():
            if "Example: lorimer" in line:
                used = {word for word in line.split() if word.startswith("--")}
                assert used <= known, f"{name}: {used - known}"


def test_the_overview_lists_every_command_once() -> None:
    listed = [
        line.split()[0]
        for line in overview().splitlines()
        if line.startswith("  ") and "lorimer" not in line
    ]
    assert listed == list(COMMANDS)


def test_the_metrics_in_the_help_are_those_that_are_measured() -> None:
    from lorimer.evaluate.text import METRICS

    text = " ".join((LEAVES["eval"].help or "").split())
    assert f"Metrics: {', '.join(METRICS)}." in text


def test_the_generated_pages_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def commands_in(text: str) -> list[str]:
    """The command of each `lorimer ...` that a page shows, in a block or in a line."""
    blocks = "".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    return re.findall(r"^ *lorimer ([a-z]+) ", blocks, re.MULTILINE) + re.findall(
        r"`lorimer ([a-z]+)", text
    )


@pytest.mark.parametrize("name", ["README.md", "docs/walk.md", "CHANGELOG.md"])
def test_a_command_that_a_page_shows_exists(name: str) -> None:
    found = commands_in((ROOT / name).read_text(encoding="utf-8"))
    assert found
    assert set(found) <= COMMANDS.keys()
