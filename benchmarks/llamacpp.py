"""Exported files in llama.cpp: the same ids, the same next tokens, the same score?

    python benchmarks/llamacpp.py                  trains 100 steps of the home recipe first
    python benchmarks/llamacpp.py --run runs/home  with that run

Held-out rows are answered by lorimer, greedily, in fp32. llama.cpp is then given the very ids of prompt
and answer, and its next token at every place of the answer is compared with lorimer's. It rounds
activations to 8 bits beside quantised weights, so not all are equal; below 98 % the command fails. Its own
greedy answers are scored too, and compared row by row with lorimer's.

Beside it: whether llama.cpp's tokenizer gives lorimer's ids, and whether its own quantiser chooses the same
types, with what error.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lorimer.bases.open import open_base
from lorimer.data.conversation import to_messages
from lorimer.evaluate.compare import Pairs, compare_pairs
from lorimer.evaluate.text import exact_match
from lorimer.export.gguf import export_gguf
from lorimer.export.gguf_lora import export_gguf_lora
from lorimer.export.source import Source, open_source
from lorimer.generate.engine import generate_ids
from lorimer.generate.model import Model, load
from lorimer.generate.sampling import Sampling
from lorimer.model.load import read_weight
from lorimer.recipes import recipe

BAR = 0.98
LONGEST = 64  # tokens of an answer
CONTEXT = 512
HARD = (
    "Hello, world!", " a  b   c\n\n\nd \t e", "12345 3.14159 1,000", "I'm you're he'LL DON'T can't",
    "naïve café ÜNÏ straße e\u0301", "日本語のテキスト。한국어 中文", "مرحبا 👩‍👩‍👧‍👦 🇩🇪 ∑∫√", 
    "def f(x):\n    return [1]\r\n", "<|im_start|>user\nhi<|im_end|>\n", "\u00a0\u200b end ",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A held-out row: what lorimer was asked, in ids, what it answered, and what was wanted."""

    prompt: list[int]
    answer: list[int]
    next: np.ndarray[Any, Any]  # lorimer's most likely token at every place of the answer
    text: str
    wanted: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--run", help="a finished run on a GGUF base; one of 100 steps is trained otherwise"
    )
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m"], help="of the merged files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = options.run or train(work)
        model, source = load(run, dtype="fp32"), open_source(run)
        if source.base.kind != "gguf":
            parser.error("the run's base is a folder; a base of one GGUF file is needed")
        rows = answered(model, options.rows)
        files: dict[str, tuple[Path, Path | None]] = {
            "base and adapter": (source.base.path, export_gguf_lora(source, work / "lora.gguf").path)
        }
        for kind in options.types:
            files[f"merged, {kind}"] = (export_gguf(source, work / f"{kind}.gguf", kind).path, None)
        table, bad = compared(model, rows, files, options.threads)
        Console().print(table)
        print(tokenized(model, source.base.path, rows))
        print(quantised(source, work))
    return 1 if bad else 0


