"""What a step reports, and where it is written: metrics.jsonl always, trackers where asked for."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from lorimer.storage import is_number, storage_errors, write_file


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of metrics.jsonl. Tokens are those of the rows; times are in seconds."""

    step: int
    total_steps: int  # of the run, as planned after this step
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    rows: int
    tokens: int
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    memory_bytes: int


class Reporter(Protocol):
    """Who is told how a run goes: the terminal, a test, nobody."""

    def start(self, info: dict[str, Any]) -> None: ...

    def step(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def saved(self, path: Path, step: int) -> None: ...

    def note(self, text: str) -> None: ...

    def proving(self, text: str) -> None: ...

    def finished(self, result: Any) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def start(self, info: dict[str, Any]) -> None: ...

    def step(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def saved(self, path: Path, step: int) -> None: ...

    def note(self, text: str) -> None: ...

    def proving(self, text: str) -> None: ...

    def finished(self, result: Any) -> None: ...


class MetricsFile:
    """metrics.jsonl, a line flushed at each step."""

    def __init__(self, path: Path, *, keep_until: int | None = None) -> None:
        """With `keep_until` an existing file is cut to the lines up to that step: those after it
        belong to steps that will be done again."""
        self.path = path
        with storage_errors(path):
            if keep_until is not None and path.exists():
                # What is written is ASCII; a byte that is none makes its line one to drop.
                lines = path.read_text(encoding="ascii", errors="replace").splitlines()
                kept = [line for line in lines if _step_of(line) <= keep_until]
                write_file(path, "".join(line + "\n" for line in kept))
            self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord | dict[str, Any]) -> dict[str, Any]:
        line = record if isinstance(record, dict) else asdict(record)
        with storage_errors(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        return line

    def sync(self) -> None:
        """Onto the disk: a checkpoint's steps must have their lines."""
        with storage_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> int:
    """The step of a line; one that a crash cut short, or that is damaged, counts as one to drop."""
    try:
        value = json.loads(line)
        step, _ = value["step"], value.pop("best", None)
        lists = {name: numbers for name, numbers in value.items() if isinstance(numbers, list)}
        numbers = [number for name, number in value.items() if name not in lists]
        if lists:  # of row_losses.jsonl
            numbers += [*lists["rows"], *lists["losses"]]
            if len(lists) != 2 or len(lists["rows"]) != len(lists["losses"]):
                return sys.maxsize
        sound = type(step) is int and "\ufffd" not in line
        return step if sound and all(map(_was_measured, numbers)) else sys.maxsize
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return sys.maxsize


def _was_measured(value: Any) -> bool:
    """A validation loss may have been NaN."""
    return type(value) is float or is_number(value)


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: of the process, or of the GPU's tensors."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
