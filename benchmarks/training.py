"""lorimer's LoRA training against TRL and PEFT: same rows, same order, same steps, one machine.

    python benchmarks/training.py                         everything, three rounds
    python benchmarks/training.py --quick                 does it all still run?
    python benchmarks/training.py --contestants lorimer peft-loop --rounds 5 --out result.json

Each contestant is a fresh process in each round, and the order changes from round to round. What is
compared, and why that is fair, is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
from peers import lorimer_cli
from peers.job import Job, Result

HERE = Path(__file__).resolve().parent
ROWS = HERE.parent / "src" / "lorimer" / "recipes" / "home" / "train.jsonl"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorimer-benchmarks"
PEERS = {
    "trl-default": "peers.trl_sft",
    "trl-tuned": "peers.trl_sft",
    "trl-packed": "peers.trl_sft",
    "peft-loop": "peers.peft_loop",
}
CONTESTANTS = ["lorimer", *PEERS]
PULL = "from lorimer.bases.store import resolve_base; print(resolve_base('smollm2-135m'))"


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
    parser = argparse.ArgumentParser(description="LoRA training: lorimer against TRL and PEFT.")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them whose time does not count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--quick", action="store_true", help="one round of 2 timed steps after 1")
    parser.add_argument("--rows", type=Path, default=ROWS, help="chat rows, JSON lines with `messages`")
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2-135M-Instruct as GGUF; the pulled one if not given"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="keeps the peers' Hugging Face folder")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds until a contestant is stopped")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.warmup = 1, 2, 1
    if min(args.rounds, args.steps, args.warmup, args.threads) < 1:
        parser.error("--rounds, --steps, --warmup and --threads must be at least 1")
    return args


def find_gguf(args: argparse.Namespace) -> Path:
    if args.gguf:
        return args.gguf.resolve()
    found = subprocess.run([sys.executable, "-c", PULL], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit("the base is not here: run `lorimer pull smollm2-135m`, or give --gguf FILE")
    return Path(found.stdout.strip().splitlines()[-1])


def find_folder(gguf: Path, cache: Path) -> Path:
    """The peers' base, made from the GGUF file the first time (half a minute)."""
    folder = cache / f"{gguf.stem}-{gguf.stat().st_size}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"making the peers' base in {folder}", flush=True)
        subprocess.run(
            [sys.executable, "-m", "peers.base", str(gguf), str(folder)],
            check=True,
            env=environment(1, cache),
            stderr=subprocess.DEVNULL,
        )
    return folder


def write_rows(source: Path, count: int, target: Path) -> None:
    """The first `count` rows of a fixed permutation: every contestant reads them in this order."""
    lines = source.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise SystemExit(f"{source} has {len(lines)} rows; {count} are needed")
    random.Random(0).shuffle(lines)
    target.write_text("".join(line + "\n" for line in lines[:count]), encoding="utf-8")


def environment(threads: int, scratch: Path) -> dict[str, str]:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
    }


def run_process(command: list[str], env: dict[str, str], log: Path, timeout: int) -> tuple[int, int, str]:
    """Exit code, peak resident memory in bytes as the kernel counted it, and what went to stdout.

    The peak is that of the whole process from its start, the same number as VmHWM at its end.
    """
    with log.with_suffix(".out").open("w+b") as out, log.open("wb") as err:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=err)
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return process.returncode, usage.ru_maxrss * unit, out.read().decode("utf-8", "replace")


def compete(name: str, number: int, job: Job, gguf: Path, timeout: int) -> Outcome:
    scratch = Path(job.scratch)
    scratch.mkdir(parents=True)
    path, log = scratch / "job.json", scratch / "log.txt"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    is_peer = name in PEERS
    command = (
        [sys.executable, "-m", PEERS[name], str(path)] if is_peer else lorimer_cli.command(job, str(gguf))
    )
    started = time.perf_counter()
    code, peak, out = run_process(command, environment(job.threads, scratch), log, timeout)
    wall = time.perf_counter() - started
    result, error = None, None
    if code:
        error = last_line(log) or last_line(log.with_suffix(".out")) or "no message"
        error = f"stopped by signal {-code}: {error}" if code < 0 else f"exit {code}: {error}"
    else:
        try:
            result = (
                Result(**json.loads(out.splitlines()[-1])) if is_peer else lorimer_cli.result(job, wall)
            )
        except (OSError, ValueError, LookupError, TypeError) as wrong:
            error = f"done, but its result cannot be read: {wrong!r}"
    return Outcome(name, number, peak, wall, result, error)


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def main() -> None:
    args = parse()
    gguf = find_gguf(args)
    folder = find_folder(gguf, args.cache.resolve())
    machine = report.machine(args.threads)
    print(report.machine_text(machine), flush=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="lorimer-benchmark-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        total = args.steps + args.warmup
        write_rows(args.rows, total * 16, rows)
        for number in range(args.rounds):
            shift = number % len(args.contestants)
            for name in args.contestants[shift:] + args.contestants[:shift]:
                job = Job(
                    variant=name,
                    folder=str(folder),
                    rows=str(rows),
                    steps=total,
                    warmup=args.warmup,
                    batch=16,
                    threads=args.threads,
                    dtype=args.dtype,
                    r=16,
                    alpha=32,
                    learning_rate=2e-4,
                    max_tokens=1024,
                    scratch=str(Path(scratch) / f"{number}-{name}"),
                    started=time.time(),
                )
                outcomes.append(compete(name, number, job, gguf, args.timeout))
                print(report.progress(outcomes[-1], args.warmup), flush=True)
    settings: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("rounds", "steps", "warmup", "threads", "dtype", "contestants")
    }
    summary = report.summary(outcomes, args.warmup)
    print(report.table(summary, settings))
    if args.out:
        everything = {
            "machine": machine,
            "settings": settings,
            "summary": summary,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        args.out.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
