# ruff: noqa: E501  (tables)
"""Damaged inputs of every kind: one message each, never a traceback, a hang or a half-made run.

python tests/crash/mutate.py                10,000 inputs, about an hour
python tests/crash/mutate.py --inputs 300   as many
python tests/crash/mutate.py --only 4711    one of them, and what it said
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import runs

from lorimer.cli import app

SECONDS, MEMORY = 10.0, 512_000_000
ODD_NUMBERS = (
    b"-1",
    b"0",
    b"99999999999999999999",
    b"1e400",
    b"NaN",
    b"0.5",
    b"null",
    b"true",
    b'"x"',
    b"[]",
)
ODD_VALUES: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "x" * 3000,
    [],
    {},
    [[[]]],
    {"a": 1},
    "\ud800",
)


@dataclass(frozen=True, slots=True)
class Surface:
    """A kind of input: the file that is mutated, and the command that reads it."""

    name: str
    file: str
    command: list[str]
    is_json: bool = False
    head: int | None = None  # mutate only these first bytes


TRAIN, RESUME = ["train", "c.yaml"], ["train", "--resume", "runs/whole"]
GENERATE = ["generate", "adapter", "a", "--max-tokens", "1"]
CHECKPOINT = "runs/whole/checkpoints/step-000001"
SURFACES = [
    Surface("rows", "train.jsonl", TRAIN),
    Surface("rows as json", "rows.json", [*TRAIN, "data.train=rows.json"], is_json=True),
    Surface("rows as csv", "rows.csv", [*TRAIN, "data.train=rows.csv"]),
    Surface("config", "c.yaml", TRAIN),
    Surface("weights", "base/model.safetensors", TRAIN, head=4096),
    Surface("config.json", "base/config.json", TRAIN, is_json=True),
    Surface("tokenizer.json", "base/tokenizer.json", TRAIN, is_json=True),
    Surface("tokenizer_config.json", "base/tokenizer_config.json", TRAIN, is_json=True),
    Surface("template", "base/chat_template.jinja", TRAIN),
    Surface("gguf", "base.gguf", [*TRAIN, "base=base.gguf"], head=12_000),
    Surface("adapter_config.json", "adapter/adapter_config.json", GENERATE, is_json=True),
    Surface("adapter weights", "adapter/adapter_model.safetensors", GENERATE, head=4096),
    Surface("lorimer.json", "adapter/lorimer.json", GENERATE, is_json=True),
    Surface("manifest", f"{CHECKPOINT}/manifest.json", RESUME, is_json=True),
    Surface("state", f"{CHECKPOINT}/state.json", RESUME, is_json=True),
    Surface("a run's record", "runs/whole/run.json", RESUME, is_json=True),
    Surface("a run's steps", "runs/whole/metrics.jsonl", ["verify", "runs/whole"]),
    Surface("command line", "", TRAIN),
]  # fmt: skip
ARGUMENTS = (
    "train.epochs=", "lora.r=-1", "--resume", "--nope", "train.learning_rate=abc", "data.train=", "=", "base=",
    "output.name=../x", "output.name=a/b", "train.device=cuda:0", "quant=nf9", "lora.layers=last:999", "--profile-steps",
    "train.seed=-5", "data.max_tokens=3", "\x00", "é", "data.train=[", "lora.target_modules={}", "train.threads=9999999999",
    "output.dir=/proc/x", "base=c.yaml", "data.test=base", "train.budget=1", "--finish-by", "data.valid_fraction=1.5",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Sound inputs of every kind, made by commands of lorimer itself."""
    runs.write_chat_base(folder / "base")
    runs.write_rows(folder / "train.jsonl", 9)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "rows.json").write_text(json.dumps(rows))
    pairs = [[turn["content"] for turn in row["messages"]] for row in rows]
    (folder / "rows.csv").write_text("prompt,completion\n" + "".join(f"{a},{b}\n" for a, b in pairs))
    (folder / "c.yaml").write_text(
        "base: base\ndata: {train: train.jsonl}\nlora: {r: 2, alpha: 4}\n"
        "train: {max_steps: 1, batch_size: 3, learning_rate: 5e-3, dtype: fp32, threads: 1}\n"
        "output: {dir: runs, name: one, save_every: 1}\n"
    )
    for command in (
        [*TRAIN, "output.name=whole", "train.max_steps=1"],
        ["export", "base", "--to", "gguf", "--out", "base.gguf"],
    ):
        code, said, _ = in_child(folder, command)
        assert code == 0, said
    shutil.copytree(folder / "runs/whole/adapter", folder / "adapter")


