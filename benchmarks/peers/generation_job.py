"""What a generating contestant is told, how it is timed, and what it answers: one JSON line on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

Ids = list[list[int]]


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """Prompts as token ids; each batch size takes them from the first on."""

    variant: str
    base: str  # lorimer: the GGUF file; transformers: its Hugging Face folder
    prompts: Ids
    batches: dict[str, int]  # batch size -> how many prompts are answered, batch after batch
    new_tokens: int
    threads: int
    dtype: str  # bf16 | fp32
    started: float  # time.time() when the process was started


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Seconds from prompt ids to answer ids, and the answers."""

    seconds: float
    tokens: int
    answers: Ids


def read_job() -> GenerationJob:
    return GenerationJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def run(job: GenerationJob, generate: Callable[[Ids], Ids]) -> None:
    """Time `generate`, which gives `new_tokens` ids for each prompt, and print the results.

    Each batch size is warmed up with one whole call.
    """
    loaded = time.time() - job.started
    found = {}
    for name, count in job.batches.items():
        size = int(name)
        parts = [job.prompts[start : start + size] for start in range(0, count, size)]
        generate(parts[0])
        began = time.perf_counter()
        answers = [answer for part in parts for answer in generate(part)]
        seconds = time.perf_counter() - began
        wrong = [len(answer) for answer in answers if len(answer) != job.new_tokens]
        if wrong:
            raise SystemExit(f"answers of {wrong} tokens (wanted: {job.new_tokens} each)")
        found[name] = asdict(BatchResult(seconds, sum(map(len, answers)), answers))
    print(json.dumps({"load_seconds": loaded, "batches": found}), flush=True)
