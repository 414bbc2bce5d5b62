"""Sound inputs of every kind, and what must hold for a command that is given damaged ones.

One parent loads everything once and forks a child for each command; the parent itself never computes, so
that no thread of PyTorch's is lost by forking.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import runs

from lorimer.cli import app

# Of the processor; a machine that is busy with other work may take longer, but never so much.
SECONDS, WAITED, MEMORY = 10, 300.0, 512_000_000
TRAIN, RESUME = ["train", "c.yaml"], ["train", "--resume", "runs/whole"]
GENERATE = ["generate", "adapter", "a", "--max-tokens", "1"]
CHECKPOINT = "runs/whole/checkpoints/step-000001"
# What the commands import when they run; every child would do it again.
USED = ("numpy.ma", "typer", "jinja2", "rich.progress", "safetensors.torch", "pyarrow.parquet")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did: its exit code (negative if it took too long), what it said, the most memory in
    bytes, and the files that it left or took away."""

    code: int
    said: str
    memory: int
    changed: frozenset[str]


def faults(outcome: Outcome, command: Sequence[str], allowed: int) -> list[str]:
    """What no command may do, whatever it is given; `allowed` is the most memory in bytes.

    A run that goes on may have written to its own folder before it is refused.
    """
    reports = list(command[:2]) == ["data", "check"]  # lists all that is wrong, by file and line
    found = []
    if outcome.code in (-signal.SIGKILL, -signal.SIGXCPU):
        found.append(f"it took more than {SECONDS} s")
    elif outcome.code < 0 or outcome.code > 4:
        found.append(f"exit code {outcome.code}")
    if "Traceback" in outcome.said or "bug in lorimer" in outcome.said:
        found.append(outcome.said[-500:])
    if outcome.code == 2 and messages(outcome.said) != 1 and not reports:
        found.append(f"{messages(outcome.said)} messages: {outcome.said[-300:]}")
    if outcome.code == 2 and outcome.changed and "--resume" not in command:
        found.append(f"left behind or taken away: {sorted(outcome.changed)}")
    if outcome.memory > allowed:
        found.append(f"it took {outcome.memory / 1e6:,.0f} MB")
    return found


def messages(said: str) -> int:
    return sum(line.startswith("error:") for line in said.splitlines())


def scratch_folder() -> str | None:
    """Memory where the system offers it as a folder: nothing here has to survive."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def sound_inputs() -> Iterator[tuple[Path, int]]:
    """A folder of sound inputs, and the memory that a child begins with."""
    with tempfile.TemporaryDirectory(prefix="lorimer-inputs-", dir=scratch_folder()) as scratch:
        folder = Path(scratch) / "sound"
        folder.mkdir()
        load_everything()
        prepare(folder)
        gc.freeze()
        yield folder, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_everything() -> None:
    gc.set_threshold(100_000, 50, 50)  # as the program's own beginning does
    for command in app.COMMANDS.values():
        app.load_command(command)
    for name in USED:
        importlib.import_module(name)


def prepare(folder: Path) -> None:
    """Sound inputs of every kind, made by commands of lorimer itself."""
    import pyarrow
    from pyarrow import parquet

    runs.write_chat_base(folder / "base")
    runs.write_rows(folder / "train.jsonl", 9)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "rows.json").write_text(json.dumps(rows))
    pairs = [[turn["content"] for turn in row["messages"]] for row in rows]
    (folder / "rows.csv").write_text("prompt,completion\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    table = pyarrow.Table.from_pylist([{"prompt": a, "completion": b} for a, b in pairs])
    parquet.write_table(table, folder / "rows.parquet")
    (folder / "c.yaml").write_text(
        "base: base\ndata: {train: train.jsonl}\nlora: {r: 2, alpha: 4}\n"
        "train: {max_steps: 1, batch_size: 3, learning_rate: 5e-3, dtype: fp32, threads: 1}\n"
        "output: {dir: runs, name: one, save_every: 1}\n"
    )
    for command in (
        [*TRAIN, "output.name=whole", "train.max_steps=1"],
        ["export", "base", "--to", "gguf", "--out", "base.gguf"],
    ):
        outcome = run(folder, command)
        assert outcome.code == 0, outcome.said
    shutil.copytree(folder / "runs/whole/adapter", folder / "adapter")


@contextmanager
def copy_of(sound: Path) -> Iterator[Path]:
    """The sound inputs once more, to be damaged."""
    with tempfile.TemporaryDirectory(prefix="lorimer-input-", dir=scratch_folder()) as scratch:
        yield Path(shutil.copytree(sound, Path(scratch) / "x", symlinks=True))


def run(folder: Path, arguments: Sequence[str]) -> Outcome:
    """One command line in a child, within a folder."""
    before = listing(folder)
    out = folder.with_name("out.txt")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            # The bases that are kept on this machine are not part of the inputs.
            os.environ["LORIMER_HOME"] = str(folder.with_name("home"))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = app.run(arguments)
        finally:
            os._exit(code)
    status, usage = _wait(child)
    changed = before ^ listing(folder)
    said = out.read_text("utf-8", "replace")
    return Outcome(os.waitstatus_to_exitcode(status), said, usage.ru_maxrss * 1024, frozenset(changed))


def agree(file: Path) -> None:
    """Write into the manifest beside a file what that file is now."""
    content = file.read_bytes()
    manifest = file.with_name("manifest.json")
    whole = json.loads(manifest.read_text(encoding="utf-8"))
    whole["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(whole), encoding="utf-8")


_work: Callable[[int], Any]


def shared(work: Callable[[int], Any], count: int, workers: int = 2) -> Iterator[Any]:
    """What `work` returns for 0, 1, ... as it comes, from some processes at once."""
    global _work
    _work = work
    with get_context("fork").Pool(workers) as pool:
        yield from pool.imap_unordered(_one, range(count))


def _one(number: int) -> Any:
    return _work(number)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    deadline = time.monotonic() + WAITED
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(0.004)
