"""Which run goes on, and which of its settings may be others now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorimer.config import RunConfig, read_config
from lorimer.errors import ConfigError
from lorimer.run import RunFolder, find_run


def resumed_run(config: RunConfig | None, resume: str | Path) -> tuple[RunFolder, RunConfig]:
    """The run to go on with, and its settings with what `config` changes of them."""
    run = find_run(str(resume), Path(config.output.dir if config else "runs"))
    saved = read_config(run.config, [])
    return run, saved if config is None else _changed(saved, config, run)


# What may be another on resume: it does not change what the steps before have computed.
MAY_CHANGE = {
    "train.epochs",
    "train.max_steps",
    "train.budget",
    "train.eval_every",
    "train.early_stopping_patience",
    "train.micro_batch_tokens",
    "train.recompute",
    "train.threads",
    "output",
    "evaluate",
    "data.test",
}


def _changed(saved: RunConfig, given: RunConfig, run: RunFolder) -> RunConfig:
    """The given settings, if they differ from the run's only where that is allowed."""
    old, new = _flat(saved.model_dump()), _flat(given.model_dump())
    for key, value in new.items():
        allowed = any(key == name or key.startswith(name + ".") for name in MAY_CHANGE)
        if old.get(key) != value and not allowed:
            raise ConfigError(
                f"`{key}` is {value!r} and the run was begun with {old.get(key)!r}",
                fix="Resume with the run's own value, or start a new run.",
                path=run.config,
            )
    return given


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
