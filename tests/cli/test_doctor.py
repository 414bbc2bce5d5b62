"""lorimer doctor: what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lorimer.cli.doctor import doctor, report
from lorimer.machine import Check

app = typer.Typer()
app.command()(doctor)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_json_has_every_fact_and_agrees_with_the_exit_code() -> None:
    result = CliRunner().invoke(app, ["--json"])
    value = json.loads(result.stdout)
    assert value["machine"]["memory"]["total"] > 0
    assert value["machine"]["torch"]["version"]
    assert {item["name"] for item in value["checks"]} >= {
        "Python",
        "torch",
        "CPU",
        "memory",
        "disk",
        "bases",
    }
    assert result.exit_code == (0 if value["can_train"] else 1)


def test_a_home_that_cannot_be_written_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "file/home"))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "NO  bases" in result.stdout
    assert "Set LORIMER_HOME to a folder" in result.stdout


def test_plain_lines_fit_sixty_columns() -> None:
    result = CliRunner().invoke(app, [])
    assert max(map(len, result.stdout.splitlines())) <= 60


def test_report_says_what_to_do_and_ends_with_the_verdict() -> None:
    long = "an explanation that is certainly much longer than what fits into one line"
    assert report([Check("cores", "ok", "2"), Check("disk", "fix", "2.0 GiB free", long)]) == [
        "ok  cores       2",
        "fix disk        2.0 GiB free",
        "                -> an explanation that is certainly much",
        "                   longer than what fits into one line",
        "",
        "ready to train; 1 could be better",
    ]
    assert report([Check("torch", "block", "none", "x")])[-1] == "1 in the way of training"
    assert report([Check("cores", "ok", "2")])[-1] == "ready to train"
