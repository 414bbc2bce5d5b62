"""Which run goes on, and which settings may be others then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorimer.config import RunConfig, config_from, dump_yaml
from lorimer.errors import ConfigError
from lorimer.train.resume import MAY_CHANGE, resumed_run
from small_base import write_rows


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    rows = str(write_rows(tmp_path / "rows.jsonl", 3))
    return {
        "base": "smollm2-135m",
        "data": {"train": rows},
        "lora": {"r": 4},
        "train": {"epochs": 2, "lr_scheduler": "constant"},
        "output": {"dir": str(tmp_path / "runs"), "name": "home"},
    }


def changed(settings: dict[str, Any], key: str, value: Any) -> RunConfig:
    block, _, name = key.partition(".")
    return config_from(settings | {block: settings.get(block, {}) | {name: value}})


@pytest.fixture
def run(tmp_path: Path, settings: dict[str, Any]) -> Path:
    folder = tmp_path / "runs" / "home"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config_from(settings)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("as_text", [True, False])
def test_a_run_goes_on_with_its_own_settings(run: Path, settings: dict[str, Any], as_text: bool) -> None:
    found, config = resumed_run(None, str(run) if as_text else run)
    assert found.path == run.resolve()
    assert config == config_from(settings)


def test_its_name_is_looked_up_under_the_settings_folder(run: Path, settings: dict[str, Any]) -> None:
    given = changed(settings, "train.epochs", 3)
    found, config = resumed_run(given, "home")
    assert found.path == run.resolve()
    assert config is given


def test_its_name_is_looked_up_under_runs_without_settings(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resumed_run(None, "home")[0].path == run.resolve()
    with pytest.raises(ConfigError, match="there is no run `away`"):
        resumed_run(None, "away")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", 3),
        ("train.max_steps", 7),
        ("train.budget", "5m"),
        ("train.eval_every", 2),
        ("train.micro_batch_tokens", 99),
        ("train.recompute", "layers"),
        ("train.threads", 1),
        ("output.name", "other"),
        ("output.keep", 7),
        ("evaluate.max_new_tokens", 5),
    ],
)
def test_what_changes_no_step_that_is_done_may_change(
    run: Path, settings: dict[str, Any], key: str, value: Any
) -> None:
    assert key in MAY_CHANGE or key.partition(".")[0] in MAY_CHANGE
    given = changed(settings, key, value)
    assert resumed_run(given, run)[1] is given


@pytest.mark.parametrize(
    ("key", "value", "was"),
    [
        ("train.seed", 3, "0"),
        ("train.batch_size", 3, r"\d+"),
        ("lora.r", 8, "4"),
        ("data.max_tokens", 77, r"\S+"),
        ("train.lr_scheduler", "cosine", "'constant'"),
    ],
)
def test_what_the_steps_depend_on_may_not(
    run: Path, settings: dict[str, Any], key: str, value: Any, was: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"`{key}` is {value!r} and the run was begun with {was}"
    ) as caught:
        resumed_run(changed(settings, key, value), run)
    assert caught.value.path == str(run.resolve() / "config.yaml")
