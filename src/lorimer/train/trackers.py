"""tensorboard, wandb, trackio and mlflow behind one seam.

Each tracker is an extra that is imported here alone, and only if it was asked for. A tracker that
cannot be opened stops the run before it begins; one that fails later is dropped with one warning,
for no chart is worth a run. Secrets are taken out of everything that is sent or said.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lorimer.errors import CREDENTIALS, HIDDEN, ConfigError
from lorimer.storage import write_json

# What the run is filed under where the tracker's own environment variables do not say.
PROJECT = "lorimer"
# The ids that trackers gave this run, so that a resumed run goes on in the same place.
IDS = "trackers.json"
# mlflow refuses longer parameters; older servers at 500 characters.
MOST_PARAM = 500


class Tracker(Protocol):
    """One open tracker. Any of its calls may raise anything."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, status: str) -> None: ...


class Trackers:
    """All that were asked for, perhaps none."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._open: dict[str, Tracker] = {}
        self._note = note

    @property
    def names(self) -> list[str]:
        """Those that still work."""
        return list(self._open)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers among the metrics; other values and `step` itself are left out."""
        numbers = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(step, numbers)
            except Exception as error:
                del self._open[name]
                self._warn(name, f"failed at step {step} and gets nothing more", error)

    def close(self, status: str) -> None:
        """End all; status is finished, interrupted or failed."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close(status)
            except Exception as error:
                self._warn(name, "could not be closed", error)

    def _add(self, name: str, tracker: Tracker) -> None:
        self._open[name] = tracker

    def _warn(self, name: str, what: str, error: Exception) -> None:
        self._note(f"{name} {what}: {_say(error)}. Training goes on; metrics.jsonl has everything.")


def open_trackers(
    names: Sequence[str],
    run_dir: Path,
    run_name: str,
    config: Mapping[str, Any],
    *,
    first_step: int = 0,
    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Trackers:
    """Open the named trackers for one run; a name given twice counts once.

    `first_step` is the number of steps done before, on resume: what was logged after it is replaced
    where the tracker can do that. `note` is told of a tracker that fails later. Raises ConfigError for
    a package that is missing or a tracker that does not open; then none is left open.
    """
    wanted = list(dict.fromkeys(names))
    modules = {name: _import(name) for name in wanted}
    trackers = Trackers(note)
    clean = without_secrets(dict(config))
    for name in wanted:
        try:
            trackers._add(name, OPENERS[name](modules[name], run_dir, run_name, clean, first_step))
        except Exception as error:
            trackers.close("failed")
            fix = f"Check how {name} is set up, or take it out of `output.trackers`."
            raise ConfigError(f"the tracker {name} cannot be opened: {_say(error)}", fix=fix) from None
    return trackers


MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}


def _import(name: str) -> Any:
    if name not in MODULES:
        known = ", ".join(MODULES)
        raise ConfigError(f"there is no tracker `{name}`", fix=f"Known are {known}.")
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        problem = f"the tracker {name} cannot be imported ({_say(error)})"
        raise ConfigError(problem, fix=f"Install it: pip install 'lorimer[{name}]'") from None


# --- one class for each -----------------------------------------------------------------------


class _Tensorboard:
    """Event files under RUN/tensorboard."""

    def __init__(
        self, module: Any, run_dir: Path, name: str, config: dict[str, Any], first_step: int
    ) -> None:
        folder = str(run_dir / "tensorboard")
        purge = first_step + 1 if first_step else None
        self._writer = module.SummaryWriter(log_dir=folder, purge_step=purge, flush_secs=10)
        if not first_step:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; its local files go under RUN/wandb."""

    def __init__(
        self, module: Any, run_dir: Path, name: str, config: dict[str, Any], first_step: int
    ) -> None:
        kept = _kept_id(run_dir, "wandb") if first_step else None
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        again = {"id": kept, "resume": "allow"} if kept else {}
        self._run = module.init(project=project, name=name, dir=str(run_dir), config=config, **again)
        _keep_id(run_dir, "wandb", self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class _Trackio:
    """A run of trackio, which keeps its runs on this machine and knows them by name."""

    def __init__(
        self, module: Any, run_dir: Path, name: str, config: dict[str, Any], first_step: int
    ) -> None:
        resume = "allow" if first_step else "never"
        self._run = module.init(project=PROJECT, name=name, config=config, resume=resume)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, status: str) -> None:
        self._run.finish()


class _Mlflow:
    """A run of mlflow, where MLFLOW_TRACKING_URI or mlflow's own default says."""

    STATUS: Mapping[str, str] = {"finished": "FINISHED", "interrupted": "KILLED"}

    def __init__(
        self, module: Any, run_dir: Path, name: str, config: dict[str, Any], first_step: int
    ) -> None:
        self._mlflow = module
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            module.set_experiment(PROJECT)
        kept = _kept_id(run_dir, "mlflow") if first_step else None
        run = module.start_run(run_id=kept) if kept else module.start_run(run_name=name)
        _keep_id(run_dir, "mlflow", run.info.run_id)
        if not kept:  # a parameter cannot change once it is logged
            module.log_params({key: str(value)[:MOST_PARAM] for key, value in _flat(config).items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, status: str) -> None:
        self._mlflow.end_run(status=self.STATUS.get(status, "FAILED"))


OPENERS: Mapping[str, Callable[[Any, Path, str, dict[str, Any], int], Tracker]] = {
    "tensorboard": _Tensorboard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}


def _ids(run_dir: Path) -> dict[str, str]:
    try:
        value = json.loads((run_dir / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _kept_id(run_dir: Path, tracker: str) -> str | None:
    return _ids(run_dir).get(tracker)


def _keep_id(run_dir: Path, tracker: str, number: str) -> None:
    write_json(run_dir / IDS, _ids(run_dir) | {tracker: number})


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 2}} as {"train.epochs": 2}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= (
            _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
        )
    return flat


# --- secrets ----------------------------------------------------------------------------------

_SECRET_NAME = re.compile(
    r"api_?key|secret|passw(or)?d|credential|authorization|(^|_)(token|key)$", re.IGNORECASE
)


def without_secrets(value: Any) -> Any:
    """The value without what is secret in it: settings by their name, logins in addresses, and
    whatever an environment variable named like a secret holds."""
    if isinstance(value, Mapping):
        hidden = {name for name, item in value.items() if item and _SECRET_NAME.search(str(name))}
        return {k: HIDDEN if k in hidden else without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            # Shorter values are words like "true" more often than secrets.
            if len(secret) >= 8 and _SECRET_NAME.search(name):
                value = value.replace(secret, HIDDEN)
        return CREDENTIALS.sub(HIDDEN, value)
    return value


def _say(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return str(without_secrets(text))
