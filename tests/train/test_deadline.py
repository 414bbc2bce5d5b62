"""A run that ends in time: the steps that fit, the schedule complete, something usable at every moment."""

from __future__ import annotations

import json
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorimer.config import RunConfig, TrainConfig, config_from
from lorimer.errors import ConfigError, Interrupted, UserError
from lorimer.train import loop as loop_module
from lorimer.train.deadline import Deadline, seconds_of, seconds_until
from lorimer.train.loop import train
from small_base import write_chat_base, write_rows


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_lengths_of_time() -> None:
    wanted = {"3h": 10800, "90m": 5400, "120s": 120, "1h30m": 5400, "1h1m1s": 3661}
    assert {text: seconds_of(text) for text in wanted} == wanted
    for wrong in ("", "3", "3 hours", "h", "1s1m", "-1h", "1.5h", "3d"):
        with pytest.raises(ValueError, match="budget"):
            TrainConfig(budget=wrong)


def test_times_of_day() -> None:
    evening = datetime(2026, 1, 31, 22, 30, 30)
    assert seconds_until("07:00", evening) == 8.5 * 3600 - 30
    assert seconds_until("22:31", evening) == 30
    assert seconds_until("22:30", evening) == 24 * 3600 - 30
    for wrong in ("7", "24:00", "07:60", "seven", "07:00:00"):
        with pytest.raises(UserError, match="HH:MM"):
            seconds_until(wrong, evening)


def test_steps_that_fit_are_planned_anew() -> None:
    clock = Clock()
    deadline = Deadline(100, clock)
    deadline.reserve("evaluation", 10)
    done = 0
    planned = []
    while done < deadline.total_steps(done):
        deadline.step_begins()
        clock.now += 2 if done < 5 else 4  # the machine becomes slower
        deadline.step_ends()
        done += 1
        planned.append(deadline.total_steps(done))
    assert planned[0] == planned[4] == 45
    assert planned[-1] == done
    assert 0 <= 90 - deadline.elapsed < 4
    assert sorted(planned, reverse=True) == planned


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Steps take two seconds each, and nothing else takes any."""
    clock = Clock()
    real = loop_module.train_step

    def slow(*args: Any, **settings: Any) -> Any:
        clock.now += 2
        return real(*args, **settings)

    monkeypatch.setattr(loop_module, "train_step", slow)
    monkeypatch.setattr(loop_module, "Deadline", partial(Deadline, clock=clock))
    return clock


def settings(folder: Path, base: Path, **changes: Any) -> RunConfig:
    value: dict[str, Any] = {
        "base": str(base),
        "data": {"train": str(write_rows(folder / "train.jsonl", 21)), "max_tokens": 256},
        "lora": {"r": 2},
        "train": {"budget": "1m", "batch_size": 6, "learning_rate": 1e-3, "dtype": "fp32", "threads": 1},
        "output": {"dir": str(folder / "runs"), "name": "run", "save_every": "never"},
    }
    for key, change in changes.items():
        block, _, name = key.partition("__")
        value.setdefault(block, {})[name] = change
    return config_from(value)


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_the_schedule_is_complete_when_the_time_is_up(
    base: Path, tmp_path: Path, clock: Clock, scheduler: str
) -> None:
    began = clock.now
    result = train(settings(tmp_path, base, train__lr_scheduler=scheduler, train__warmup_ratio=0.2))
    assert 0 <= 60 - (clock.now - began) < 3
    assert result.steps in (29, 30)
    steps = steps_of(result.path)
    assert steps[-1]["total_steps"] == len(steps) == result.steps
    rates = [step["learning_rate"] for step in steps[1:]]
    assert max(rates) == pytest.approx(1e-3, rel=0.2)
    assert rates.index(max(rates)) == pytest.approx(0.2 * len(rates), abs=2)
    assert rates[-1] < 0.06 * max(rates)


def test_an_adapter_is_there_from_the_first_step_on(base: Path, tmp_path: Path, clock: Clock) -> None:
    class Stopping(loop_module.Silent):
        def step(self, record: dict[str, Any]) -> None:
            adapter = tmp_path / "runs" / "run" / "adapter" / "adapter_model.safetensors"
            assert adapter.is_file()
            raise Interrupted("now", fix="")

    with pytest.raises(Interrupted):
        train(settings(tmp_path, base), reporter=Stopping())


def test_a_resumed_run_has_what_is_left(base: Path, tmp_path: Path, clock: Clock) -> None:
    import shutil

    run = train(settings(tmp_path, base, output__save_every=10, output__keep=9)).path
    for step in (run / "checkpoints").iterdir():
        if "10" not in step.name:
            shutil.rmtree(step)
    began = clock.now
    train(None, resume=run)
    assert clock.now - began == pytest.approx(40, abs=3)


def test_the_base_answers_first_and_time_is_kept_for_the_adapter(
    base: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "test.jsonl", 3, seed=1)
    asked = []
    real = loop_module.evaluate_rows

    def slow(*args: Any, **given: Any) -> Any:
        asked.append((given["name"], clock.now))
        clock.now += 7
        return real(*args, **given)

    monkeypatch.setattr(loop_module, "evaluate_rows", slow)
    monkeypatch.setattr(loop_module.time, "perf_counter", clock)
    began = clock.now
    result = train(settings(tmp_path, base, data__test=str(rows), evaluate__max_new_tokens=4))
    assert [name for name, _ in asked] == ["before", "after"]
    assert result.comparison is not None
    assert asked[1][1] - asked[0][1] > 40
    assert 0 <= 60 - (clock.now - began) < 4


def test_a_budget_that_is_too_short_says_so(
    base: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop_module.load_decoder

    def slow(*args: Any) -> Any:
        clock.now += 30
        return real(*args)

    monkeypatch.setattr(loop_module, "load_decoder", slow)
    with pytest.raises(ConfigError, match=r"`train\.budget` is 20 s, and loading took 30 s"):
        train(settings(tmp_path, base, train__budget="20s"))
    assert not (tmp_path / "runs").exists()
