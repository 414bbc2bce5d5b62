"""What a contestant is told and what it answers: a job file in, one JSON line on stdout out."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# SmolLM2's template with the answer marked as TRL and transformers want it, so that every contestant
# trains the same tokens: the answer and its end-of-turn token. `read_tokenizer` checks that it
# renders like the original.
MARKED_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n' }}"
    "{{ 'You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Job:
    """The same for every contestant but `variant`."""

    variant: str
    folder: str  # the peers' base: a Hugging Face folder
    rows: str  # JSON lines, already in the order of training
    chat: bool  # rows are messages whose answers are trained; else plain text, all of it trained
    steps: int  # warm-up steps included
    warmup: int  # steps whose time does not count
    batch: int  # rows per optimizer step
    micro_rows: int  # rows that a tuned peer computes at once
    pack_tokens: int  # size of a packing peer's packs
    packs: int  # packs in one of its optimizer steps
    micro_batch_tokens: int | None  # lorimer's; it chooses if None
    threads: int
    dtype: str  # bf16 | fp32
    r: int
    alpha: int
    learning_rate: float
    max_tokens: int
    scratch: str
    started: float  # time.time() when the process was started

    @property
    def is_bf16(self) -> bool:
        return self.dtype == "bf16"


@dataclass(slots=True)
class StepLog:
    """Losses, rows and tokens of each step, and the clock times that the speed is taken from."""

    job: Job
    losses: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained_tokens: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    first_begin: float | None = None

    def begin(self) -> None:
        if self.first_begin is None:
            self.first_begin = time.time()

    def end(self, *, loss: float, rows: int, tokens: int, trained_tokens: int) -> None:
        self.ends.append(time.time())
        self.losses.append(loss)
        self.rows.append(rows)
        self.tokens.append(tokens)
        self.trained_tokens.append(trained_tokens)

    def result(self) -> Result:
        assert self.first_begin is not None
        return Result(
            losses=self.losses,
            rows=self.rows,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            timed_seconds=self.ends[-1] - self.ends[self.job.warmup - 1],
            load_seconds=self.first_begin - self.job.started,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """Per step: loss, rows, real tokens, trained tokens. `timed_seconds`: the end of the last warm-up
    step to the end of the last step. `load_seconds`: the start of the process to the first step."""

    losses: list[float]
    rows: list[int]
    tokens: list[int]
    trained_tokens: list[int]
    timed_seconds: float
    load_seconds: float

    def print(self) -> None:
        print(json.dumps(asdict(self)), flush=True)


def read_job() -> Job:
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def read_rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(job.rows).read_text(encoding="utf-8").splitlines()]


def read_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the marked template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    if not job.chat:
        return tokenizer
    messages = read_rows(job)[0]["messages"]
    original: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = MARKED_TEMPLATE
    if tokenizer.apply_chat_template(messages, tokenize=False) != original:
        raise SystemExit(
            "the base's chat template is not SmolLM2's: its rows would differ between contestants"
        )
    return tokenizer


def read_examples(job: Job) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row; what is not trained has label -100."""
    tokenizer = read_tokenizer(job)
    examples = []
    for row in read_rows(job):
        if job.chat:
            encoded: Any = tokenizer.apply_chat_template(
                row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
            labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        else:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            labels = list(ids)
        examples.append((ids[: job.max_tokens], labels[: job.max_tokens]))
    return examples
