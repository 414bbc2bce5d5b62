"""Trackers: tensorboard for real, the others as modules that record their calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorimer.errors import ConfigError
from lorimer.train.trackers import open_trackers, without_secrets

CONFIG = {"base": "smollm2-135m", "train": {"epochs": 2.0, "max_tokens": 64}, "data": {"train": ["a", "b"]}}
Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """wandb, trackio and mlflow stand-ins with the signatures of the real ones."""
    seen: Calls = []
    for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)

    class Run:
        id = "id-1"

        def __init__(self, package: str) -> None:
            self.package = package

        def log(self, data: dict[str, float], step: int | None = None) -> None:
            seen.append((self.package, "log", data, step))

        def finish(self, exit_code: int | None = None) -> None:
            seen.append((self.package, "finish", exit_code))

    def wandb_init(
        *, project: str, name: str, dir: str, config: Any, id: str | None = None, resume: Any = None
    ) -> Run:
        seen.append(("wandb", "init", project, name, dir, config, id, resume))
        return Run("wandb")

    def trackio_init(
        project: str, name: str | None = None, config: Any = None, resume: str = "never"
    ) -> Run:
        seen.append(("trackio", "init", project, name, config, resume))
        return Run("trackio")

    def start_run(run_id: str | None = None, run_name: str | None = None) -> Any:
        seen.append(("mlflow", "start_run", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="run-7"))

    packages: dict[str, dict[str, Any]] = {
        "wandb": {"init": wandb_init},
        "trackio": {"init": trackio_init},
        "mlflow": {
            "set_experiment": lambda name: seen.append(("mlflow", "set_experiment", name)),
            "start_run": start_run,
            "log_params": lambda params: seen.append(("mlflow", "log_params", params)),
            "log_metrics": lambda metrics, step: seen.append(("mlflow", "log_metrics", metrics, step)),
            "end_run": lambda status: seen.append(("mlflow", "end_run", status)),
        },
    }
    for name, functions in packages.items():
        module = ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def events(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    return read


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path, "home", CONFIG)
    trackers.log(1, {"step": 1, "loss": 2.5, "rows": 16, "note": "text", "done": True})
    trackers.log(2, {"step": 2, "loss": 1.25, "rows": 16})
    trackers.close("finished")
    read = events(tmp_path)
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert sorted(read.Tags()["scalars"]) == ["loss", "rows"]
    text = read.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"epochs": 2.0' in text


def test_tensorboard_of_a_resumed_run_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    trackers = open_trackers(["tensorboard"], tmp_path, "home", CONFIG)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": float(step)})
    trackers.close("failed")
    trackers = open_trackers(["tensorboard"], tmp_path, "home", CONFIG, first_step=2)
    trackers.log(3, {"loss": 30.0})
    trackers.close("finished")
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_wandb_gets_config_numbers_and_the_end(tmp_path: Path, calls: Calls) -> None:
    trackers = open_trackers(["wandb"], tmp_path, "home", CONFIG)
    trackers.log(3, {"step": 3, "loss": 0.5})
    trackers.close("finished")
    assert calls == [
        ("wandb", "init", "lorimer", "home", str(tmp_path), CONFIG, None, None),
        ("wandb", "log", {"loss": 0.5}, 3),
        ("wandb", "finish", 0),
    ]


def test_trackio_gets_config_numbers_and_the_end(tmp_path: Path, calls: Calls) -> None:
    trackers = open_trackers(["trackio"], tmp_path, "home", CONFIG)
    trackers.log(3, {"loss": 0.5})
    trackers.close("finished")
    open_trackers(["trackio"], tmp_path, "home", CONFIG, first_step=3)
    assert calls == [
        ("trackio", "init", "lorimer", "home", CONFIG, "never"),
        ("trackio", "log", {"loss": 0.5}, 3),
        ("trackio", "finish", None),
        ("trackio", "init", "lorimer", "home", CONFIG, "allow"),
    ]


def test_mlflow_gets_flat_parameters_numbers_and_the_end(tmp_path: Path, calls: Calls) -> None:
    trackers = open_trackers(["mlflow"], tmp_path, "home", {**CONFIG, "long": "x" * 900})
    trackers.log(3, {"loss": 0.5})
    trackers.close("finished")
    params = {
        "base": "smollm2-135m",
        "train.epochs": "2.0",
        "train.max_tokens": "64",
        "data.train": "['a', 'b']",
        "long": "x" * 500,
    }
    assert calls == [
        ("mlflow", "set_experiment", "lorimer"),
        ("mlflow", "start_run", None, "home"),
        ("mlflow", "log_params", params),
        ("mlflow", "log_metrics", {"loss": 0.5}, 3),
        ("mlflow", "end_run", "FINISHED"),
    ]


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [("finished", 0, "FINISHED"), ("interrupted", 1, "KILLED"), ("failed", 1, "FAILED")],
)
def test_how_a_run_ended_is_told(tmp_path: Path, calls: Calls, status: str, code: int, word: str) -> None:
    open_trackers(["wandb", "mlflow"], tmp_path, "home", CONFIG).close(status)
    assert ("wandb", "finish", code) in calls
    assert ("mlflow", "end_run", word) in calls


def test_a_resumed_run_goes_on_under_its_ids(tmp_path: Path, calls: Calls) -> None:
    open_trackers(["wandb", "mlflow"], tmp_path, "home", CONFIG).close("failed")
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "id-1", "mlflow": "run-7"}
    calls.clear()
    open_trackers(["wandb", "mlflow"], tmp_path, "home", CONFIG, first_step=10)
    assert calls == [
        ("wandb", "init", "lorimer", "home", str(tmp_path), CONFIG, "id-1", "allow"),
        ("mlflow", "set_experiment", "lorimer"),
        ("mlflow", "start_run", "run-7", None),
    ]


def test_the_users_own_project_is_kept(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    open_trackers(["wandb", "mlflow"], tmp_path, "home", CONFIG)
    assert calls[0][2] == "mine"
    assert "set_experiment" not in [call[1] for call in calls]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_is_said_before_anything_is_opened(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = "wandb" if name != "wandb" else "trackio"
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for module in [m for m in sys.modules if m.startswith(("tensorboard.", "torch.utils.tensorboard."))]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ConfigError) as error:
        open_trackers([other, name], tmp_path, "home", CONFIG)
    assert f"pip install 'lorimer[{name}]'" in str(error.value)
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensorboard, wandb, trackio, mlflow"):
        open_trackers(["comet"], tmp_path, "home", CONFIG)


def test_one_that_does_not_open_stops_the_run_and_closes_the_others(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh1234")

    def refuse(**_: Any) -> None:
        raise RuntimeError("no login for\nabcdefgh1234")

    monkeypatch.setattr(sys.modules["trackio"], "init", refuse)
    with pytest.raises(ConfigError, match=r"trackio cannot be opened: no login for \*\*\*") as error:
        open_trackers(["wandb", "trackio"], tmp_path, "home", CONFIG)
    assert "abcdefgh1234" not in str(error.value)
    assert ("wandb", "finish", 1) in calls


def test_one_that_fails_later_is_dropped_with_one_warning(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(metrics: Any, step: int) -> None:
        raise ConnectionError("server is gone")

    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", fail)
    notes: list[str] = []
    trackers = open_trackers(["mlflow", "wandb"], tmp_path, "home", CONFIG, note=notes.append)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0})
    trackers.close("finished")
    assert len(notes) == 1
    assert "mlflow failed at step 1" in notes[0]
    assert "server is gone" in notes[0]
    assert [call[3] for call in calls if call[1] == "log"] == [1, 2, 3]
    assert ("wandb", "finish", 0) in calls


def test_one_that_fails_to_close_does_not_hide_the_others(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(status: str) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(sys.modules["mlflow"], "end_run", fail)
    notes: list[str] = []
    open_trackers(["wandb", "mlflow"], tmp_path, "home", CONFIG, note=notes.append).close("finished")
    assert len(notes) == 1
    assert ("wandb", "finish", 0) in calls


def test_without_trackers_nothing_happens(tmp_path: Path) -> None:
    trackers = open_trackers([], tmp_path, "home", CONFIG)
    trackers.log(1, {"loss": 1.0})
    trackers.close("finished")
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("SHORT_TOKEN", "base")
    given = {
        "base": "https://me:hunter2@host.example/base",
        "api_key": "k",
        "hub": {"token": "t", "password": None, "max_tokens": 64, "target_modules": ["q_proj"]},
        "note": ["uses hf_0123456789 here", 1],
    }
    assert without_secrets(given) == {
        "base": "https://***@host.example/base",
        "api_key": "***",
        "hub": {"token": "***", "password": None, "max_tokens": 64, "target_modules": ["q_proj"]},
        "note": ["uses *** here", 1],
    }


def test_secrets_reach_no_tracker(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = {"base": "x-0123456789abcdef", "api_key": "another-one"}
    trackers = open_trackers(["tensorboard", "wandb", "trackio", "mlflow"], tmp_path, "home", config)
    trackers.close("finished")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in ("0123456789abcdef", "another-one"):
        assert secret not in str(calls)
        assert secret.encode() not in written


def test_no_tracker_is_imported_unless_asked_for() -> None:
    code = (
        "import sys, lorimer.train.trackers;"
        "assert not {'tensorboard', 'wandb', 'trackio', 'mlflow', 'torch'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
