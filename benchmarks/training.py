"""lorimer's LoRA training against its peers: same rows, same order, same steps, one machine.

    python benchmarks/training.py                              chat rows, everything, three rounds
    python benchmarks/training.py --workload packs             full packs of 2,048 tokens
    python benchmarks/training.py --dtype fp32 --isa avx2      as on a CPU without bf16 and AVX-512
    python benchmarks/training.py --quick                      does it all still run?
    python benchmarks/training.py --contestants lorimer peft-loop --rounds 5 --out result.json

Each contestant is a fresh process in each round, and the order changes from round to round. What is
compared, and why that is fair, is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import process
import report
import workloads
from peers import lorimer_cli
from peers.job import Job, Result
from workloads import WORKLOADS, Workload

PEERS = {
    "trl-default": "trl_sft",
    "trl-tuned": "trl_sft",
    "trl-packed": "trl_sft",
    "trl-nf4": "trl_sft",
    "peft-loop": "peft_loop",
    "peft-compiled": "peft_loop",
    "torchtune": "torchtune_recipe",
    "llama-factory": "llama_factory",
}
OURS = ("lorimer", "lorimer-nf4")
CONTESTANTS = [*OURS, *PEERS]
IN_FP32 = ("lorimer", "lorimer-nf4", "trl-default", "trl-tuned", "trl-nf4")
# Peers that want other versions than those they are compared with have an environment of their own.
PYTHONS = {
    "torchtune": process.ROOT / ".venv-bench-torchtune" / "bin" / "python",
    "llama-factory": process.ROOT / ".venv-bench-llamafactory" / "bin" / "python",
}
PACKAGES = {
    "torchtune": ["torchtune", "torchao", "torch"],
    "llama-factory": ["llamafactory", "torch", "transformers", "peft", "trl"],
}
R = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """One contestant in one round: a result, or the reason why there is none."""

    contestant: str
    round: int
    peak_rss_bytes: int
    wall_seconds: float
    result: Result | None
    error: str | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA training: lorimer against its peers.")
    parser.add_argument("--workload", choices=WORKLOADS, default="home")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="the workload's if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, help="steps before them whose time does not count")
    parser.add_argument("--threads", type=int, default=process.cores())
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--isa", help="lorimer's process gets this as LORIMER_ISA, and its torch no more")
    parser.add_argument("--peers-isa", choices=process.TORCH_LIMITS, help="the peers' torch gets no more")
    parser.add_argument("--quick", action="store_true", help="one round of one small step after another")
    parser.add_argument("--rows", type=Path, default=process.ROWS, help="chat rows, JSON lines")
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2-135M-Instruct as GGUF; the pulled one if not given"
    )
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="PEER=PATH",
        help="the interpreter of a peer's own environment",
    )
    parser.add_argument(
        "--cache", type=Path, default=process.CACHE, help="keeps the peers' Hugging Face folder"
    )
    parser.add_argument("--timeout", type=int, default=1800, help="seconds until a contestant is stopped")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    if args.quick:
        args.rounds, args.steps, args.warmup = 1, 1, 1
        batch = min(workload.batch, 8)
        micro_rows, packs = min(workload.micro_rows, batch), max(1, workload.packs // 2)
        workload = replace(workload, batch=batch, micro_rows=micro_rows, packs=packs)
    args.plan = workload
    args.steps = workload.steps if args.steps is None else args.steps
    args.warmup = workload.warmup if args.warmup is None else args.warmup
    if min(args.rounds, args.steps, args.warmup, args.threads) < 1:
        parser.error("--rounds, --steps, --warmup and --threads must be at least 1")
    given = dict(pair.split("=", 1) for pair in args.python if "=" in pair)
    if len(given) < len(args.python) or not given.keys() <= PYTHONS.keys():
        parser.error(f"--python takes PEER=PATH for {', '.join(PYTHONS)}")
    # Not resolved: the interpreter of an environment is a link, and its folder is what counts.
    args.pythons = {name: os.path.abspath(given.get(name, path)) for name, path in PYTHONS.items()}
    args.contestants, args.left_out = choose(args)
    return args


def choose(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The contestants that can run, and for each other one the reason why it cannot."""
    wanted = args.contestants or [
        name for name in args.plan.contestants if args.dtype == "bf16" or name in IN_FP32
    ]
    missing = {
        name: f"no environment at {args.pythons[name]}"
        for name in wanted
        if name in args.pythons and not Path(args.pythons[name]).is_file()
    }
    return [name for name in wanted if name not in missing], missing


