"""Run the benchmarks and write RESULTS.md from what they measured.

    python benchmarks/results.py                     everything: three rounds of each, some hours
    python benchmarks/results.py home kernels        these parts anew; the others as they were measured last
    python benchmarks/results.py --write-only        RESULTS.md anew from what was measured last
    python benchmarks/results.py --quick --keep /tmp/quick --out /tmp/quick/RESULTS.md

Each part keeps its JSON in the cache folder. Parts that were measured on another machine, with other
versions or other threads than the newest part are left out and named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generation
import peak
import process
import report
import scaling

Found = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """One command, and what its table shows."""

    title: str
    about: str
    command: tuple[str, ...]


AVX2 = ("training.py", "--dtype", "fp32", "--isa", "avx2")
PARTS = {
    "home": Part("Chat rows", "Short rows, as most people have them.", ("training.py",)),
    "packs": Part(
        "Full packs", "No padding and no prompt to save.", ("training.py", "--workload", "packs")
    ),
    "prompt": Part(
        "One long system prompt", "Rows that share it.", ("training.py", "--workload", "prompt")
    ),
    "qlora": Part(
        "QLoRA", "The base in NF4, scales quantised too.", ("training.py", "--workload", "qlora")
    ),
    "fp32-avx2": Part(
        "A CPU with AVX2 alone",
        "lorimer and its peers in fp32, kept from everything newer than AVX2.",
        (*AVX2, "--peers-isa", "avx2"),
    ),
    "fp32-avx2-lorimer": Part(
        "AVX2 alone for lorimer", "The same, but the peers may use all that this CPU has.", AVX2
    ),
    "generation": Part("Greedy decoding", "New tokens a second, one row and sixteen.", ("generation.py",)),
    "kernels": Part("Kernels", "Each beside torch's own operation and beside the peak.", ("kernels.py",)),
    "families": Part("Families", "Each beside SmolLM2's shape, at equal arithmetic.", ("families.py",)),
    "scaling": Part("How cost grows", "Seconds a token and peak memory.", ("scaling.py",)),
}


def kernel_table(everything: dict[str, Any]) -> str:
    import kernels  # imports torch and lorimer

    return kernels.table(everything)


def family_table(everything: dict[str, Any]) -> str:
    import families  # imports torch and lorimer

    return families.table(everything)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "families": family_table,
    "training": report.training_table,
    "generation": generation.table,
    "kernels": kernel_table,
    "scaling": scaling.table,
}


@dataclass(frozen=True, slots=True)
class Goal:
    """A line of the summary: what was aimed at, and how it is read from the parts."""

    work: str
    least: str
    aim: str
    read: Callable[[Found], tuple[str, str] | None]  # against whom, and the ratio


def training_goal(part: str, key: str, family: str) -> Callable[[Found], tuple[str, str] | None]:
    """The ratio to the fastest peer whose name begins so."""

    def read(found: Found) -> tuple[str, str] | None:
        summary = found[part]["summary"] if part in found else {}
        peer = report.best_peer(summary, family)
        return (peer, report.spread_text(summary[peer][key])) if peer else None

    return read


def share_goal(found: Found) -> tuple[str, str] | None:
    facts = found.get("packs", {}).get("summary", {}).get("lorimer", {})
    if "share_of_peak" not in facts:
        return None
    limit = found["packs"]["machine"]["peak"]["bf16"]
    return f"{limit:.0f} GFLOP/s from registers", f"{100 * facts['share_of_peak']:.0f} %"


def generation_goal(size: str) -> Callable[[Found], tuple[str, str] | None]:
    def read(found: Found) -> tuple[str, str] | None:
        summary = found.get("generation", {}).get("summary", {})
        peer = generation.best_peer(summary, size)
        return (peer, report.spread_text(summary[peer]["ratio"][size])) if peer else None

    return read


GOALS = [
    Goal("chat rows, rows/s", "8", "12", training_goal("home", "rows_ratio", "trl")),
    Goal("chat rows, rows/s", "", "", training_goal("home", "rows_ratio", "")),
    Goal("full packs, tokens/s", "4", "6", training_goal("packs", "tokens_ratio", "peft-loop")),
    Goal("full packs, tokens/s", "", "", training_goal("packs", "tokens_ratio", "")),
    Goal("full packs, peak memory", "0.25", "0.17", training_goal("packs", "memory_ratio", "peft-loop")),
    Goal("full packs, share of the bf16 peak", "30 %", "45 %", share_goal),
    Goal("one long system prompt, rows/s", "25", "50", training_goal("prompt", "rows_ratio", "trl")),
    Goal("QLoRA, rows/s", "8", "", training_goal("qlora", "rows_ratio", "trl")),
    Goal("QLoRA beside bf16 LoRA, rows/s", "0.85", "", training_goal("qlora", "rows_ratio", "lorimer")),
    Goal("decoding, one row", "3", "6", generation_goal("1")),
    Goal("decoding, sixteen rows", "3", "6", generation_goal("16")),
    Goal("fp32, AVX2 alone, chat rows", "3", "5", training_goal("fp32-avx2", "rows_ratio", "trl")),
    Goal(
        "fp32, AVX2 for lorimer only, chat rows",
        "3",
        "5",
        training_goal("fp32-avx2-lorimer", "rows_ratio", "trl"),
    ),
]


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ("cpu", "flags", "cores", "threads", "memory_bytes")
    versions = [
        # lorimer's own is each part's commit.
        {k: v for k, v in machine["versions"].items() if isinstance(v, str) and k != "lorimer"}
        for machine in (one, other)
    ]
    return all(one[key] == other[key] for key in keys) and versions[0] == versions[1]


def page(found: Found) -> str:
    """RESULTS.md, from the newest part's machine and everything measured on the same."""
    newest = max(found.values(), key=lambda part: str(part["machine"]["date"]))["machine"]
    kept = {name: part for name, part in found.items() if same_machine(part["machine"], newest)}
    lines = [
        "<!-- Made by benchmarks/results.py; do not edit. -->",
        "",
        "# Results",
        "",
        "What is compared, and why that is fair, is in [README.md](README.md). Figures move with the",
        "machine; ratios are taken within a round.",
        "",
        *machine_lines(newest),
        "",
        *summary_lines(kept),
    ]
    for name, part in PARTS.items():
        if name in kept:
            facts = kept[name]
            head = [f"## {part.title}", "", part.about, "", when(facts["machine"]), ""]
            lines += ["", *head, "```", TABLES[facts["kind"]](facts).strip("\n"), "```"]
        elif name in found:
            lines += [
                "",
                f"## {part.title}",
                "",
                "Left out: measured on another machine or other versions.",
            ]
        else:
            lines += ["", f"## {part.title}", "", "Not measured yet."]
    return "\n".join(lines) + "\n"


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if isinstance(v, str))
    return [
        "## The machine",
        "",
        "| | |",
        "|---|---|",
        f"| CPU | {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used |",
        f"| instruction sets | {', '.join(machine['flags']) or 'none of those that matter'} |",
        f"| peak | {peak.text(machine['peak']).removeprefix('peak').strip()} |",
        f"| memory | {machine['memory_bytes'] / report.GB:.1f} GB |",
        f"| system | {machine['system']} |",
        f"| versions | {versions} |",
    ]


