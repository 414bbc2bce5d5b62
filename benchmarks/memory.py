"""Planned against measured peak memory: short runs of 24 combinations, each a process of its own.

    python benchmarks/memory.py                  some minutes; ends with 1 if one is out of bounds
    python benchmarks/memory.py --only wide-few
    python benchmarks/memory.py --dtype fp32     each in this type, as where bf16 is not native and slow

A run's plan is in its run.json; the peak is the kernel's, loading included. Bases are random, of shapes
unlike each other, but for SmolLM2. Rows are full: two of them are a step of two packs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import large
import process
import workloads

LOW, HIGH = -0.05, 0.10
SHAPES = ("smollm2-135m", "wide-few", "deep-thin", "long-heads")
# tokens, quant, recompute, dtype
CASES = (
    (256, "none", "none", "bf16"),
    (1024, "none", "none", "bf16"),
    (2048, "none", "mlp", "bf16"),
    (512, "none", "none", "fp32"),
    (1024, "nf4", "layers", "bf16"),
    (2048, "int8", "none", "bf16"),
)


def cases(only: str | None, dtype: str | None) -> Iterator[tuple[str, int, str, str, str]]:
    for shape in SHAPES:
        if only in (None, shape):
            yield from ((shape, *case[:3], dtype or case[3]) for case in CASES)


def measured(base: str, folder: Path, tokens: int, quant: str, rung: str, dtype: str) -> tuple[int, int]:
    """Planned and measured bytes of one run."""
    name = f"{tokens}-{quant}-{rung}-{dtype}"
    config = {
        "base": base,
        "quant": quant,
        "data": {"train": str(folder / f"rows-{tokens}.jsonl"), "max_tokens": tokens},
        "train": {
            "batch_size": 2,
            "max_steps": 2,
            "micro_batch_tokens": tokens,
            "recompute": rung,
            "dtype": dtype,
            "eval_every": "never",
        },
        "output": {"dir": str(folder / "runs"), "name": name, "save_every": "never"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-c", large.MAIN, "train", str(path)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{name}: the run ended with {status}")
    record = json.loads((folder / "runs" / name / "run.json").read_text(encoding="utf-8"))
    return record["planned_memory"]["peak"], usage.ru_maxrss * 1024


def prepare(scratch: Path, shape: str) -> tuple[str, Path]:
    """The base's name or path, and a folder with rows of each length."""
    from tokenizers import Tokenizer

    from lorimer.bases.open import open_base
    from lorimer.bases.store import resolve_base
    from lorimer.data.tokenizer import Tokenizer as Ours

    folder = scratch / shape
    folder.mkdir(parents=True, exist_ok=True)
    if shape in SHAPES[:1]:
        base = shape
    else:
        base = str(folder / "base")
        subprocess.run([sys.executable, large.__file__, shape, "--write", base], check=True)
    files = Ours.from_base(open_base(resolve_base("smollm2-135m"))).files()
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    for tokens in {case[0] for case in CASES}:
        rows = workloads.text_rows(tokens)(process.ROWS, tokenizer, 4)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"rows-{tokens}.jsonl").write_text(text, encoding="utf-8")
    return base, folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Planned against measured peak memory.")
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="in place of each case's own")
    args = parser.parse_args()
    bad = 0
    head = f"{'base':<14}{'tokens':>7}  {'quant':<6}{'again':<8}{'type':<6}"
    print(f"{head}{'planned':>9}{'measured':>10}{'error':>8}")
    with tempfile.TemporaryDirectory(prefix="lorimer-memory-") as scratch:
        ready: dict[str, tuple[str, Path]] = {}
        for shape, tokens, quant, rung, dtype in cases(args.only, args.dtype):
            if shape not in ready:
                ready[shape] = prepare(Path(scratch), shape)
            planned, peak = measured(*ready[shape], tokens, quant, rung, dtype)
            error = planned / peak - 1
            bad += not LOW <= error <= HIGH
            print(
                f"{shape:<14}{tokens:>7,}  {quant:<6}{rung:<8}{dtype:<6}{planned / 1e6:>6,.0f} MB"
                f"{peak / 1e6:>7,.0f} MB{error:>+8.1%}",
                flush=True,
            )
    print(f"{bad} outside of {LOW:+.0%} to {HIGH:+.0%}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