def in_child(folder: Path, arguments: list[str]) -> tuple[int, str, int]:
    """Exit code (-9 for one that took too long), what was said, and the most memory in bytes."""
    out = folder / "out.txt"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(folder)
            handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = app.run(arguments)
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.004)
    return os.waitstatus_to_exitcode(status), out.read_text("utf-8", "replace"), usage.ru_maxrss * 1024


def mutate(data: bytes, surface: Surface) -> bytes:
    """One damage of a kind that is chosen by the random numbers."""
    if surface.is_json and random.random() < 0.5:
        return _mutated_json(data)
    end = min(len(data), surface.head or len(data))
    at = random.randrange(max(1, end))
    span = random.choice((1, 2, 8, 40, 300))
    kind = random.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + span :]
    if kind == 2:
        return data[:at] + data[at : at + span] * random.choice((2, 50)) + data[at + span :]
    if kind == 3:
        return data[:at] + random.randbytes(span) + data[at:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        digits = [i for i in range(end) if data[i : i + 1].isdigit() and not data[i - 1 : i].isdigit()]
        if not digits:
            return b""
        start = random.choice(digits)
        stop = start
        while data[stop : stop + 1].isdigit():
            stop += 1
        return data[:start] + random.choice(ODD_NUMBERS) + data[stop:]
    return (
        data[:at]
        + random.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"{", b"]", b'"', b"\\"))
        + data[at:]
    )


def _mutated_json(data: bytes) -> bytes:
    """One value somewhere in it replaced, taken away, or under another key."""
    value = json.loads(data)
    places: list[tuple[object, object]] = []

    def walk(node: object) -> None:
        items = (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        )
        for key, inner in items:
            places.append((node, key))
            walk(inner)

    walk(value)
    if not places:
        return b"null"
    node, key = random.choice(places)
    kind = random.randrange(4)
    if kind == 0 and isinstance(node, dict):
        node["x" + str(key)] = node.pop(key)
    elif kind == 1:
        del node[key]  # type: ignore[attr-defined]
    else:
        node[key] = random.choice(ODD_VALUES)  # type: ignore[index]
    return json.dumps(value).encode("utf-8", "surrogatepass")


def problems(sound: Path, number: int, baseline: int, *, show: bool = False) -> tuple[str, list[str]]:
    """The surface of input `number`, and what went wrong with it."""
    random.seed(number)
    surface = SURFACES[number % len(SURFACES)]
    command = list(surface.command)
    with tempfile.TemporaryDirectory(prefix="lorimer-input-") as scratch:
        folder = Path(scratch) / "x"
        shutil.copytree(sound, folder, symlinks=True)
        size = 0
        if surface.file:
            file = folder / surface.file
            data = mutate(file.read_bytes(), surface)
            file.write_bytes(data)
            size = len(data)
        else:
            extra = random.sample(ARGUMENTS, random.randint(1, 3))
            command = [text for text in (*command, *extra) if "\x00" not in text or random.random() < 0.5]
        before = {path.name for path in (folder / "runs").iterdir()}
        code, said, memory = in_child(folder, command)
        after = {path.name for path in (folder / "runs").iterdir()} if (folder / "runs").is_dir() else set()
        if show:
            print(f"{surface.name}: exit code {code}\n{said}")
        found = []
        if code == -signal.SIGKILL:
            found.append(f"it took more than {SECONDS:.0f} s")
        elif code not in (0, 1, 2, 4):
            found.append(f"exit code {code}")
        if "Traceback" in said or "bug in lorimer" in said:
            found.append(said[-500:])
        if (
            code == 1
            and "diverge" not in said
            and "not finite" not in said
            and "is nan" not in said
            and surface.name != "a run's steps"
        ):
            found.append(f"exit code 1: {said[-300:]}")
        if code == 2 and "error:" not in said:
            found.append(f"no message: {said[-200:]}")
        if code == 2 and after - before and "--resume" not in command:
            found.append(f"left behind: {sorted(after - before)}")
        if memory > baseline + MEMORY + 2 * size:
            found.append(f"it took {memory / 1e6:,.0f} MB")
        return surface.name, found


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged inputs of every kind.")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--only", type=int, help="one input by its number")
    args = parser.parse_args()
    began, bad = time.perf_counter(), 0
    counts: Counter[str] = Counter()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory(prefix="lorimer-inputs-") as scratch:
        sound = Path(scratch) / "sound"
        sound.mkdir()
        prepare(sound)
        baseline = max(baseline, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        numbers = range(args.inputs) if args.only is None else [args.only]
        for number in numbers:
            name, found = problems(sound, number, baseline, show=args.only is not None)
            counts[name] += 1
            bad += bool(found)
            for text in found:
                print(f"input {number}, {name}: {text}", flush=True)
    print(f"{sum(counts.values())} inputs, {bad} went wrong, {time.perf_counter() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
