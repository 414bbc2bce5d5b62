"""Change the source in one place at a time: do the tests notice?

    python tests/mutants/run.py                   every module
    python tests/mutants/run.py --only data/pack  modules whose name holds this
    python tests/mutants/run.py --workers 1       two at once if not said otherwise

mutmut makes the mutants (made.py says which). Each is put into a copy of the tree, and its module's tests
(scope.py) run in a fork of a process that has loaded the big libraries already. What was found goes to
docs/mutants.md, and is kept in .mutants/ by the content of mutant and tests: a run that was stopped goes
on, and a mutant that was killed once meets the test that killed it first. `--anew` forgets the outcomes.
Ends with 1 if a module's share of killed mutants is below 85 %, or a survivor has no reason in
reasons.toml.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made import Mutant, mutants
from page import page
from scope import MODULES, Module

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "docs", "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")
KEPT = ROOT / ".mutants"
LEAST = 0.85
MEMORY = 8 << 30  # bytes a mutant may take
FAMILIES = (
    *("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Gemma3", "Phi3"),
    *(
        "SmolLM3",
        "Olmo2",
        "Granite",
        "Cohere",
        "Cohere2",
        "StableLm",
        "Starcoder2",
        "GPTNeoX",
        "OPT",
        "Falcon",
    ),
    "Glm4",
)
# Exit codes of pytest: a test failed; it was interrupted, which is what an error while importing is.
NOTICED = (1, 2)


@dataclass
class Outcome:
    """How the tests ended: pytest's exit code, or minus the signal. `killer` failed first."""

    code: int
    killer: str
    cpu_seconds: float
    said: str

    @property
    def killed(self) -> bool:
        return self.code in NOTICED or self.code < 0


