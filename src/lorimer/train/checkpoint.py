"""The state of a run at the end of a step, whole or not at all.

    adapter_model.safetensors, adapter_config.json, lorimer.json   the adapter, a PEFT folder
    optimizer.safetensors                                          its state and count of steps
    state.json                                                     step, best, patience, hashes
    manifest.json                                                  sizes and sha256, written last

Order, learning rate and dropout are functions of (seed, step), so they need no state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lorimer.bases.safetensors import SafetensorsFile
from lorimer.errors import ConfigError, StorageError
from lorimer.lora.adapter import read_adapter
from lorimer.lora.layers import Adapter
from lorimer.run import STEP, RunFolder
from lorimer.storage import is_number, remove_folder, verify_folder, write_folder, write_tensors
from lorimer.train.optimizer import Optimizer

FORMAT = 2  # 1 had the optimizer's numbers in another order
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"


@dataclass(slots=True)
class Progress:
    """How far a run is, and what it knows. `step` optimizer steps are done."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    train_seconds: float = 0.0
    elapsed: float = 0.0  # of `train.budget`, in seconds
    evaluated: int = 0  # the step of the last evaluation
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    loss_scale: float | None = None  # of the last step, in float16
    data_hash: str = ""
    base_fingerprint: str = ""


def save_checkpoint(
    run: RunFolder,
    progress: Progress,
    optimizer: Optimizer,
    fill_adapter: Callable[[Path], None],
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of `progress.step`, then drop all but the newest `keep`.

    Raises StorageError; the earlier checkpoints are then as they were.
    """

    def fill(folder: Path) -> None:
        fill_adapter(folder)
        state = {name: value.detach().cpu().contiguous() for name, value in optimizer.state().items()}
        write_tensors(folder / OPTIMIZER, state)
        text = json.dumps({"format": FORMAT} | asdict(progress), indent=2)
        (folder / STATE).write_text(text + "\n", encoding="utf-8")

    path = run.checkpoint(progress.step)
    write_folder(path, fill)
    for step in run.saved_steps()[:-keep]:
        if step != progress.step:
            remove_folder(run.checkpoint(step))
    return path


def newest_checkpoint(run: RunFolder, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is what its manifest says; damaged ones are passed over aloud."""
    for step in reversed(run.saved_steps()):
        path = run.checkpoint(step)
        damage = verify_folder(path)
        if damage is None:
            return path
        say(f"the checkpoint {path.name} is damaged and not used: {damage}")
    return None


def read_progress(path: Path) -> Progress:
    """The state of a verified checkpoint. Raises ConfigError for one of another format or without sense."""
    try:
        state: Any = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _unusable(path / STATE, f"it is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise _unusable(path / STATE, "it is not a JSON object")
    found = state.pop("format", None)
    if found != FORMAT or not set(state) <= {item.name for item in fields(Progress)}:
        raise ConfigError(
            f"the checkpoint has the format {found} (this version reads: {FORMAT})",
            fix="Resume it with the version of lorimer that wrote it.",
            path=path,
        )
    progress = Progress(**state)
    for item in fields(Progress):
        value = getattr(progress, item.name)
        if not _fits(value, str(item.type)):
            raise _unusable(path / STATE, f"`{item.name}` is {value!r} (wanted: {item.type})")
    if progress.step != int(STEP.fullmatch(path.name)[1]):  # type: ignore[index]  # so it was found
        raise _unusable(path / STATE, f"`step` is {progress.step}, and the folder is {path.name}")
    return progress


def _fits(value: Any, kind: str) -> bool:
    """Whether a value of JSON is what a field of Progress holds: a finite float, an integer from 0 on."""
    if value is None:
        return kind.endswith("None")
    if kind.startswith("str"):
        return isinstance(value, str)
    if kind.startswith("float"):
        return is_number(value)
    return type(value) is int and value >= 0


def _unusable(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint cannot be used: {what}",
        fix="Delete its folder: the run goes on from the one before it, or begins again.",
        path=path,
    )


def restore(path: Path, adapter: Adapter, optimizer: Optimizer) -> None:
    """Put a verified checkpoint's parameters and optimizer state in place."""
    kept = read_adapter(path).tensors
    if set(kept) != set(adapter.tensors):
        raise StorageError("the checkpoint's adapter does not fit this run's settings", path=path)
    for name, tensor in kept.items():
        adapter.take(name, tensor)
    adapter.refresh()
    file = SafetensorsFile(path / OPTIMIZER)
    state = {name: file.tensor(name) for name in file.tensors}
    for name, wanted in optimizer.state().items():
        found = state.get(name)
        if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
            what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise _unusable(
                path / OPTIMIZER, f"`{name}` {what} (wanted: {wanted.dtype} {list(wanted.shape)})"
            )
        if not torch.isfinite(found).all():
            raise _unusable(path / OPTIMIZER, f"`{name}` holds NaN or infinity")
    optimizer.restore(state)