def when(machine: Mapping[str, Any]) -> str:
    others = [
        f"{name.strip('()')}: {', '.join(f'{k} {v}' for k, v in versions.items())}"
        for name, versions in machine["versions"].items()
        if not isinstance(versions, str)
    ]
    load = machine["load_average_before"]
    text = f"Measured {machine['date']}, lorimer at {machine['commit'] or 'an unknown commit'}; "
    text += f"kernels: {machine['kernels']}; load {load:.2f} before the first round."
    return text + (f" Environments of their own: {'; '.join(others)}." if others else "")


def summary_lines(found: Found) -> list[str]:
    lines = [
        "## In short",
        "",
        "lorimer divided by the fastest of those it is held against: median over rounds (least to most).",
        "",
        "| work | against | lorimer | at least | aim |",
        "|---|---|---|---|---|",
    ]
    for goal in GOALS:
        against, ratio = goal.read(found) or ("", "not measured yet")
        lines.append(f"| {goal.work} | {against} | {ratio} | {goal.least} | {goal.aim} |")
    return lines


def run(name: str, args: argparse.Namespace) -> None:
    """One part in a process of its own, its JSON kept."""
    script, *options = PARTS[name].command
    command = [
        sys.executable,
        str(process.HERE / script),
        *options,
        "--out",
        str(args.keep / f"{name}.json"),
    ]
    command += ["--threads", str(args.threads)]
    if args.quick:
        command.append("--quick")
    elif args.rounds and name != "scaling":
        command += ["--rounds", str(args.rounds)]
    if args.python and script == "training.py":
        command += ["--python", *args.python]
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    if subprocess.run(command).returncode:
        print(f"== {name} failed", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the benchmarks and write RESULTS.md.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--write-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--quick", action="store_true", help="everything at its smallest: does it still run?"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each part; its own number if not given")
    parser.add_argument("--threads", type=int, default=process.cores())
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PEER=PATH", help="as training.py has it"
    )
    parser.add_argument("--keep", type=Path, default=process.CACHE / "results", help="folder for the JSON")
    parser.add_argument("--out", type=Path, default=process.HERE / "RESULTS.md")
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)} (there are: {', '.join(PARTS)})")
    if args.quick and args.out == process.HERE / "RESULTS.md":
        parser.error("--quick measures nothing worth keeping: give --keep and --out")
    return args


def main() -> None:
    args = parse()
    args.keep.mkdir(parents=True, exist_ok=True)
    for name in [] if args.write_only else args.parts or PARTS:
        run(name, args)
    files = {name: args.keep / f"{name}.json" for name in PARTS}
    found = {
        name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()
    }
    if not found:
        raise SystemExit(f"nothing was measured yet: {args.keep} is empty")
    args.out.write_text(page(found), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