def train(work: Path) -> str:
    config = recipe("home").config
    settings = ["train.max_steps=100", "train.batch_size=8", "evaluate.rows=1", f"output.dir={work}"]
    command = [sys.executable, "-m", "lorimer", "train", str(config), *settings, "output.name=run"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(work / "run")


def answered(model: Model, count: int) -> list[Row]:
    """lorimer's greedy answers to the recipe's first held-out rows."""
    lines = (recipe("home").folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    turns = [json.loads(line)["messages"] for line in lines]
    prompts = [model.template.prompt_ids(to_messages(each[:-1])) for each in turns]
    answers = generate_ids(
        model.decoder,
        [list(prompt) for prompt in prompts],
        max_new_tokens=LONGEST,
        sampling=Sampling(temperature=0),
        eos_ids=model.eos_ids,
    )
    rows = []
    for prompt, answer, each in zip(prompts, answers, turns, strict=True):
        ids = torch.tensor([*prompt, *answer.tokens])
        with torch.no_grad():
            logits = model.decoder.logits(model.decoder.hidden(ids, [len(ids)]))
        likely = logits[len(prompt) - 1 :].argmax(-1).numpy()
        text = model.tokenizer.decode(answer.tokens)
        rows.append(Row(list(prompt), list(answer.tokens), likely, text, each[-1]["content"]))
    return rows


@contextmanager
def opened(path: Path, adapter: Path | None, threads: int) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(
        str(path),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def likely_after(model: llama_cpp.Llama, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    model.reset()
    model.eval(ids)
    return np.asarray(model.scores[: len(ids)].argmax(-1))


def greedy(model: llama_cpp.Llama, prompt: Sequence[int], ends: Sequence[int]) -> list[int]:
    model.reset()
    model.eval(prompt)
    answer: list[int] = []
    while len(answer) < LONGEST:
        token = int(model.scores[model.n_tokens - 1].argmax())
        if token in ends:
            break
        answer.append(token)
        model.eval([token])
    return answer


def compared(
    model: Model, rows: list[Row], files: dict[str, tuple[Path, Path | None]], threads: int
) -> tuple[Table, bool]:
    """One line for each file, and whether one falls below the bar."""
    mine = [exact_match(row.text, row.wanted) for row in rows]
    table = Table(
        title=f"{len(rows)} answers, {sum(len(row.next) for row in rows):,} places", title_justify="left"
    )
    for heading in ("file", "MB", "same next", "exact", "lorimer's", "difference, 95 %"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    bad = False
    for name, (path, adapter) in files.items():
        same, total, scores = 0, 0, []
        with opened(path, adapter, threads) as theirs:
            for row in rows:
                likely = likely_after(theirs, [*row.prompt, *row.answer])[len(row.prompt) - 1 :]
                same, total = same + int((likely == row.next).sum()), total + len(likely)
                text = model.tokenizer.decode(greedy(theirs, row.prompt, model.eos_ids))
                scores.append(exact_match(text, row.wanted))
        found = compare_pairs([Pairs("exact_match", mine, scores, [1.0] * len(rows))])[0]
        size = path.stat().st_size + (adapter.stat().st_size if adapter else 0)
        inside = found.low <= 0 <= found.high
        # Four bits change the weights themselves, so only what should be the same model is held to it.
        bad |= "q4" not in name and (same / total < BAR or not inside)
        table.add_row(
            name,
            f"{size / 1e6:,.0f}",
            f"{same / total:.2%}",
            f"{found.after:.0%}",
            f"{found.before:.0%}",
            f"{found.low:+.0%} to {found.high:+.0%}",
        )
    return table, bad


def tokenized(model: Model, path: Path, rows: list[Row]) -> str:
    """Whether llama.cpp makes the same ids of the prompts' text and of hard strings."""
    texts = [model.tokenizer.decode(row.prompt, skip_special=False) for row in rows] + list(HARD)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    same = 0
    for text in texts:
        ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
        same += ids == model.tokenizer.encode(text)
    return f"same ids from llama.cpp's tokenizer: {same} of {len(texts)} texts"


def quantised(source: Source, work: Path) -> str:
    """Our Q4_K_M beside the one that llama.cpp makes of the same F32 file."""
    exact = export_gguf(source, work / "exact.gguf", "f32").path
    ours = open_base(export_gguf(source, work / "ours.gguf", "q4_k_m").path)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    with quiet():
        failed = llama_cpp.llama_model_quantize(
            str(exact).encode(), str(work / "theirs.gguf").encode(), ctypes.byref(settings)
        )
    assert not failed
    theirs, wanted = open_base(work / "theirs.gguf"), open_base(exact)
    types, errors = 0, np.zeros(2)
    for name, entry in ours.tensors.items():
        types += entry.dtype == theirs.tensors[name].dtype
        exact_weight = read_weight(wanted, source.spec, name)
        for side, base in enumerate((ours, theirs)):
            errors[side] += float((read_weight(base, source.spec, name) - exact_weight).square().sum())
    return (
        f"Q4_K_M beside llama.cpp's own: {types} of {len(ours.tensors)} tensors of the same type, "
        f"squared error {errors[0] / errors[1]:.4f} of its"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """llama.cpp's quantiser prints a line for each tensor to the standard error stream."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
