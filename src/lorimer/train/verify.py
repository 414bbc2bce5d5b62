"""Whether a run's folder is what the run left there; and whether its last steps, done again, end the same.

Each part is looked at by itself, and a damaged one does not hide the others.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorimer.bases.open import open_base
from lorimer.bases.store import resolve_base
from lorimer.config import RunConfig, read_config
from lorimer.errors import LorimerError
from lorimer.run import RunFolder
from lorimer.storage import verify_folder
from lorimer.train.checkpoint import read_progress
from lorimer.train.metrics import Silent


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a run: what is wrong with it, or None; `note` is what was looked at."""

    name: str
    damage: str | None
    note: str = ""


class _Damaged(Exception):
    pass


def verify_run(run: RunFolder, *, replay: bool = False) -> list[Part]:
    """All parts of a run. With `replay` the steps between its last two checkpoints are done again in a
    folder of their own and compared bit for bit: losses, and the adapter and optimizer at the end."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("config.yaml", lambda: _config(run)),
        ("run.json", lambda: _record(run)),
        ("metrics.jsonl", lambda: _metrics(run)),
        ("base", lambda: _base(run)),
    ]
    for step in run.saved_steps():
        path = run.checkpoint(step)
        checks.append((f"checkpoints/{path.name}", lambda path=path: _checkpoint(path)))  # type: ignore[misc]
    if run.adapter.exists():
        checks.append(("adapter", lambda: _folder(run.adapter)))
    for file in sorted(run.eval.glob("*.json")):
        checks.append((f"eval/{file.name}", lambda file=file: _json(file)))  # type: ignore[misc]
    if replay:
        checks.append(("replay", lambda: replayed(run)))
    return [_looked_at(name, check) for name, check in checks]


def _looked_at(name: str, check: Callable[[], str]) -> Part:
    try:
        return Part(name, None, check())
    except _Damaged as damage:
        return Part(name, str(damage))
    except LorimerError as error:
        return Part(name, error.problem)
    except (OSError, ValueError, RecursionError) as error:
        return Part(name, f"it cannot be read: {error}")


def _config(run: RunFolder) -> str:
    read_config(run.config, [], need_files=False)
    return ""


def _record(run: RunFolder) -> str:
    value = json.loads(run.record.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or "status" not in value:
        raise _Damaged("it does not say how the run ended")
    return str(value["status"])


def _metrics(run: RunFolder) -> str:
    """Each step once, in order, with a loss that is a number."""
    last = 0
    for number, line in enumerate(run.metrics.read_text(encoding="utf-8").splitlines(), 1):
        try:
            value = json.loads(line)
            step, loss = value["step"], value.get("loss", 0.0)
            finite = math.isfinite(loss)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _Damaged(f"line {number} cannot be read") from error
        if "loss" in value:
            if step != last + 1:
                raise _Damaged(f"line {number} is step {step} (wanted: {last + 1})")
            last = step
        if not finite:
            raise _Damaged(f"line {number} has the loss {loss}")
    saved = max(run.saved_steps(), default=0)
    if last < saved:
        raise _Damaged(f"it ends with step {last}, and there is a checkpoint of step {saved}")
    return f"{last} steps"


def _base(run: RunFolder) -> str:
    """The base as it is here now, against the one that was trained on."""
    config = read_config(run.config, [], need_files=False)
    wanted = json.loads(run.record.read_text(encoding="utf-8")).get("base_fingerprint")
    found = open_base(resolve_base(config.base)).fingerprint()
    if wanted is not None and found != wanted:
        raise _Damaged(f"{config.base} is not the one that was trained on: {found[:12]} ({wanted[:12]})")
    return config.base


def _folder(path: Path) -> str:
    if damage := verify_folder(path):
        raise _Damaged(damage)
    files = [file for file in path.iterdir() if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


def _checkpoint(path: Path) -> str:
    text = _folder(path)
    read_progress(path)
    return text


def _json(file: Path) -> str:
    json.loads(file.read_text(encoding="utf-8"))
    return ""


# --- replay ---------------------------------------------------------------------------------------


def replayed(run: RunFolder) -> str:
    """The steps between the last two whole checkpoints done again. Raises _Damaged where they differ."""
    config = read_config(run.config, [], need_files=True)
    if config.train.budget is not None:
        return "not done: with `train.budget` the schedule follows the clock"
    whole = [step for step in run.saved_steps() if verify_folder(run.checkpoint(step)) is None]
    if not whole:
        return "not done: there is no whole checkpoint"
    first, last = ([0, *whole])[-2:]
    with tempfile.TemporaryDirectory(prefix="lorimer-verify-") as scratch:
        again = RunFolder(Path(scratch) / "run")
        again.checkpoints.mkdir(parents=True)
        shutil.copyfile(run.config, again.config)
        shutil.copyfile(run.record, again.record)
        if first:
            shutil.copytree(run.checkpoint(first), again.checkpoint(first))
        losses = _redo(config, again, last)
        wanted = dict(_losses(run))
        for step, loss in losses:
            if step in wanted and wanted[step] != loss:
                raise _Damaged(
                    f"step {step} has the loss {wanted[step]!r} in metrics.jsonl, and {loss!r} done again; "
                    "the same is promised on the same machine, with the same threads and versions"
                )
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            one, other = run.checkpoint(last) / name, again.checkpoint(last) / name
            if one.read_bytes() != other.read_bytes():
                raise _Damaged(f"{name} of step {last} came out otherwise, done again")
    return f"steps {first + 1} to {last}: the same losses and the same bytes"


def _redo(config: RunConfig, run: RunFolder, last: int) -> list[tuple[int, float]]:
    """Train up to step `last` in this folder; returns the losses on the way."""
    from lorimer.train.loop import Session

    quiet = config.model_copy(update={"output": config.output.model_copy(update={"trackers": []})})
    session = Session(quiet, Silent(), run)
    session.run = run
    try:
        with torch.random.fork_rng(devices=[]):
            session.restore_if_any(resuming=bool(run.saved_steps()))
            session.make_up_evaluation()
            while (step := session.progress.step) < last:
                session.one_step(step)
                if session.evaluation_due(step):
                    session.evaluate()
            session.save()
    finally:
        session.close()
    return list(_losses(run))


def _losses(run: RunFolder) -> Iterator[tuple[int, float]]:
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        value: dict[str, Any] = json.loads(line)
        if "loss" in value:
            yield value["step"], value["loss"]
