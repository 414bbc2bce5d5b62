"""Greedy decoding by lorimer and by transformers' generate: new tokens a second, one row and sixteen.

    python benchmarks/generation.py                    three rounds
    python benchmarks/generation.py --quick            does it all still run?

Same weights, same prompts as token ids, the same number of new tokens, and no token ends an answer on
either side. The clock runs from prompt ids to answer ids, so reading the prompt is in it. Each contestant
is a fresh process in each round, and the order changes from round to round.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

import process
import report
import workloads
from peers.generation_job import GenerationJob
from training import rotated

MODULES = {
    "lorimer": "generate_lorimer",
    "transformers": "generate_transformers",
    "transformers-static": "generate_transformers",
    "transformers-compiled": "generate_transformers",
}
# Compiling takes minutes for each batch size and was no faster; ask for it by name.
DEFAULT = ["lorimer", "transformers", "transformers-static"]
BATCHES = {"1": 4, "16": 16}  # batch size -> prompts answered


@dataclass(frozen=True, slots=True)
class Outcome:
    """One contestant in one round: tokens a second and answers for each batch size, or what went wrong."""

    contestant: str
    round: int
    peak_rss_bytes: int
    load_seconds: float
    speeds: dict[str, float]
    answers: dict[str, list[list[int]]]
    error: str | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Greedy decoding: lorimer against transformers.")
    parser.add_argument("--contestants", nargs="+", choices=MODULES, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=process.cores())
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--quick", action="store_true", help="one round of 8 new tokens")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct; the pulled one if not given")
    parser.add_argument("--cache", type=Path, default=process.CACHE)
    parser.add_argument("--timeout", type=int, default=1800, help="seconds until a contestant is stopped")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.new_tokens = 1, 8
    if min(args.rounds, args.new_tokens, args.threads) < 1:
        parser.error("--rounds, --new-tokens and --threads must be at least 1")
    return args


def read_prompts(folder: Path) -> list[list[int]]:
    """Questions of the home rows as SmolLM2's template puts them, up to the answer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    rows = workloads.home_rows(process.ROWS, tokenizer, max(BATCHES.values()))
    texts = [turns.format(system, row["messages"][0]["content"]) for row in rows]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def compete(name: str, number: int, job: GenerationJob, scratch: Path, timeout: int) -> Outcome:
    scratch.mkdir()
    path, log = scratch / "job.json", scratch / "log.txt"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = process.module_command(sys.executable, MODULES[name], str(path))
    env = process.environment(job.threads, scratch)
    code, peak, out = process.run_process(command, env, log, timeout)
    if code:
        return Outcome(name, number, peak, 0.0, {}, {}, process.reason(code, log))
    found = json.loads(out.splitlines()[-1])
    batches = found["batches"]
    speeds = {size: facts["tokens"] / facts["seconds"] for size, facts in batches.items()}
    answers = {size: facts["answers"] for size, facts in batches.items()}
    return Outcome(name, number, peak, found["load_seconds"], speeds, answers, None)


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Per contestant: medians, lorimer's ratio to it in the same round, and how far the answers agree."""
    done = {(o.contestant, o.round): o for o in outcomes if o.error is None}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(outcome.contestant for outcome in outcomes):
        mine = [outcome for (contestant, _), outcome in done.items() if contestant == name]
        if not mine:
            found[name] = {"error": next(o.error for o in outcomes if o.contestant == name)}
            continue
        pairs = [(done["lorimer", o.round], o) for o in mine if ("lorimer", o.round) in done]
        found[name] = {
            "peak_rss_bytes": median(outcome.peak_rss_bytes for outcome in mine),
            "load_seconds": median(outcome.load_seconds for outcome in mine),
            "tokens_per_second": {s: median(o.speeds[s] for o in mine) for s in BATCHES},
        }
        if name != "lorimer" and pairs:
            found[name]["ratio"] = {
                size: report.spread([ours.speeds[size] / theirs.speeds[size] for ours, theirs in pairs])
                for size in BATCHES
            }
            found[name]["same_tokens"] = {
                size: agreement(pairs[0][0].answers[size], pairs[0][1].answers[size]) for size in BATCHES
            }
    return found


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of answer tokens before the first that differs. In bf16 two tokens that are nearly as
    likely can change places, and the answers part there."""
    same = total = 0
    for one, other in zip(ours, theirs, strict=True):
        equal = [a == b for a, b in zip(one, other, strict=True)]
        same += equal.index(False) if False in equal else len(equal)
        total += len(equal)
    return same / total


def table(everything: dict[str, Any]) -> str:
    found, settings = everything["summary"], everything["settings"]
    lines = [
        "",
        f"greedy, {settings['new_tokens']} new tokens, {settings['dtype']}, {settings['threads']} threads, "
        f"median of {settings['rounds']} rounds; new tokens a second",
        f"{'':<23}"
        + "".join(f"{'batch ' + size:>10}" for size in BATCHES)
        + f"{'peak GB':>9}{'load s':>8}",
    ]
    for name, facts in found.items():
        if "error" in facts:
            lines.append(f"{name:<23}failed, {facts['error']}")
            continue
        speeds = "".join(f"{facts['tokens_per_second'][size]:>10.1f}" for size in BATCHES)
        memory = facts["peak_rss_bytes"] / report.GB
        lines.append(f"{name:<23}{speeds}{memory:>9.2f}{facts['load_seconds']:>8.1f}")
    lines += ["", "lorimer divided by the peer: median over the rounds (least to most)"]
    for name, facts in found.items():
        if "ratio" in facts:
            parts = [f"batch {size} {report.spread_text(facts['ratio'][size])}" for size in BATCHES]
            same = ", ".join(f"{100 * facts['same_tokens'][size]:.0f} %" for size in BATCHES)
            lines.append(f"{name:<23}" + "   ".join(parts) + f"   same tokens until they part: {same}")
    return "\n".join(lines)


def best_peer(found: dict[str, Any], size: str) -> str:
    """The fastest peer at this batch size; "" if there is none."""
    peers = [name for name, facts in found.items() if "ratio" in facts]
    return max(peers, key=lambda name: found[name]["tokens_per_second"][size], default="")


def main() -> None:
    args = parse()
    gguf = process.find_gguf(args.gguf)
    folder = process.find_folder(gguf, args.cache.resolve())
    machine = report.machine(args.threads)
    print(report.machine_text(machine), flush=True)
    prompts = read_prompts(folder)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lorimer-generation-") as scratch:
        for number in range(args.rounds):
            for name in rotated(args.contestants, number):
                job = GenerationJob(
                    variant=name,
                    base=str(gguf if name == "lorimer" else folder),
                    prompts=prompts,
                    batches=BATCHES,
                    new_tokens=args.new_tokens,
                    threads=args.threads,
                    dtype=args.dtype,
                    started=time.time(),
                )
                place = Path(scratch) / f"{number}-{name}"
                outcomes.append(compete(name, number, job, place, args.timeout))
                shown = outcomes[-1].error or ", ".join(
                    f"batch {size} {value:.1f} tokens/s" for size, value in outcomes[-1].speeds.items()
                )
                print(f"round {number + 1}  {name:<23} {shown}", flush=True)
    settings = {
        name: getattr(args, name) for name in ("rounds", "new_tokens", "threads", "dtype", "contestants")
    }
    everything = {
        "kind": "generation",
        "machine": machine,
        "settings": settings,
        "summary": summary(outcomes),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    print(table(everything))
    process.write_json(args.out, everything)


if __name__ == "__main__":
    main()
