"""A run in words. The terminal and report.html say the same of it, so both take it from here."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorimer.run import RunFolder

if TYPE_CHECKING:
    from lorimer.evaluate.run import Change

GIB = 1024**3
KEPT = "as the base has it"
# A prompt longer than this is no example to type.
EXAMPLE = 60


def quant_text(quant: dict[str, Any]) -> str:
    """How the frozen weights are stored: `nf4, blocks of 64, scales in 8 bits: 92 MB`."""
    words = [KEPT if quant["kind"] == "keep" else quant["kind"]]
    if quant["kind"] in ("nf4", "fp4"):
        words += [
            f"blocks of {quant['block_size']}",
            "scales in 8 bits" if quant["double"] else "scales in fp32",
        ]
    if quant["embeddings"]:
        words.append("embedding and head too")
    return f"{', '.join(words)}: {quant['bytes'] / 1e6:,.0f} MB"


def facts(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What is trained: name and text of each line, no name where a line goes on with the one before.

    `info` is what run.json keeps under that name.
    """
    share = info["trained_tokens"] / max(1, info["tokens"])
    others = [f"{info[f'{name}_rows']:,} {name}" for name in ("valid", "test") if info[f"{name}_rows"]]
    rows = counted(info["rows"], "row") + (f" (and {', '.join(others)})" if others else "")
    threads = f", {counted(info['threads'], 'thread')}" if info["device"] == "cpu" else ""
    rung = info.get("recompute", "none")
    again = "" if rung == "none" else f", recompute {rung}"
    steps = f"{counted(info['steps'], 'step')} of {counted(info['batch_size'], 'row')}"
    if info.get("budget"):
        steps = f"{info['budget']}, in steps of {counted(info['batch_size'], 'row')}"
    if info["first_step"]:
        steps += f", from step {info['first_step'] + 1}"
    warmup = counted(info["warmup_steps"], "step")
    rate = f"{info['lr_scheduler']}, {info['learning_rate']:g}, {warmup} of warm-up"
    tokens = f"{info['tokens']:,} tokens, {info['trained_tokens']:,} trained ({share:.0%})"
    return [
        ("base", f"{info['base']} ({info['architecture']}, {info['base_parameters'] / 1e6:,.0f} M)"),
        *([("slower", info["slower"])] if info.get("slower") else []),
        *([("preset", ", ".join(info["preset"]))] if info.get("preset") else []),
        *(
            [("stored", quant_text(quant))]
            if (quant := info.get("quant", {})).get("kind", "none") != "none"
            else []
        ),
        (
            "machine",
            f"{info['device']}, {info['dtype']}{threads}, {info['micro_batch_tokens']:,} tokens at once"
            + again,
        ),
        ("method", f"LoRA r={info['r']} alpha={info['alpha']:g}: {info['targets']}"),
        ("", info["trainable"]),
        ("data", rows),
        ("", tokens),
        ("", f"chat template: {info['template']}"),
        ("schedule", steps),
        ("", rate),
        ("run", short_path(Path(info["run"]))),
    ]


def next_commands(path: Path, changes: Sequence[Change], *, proved: bool) -> list[str]:
    """What to do with a run's adapter, as commands that run as they are.

    The last two are other tools' servers with OpenAI's routes: both load the folder that `merge` writes.
    What `export` writes is for llama.cpp and Ollama; it prints the commands that use it.
    """
    run = shlex.quote(short_path(path))
    merged = shlex.quote(short_path(path) + "-merged")
    example = changes[0]["prompt"] if changes else "Hello"
    if not 0 < len(example) <= EXAMPLE or not example.isprintable():
        example = "Hello"
    commands = [f"lorimer chat {run}", f"lorimer generate {run} {shlex.quote(example)}"]
    if proved:
        commands.append(f"lorimer eval {run}")
    # What transformers computes has no form there.
    if not RunFolder(path).read_record().get("info", {}).get("slower"):
        commands.append(f"lorimer export {run} --to gguf-lora  # for llama.cpp and Ollama")
    return [
        *commands,
        f"lorimer merge {run} --out {merged}",
        f"vllm serve {merged}  # after merge, where vLLM is installed",
        f"transformers serve {merged}  # after merge, with transformers[serving]",
    ]


def counted(number: int, thing: str) -> str:
    """1 step, 1,200 steps."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def short_path(path: Path) -> str:
    """The path from here where that is shorter, so that it can be typed."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
