"""Asked to stop: what is saved, how fast, the exit codes; and two processes on one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorimer.cli import app
from lorimer.config import config_from
from lorimer.errors import Interrupted, StorageError, Terminated, UserError
from lorimer.run import RunFolder
from lorimer.storage import verify_folder
from lorimer.train import loop as loop_module
from lorimer.train import stop as stop_module
from lorimer.train.loop import Session, train
from lorimer.train.metrics import Silent
from small_base import write_rows


@pytest.fixture
def settings(short_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    short_run["data"]["valid"] = str(write_rows(tmp_path / "valid.jsonl", 4, seed=7))
    short_run["lora"]["dropout"] = 0.1
    short_run["train"] |= {"eval_every": 2, "micro_batch_tokens": 60}
    short_run["evaluate"]["batch_size"] = 1
    return short_run


def begun(settings: dict[str, Any], name: str, **named: Any) -> Path:
    settings["output"]["name"] = name
    return train(config_from(settings), **named).path


def outcome(run: Path) -> tuple[list[str], bytes]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line.get("loss") or line["valid_loss"]).hex() for line in lines]
    return losses, (run / "adapter/adapter_model.safetensors").read_bytes()


class Signals(Silent):
    """Sends a signal to this process once a step is done, or an evaluation begins."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.last = number, step

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.last:
            signal.raise_signal(self.number)


def test_sigterm_saves_and_the_resumed_run_ends_in_the_same_bytes(settings: dict[str, Any]) -> None:
    whole = begun(settings, "whole")
    with pytest.raises(Terminated, match="after step 3 of 8") as stopped:
        begun(settings, "cut", reporter=Signals(signal.SIGTERM, 3))
    assert stopped.value.exit_code == 143
    cut = whole.parent / "cut"
    assert verify_folder(cut / "checkpoints/step-000003") is None
    train(None, resume=cut)
    assert outcome(cut) == outcome(whole)


def test_a_step_that_takes_too_long_is_left_before_its_update(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begun(settings, "whole")
    monkeypatch.setattr(stop_module, "STOP_PATIENCE", 0.0)
    real = Session.one_step

    def asked_in_the_middle(self: Session, step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        real(self, step)

    monkeypatch.setattr(Session, "one_step", asked_in_the_middle)
    with pytest.raises(Terminated, match="after step 4 of 8"):
        begun(settings, "cut")
    monkeypatch.undo()
    cut = whole.parent / "cut"
    train(None, resume=cut)
    assert outcome(cut) == outcome(whole)


def test_an_evaluation_that_was_left_is_made_up_for(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["train"]["early_stopping_patience"] = 2
    whole = begun(settings, "whole")
    monkeypatch.setattr(stop_module, "STOP_PATIENCE", 0.0)
    real = Session.evaluate

    def asked_in_the_middle(self: Session) -> None:
        if self.progress.step == 4:
            signal.raise_signal(signal.SIGINT)
        real(self)

    monkeypatch.setattr(Session, "evaluate", asked_in_the_middle)
    with pytest.raises(Interrupted, match="after step 4 of 8"):
        begun(settings, "cut")
    monkeypatch.undo()
    cut = whole.parent / "cut"
    train(None, resume=cut)
    assert outcome(cut) == outcome(whole)


@pytest.mark.parametrize("save_every", ["never", 3])
def test_the_proof_can_be_left_and_is_done_when_the_run_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, save_every: object
) -> None:
    # What the rows do not teach: the validation loss grows, and the run stops early.
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "~~~~"}]
    Path(settings["data"]["valid"]).write_text(json.dumps({"messages": turns}) + "\n")
    settings["data"]["test"] = settings["data"]["valid"]
    settings["output"]["save_every"] = save_every
    settings["train"] |= {"learning_rate": 0.05, "early_stopping_patience": 2, "epochs": 8}
    whole = begun(settings, "whole")

    class InTheProof(Silent):
        def proving(self, text: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        begun(settings, "cut", reporter=InTheProof())
    cut = whole.parent / "cut"
    assert not (cut / "eval/after.json").exists()
    train(None, resume=cut)
    assert outcome(cut) == outcome(whole)
    assert (cut / "eval/after.json").exists()
    record = json.loads((cut / "run.json").read_text())
    assert record["status"] == "finished"
    # It stopped early before, and goes on as one that has.
    assert record["steps"] == json.loads((whole / "run.json").read_text())["steps"] < 32


def test_a_second_signal_ends_at_once(settings: dict[str, Any]) -> None:
    class Twice(Silent):
        def step(self, record: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated, match="at once"):
        begun(settings, "run", reporter=Twice())


def test_saving_by_time(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings["output"] |= {"save_every": "10m", "keep": 9}
    now = [0.0]
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: now[0])

    class Slow(Silent):
        def step(self, record: dict[str, Any]) -> None:
            now[0] += 250.0

    run = begun(settings, "run", reporter=Slow())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000006",
        "step-000008",
    ]


def test_two_processes_on_one_run_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(Interrupted):
        begun(settings, "run", reporter=Signals(signal.SIGINT, 2))
    run = RunFolder(Path(settings["output"]["dir"]) / "run")
    program = (
        "import sys, time; from pathlib import Path; from lorimer.run import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n    print('held', flush=True); time.sleep(60)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = run.metrics.read_bytes()
        with pytest.raises(UserError, match=f"another process \\({holder.pid}\\) is training this run"):
            train(None, resume=run.path)
        assert run.metrics.read_bytes() == before
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()  # type: ignore[union-attr]
    # The lock of one that died does not count.
    assert train(None, resume=run.path).steps == 8


def test_a_disk_that_is_too_full_is_said_before_the_first_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorimer import storage

    settings["output"]["save_every"] = 2
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1_000)
    with pytest.raises(StorageError, match=r"bytes needed, 1,000 bytes free"):
        begun(settings, "run")
    assert not Path(settings["output"]["dir"]).exists()


def test_exit_codes_of_a_real_process(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train"] |= {"epochs": 5000}
    (tmp_path / "c.yaml").write_text(json.dumps(settings), encoding="utf-8")
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-m", "lorimer.cli.app", "train", str(tmp_path / "c.yaml")],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics = tmp_path / "runs/run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.startswith(b"stopped after step ")
    assert app.run(["verify", str(tmp_path / "runs/run")]) == 0
