"""Runs that are killed or fail, each in a process of its own, and what they must end as.

One parent loads everything once and forks a child for each run; the parent itself never computes, so that
no thread of PyTorch's is lost by forking.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults import Faults  # noqa: E402

from lorimer.cli import app  # noqa: E402
from lorimer.run import RunFolder  # noqa: E402
from lorimer.storage import verify_folder  # noqa: E402
from lorimer.train import loop  # noqa: E402
from small_base import write_chat_base, write_rows  # noqa: E402

SAVE_EVERY = 2
# Everything that has state at once: dropout in one, shared prefixes in the other.
VARIANTS = {
    "dropout": "lora: {r: 2, alpha: 4, dropout: 0.1}",
    "shared": "lora: {r: 2, alpha: 4}",
}
CONFIG = """\
base: {folder}/base
data: {{train: {folder}/train.jsonl, valid: {folder}/valid.jsonl, test: {folder}/test.jsonl}}
{lora}
train:
  {{epochs: 2, batch_size: 6, learning_rate: 5e-3, dtype: fp32, threads: 1, micro_batch_tokens: 90,
   eval_every: 2, early_stopping_patience: 3}}
evaluate: {{max_new_tokens: 3, batch_size: 2}}
output: {{dir: {folder}/runs, name: NAME, save_every: 2, keep: 2}}
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with base, rows and one uninterrupted run of each variant."""

    folder: Path

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def config(self, variant: str) -> Path:
        return self.folder / f"{variant}.yaml"


def prepare(folder: Path) -> Place:
    place = Place(folder)
    write_chat_base(folder / "base")
    for name, rows, seed in (("train", 21, 0), ("valid", 4, 7), ("test", 2, 9)):
        write_rows(folder / f"{name}.jsonl", rows, seed=seed)
    for variant, lora in VARIANTS.items():
        place.config(variant).write_text(CONFIG.format(folder=folder, lora=lora), encoding="utf-8")
        assert train(place, variant, f"whole-{variant}") == 0, "the uninterrupted run failed"
    return place


def train(place: Place, variant: str, name: str, faults: Faults | None = None, after: float = 0.0) -> int:
    """A run from the beginning; `after` kills it after so many seconds. Returns its exit code, negative for
    a signal."""
    arguments = ["train", str(place.config(variant)), f"output.name={name}"]
    return in_child(place, arguments, faults, after)


def resume(place: Place, name: str, faults: Faults | None = None, after: float = 0.0) -> int:
    return in_child(place, ["train", "--resume", str(place.run(name).path)], faults, after)


def in_child(place: Place, arguments: list[str], faults: Faults | None, after: float) -> int:
    """One command line in a process of its own; what it says is kept in out.txt."""
    child = os.fork()
    if child == 0:
        out = os.open(place.folder / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 99
        try:
            if faults is not None:
                faults.arm()
            code = app.run(arguments)
            if faults is not None and faults.what is None:
                os.write(os.open(place.folder / "calls.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                         "\n".join(faults.names).encode())  # fmt: skip
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def calls(place: Place, variant: str) -> list[str]:
    """The calls of a whole run, in order."""
    assert train(place, variant, "counted", Faults()) == 0
    shutil.rmtree(place.run("counted").path)
    return (place.folder / "calls.txt").read_text(encoding="utf-8").splitlines()


def outcome(run: RunFolder) -> tuple[list[str], str]:
    """Losses and validation losses as hexadecimal numbers, and the adapter's sha256."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    losses = [
        f"{line['step']} {key} {line[key].hex()}"
        for line in lines
        for key in ("loss", "grad_norm", "valid_loss")
        if key in line
    ]
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    return losses, hashlib.sha256(weights).hexdigest()


def problems_of_rest(run: RunFolder) -> list[str]:
    """What a killed run must not have left: no whole checkpoint, or more than one save interval lost."""
    if not run.metrics.exists():
        return []
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    done = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    whole = [step for step in run.saved_steps() if verify_folder(run.checkpoint(step)) is None]
    found = []
    if set(run.saved_steps()) - set(whole):
        found.append("a checkpoint with its final name is not whole")
    # While step n is saved its line is there already.
    if done > SAVE_EVERY and not whole:
        found.append(f"{done} steps were done and there is no whole checkpoint")
    if whole and done - max(whole) > SAVE_EVERY:
        found.append(f"{done - max(whole)} steps are lost")
    return found


def killed_and_resumed(
    place: Place, variant: str, kill: Callable[[str], int], again: Callable[[str], int] | None = None
) -> list[str]:
    """Kill a run, kill its resumption if asked, resume, and compare with the uninterrupted run."""
    name = "cut"
    shutil.rmtree(place.run(name).path, ignore_errors=True)
    run = place.run(name)
    code = kill(name)
    found = problems_of_rest(run)
    if code not in (0, -signal.SIGKILL):
        found.append(f"it ended with {code}: {_said(place)}")
    if again is not None and run.config.exists():
        again(name)
        found += problems_of_rest(run)
    if run.config.exists():
        code = resume(place, name)
    else:  # killed before it had begun
        shutil.rmtree(run.path, ignore_errors=True)
        code = train(place, variant, name)
    if code:
        return [*found, f"it did not go on, {code}: {_said(place)}"]
    if outcome(run) != outcome(place.run(f"whole-{variant}")):
        found.append("it did not end in the same losses and bytes")
    left = [path.name for path in run.path.rglob(".staged-*")]
    return found + ([f"left behind: {left}"] if left else [])


def _said(place: Place) -> str:
    return (place.folder / "out.txt").read_text(encoding="utf-8", errors="replace")[-600:]


assert loop is not None  # loaded before the first child
