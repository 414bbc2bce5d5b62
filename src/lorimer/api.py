"""train() as Python calls it: settings in any form in, a finished run out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorimer.config import RunConfig
    from lorimer.train.loop import RunResult
    from lorimer.train.metrics import Reporter


def train(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    resume: str | Path | None = None,
    reporter: Reporter | None = None,
) -> RunResult:
    """Train an adapter: `lorimer.train("run.yaml")`, or with the same settings as a dict.

    `resume` names a run (its folder, its name, or "last") that goes on; `config` may then be left
    out. Paths in a dict are relative to the current folder. Raises the errors of lorimer.errors.
    """
    from lorimer.config import config_from, read_config
    from lorimer.train import loop

    if isinstance(config, Mapping):
        config = config_from(config)
    elif isinstance(config, str | Path):
        config = read_config(config)
    return loop.train(config, resume=resume, reporter=reporter)
