"""lorimer through its command line: the config it gets, and the result read from its run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .job import Job, Result

MAIN = "from lorimer.cli.app import main; main()"


def command(job: Job, base: str) -> list[str]:
    """Write config.yaml (JSON is YAML) and give the command that trains on it."""
    scratch = Path(job.scratch)
    config = {
        "base": base,
        "data": {"train": job.rows, "max_tokens": job.max_tokens, "shuffle": False},
        "lora": {"r": job.r, "alpha": job.alpha, "target_modules": "all-linear"},
        "train": {
            "batch_size": job.batch,
            "micro_batch_tokens": job.micro_batch_tokens,
            "learning_rate": job.learning_rate,
            "lr_scheduler": "constant",
            "eval_every": "never",
            "dtype": job.dtype,
            "device": "cpu",
            "threads": job.threads,
        },
        "quant": "nf4" if job.variant == "lorimer-nf4" else "none",
        "output": {"dir": str(scratch / "runs"), "name": "benchmark", "save_every": "never"},
    }
    path = scratch / "config.yaml"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [sys.executable, "-P", "-c", MAIN, "train", str(path), f"train.max_steps={job.steps}"]


def result(job: Job, wall_seconds: float) -> Result:
    """`train_seconds` covers all steps, so the seconds of the warm-up steps are taken off. Loading is
    what is left of the whole process: imports and exit are in it."""
    run = Path(job.scratch) / "runs" / "benchmark"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps: list[dict[str, Any]] = [line for line in map(json.loads, lines) if "loss" in line]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    training = record["train_seconds"] + record["save_seconds"] + record["eval_seconds"]
    warmup = sum(step["seconds"] for step in steps[: job.warmup])
    return Result(
        losses=[step["loss"] for step in steps],
        rows=[step["rows"] for step in steps],
        tokens=[step["tokens"] for step in steps],
        trained_tokens=[step["trained_tokens"] for step in steps],
        timed_seconds=record["train_seconds"] - warmup,
        load_seconds=wall_seconds - training,
    )
