"""What is trained in a benchmark: each workload a row of one table, and the rows it is made of.

Every contestant reads the same file, in its order. Where a row must have an exact number of tokens,
its text is cut until it has; the contestants tokenise it themselves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

Row = dict[str, Any]
SYSTEM_TOKENS = 500  # the whole system turn, its marks included
PACK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of training. `batch` is rows per optimizer step; how peers split it is told beside it."""

    about: str
    rows: Callable[[Path, Tokenizer, int], list[Row]]
    contestants: tuple[str, ...]
    steps: int  # timed optimizer steps
    warmup: int  # steps before them
    batch: int
    max_tokens: int
    micro_rows: int  # rows that a tuned peer computes at once
    pack_tokens: int  # size of trl-packed's packs; one is computed at once
    packs: int  # packs in an optimizer step of trl-packed
    micro_batch_tokens: int | None = None  # lorimer's; it chooses if None
    ours: str = "lorimer"  # whom the others are held against
    chat: bool = True  # messages with trained answers; else plain text, all of it trained


def home_rows(source: Path, tokenizer: Tokenizer, count: int) -> list[Row]:
    """The first `count` rows of a fixed permutation."""
    lines = source.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise SystemExit(f"{source} has {len(lines)} rows; {count} are needed")
    random.Random(0).shuffle(lines)
    return [json.loads(line) for line in lines[:count]]


def prompt_rows(source: Path, tokenizer: Tokenizer, count: int) -> list[Row]:
    """The home rows behind one system prompt of 500 tokens full of examples, each with a line on time
    and place before the question, which brings its own turns to about 60 tokens."""
    found = home_rows(source, tokenizer, count + 64)
    rows, examples = found[:count], found[count:]
    lines = [f"{question} -> {answer}" for question, answer in map(_exchange, examples)]
    intro = "You control a home. Answer each command with one line of JSON, as in these examples:"
    marks = _count(tokenizer, "<|im_start|>system\n<|im_end|>\n")
    system = exact_text(tokenizer, iter([intro, *lines]), SYSTEM_TOKENS - marks)
    draw = random.Random(0)
    made = []
    for question, answer in map(_exchange, rows):
        place = draw.choice(["kitchen", "living room", "bedroom", "office", "hall", "garage"])
        moment = f"{draw.randrange(24)}:{draw.randrange(60):02d}"
        context = f"It is {moment} and I am in the {place}."
        turns = (("system", system), ("user", f"{context}\n{question}"), ("assistant", answer))
        made.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return made


def text_rows(tokens: int) -> Callable[[Path, Tokenizer, int], list[Row]]:
    """Plain-text rows of exactly `tokens` tokens, the end token that tools append included."""

    def rows(source: Path, tokenizer: Tokenizer, count: int) -> list[Row]:
        texts = _endless(home_rows(source, tokenizer, 64))
        return [{"text": exact_text(tokenizer, texts, tokens - 1)} for _ in range(count)]

    return rows


WORKLOADS = {
    "home": Workload(
        about="chat rows of 62 tokens",
        rows=home_rows,
        contestants=(
            "lorimer",
            "trl-default",
            "trl-tuned",
            "trl-packed",
            "peft-loop",
            "torchtune",
            "llama-factory",
        ),
        steps=8,
        warmup=2,
        batch=16,
        max_tokens=1024,
        micro_rows=16,
        # A pack of 1024 tokens holds about as many rows as an optimizer step (16 x 62 tokens).
        pack_tokens=1024,
        packs=1,
    ),
    "qlora": Workload(
        about="chat rows of 62 tokens, the base in NF4",
        rows=home_rows,
        contestants=("lorimer-nf4", "lorimer", "trl-nf4"),
        steps=8,
        warmup=2,
        batch=16,
        max_tokens=1024,
        micro_rows=16,
        pack_tokens=1024,
        packs=1,
        ours="lorimer-nf4",
    ),
    "packs": Workload(
        about=f"plain text in full packs of {PACK_TOKENS} tokens, every token trained",
        rows=text_rows(PACK_TOKENS),
        contestants=("lorimer", "trl-packed", "peft-loop", "peft-compiled", "torchtune"),
        steps=4,
        warmup=2,
        batch=1,
        max_tokens=PACK_TOKENS,
        micro_rows=1,
        pack_tokens=PACK_TOKENS,
        packs=1,
        micro_batch_tokens=PACK_TOKENS,
        chat=False,
    ),
    "prompt": Workload(
        about=f"chat rows of about 60 tokens behind one system prompt of {SYSTEM_TOKENS}",
        rows=prompt_rows,
        contestants=("lorimer", "trl-default", "trl-tuned", "trl-packed", "peft-loop"),
        steps=2,
        warmup=1,
        batch=16,
        max_tokens=1024,
        micro_rows=4,
        pack_tokens=2400,  # four rows
        packs=4,
    ),
}


def _exchange(row: Row) -> tuple[str, str]:
    question, answer = (message["content"] for message in row["messages"][-2:])
    return question, answer


def _endless(rows: Sequence[Row]) -> Iterator[str]:
    """The rows' text, message by message, again and again in another order."""
    draw = random.Random(0)
    while True:
        for row in draw.sample(rows, len(rows)):
            yield from _exchange(row)


def exact_text(tokenizer: Tokenizer, lines: Iterator[str], tokens: int) -> str:
    """Lines joined, cut at a line's or word's end, and filled to exactly this many tokens."""
    parts: list[str] = []
    found = 0
    while found < tokens:
        parts.append(next(lines))
        found += _count(tokenizer, "\n" + parts[-1])
    text = "\n".join(parts)
    while _count(tokenizer, text) > tokens:
        text = text[: max(text.rfind(" "), text.rfind("\n"))]
    text += " and" * (tokens - _count(tokenizer, text))  # one token each
    if _count(tokenizer, text) != tokens:
        raise SystemExit(f"no text of {tokens} tokens can be made of these rows with this tokenizer")
    return text


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def useful_flops(config: dict[str, Any], *, tokens: int, trained: int, r: int) -> float:
    """Floating-point operations that training on one row of `tokens` tokens needs at least.

    The frozen layers forward and their input gradients (2 + 2 for each weight), the head on trained
    tokens (2 + 2), causal attention (two products forward, five backward, each on half a square),
    LoRA (three products each of A and B). No gradient of a frozen weight, and nothing twice.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    shapes = [(hidden, heads * size), (hidden, groups * size), (hidden, groups * size)]
    shapes += [(heads * size, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    layer = tokens * sum(4 * i * o + 6 * r * (i + o) for i, o in shapes)
    attention = 7 * heads * size * tokens * tokens
    head = 4 * hidden * config["vocab_size"] * trained
    return float(config["num_hidden_layers"] * (layer + attention) + head)