def compete(name: str, number: int, job: Job, gguf: Path, args: argparse.Namespace) -> Outcome:
    scratch = Path(job.scratch)
    scratch.mkdir(parents=True)
    path, log = scratch / "job.json", scratch / "log.txt"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    if name in OURS:
        command = lorimer_cli.command(job, str(gguf))
    else:
        command = process.module_command(args.pythons.get(name, sys.executable), PEERS[name], str(path))
    isa = args.isa if name in OURS else args.peers_isa
    env = process.environment(job.threads, scratch, isa=isa, lorimer=name in OURS)
    if name in PYTHONS:
        env["PYTHONPATH"] = str(process.ROOT)
    started = time.perf_counter()
    code, peak, out = process.run_process(command, env, log, args.timeout)
    wall = time.perf_counter() - started
    result, error = None, None
    if code:
        error = process.reason(code, log)
    else:
        try:
            result = lorimer_cli.result(job, wall) if name in OURS else _printed(out)
        except (OSError, ValueError, LookupError, TypeError) as wrong:
            error = f"done, but its result cannot be read: {wrong!r}"
    return Outcome(name, number, peak, wall, result, error)


def _printed(out: str) -> Result:
    return Result(**json.loads(out.splitlines()[-1]))


def make_job(name: str, args: argparse.Namespace, folder: Path, rows: Path, scratch: Path) -> Job:
    workload: Workload = args.plan
    return Job(
        variant=name,
        folder=str(folder),
        rows=str(rows),
        chat=workload.chat,
        steps=args.steps + args.warmup,
        warmup=args.warmup,
        batch=workload.batch,
        micro_rows=workload.micro_rows,
        pack_tokens=workload.pack_tokens,
        packs=workload.packs,
        micro_batch_tokens=workload.micro_batch_tokens,
        threads=args.threads,
        dtype=args.dtype,
        r=R,
        alpha=2 * R,
        learning_rate=2e-4,
        max_tokens=workload.max_tokens,
        scratch=str(scratch),
        started=time.time(),
    )


def run_rounds(args: argparse.Namespace, gguf: Path, folder: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []
    workload: Workload = args.plan
    with tempfile.TemporaryDirectory(prefix="lorimer-benchmark-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        made = workload.rows(args.rows, tokenizer, (args.steps + args.warmup) * workload.batch)
        rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        for number in range(args.rounds):
            for name in rotated(args.contestants, number):
                job = make_job(name, args, folder, rows, Path(scratch) / f"{number}-{name}")
                outcomes.append(compete(name, number, job, gguf, args))
                print(report.progress(outcomes[-1], args.warmup), flush=True)
    return outcomes


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Each round begins with another contestant."""
    shift = number % len(names)
    return [*names[shift:], *names[:shift]]


def add_work(
    summary: dict[str, Any], folder: Path, args: argparse.Namespace, peak: dict[str, float]
) -> None:
    """Where every row is a full pack: the useful GFLOP/s of each contestant, and its share of the peak."""
    workload: Workload = args.plan
    if workload.chat or args.dtype not in peak:
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = workload.pack_tokens
    flops = workloads.useful_flops(config, tokens=tokens, trained=tokens - 1, r=R) / tokens
    for facts in summary.values():
        if "tokens_per_second" in facts:
            facts["gflops"] = facts["tokens_per_second"] * flops / 1e9
            facts["share_of_peak"] = facts["gflops"] / peak[args.dtype]


def main() -> None:
    args = parse()
    gguf = process.find_gguf(args.gguf)
    folder = process.find_folder(gguf, args.cache.resolve())
    machine = report.machine(args.threads, isa=args.isa)
    for name in args.contestants:
        if name in PACKAGES:
            machine["versions"][f"({name})"] = process.versions(args.pythons[name], PACKAGES[name])
    print(report.machine_text(machine), flush=True)
    outcomes = run_rounds(args, gguf, folder)
    names = ("workload", "rounds", "steps", "warmup", "threads", "dtype", "isa", "peers_isa", "contestants")
    settings = {name: getattr(args, name) for name in names} | {"left_out": args.left_out}
    settings |= {"about": args.plan.about, "batch": args.plan.batch}
    summary = report.summary(outcomes, args.warmup, args.plan.ours)
    add_work(summary, folder, args, machine["peak"])
    everything = {
        "kind": "training",
        "machine": machine,
        "settings": settings,
        "summary": summary,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    print(report.training_table(everything))
    process.write_json(args.out, everything)


if __name__ == "__main__":
    main()