class Slot:
    """A copy of the tree, in which one mutant at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = 0
        self.source, self.tests = folder / "src" / "lorimer", folder / "tests"
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, folder / name)

    def put(self, file: str, text: str) -> None:
        path = self.source / file
        path.write_text(text, encoding="utf-8")
        for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            stale.unlink()

    def start(
        self, tests: list[str], *, cpu_limit: int, first: Sequence[str] = (), caches: bool = False
    ) -> None:
        self.cpu_limit, self.began = cpu_limit, time.monotonic()
        (self.folder / "killer").unlink(missing_ok=True)
        sys.stdout.flush()
        self.process = os.fork()
        if not self.process:
            self._in_child(tests, first, cpu_limit, caches)

    def _in_child(self, tests: list[str], first: Sequence[str], cpu_limit: int, caches: bool) -> None:
        """Never returns. The copy's own code is imported here for the first time."""
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with (self.folder / "said.txt").open("wb") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.chdir(self.folder)
            source = str(self.folder / "src")
            sys.path[:] = [source, *(p for p in sys.path if p not in (str(Path(__file__).parent), source))]
            os.environ |= {"PYTHONPATH": source, "PYTHONDONTWRITEBYTECODE": "" if caches else "1"}
            sys.dont_write_bytecode = not caches
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}"]
            code = int(pytest.main([*options, *tests], plugins=[Killer(self.folder / "killer", first)]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> Outcome | None:
        """None while it runs. One that waits for ever is ended by the clock, one that counts by its CPU."""
        process, status, usage = os.wait4(self.process, os.WNOHANG)
        if not process:
            if time.monotonic() - self.began > 60 + 10 * self.cpu_limit:
                self.stop()
            return None
        self.stop()
        self.process = 0
        killer = self.folder / "killer"
        return Outcome(
            os.waitstatus_to_exitcode(status),
            killer.read_text(encoding="utf-8") if killer.exists() else "",
            usage.ru_utime + usage.ru_stime,
            (self.folder / "said.txt").read_text(encoding="utf-8", errors="replace"),
        )

    def stop(self) -> None:
        """End the child and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)


class Killer:
    """Begins with the tests that are likely to fail, and writes down which was the first to do so."""

    def __init__(self, file: Path, likely: Sequence[str]) -> None:
        self.file = file
        self.places = {name: place for place, name in reversed(list(enumerate(likely)))}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.places.get(item.nodeid, len(self.places)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid, encoding="utf-8")


class Kept:
    """Outcomes and killing tests of earlier runs, a line each as they come."""

    def __init__(self, *, anew: bool) -> None:
        KEPT.mkdir(exist_ok=True)
        self.file = KEPT / "outcomes.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        read = [json.loads(line) for line in lines if line.endswith("}")]
        self.killers = {line["mutant"]: line["killer"] for line in read if line["killer"]}
        self.outcomes = {} if anew else {line["key"]: line["killed"] for line in read}

    def add(self, key: str, mutant: str, outcome: Outcome) -> None:
        line = {"key": key, "mutant": mutant, "killed": outcome.killed, "killer": outcome.killer}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.outcomes[key] = outcome.killed


def warm_up() -> None:
    """What takes long to import and is not lorimer's."""
    import gguf  # noqa: F401
    import jinja2.sandbox
    import peft  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch
    import torch
    import transformers
    import yaml  # noqa: F401

    torch.set_num_threads(1)
    for family in FAMILIES:
        getattr(transformers, f"{family}ForCausalLM")
    _ = transformers.GPT2LMHeadModel
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, safetensors, jinja2
    assert "lorimer" not in sys.modules
    # pytest collects garbage ten times as it ends: what is here for good is not looked at in the forks.
    gc.collect()
    gc.freeze()


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def keyed(root: Path, module: Module) -> list[tuple[str, Mutant]]:
    """The mutants of a module, each with a key that says what was tried: its text and its tests."""
    text = (root / "src" / "lorimer" / module.file).read_text(encoding="utf-8")
    tests = [(root / "tests" / name).read_text(encoding="utf-8") for name in module.tests]
    return [(digest(mutant.text, *tests), mutant) for mutant in mutants(text, module.functions)]


def baseline(slots: list[Slot], module: Module) -> float:
    """CPU seconds of the tests without any change, where they must pass; fills the caches of bytecode."""
    took = 0.0
    for slot in slots:
        slot.start([f"tests/{name}" for name in module.tests], cpu_limit=900, caches=True)
    for slot in slots:
        outcome = None
        while outcome is None:
            time.sleep(0.05)
            outcome = slot.ended()
        if outcome.code:
            why = f"fail without any change ({outcome.code}):\n{outcome.said[-3000:]}"
            sys.exit(f"the tests of {module.file} {why}")
        took = max(took, outcome.cpu_seconds)
    return took


def tried(
    slots: list[Slot], module: Module, text: str, wanted: list[tuple[str, Mutant]], kept: Kept
) -> Iterator[tuple[str, Mutant, Outcome]]:
    """Each mutant's outcome, as many at once as there are slots.

    The test that killed it once comes first, then those that killed others of its function.
    """
    limit = int(10 + 3 * baseline(slots, module))
    tests = [f"tests/{name}" for name in module.tests]
    waiting = list(reversed(wanted))
    running: dict[int, tuple[str, Mutant]] = {}
    killers: dict[str, list[str]] = {}
    while waiting or running:
        for number, slot in enumerate(slots):
            if number in running:
                outcome = slot.ended()
                if outcome is None:
                    continue
                key, mutant = running.pop(number)
                assert outcome.killed or outcome.code == 0, outcome.said
                others = [name for name in killers.get(mutant.function, []) if name != outcome.killer]
                killers[mutant.function] = [outcome.killer, *others] if outcome.killer else others
                yield key, mutant, outcome
            if waiting:
                key, mutant = running[number] = waiting.pop()
                slot.put(module.file, mutant.text)
                known = kept.killers.get(name_of(module, mutant), "")
                slot.start(tests, cpu_limit=limit, first=[known, *killers.get(mutant.function, [])])
        time.sleep(0.01)
    for slot in slots:
        slot.put(module.file, text)


def name_of(module: Module, mutant: Mutant) -> str:
    return f"{module.file}::{mutant.function}: {mutant.change}"


def measure(slots: list[Slot], module: Module, kept: Kept) -> None:
    """Try every mutant of a module that was not tried yet."""
    # From the copy: the tree may be edited while this runs.
    made = keyed(slots[0].folder, module)
    text = (slots[0].source / module.file).read_text(encoding="utf-8")
    wanted = [(key, mutant) for key, mutant in made if key not in kept.outcomes]
    print(
        f"{module.file}: {len(made)} mutants, {len(wanted)} to try with {', '.join(module.tests)}",
        flush=True,
    )
    began = time.monotonic()
    if wanted:
        for done, (key, mutant, outcome) in enumerate(tried(slots, module, text, wanted, kept), 1):
            kept.add(key, name_of(module, mutant), outcome)
            if not outcome.killed:
                print(f"  survived: {mutant.function}: {mutant.change}", flush=True)
            if done % 50 == 0:
                print(f"  {done} of {len(wanted)} in {time.monotonic() - began:.0f} s", flush=True)
    killed = sum(kept.outcomes[key] for key, _ in made)
    print(f"  killed {killed} of {len(made)}: {100 * killed / len(made):.1f} %", flush=True)


def known(module: Module, kept: Kept) -> list[tuple[Mutant, bool]]:
    """Every mutant of a module and whether it was killed; nothing if not all were tried."""
    made = keyed(ROOT, module)
    if any(key not in kept.outcomes for key, _ in made):
        return []
    return [(mutant, kept.outcomes[key]) for key, mutant in made]


def main() -> int:
    parser = argparse.ArgumentParser(description="Change the source in one place at a time.")
    parser.add_argument("--only", default="", help="modules whose file name holds this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--anew", action="store_true", help="try again what was tried already")
    args = parser.parse_args()
    fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Plugins of other packages would want to be imported before what they watch.
    fixed["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if any(os.environ.get(name) != value for name, value in fixed.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | fixed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [module for module in MODULES if args.only in module.file]
    kept = Kept(anew=args.anew)
    warm_up()
    with tempfile.TemporaryDirectory(prefix="lorimer-mutants-") as scratch:
        slots = [Slot(Path(scratch) / str(number)) for number in range(args.workers)]
        try:
            for module in chosen:
                measure(slots, module, kept)
        finally:
            for slot in slots:
                if slot.process:
                    slot.stop()
    text, faults = page([(module, known(module, kept)) for module in MODULES], LEAST)
    (ROOT / "docs" / "mutants.md").write_text(text, encoding="utf-8")
    print("\n".join(faults) or "every module is above the bar, every survivor has a reason")
    print("written: docs/mutants.md")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
