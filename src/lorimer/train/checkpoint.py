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

from lorimer.bases.safetensors import SafetensorsFile
from lorimer.errors import ConfigError, StorageError
from lorimer.lora.adapter import read_adapter
from lorimer.lora.layers import Adapter
from lorimer.run import RunFolder
from lorimer.storage import remove_folder, verify_folder, write_folder, write_tensors
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
    """The state of a verified checkpoint. Raises ConfigError for one of another format."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    found = state.pop("format", None)
    if found != FORMAT or not set(state) <= {item.name for item in fields(Progress)}:
        raise ConfigError(
            f"the checkpoint has the format {found} (this version reads: {FORMAT})",
            fix="Resume it with the version of lorimer that wrote it.",
            path=path,
        )
    return Progress(**state)


def restore(path: Path, adapter: Adapter, optimizer: Optimizer) -> None:
    """Put a verified checkpoint's parameters and optimizer state in place."""
    kept = read_adapter(path).tensors
    if set(kept) != set(adapter.tensors):
        raise StorageError("the checkpoint's adapter does not fit this run's settings", path=path)
    for name, tensor in kept.items():
        adapter.take(name, tensor)
    adapter.refresh()
    state = SafetensorsFile(path / OPTIMIZER)
    optimizer.restore({name: state.tensor(name) for name in state.tensors})
