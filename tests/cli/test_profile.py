"""lorimer train --profile: the table among what a run says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lorimer.cli.app import run
from small_base import write_chat_base, write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows and a config of 8 steps, and the shell in it."""
    monkeypatch.chdir(tmp_path)
    base = write_chat_base(tmp_path / "tiny")
    write_rows(tmp_path / "train.jsonl", 16)
    settings = {
        "base": str(base),
        "data": {"train": "train.jsonl", "max_tokens": 200},
        "lora": {"r": 4},
        "train": {"epochs": 1, "batch_size": 2, "dtype": "fp32", "threads": 1},
        "output": {"dir": "runs", "name": "my", "save_every": "never"},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--profile"], [3, 4, 5, 6, 7]),
        (["--profile-steps", "2"], [3, 4]),
        (["--profile", "--profile-steps", "1"], [3]),
    ],
)
def test_a_profile_is_shown_and_the_run_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], steps: list[int]
) -> None:
    assert run(["train", *options, "my.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("where a step goes: "))
    last = lines.index("trace: runs/my/profile/trace.json")
    assert max(map(len, lines[first : last + 2])) <= 60
    assert any(line.startswith("step 8/8") for line in lines[last:])
    assert not any("\x1b" in line for line in lines)
    assert json.loads((here / "runs/my/profile/table.json").read_text())["steps"] == steps


def test_with_json_the_table_goes_to_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "my.yaml", "--profile-steps", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 8
    assert "where a step goes: step 3, " in captured.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--profile-steps", "0"], "--profile-steps"),
        (["--profile-steps", "7"], "profiling 7 steps takes 2 more to warm up; 8 are to go"),
        (["--profile", "train.max_steps=6"], "At most 4: --profile-steps 4"),
        (["--profile", "train.max_steps=2"], "Train longer"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert run(["train", "my.yaml", *arguments]) == 2
    assert problem in capsys.readouterr().err
    assert not (here / "runs/my").exists()
