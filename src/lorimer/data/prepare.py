"""The data settings of a run -> examples to train on, and what was done to get them.

This is the walk of a row up to its tokens: read, understood as a conversation, rendered and
tokenised, held to the length limit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from lorimer.config import DataConfig
from lorimer.data.conversation import Conversation, to_conversation
from lorimer.data.rows import Row, read_rows, split_rows
from lorimer.data.template import ChatTemplate, Example
from lorimer.errors import DataError

LOOKED_AT = 64


@dataclass(slots=True)
class Prepared:
    """What a run trains on, validates on and is proved on; `notes` says what was left out or cut."""

    train: list[Example]
    valid: list[Example]
    test: list[Conversation]
    notes: list[str] = field(default_factory=list)
    # Rows of which something is kept, and all their examples, for preflight.
    looked_at: list[tuple[Conversation, list[Example]]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.train)

    @property
    def trained_tokens(self) -> int:
        return sum(int(example.trained.sum()) for example in self.train)

    def train_hash(self) -> str:
        """sha256 over what is trained on: token ids and which of them are trained, in order."""
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(len(example.ids).to_bytes(4, "little"))
            digest.update(example.ids.tobytes() + example.trained.tobytes())
        return digest.hexdigest()


def prepare(config: DataConfig, template: ChatTemplate, *, seed: int) -> Prepared:
    """Read and tokenise the rows that the settings name. Raises DataError with file and line."""
    rows = read_rows(config.train)
    valid = read_rows(config.valid) if config.valid else []
    test = read_rows(config.test) if config.test else []
    if config.valid_fraction or config.test_fraction:
        rows, more_valid, more_test = split_rows(rows, config.valid_fraction, config.test_fraction, seed)
        valid, test = valid or more_valid, test or more_test
    notes: list[str] = []
    if template.writes_date:
        day = (template.now or datetime.now()).date()
        notes.append(f"the chat template writes the day into each prompt; these rows say {day}")
    if template.marks_otherwise is not None:
        notes.append(marks_text(template.marks_otherwise))
    looked_at: list[tuple[Conversation, list[Example]]] = []
    return Prepared(
        train=_examples("train", rows, config, template, notes, looked_at),
        valid=_examples("valid", valid, config, template, notes) if valid else [],
        test=list(conversations(test, config)),
        notes=notes,
        looked_at=looked_at,
    )


def marks_text(differ: tuple[str, str]) -> str:
    """That a template's own marks are not what is trained, in words."""
    marked, trained = differ
    return (
        f"the chat template marks {marked!r} of an answer as generated; trained is {trained!r}, which is "
        "what the model writes at inference"
    )


def split_text(split: str, rows: int, examples: int) -> str:
    """That chats were taken apart, and why, in words."""
    chats = "1 chat is" if rows == 1 else f"{rows} chats are"
    return (
        f"{split}: {chats} trained as {examples} examples, because the chat template changes earlier turns "
        "of a longer chat: each answer is trained once, after what inference feeds"
    )


def conversations(rows: Iterable[Row], config: DataConfig) -> Iterable[Conversation]:
    for row in rows:
        yield to_conversation(row, config.format, config.system)


def _examples(
    split: str,
    rows: Sequence[Row],
    config: DataConfig,
    template: ChatTemplate,
    notes: list[str],
    looked_at: list[tuple[Conversation, list[Example]]] | None = None,
) -> list[Example]:
    """Tokenise one split and apply `data.too_long`; the notes name the rows it touched. Some rows, spread
    evenly, are kept as conversations too where `looked_at` is given."""
    kept: list[Example] = []
    long: list[Example] = []
    lost: list[Example] = []
    apart = [0, 0]
    every = max(1, len(rows) // LOOKED_AT)
    for number, conversation in enumerate(conversations(rows, config)):
        examples = template.examples(conversation, config.train_on)
        if len(examples) > 1:
            apart = [apart[0] + 1, apart[1] + len(examples)]
        before = len(kept)
        for example in examples:
            _sort(example, config, kept, long, lost)
        if looked_at is not None and number % every == 0 and len(kept) > before:
            looked_at.append((conversation, examples))
    if apart[0]:
        notes.append(split_text(split, *apart))
    _report_long(split, long, config, notes)
    if lost:
        notes.append(f"{split}: {len(lost)} rows left out, nothing in them is trained ({_places(lost)})")
    if not kept:
        raise DataError(
            f"no {split} rows are left: {len(long)} of {len(rows)} are longer than "
            f"{config.max_tokens} tokens, {len(lost)} have nothing to train",
            fix="Raise `data.max_tokens`, or look at the rows with `lorimer data check`.",
            path=rows[0].path,
        )
    return kept


def _sort(
    example: Example, config: DataConfig, kept: list[Example], long: list[Example], lost: list[Example]
) -> None:
    """Put one example where it belongs: kept (cut, if it must be), left out as too long, or lost."""
    if len(example.ids) > config.max_tokens:
        long.append(example)
        if config.too_long == "drop":
            return
        limit = config.max_tokens
        example = Example(example.ids[:limit], example.trained[:limit], example.place)
    (kept if example.trained.any() else lost).append(example)


def _report_long(split: str, long: Sequence[Example], config: DataConfig, notes: list[str]) -> None:
    if not long:
        return
    longest = max(len(example.ids) for example in long)
    what = f"{len(long)} rows are longer than {config.max_tokens} tokens (longest: {longest})"
    if config.too_long == "error":
        raise DataError(
            f"{split}: {what}: {_places(long)}",
            fix="Raise `data.max_tokens`, or set `data.too_long` to drop or truncate.",
        )
    done = "left out" if config.too_long == "drop" else "cut at the end"
    notes.append(f"{split}: {what}; {done} ({_places(long)})")


def _places(examples: Sequence[Example]) -> str:
    shown = ", ".join(example.place for example in examples[:3])
    return shown + (f" and {len(examples) - 3} more" if len(examples) > 3 else "")
