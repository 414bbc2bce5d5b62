"""What was measured -> medians, ratios, and the tables that are printed."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import peak as peaks
import process

if TYPE_CHECKING:
    from peers.job import Result
    from training import Outcome

FLAGS = ["avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"]
PACKAGES = ["lorimer", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers"]
OTHER_ROWS = {"trl-packed"}  # its first step holds other rows, so its losses are not comparable
TOLERANCE = 0.02  # of the first step's loss
GB = 1e9


def machine(threads: int, *, isa: str | None = None) -> dict[str, Any]:
    """The machine, its peak measured now, and lorimer's kernels as they run with `isa`."""
    cpu = _proc("/proc/cpuinfo")
    flags = cpu.get("flags", "").split()
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "from source" if name == "lorimer" else "not installed"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": process.cores(),
        "threads": threads,
        "memory_bytes": int(_proc("/proc/meminfo").get("MemTotal", "0 kB").split()[0]) * 1024,
        "system": platform.platform(),
        "load_average_before": os.getloadavg()[0],
        "kernels": process.kernels(process.environment(threads, process.CACHE, isa=isa, lorimer=True)),
        "commit": _commit(),
        "versions": versions,
        "peak": process.peak(threads),
    }


def _commit() -> str:
    """The commit that is measured, with a `+` if files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(process.ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _proc(path: str) -> dict[str, str]:
    """The first value of each key of a /proc file; nothing where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = [line.split(":", 1) for line in reversed(lines) if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def machine_text(machine: Mapping[str, Any]) -> str:
    load = machine["load_average_before"]
    busy = "  (not quiet: trust ratios only)" if load > 0.5 else ""
    versions = [
        f"{name} {version}" if isinstance(version, str) else f"{name} {_pairs(version)}"
        for name, version in machine["versions"].items()
    ]
    return "\n".join(
        [
            f"date     {machine['date']}, lorimer at {machine['commit'] or 'an unknown commit'}",
            f"cpu      {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used",
            f"flags    {' '.join(machine['flags']) or 'none of those that matter'}",
            peaks.text(machine["peak"]),
            f"kernels  {machine['kernels']}",
            f"memory   {machine['memory_bytes'] / GB:.1f} GB",
            f"load     {load:.2f} before the first round{busy}",
            "versions " + ", ".join(versions),
            "",
        ]
    )


def _pairs(versions: Mapping[str, str]) -> str:
    return " ".join(f"{name} {version}" for name, version in versions.items())


def speed(result: Result, warmup: int) -> tuple[float, float]:
    """Rows and real tokens a second over the timed steps."""
    seconds = result.timed_seconds
    return sum(result.rows[warmup:]) / seconds, sum(result.tokens[warmup:]) / seconds


def progress(outcome: Outcome, warmup: int) -> str:
    head = f"round {outcome.round + 1}  {outcome.contestant:<14}"
    if outcome.result is None:
        return f"{head} failed, {outcome.error}"
    rows, tokens = speed(outcome.result, warmup)
    return f"{head} {rows:6.2f} rows/s {tokens:7.1f} tokens/s {outcome.peak_rss_bytes / GB:6.2f} GB"


def summary(outcomes: Sequence[Outcome], warmup: int, ours: str = "lorimer") -> dict[str, Any]:
    """Per contestant: medians over its rounds, and the ratios of `ours` to it, round by round."""
    names = list(dict.fromkeys(outcome.contestant for outcome in outcomes))
    done = {(o.contestant, o.round): o for o in outcomes if o.result is not None}
    return {name: _summary_of(name, outcomes, done, warmup, ours) for name in names}


def _summary_of(
    name: str, outcomes: Sequence[Outcome], done: dict[tuple[str, int], Outcome], warmup: int, ours: str
) -> dict[str, Any]:
    errors = [o.error for o in outcomes if o.contestant == name and o.error]
    mine = [o for (contestant, _), o in done.items() if contestant == name]
    if not mine:
        return {"error": errors[-1]}
    speeds = [speed(o.result, warmup) for o in mine if o.result]
    first = mine[0].result
    assert first is not None
    facts: dict[str, Any] = {
        "rows_per_second": median(rows for rows, _ in speeds),
        "tokens_per_second": median(tokens for _, tokens in speeds),
        "peak_rss_bytes": median(o.peak_rss_bytes for o in mine),
        "load_seconds": median(o.result.load_seconds for o in mine if o.result),
        "first_loss": first.losses[0],
        "last_loss": first.losses[-1],
        "first_step_tokens": first.tokens[0],
        "first_step_trained_tokens": first.trained_tokens[0],
    }
    if errors:
        facts["error"] = errors[-1]
    if name != ours:
        pairs = [(done[ours, o.round], o) for o in mine if (ours, o.round) in done]
        facts |= _ratios(pairs, warmup)
    return facts


def _ratios(pairs: Sequence[tuple[Outcome, Outcome]], warmup: int) -> dict[str, Any]:
    """lorimer divided by the peer in the same round: [median, least, most]."""
    if not pairs:
        return {}
    rows, tokens, memory = [], [], []
    for ours, theirs in pairs:
        assert ours.result is not None
        assert theirs.result is not None
        ours_rows, ours_tokens = speed(ours.result, warmup)
        their_rows, their_tokens = speed(theirs.result, warmup)
        rows.append(ours_rows / their_rows)
        tokens.append(ours_tokens / their_tokens)
        memory.append(ours.peak_rss_bytes / theirs.peak_rss_bytes)
    series = {"rows_ratio": rows, "tokens_ratio": tokens, "memory_ratio": memory}
    return {key: spread(values) for key, values in series.items()}


def spread(values: Sequence[float]) -> list[float]:
    """[median, least, most]."""
    return [median(values), min(values), max(values)]


def spread_text(values: Sequence[float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def training_table(everything: Mapping[str, Any]) -> str:
    summary, settings = everything["summary"], everything["settings"]
    lines = [
        "",
        f"{settings['workload']}: {settings['about']}",
        f"{settings['steps']} timed steps of {settings['batch']} rows after {settings['warmup']}, "
        f"{settings['dtype']}, {settings['threads']} threads, median of {settings['rounds']} rounds"
        + _isa_text(settings),
        f"{'':<15}{'rows/s':>8}{'tokens/s':>10}{'peak GB':>9}{'load s':>8}{'first loss':>12}"
        f"{'last loss':>11}{'tokens':>8}{'trained':>9}   (tokens: first step)",
    ]
    reference = _reference_loss(summary)
    for name, facts in summary.items():
        if "rows_per_second" not in facts:
            lines.append(f"{name:<15}failed, {facts['error']}")
            continue
        lines.append(
            f"{name:<15}{facts['rows_per_second']:>8.2f}{facts['tokens_per_second']:>10.1f}"
            f"{facts['peak_rss_bytes'] / GB:>9.2f}{facts['load_seconds']:>8.1f}{facts['first_loss']:>12.4f}"
            f"{facts['last_loss']:>11.4f}{facts['first_step_tokens']:>8}{facts['first_step_trained_tokens']:>9}"
            + _remark(name, facts, reference)
        )
    lines += [f"{name:<15}left out: {why}" for name, why in settings["left_out"].items()]
    return "\n".join([*lines, *_work_lines(summary), *_ratio_lines(summary)])


def _isa_text(settings: Mapping[str, Any]) -> str:
    if not settings["isa"] and not settings["peers_isa"]:
        return ""
    return (
        f"; lorimer on {settings['isa'] or 'all'}, peers on {settings['peers_isa'] or 'all'} instructions"
    )


def _reference_loss(summary: Mapping[str, Any]) -> float | None:
    losses = [f["first_loss"] for n, f in summary.items() if "first_loss" in f and n not in OTHER_ROWS]
    return median(losses) if losses else None


def _remark(name: str, facts: Mapping[str, Any], reference: float | None) -> str:
    remark = f"   a round failed, {facts['error']}" if "error" in facts else ""
    if name in OTHER_ROWS:
        return remark + "   rows in another order: losses not comparable"
    if reference and abs(facts["first_loss"] / reference - 1) > TOLERANCE:
        return remark + f"   FIRST LOSS OFF BY {100 * (facts['first_loss'] / reference - 1):+.1f} %"
    return remark


def _work_lines(summary: Mapping[str, Any]) -> list[str]:
    found = {name: facts for name, facts in summary.items() if "gflops" in facts}
    if not found:
        return []
    lines = ["", "useful GFLOP/s (what the tokens need at least), and their share of the peak"]
    return lines + [
        f"{name:<15}{facts['gflops']:>8.0f}{100 * facts['share_of_peak']:>8.1f} %"
        for name, facts in found.items()
    ]


def _ratio_lines(summary: Mapping[str, Any]) -> list[str]:
    peers = {name: facts for name, facts in summary.items() if "rows_ratio" in facts}
    if not peers:
        return []
    ours = next(name for name in summary if name not in peers)
    lines = ["", f"{ours} divided by the other: median over the rounds (least to most)"]
    labels = [("rows/s", "rows_ratio"), ("tokens/s", "tokens_ratio"), ("memory", "memory_ratio")]
    for name, facts in peers.items():
        parts = [f"{label} {spread_text(facts[key])}" for label, key in labels]
        lines.append(f"{name:<15}" + "   ".join(parts))
    fastest = best_peer(summary)
    if fastest.startswith("lorimer"):
        return lines
    rows, memory = peers[fastest]["rows_ratio"][0], peers[fastest]["memory_ratio"][0]
    lines.append(
        f"\nfastest peer: {fastest}; {ours} trains {rows:.2f} times its rows in {memory:.2f} of its memory"
    )
    return lines


def best_peer(summary: Mapping[str, Any], family: str = "") -> str:
    """The peer with the most rows a second among those whose name begins so; "" if there is none."""
    peers = [name for name, facts in summary.items() if "rows_ratio" in facts and name.startswith(family)]
    return max(peers, key=lambda name: summary[name]["rows_per_second"], default="")
