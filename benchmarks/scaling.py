"""How the cost of training grows: seconds a token and peak memory, one thing changed at a time.

    python benchmarks/scaling.py                          every series
    python benchmarks/scaling.py --series threads length  some of them
    python benchmarks/scaling.py --quick                  does it all still run?

Each point is a training run of its own through the command line, on plain-text rows of an exact number
of tokens, all of them trained; the speed is that of its steps after the first. A point that takes longer
than the limit is stopped and said to be so.
"""

from __future__ import annotations

import argparse
import json
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
from peers.job import Job


@dataclass(frozen=True, slots=True)
class Point:
    """One run: `rows` rows of `length` tokens an optimizer step. `width` 0 is the base itself."""

    threads: int
    rows: int = 8
    length: int = 256
    r: int = 16
    width: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length


STEP_TOKENS = 8192  # of every point of the length series, so that one row of the longest is one step
WIDTH_LAYERS = 8  # of the models with random weights


def series(threads: int, *, quick: bool) -> dict[str, dict[str, Point]]:
    """Each series: what is changed -> the points. Quick ones are the first two of each, of one row."""
    usual = Point(threads=threads, rows=1) if quick else Point(threads=threads)
    counts = sorted({1, threads} if quick else {1, 2, process.cores()})
    found = {
        "threads": {f"{n} threads": replace(usual, threads=n) for n in counts},
        "tokens": {
            f"{rows * usual.length} tokens a step": replace(usual, rows=rows)
            for rows in (1, 2, 4, 8, 16, 32, 64)
        },
        "length": {
            f"rows of {n}": replace(usual, length=n, rows=1 if quick else STEP_TOKENS // n)
            for n in (128, 256, 512, 1024, 2048, 4096, 8192)
        },
        "rank": {f"r {r}": replace(usual, r=r) for r in (4, 8, 16, 32, 64, 128)},
        "width": {f"width {w}": replace(usual, width=w) for w in (192, 384, 576, 1152, 1728)},
    }
    return {name: dict(list(points.items())[: 2 if quick else None]) for name, points in found.items()}


def measure(
    point: Point, base: Path, folder: Path, scratch: Path, args: argparse.Namespace
) -> dict[str, Any]:
    scratch.mkdir(parents=True)
    rows, log = scratch / "rows.jsonl", scratch / "log.txt"
    steps = 1 + args.steps
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # A few rows, again and again: rows of 8,192 tokens take long to make.
    made = workloads.text_rows(point.length)(process.ROWS, tokenizer, min(point.rows * steps, 8))
    lines = [json.dumps(made[number % len(made)]) + "\n" for number in range(point.rows * steps)]
    rows.write_text("".join(lines), encoding="utf-8")
    job = Job(
        variant="lorimer",
        folder=str(folder),
        rows=str(rows),
        chat=False,
        steps=steps,
        warmup=1,
        batch=point.rows,
        micro_rows=1,
        pack_tokens=point.length,
        packs=point.rows,
        micro_batch_tokens=None,
        threads=point.threads,
        dtype=args.dtype,
        r=point.r,
        alpha=2 * point.r,
        learning_rate=2e-4,
        max_tokens=point.length,
        scratch=str(scratch),
        started=time.time(),
    )
    command = lorimer_cli.command(job, str(base))
    if point.width:  # control tokens of random weights were never trained, and preflight says so
        command += ["--skip-preflight", "embeddings"]
    env = process.environment(point.threads, scratch)
    started = time.perf_counter()
    code, peak, _ = process.run_process(command, env, log, args.limit)
    wall = time.perf_counter() - started
    if code:
        late = wall >= args.limit
        return {"error": f"more than {args.limit} s" if late else process.reason(code, log)}
    result = lorimer_cli.result(job, wall)
    seconds = result.timed_seconds / sum(result.tokens[1:])
    return {"seconds_per_token": seconds, "peak_rss_bytes": peak, "tokens": sum(result.tokens[1:])}


def base_of(point: Point, gguf: Path, folder: Path, scratch: Path, cache: Path) -> Path:
    """The base itself, or one with random weights of another width, made once."""
    if not point.width:
        return gguf
    made = scratch / f"width-{point.width}"
    if not made.is_dir():
        process.make_base(str(folder), str(made), str(point.width), str(WIDTH_LAYERS), cache=cache)
    return made


def table(everything: dict[str, Any]) -> str:
    settings = everything["settings"]
    usual = Point(settings["threads"])
    lines = [
        "",
        f"one thing changed at a time, from rows of {usual.length} tokens, {usual.tokens} tokens a step, "
        f"r {usual.r}, {usual.threads} threads, {settings['dtype']}",
        f"the length series has {STEP_TOKENS} tokens a step; the widths are of random models of "
        f"{WIDTH_LAYERS} layers",
    ]
    for name, points in everything["series"].items():
        lines += [
            "",
            f"{name:<22}{'ms/token':>10}{'tokens/s':>10}{'peak GB':>9}{'cost against the first':>24}",
        ]
        measured = [facts for facts in points.values() if "error" not in facts]
        for label, facts in points.items():
            lines.append(f"{label:<22}" + _cells(facts, measured))
    return "\n".join(lines)


def _cells(facts: dict[str, Any], measured: Sequence[dict[str, Any]]) -> str:
    if "error" in facts:
        return f"  {facts['error']}"
    seconds, first = facts["seconds_per_token"], measured[0]["seconds_per_token"]
    memory = facts["peak_rss_bytes"] / report.GB
    return f"{1e3 * seconds:>10.3f}{1 / seconds:>10.0f}{memory:>9.2f}{seconds / first:>24.2f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How lorimer's cost grows.")
    names = list(series(1, quick=False))
    parser.add_argument("--series", nargs="+", choices=names, default=names)
    parser.add_argument("--threads", type=int, default=process.cores())
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each point")
    parser.add_argument(
        "--limit", type=int, default=180, help="seconds that a point may take, loading included"
    )
    parser.add_argument("--quick", action="store_true", help="two small points of each series")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct; the pulled one if not given")
    parser.add_argument("--cache", type=Path, default=process.CACHE)
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if min(args.threads, args.steps, args.limit) < 1:
        parser.error("--threads, --steps and --limit must be at least 1")
    if args.quick:
        args.steps = 1
    return args


def main() -> None:
    args = parse()
    gguf = process.find_gguf(args.gguf)
    folder = process.find_folder(gguf, args.cache.resolve())
    machine = report.machine(args.threads)
    print(report.machine_text(machine), flush=True)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="lorimer-scaling-") as scratch:
        for name, points in series(args.threads, quick=args.quick).items():
            if name not in args.series:
                continue
            found[name] = {}
            for number, (label, point) in enumerate(points.items()):
                base = base_of(point, gguf, folder, Path(scratch), args.cache)
                place = Path(scratch) / f"{name}-{number}"
                facts = measure(point, base, folder, place, args)
                found[name][label] = asdict(point) | facts
                shown = facts.get("error") or f"{1e3 * facts['seconds_per_token']:.3f} ms/token"
                print(f"{name}: {label}: {shown}", flush=True)
    settings = {name: getattr(args, name) for name in ("threads", "dtype", "steps", "limit", "series")}
    everything = {"kind": "scaling", "machine": machine, "settings": settings, "series": found}
    print(table(everything))
    process.write_json(args.out, everything)


if __name__ == "__main__":
    main()
