# ruff: noqa: E501  (tables)
"""Damaged inputs of every kind: one message each, never a traceback, a hang or a half-made run.

python tests/crash/mutate.py                10,000 inputs, about an hour
python tests/crash/mutate.py --inputs 300   as many
python tests/crash/mutate.py --first 10000  others than those
python tests/crash/mutate.py --only 4711    one of them, and what it said
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import inputs
from inputs import CHECKPOINT, GENERATE, MEMORY, RESUME, TRAIN

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
    """A kind of input: the file that is mutated, and the commands that read it."""

    name: str
    file: str
    commands: tuple[list[str], ...]
    is_json: bool = False
    head: int | None = None  # mutate only these first bytes
    # Exit codes that are no refusal: `verify` ends with 1 where it finds damage.
    codes: frozenset[int] = frozenset({0, 2})


def to_train(key: str, file: str) -> tuple[list[str], ...]:
    return ([*TRAIN, f"{key}={file}"],)


CHECK, SHOWN = (
    ["data", "check", "train.jsonl", "--base", "base"],
    ["data", "show", "train.jsonl", "--base", "base"],
)
MERGE, PLAN, SHOW = ["merge", "adapter", "--out", "merged"], ["plan", "c.yaml"], ["show", "base"]
EXPORT = ["export", "adapter", "--to", "gguf-lora", "--out", "lora.gguf"]
OF_ADAPTER = (GENERATE, MERGE, EXPORT, ["show", "adapter"])
VERIFY = ["verify", "runs/whole"]
OF_RUN, VERDICTS = (RESUME, VERIFY), frozenset({0, 1, 2})
SURFACES = [
    Surface("rows", "train.jsonl", (TRAIN, CHECK, SHOWN, PLAN)),
    Surface("rows as json", "rows.json", to_train("data.train", "rows.json"), is_json=True),
    Surface("rows as csv", "rows.csv", to_train("data.train", "rows.csv")),
    Surface("rows as parquet", "rows.parquet", to_train("data.train", "rows.parquet")),
    Surface("config", "c.yaml", (TRAIN, PLAN)),
    Surface("weights", "base/model.safetensors", (TRAIN, SHOW), head=4096),
    Surface("config.json", "base/config.json", (TRAIN, SHOW, PLAN), is_json=True),
    Surface("tokenizer.json", "base/tokenizer.json", (TRAIN, CHECK), is_json=True),
    Surface("tokenizer_config.json", "base/tokenizer_config.json", (TRAIN,), is_json=True),
    Surface("template", "base/chat_template.jinja", (TRAIN, SHOWN)),
    Surface("gguf", "base.gguf", (*to_train("base", "base.gguf"), ["show", "base.gguf"]), head=12_000),
    Surface("adapter_config.json", "adapter/adapter_config.json", OF_ADAPTER, is_json=True),
    Surface("adapter weights", "adapter/adapter_model.safetensors", OF_ADAPTER, head=4096),
    Surface("lorimer.json", "adapter/lorimer.json", OF_ADAPTER, is_json=True),
    Surface("adapter's template", "adapter/chat_template.jinja", (GENERATE, MERGE)),
    Surface("manifest", f"{CHECKPOINT}/manifest.json", OF_RUN, is_json=True, codes=VERDICTS),
    Surface("state", f"{CHECKPOINT}/state.json", OF_RUN, is_json=True, codes=VERDICTS),
    Surface("a run's record", "runs/whole/run.json", OF_RUN, is_json=True, codes=VERDICTS),
    Surface("a run's steps", "runs/whole/metrics.jsonl", OF_RUN, codes=VERDICTS),
    Surface("command line", "", (TRAIN, PLAN), codes=frozenset({0, 2, 4})),
]
ARGUMENTS = (
    "train.epochs=", "lora.r=-1", "--resume", "--nope", "train.learning_rate=abc", "data.train=", "=", "base=",
    "output.name=../x", "output.name=a/b", "train.device=cuda:0", "quant=nf9", "lora.layers=last:999", "--profile-steps",
    "train.seed=-5", "data.max_tokens=3", "\x00", "é", "data.train=[", "lora.target_modules={}", "train.threads=9999999999",
    "output.dir=/proc/x", "base=c.yaml", "data.test=base", "train.budget=1", "--finish-by", "data.valid_fraction=1.5",
)  # fmt: skip


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
    command = list(random.choice(surface.commands))
    with inputs.copy_of(sound) as folder:
        size = 0
        if surface.file:
            file = folder / surface.file
            data = mutate(file.read_bytes(), surface)
            file.write_bytes(data)
            size = len(data)
            if surface.name == "state" and random.random() < 0.7:
                inputs.agree(file)  # else every mutation ends at the manifest
        else:
            extra = random.sample(ARGUMENTS, random.randint(1, 3))
            command = [text for text in (*command, *extra) if "\x00" not in text or random.random() < 0.5]
        outcome = inputs.run(folder, command)
    if show:
        print(f"{surface.name}: {' '.join(command)}: exit code {outcome.code}\n{outcome.said}")
    found = inputs.faults(outcome, command, baseline + MEMORY + 2 * size)
    # A weight may have become so large that training cannot go on, which is no refusal.
    diverged = outcome.code == 1 and any(
        word in outcome.said for word in ("diverge", "not finite", "is nan")
    )
    if outcome.code not in surface.codes and not diverged and not found:
        found.append(f"exit code {outcome.code}: {outcome.said[-300:]}")
    return surface.name, found


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged inputs of every kind.")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", type=int, help="one input by its number")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    began, bad = time.perf_counter(), 0
    counts: Counter[str] = Counter()
    with inputs.sound_inputs() as (sound, baseline):
        if args.only is not None:
            print(problems(sound, args.only, baseline, show=True)[1])
            return 0

        def one(place: int) -> tuple[int, str, list[str]]:
            return args.first + place, *problems(sound, args.first + place, baseline)

        for number, name, found in inputs.shared(one, args.inputs, args.workers):
            counts[name] += 1
            bad += bool(found)
            for text in found:
                print(f"input {number}, {name}: {text}", flush=True)
            if sum(counts.values()) % 500 == 0:
                print(f"{sum(counts.values())} inputs, {bad} went wrong", flush=True)
    print(f"{sum(counts.values())} inputs, {bad} went wrong, {time.perf_counter() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
