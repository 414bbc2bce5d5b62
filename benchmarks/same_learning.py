"""Does the fast path learn the same? bf16 on the native kernels against fp32 on the references.

    python benchmarks/same_learning.py                     200 steps on the home recipe's rows
    python benchmarks/same_learning.py --steps 20 --no-eval

Two runs through the command line with the same settings: the same rows in the same order, the same
initial adapter. Prints how far the losses are apart, step by step and on average, and both scores on
the held-out rows with their intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent / "src" / "lorimer" / "recipes" / "home"
MAIN = "from lorimer.cli.app import main; main()"
WAYS = {
    "native bf16": {"dtype": "bf16", "isa": ""},
    "reference fp32": {"dtype": "fp32", "isa": "reference"},
}


def run(name: str, way: dict[str, str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One training run: its losses, and its score on the held-out rows."""
    config = {
        "base": "smollm2-135m",
        "data": {"train": str(HOME / "train.jsonl")}
        | ({} if args.no_eval else {"test": str(HOME / "test.jsonl")}),
        "lora": {"r": 16, "alpha": 32},
        "train": {
            "batch_size": args.batch,
            "max_steps": args.steps,
            "learning_rate": args.learning_rate,
            "lr_scheduler": "linear",
            "eval_every": "never",
            "dtype": way["dtype"],
            "device": "cpu",
        },
        "evaluate": {"max_new_tokens": 64},
        "output": {"dir": str(folder), "name": name.replace(" ", "-"), "save_every": "never"},
    }
    path = folder / f"{name.replace(' ', '-')}.yaml"
    path.write_text(json.dumps(config) + "\n", encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "LORIMER_ISA"}
    environment |= {"LORIMER_ISA": way["isa"]} if way["isa"] else {}
    print(f"{name}: {args.steps} steps of {args.batch} rows", flush=True)
    subprocess.run([sys.executable, "-c", MAIN, "train", str(path)], check=True, env=environment)
    made = folder / name.replace(" ", "-")
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = {"losses": [line["loss"] for line in lines if "loss" in line]}
    if not args.no_eval:
        result["after"] = json.loads((made / "eval" / "after.json").read_text(encoding="utf-8"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of the native bf16 path against fp32 references.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--no-eval", action="store_true", help="compare losses only")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(name, way, args, Path(folder)) for name, way in WAYS.items()}
    native, reference = (results[name]["losses"] for name in WAYS)
    apart = [abs(a - b) for a, b in zip(native, reference, strict=True)]
    signed = statistics.fmean(a - b for a, b in zip(native, reference, strict=True))
    print(f"losses apart: at most {max(apart):.2e} (step {apart.index(max(apart)) + 1}), ", end="")
    print(f"on average {statistics.fmean(apart):.2e}, with sign {signed:+.2e}")
    for name, result in results.items():
        score = result.get("after", {}).get("exact_match")
        print(
            f"{name}: last loss {result['losses'][-1]:.4f}"
            + (f", exact match {score}" if score is not None else "")
        )
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
