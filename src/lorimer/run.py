"""One run's folder: where everything that a run leaves behind has its place.

config.yaml     resolved; runs again as it is
run.json        command, versions, machine, hashes, status, times, best step
metrics.jsonl   one object a line, flushed at each step
row_losses.jsonl   the loss of each row of each step
train.log       what the run said
samples.jsonl   held-out answers before and after
eval/           before.json, after.json
checkpoints/    step-000100/ and so on
adapter/        the best adapter
profile/        with `train --profile`: table.json, trace.json
report.html     all of it on one page
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: two processes on one run are not noticed there
    fcntl = None  # type: ignore[assignment]

from lorimer.errors import ConfigError, StorageError, UserError
from lorimer.storage import STAGED, clear_staged, make_folder, storage_errors, write_file, write_json

LOCK = ".lock"
STEP = re.compile(r"step-(\d+)")
# What systems say that have no links, or give none to everybody.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of a run, and the small files that change while it runs."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def row_losses(self) -> Path:
        return self.path / "row_losses.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [STEP.fullmatch(entry.name) for entry in self.checkpoints.iterdir()]
        return sorted(int(match.group(1)) for match in found if match)

    def read_record(self) -> dict[str, Any]:
        """run.json, or nothing if the run never got so far."""
        try:
            value = json.loads(self.record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def update_record(self, **facts: Any) -> None:
        """Add to run.json, or change what is there."""
        write_json(self.record, self.read_record() | facts)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this run alone; what a process that died has left half-written is cleared.

        The system gives the lock back when its holder ends, however that is. Raises UserError if another
        process holds it.
        """
        with storage_errors(self.path), (self.path / LOCK).open("a+", encoding="utf-8") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    raise UserError(
                        f"another process ({file.read().strip() or 'unknown'}) is training this run",
                        fix="Wait until it ends, or stop it.",
                        path=self.path,
                    ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            for folder in (self.path, *filter(Path.is_dir, self.path.iterdir())):
                clear_staged(folder)
            yield

    def say(self, text: str) -> None:
        """A line for train.log, with the time."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with storage_errors(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")


def create_run(parent: Path, name: str | None, data: str) -> RunFolder:
    """A new run folder; `last` beside it points to it.

    Without a name it is called after the data and the time. A name that is taken gets the next
    number: home, home-2, home-3.
    """
    make_folder(parent)
    chosen = name or f"{Path(data).stem or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = parent / (chosen if number == 1 else f"{chosen}-{number}")
        try:
            with storage_errors(folder):
                folder.mkdir()
            break
        except Exception as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            number += 1
    try:
        with storage_errors(folder):
            (folder / "eval").mkdir()
            (folder / "checkpoints").mkdir()
        _point_last(parent, folder.name)
    except StorageError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return RunFolder(folder)


def _point_last(parent: Path, name: str) -> None:
    """`last` is a link where links work, else a file that holds the name."""
    staged = parent / f"{STAGED}last-{os.getpid()}"
    with storage_errors(parent):
        staged.unlink(missing_ok=True)
    try:
        staged.symlink_to(name)
        os.replace(staged, parent / "last")
    except OSError as error:
        if error.errno in NO_LINKS:
            write_file(parent / "last", name + "\n")
            return
        with storage_errors(parent / "last"):
            raise


def find_run(name: str, parent: Path) -> RunFolder:
    """A run by its folder, by its name under `parent`, or as `last`. ConfigError if there is none."""
    for path in (Path(name), parent / name):
        try:
            if path.is_file():
                path = path.parent / path.read_text(encoding="utf-8").strip()
            if (path / "config.yaml").is_file():
                return RunFolder(path.resolve())
        except (OSError, ValueError):
            continue  # a name that no file can have, or a file that holds no name
    raise ConfigError(
        f"there is no run `{name}`: neither {name} nor {parent / name} holds a config.yaml",
        fix="Give the run's folder, its name, or `last`; `output.dir` says where runs are.",
    )
