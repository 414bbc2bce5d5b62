"""The single checks of the data doctor: what each looks at, how bad it is, what to do about it.

ROW_CHECKS look at one row each; the functions after it compare rows with each other.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from lorimer.config import DataConfig
from lorimer.data.conversation import Conversation, Message
from lorimer.data.dropped import dropped
from lorimer.data.near import near_prompts
from lorimer.data.rows import row_key
from lorimer.data.template import ChatTemplate, Example

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
# A base whose answers have no end for more than this share of the rows does not learn to stop.
UNENDED_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found; `places` are all its rows as file:line, in order of the files."""

    code: str
    severity: Severity
    message: str
    places: tuple[str, ...]
    fix: str

    @property
    def count(self) -> int:
        return len(self.places)


@dataclass(frozen=True, slots=True)
class Checked:
    """A sound row on its way to training; there are no examples where there is no tokenizer."""

    format: str
    conversation: Conversation
    examples: tuple[Example, ...]

    @property
    def place(self) -> str:
        return self.conversation.place

    @property
    def answers(self) -> list[Message]:
        return [message for message in self.conversation.messages if message.role == "assistant"]


@dataclass(frozen=True, slots=True)
class Context:
    """What row checks need to know besides the row."""

    config: DataConfig
    template: ChatTemplate | None
    end_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class RowCheck:
    """A question to each row; `message` follows the number of rows that answer yes."""

    code: str
    severity: Severity
    message: str
    fix: str
    applies: Callable[[Checked, Context], bool]


def _nothing_trained(one: Checked, _: Context) -> bool:
    return bool(one.examples) and not any(example.trained.any() for example in one.examples)


def _end_not_trained(one: Checked, context: Context) -> bool:
    learnt = [example.ids[example.trained] for example in one.examples if example.trained.any()]
    return any(not np.isin(ids, list(context.end_ids)).any() for ids in learnt)


def _double_bos(one: Checked, context: Context) -> bool:
    bos = context.template.tokenizer.bos_id if context.template else None
    return bos is not None and any(list(example.ids[:2]) == [bos, bos] for example in one.examples)


def _all_trained(one: Checked, context: Context) -> bool:
    if one.conversation.text is not None or context.config.train_on == "all":
        return False
    return any(bool(example.trained[1:].all()) for example in one.examples)


def _texts(one: Checked) -> Iterator[str]:
    yield one.conversation.text or ""
    for message in one.conversation.messages:
        yield message.content


def _markers(one: Checked, context: Context) -> list[str]:
    """Control tokens of the base that are spelled in the row."""
    if context.template is None:
        return []
    spans = context.template.tokenizer.control_spans
    return [text[first:last] for text in _texts(one) for first, last in spans(text)]


def _spells_markers(one: Checked, context: Context) -> bool:
    return one.conversation.text is None and bool(_markers(one, context))


def _text_with_markers(one: Checked, context: Context) -> bool:
    return one.conversation.text is not None and bool(_markers(one, context))


def _empty_answer(one: Checked, _: Context) -> bool:
    return any(not turn.content.strip() and not turn.tool_calls for turn in one.answers)


def _empty_question(one: Checked, _: Context) -> bool:
    return any(not turn.content.strip() for turn in one.conversation.messages if turn.role == "user")


def _role_twice(one: Checked, _: Context) -> bool:
    roles = [turn.role for turn in one.conversation.messages]
    return any(a == b and a in ("user", "assistant") for a, b in pairwise(roles))


def _late_system(one: Checked, _: Context) -> bool:
    return any(turn.role == "system" for turn in one.conversation.messages[1:])


def _dropped(one: Checked, context: Context) -> list[str]:
    return dropped(context.template, one.conversation, one.examples) if context.template else []


def _not_shown(one: Checked, context: Context) -> bool:
    return bool(_dropped(one, context))


PLACEHOLDER = re.compile(
    r"\{\{\s*[\w.]+\s*\}\}|\{(?:input|instruction|question|answer|context|prompt|output|response|text)\}"
    r"|\[(?:insert|your|fill in)\b[^\]]*\]|<(?:placeholder|insert)\b[^>]*>",
    re.IGNORECASE,
)
# UTF-8 read as Latin-1 or Windows-1252, and what could not be read at all.
BROKEN = re.compile("\u00c3[\u0080-\u00bf]|\u00e2\u20ac|\u00c2[\u0080-\u00bf]|\ufffd")
HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff]")


def _placeholder(one: Checked, _: Context) -> bool:
    return any(PLACEHOLDER.search(text) for text in _texts(one))


def _broken_text(one: Checked, _: Context) -> bool:
    return any(BROKEN.search(text) for text in _texts(one))


def _hidden_characters(one: Checked, _: Context) -> bool:
    return any(HIDDEN.search(text) for text in _texts(one))


def _edge_space(one: Checked, _: Context) -> bool:
    return any(turn.content != turn.content.strip() for turn in one.answers if turn.content.strip())


def _echo(one: Checked, _: Context) -> bool:
    turns = one.conversation.messages
    return any(
        a.role == "user" and b.role == "assistant" and a.content.strip() == b.content.strip() != ""
        for a, b in pairwise(turns)
    )


def _open_end(one: Checked, _: Context) -> bool:
    return bool(one.conversation.messages) and one.conversation.messages[-1].role != "assistant"


ROW_CHECKS = (
    RowCheck(
        "nothing-trained",
        "error",
        "without any trained token",
        "Look at them with `lorimer data show`; give them an answer or delete them.",
        _nothing_trained,
    ),
    RowCheck(
        "end-not-trained",
        "error",
        "without an end of turn among the trained tokens: the model would not learn to stop",
        "Give a template that closes each turn with the base's end token as `data.chat_template`.",
        _end_not_trained,
    ),
    RowCheck(
        "double-bos",
        "error",
        "with two bos tokens at the beginning",
        "Take the bos token out of the texts or of the chat template.",
        _double_bos,
    ),
    RowCheck(
        "all-trained",
        "warning",
        "trained on every token, the question too",
        "Look at them with `lorimer data show`; set `data.train_on: all` if this is meant.",
        _all_trained,
    ),
    RowCheck(
        "empty-answer",
        "warning",
        "with an empty answer: only the end of turn is trained",
        "Give the answers or delete the rows, unless silence is what the model should learn.",
        _empty_answer,
    ),
    RowCheck(
        "empty-question",
        "warning",
        "with an empty user message",
        "Mend or delete the rows.",
        _empty_question,
    ),
    RowCheck(
        "not-shown",
        "warning",
        "with parts that the chat template leaves out: the model never sees them",
        "Give a template that shows them as `data.chat_template`, or take them out of the rows.",
        _not_shown,
    ),
    RowCheck(
        "rendered-text",
        "warning",
        "of plain text that spells control tokens, which are read as ordinary text",
        "If these are rendered chats, give the chats as `messages`.",
        _text_with_markers,
    ),
    RowCheck(
        "placeholder",
        "warning",
        "with a template's placeholder left in the text",
        "Fill them in where the rows were made, or delete the rows.",
        _placeholder,
    ),
    RowCheck(
        "broken-text",
        "warning",
        "with text that was read in a wrong encoding (as Ã© for é)",
        "`--fix` reads what can be read again as UTF-8; else make the rows again.",
        _broken_text,
    ),
    RowCheck(
        "hidden-characters",
        "note",
        "with characters that cannot be seen (control characters, zero-width space, BOM)",
        "`--fix` takes them out.",
        _hidden_characters,
    ),
    RowCheck(
        "edge-space",
        "note",
        "with white space around an answer: the model learns to write it",
        "`--fix` takes it away.",
        _edge_space,
    ),
    RowCheck(
        "echo",
        "note",
        "whose answer repeats the question",
        "Nothing to do if this is the task.",
        _echo,
    ),
    RowCheck(
        "control-markers",
        "note",
        "spelling control tokens of the base, which are read as ordinary text",
        "Nothing to do if the texts are about such tokens; else take them out.",
        _spells_markers,
    ),
    RowCheck(
        "role-twice",
        "note",
        "with two user or two assistant messages in a row",
        "Join them if the chat is meant to alternate.",
        _role_twice,
    ),
    RowCheck(
        "late-system",
        "note",
        "with a system message that is not the first",
        "Put it first: many chat templates drop or refuse it elsewhere.",
        _late_system,
    ),
    RowCheck(
        "open-end",
        "note",
        "without an answer at the end: what follows the last answer is not trained",
        "Nothing to do, or cut the rows after their last answer.",
        _open_end,
    ),
)


# What of these rows is named in the message, the most frequent first.
NAMED = {"control-markers": _markers, "rendered-text": _markers, "not-shown": _dropped}


def row_findings(name: str, rows: Sequence[Checked], context: Context) -> list[Finding]:
    findings = []
    for one in ROW_CHECKS:
        hit = [row for row in rows if one.applies(row, context)]
        if not hit:
            continue
        severity = one.severity
        if one.code == "end-not-trained" and len(hit) <= UNENDED_SHARE * len(rows):
            severity = "warning"
        message = f"{name}: {_rows(len(hit))} {one.message}"
        if one.code in NAMED:
            named = Counter(part for row in hit for part in set(NAMED[one.code](row, context)))
            message += f" ({', '.join(part for part, _ in named.most_common(3))})"
        findings.append(Finding(one.code, severity, message, tuple(row.place for row in hit), one.fix))
    return findings


def too_long(name: str, rows: Sequence[Checked], context: Context) -> list[Finding]:
    """Rows over the limit, and what training does with them."""
    config = context.config
    examples = [example for one in rows for example in one.examples]
    long = [example for example in examples if len(example.ids) > config.max_tokens]
    if not long or name == "test":
        return []
    longest = max(len(example.ids) for example in long)
    done = {
        "error": "training refuses to start",
        "drop": "left out",
        "truncate": "cut at the end",
    }
    found = [
        Finding(
            "too-long",
            "error" if config.too_long == "error" else "warning",
            f"{name}: {_rows(len(long))} over {config.max_tokens} tokens (longest: {longest}): "
            f"{done[config.too_long]}",
            tuple(example.place for example in long),
            f"Set `data.max_tokens` to {longest} or more to keep them whole.",
        )
    ]
    lost = [one for one in long if one.trained.any() and not one.trained[: config.max_tokens].any()]
    if lost and config.too_long == "truncate":
        message = f"{name}: {_rows(len(lost))} with every trained token cut off, left out"
        fix = "Raise `data.max_tokens`, or shorten what comes before the answer."
        found.append(Finding("answer-cut-off", "warning", message, tuple(one.place for one in lost), fix))
    return found


def _turns_key(messages: Iterable[Message]) -> list[Any]:
    return [[turn.role, turn.content, turn.tool_calls, dict(turn.extra)] for turn in messages]


def _row_hash(one: Checked) -> str:
    """Equal for rows of one content, in whatever format, case and spacing they were written."""
    talk = one.conversation
    return row_key([_turns_key(talk.messages), talk.tools, talk.text])


def _prompt_and_answer(one: Checked) -> tuple[str, str] | None:
    """Exact texts up to the last answer, and that answer."""
    messages = one.conversation.messages
    if not one.answers:
        return None
    last = max(i for i, turn in enumerate(messages) if turn.role == "assistant")
    prompt = repr((_turns_key(messages[:last]), one.conversation.tools))
    return prompt, row_key(_turns_key(messages[last : last + 1]))


def within(name: str, rows: Sequence[Checked]) -> list[Finding]:
    """Rows of one split against each other: repeated, contradicting, of several formats."""
    first: dict[str, str] = {}
    repeats = []
    answers: dict[str, dict[str, str]] = {}
    for one in rows:
        key = _row_hash(one)
        if key in first:
            repeats.append(f"{one.place} = {first[key]}")
        first.setdefault(key, one.place)
        pair = _prompt_and_answer(one)
        if pair:
            answers.setdefault(pair[0], {}).setdefault(pair[1], one.place)
    against = [place for given in answers.values() if len(given) > 1 for place in given.values()]
    found = []
    if repeats:
        message = f"{name}: {_rows(len(repeats))} equal to an earlier row"
        fix = "Delete them, unless they are meant to count more."
        found.append(Finding("duplicate", "warning", message, tuple(repeats), fix))
    if against:
        message = f"{name}: {_rows(len(against))} with different answers to the same prompt"
        fix = "Keep one answer to each prompt if there is one right answer."
        found.append(Finding("contradiction", "warning", message, tuple(against), fix))
    found += _answers_alike(name, rows)
    formats = Counter(one.format for one in rows)
    if len(formats) > 1:
        shares = ", ".join(f"{count} {kind}" for kind, count in formats.most_common())
        fix = "Nothing to do if this is meant."
        found.append(
            Finding("mixed-formats", "note", f"{name}: rows of several formats: {shares}", (), fix)
        )
    return found


# From so many rows on, and such a share of them, what the others do differently is taken for a fault.
ENOUGH_ROWS, MOST_OF_THEM = 20, 0.9


def _answers_alike(name: str, rows: Sequence[Checked]) -> list[Finding]:
    """Answers that are JSON but for a few, or all the same."""
    last = {one.place: one.answers[-1].content for one in rows if one.answers and one.answers[-1].content}
    found: list[Finding] = []
    if len(last) < ENOUGH_ROWS:
        return found
    broken = [place for place, text in last.items() if not _is_json(text)]
    if broken and len(broken) <= (1 - MOST_OF_THEM) * len(last):
        message = f"{name}: {_rows(len(broken))} with an answer that is not JSON, as the others' are"
        found.append(Finding("json-broken", "warning", message, tuple(broken), "Mend or delete the rows."))
    text, count = Counter(last.values()).most_common(1)[0]
    if count > MOST_OF_THEM * len(last):
        message = f"{name}: {_rows(count)} of {len(last):,} have the same answer"
        fix = "Add rows with other answers: this one is learned whatever is asked."
        places = tuple(place for place, answer in last.items() if answer == text)
        found.append(Finding("one-answer", "warning", message, places, fix))
    return found


def _is_json(text: str) -> bool:
    """Whether an answer is a JSON object or list."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def between(parts: dict[str, list[Checked]]) -> list[Finding]:
    """Rows and prompts that are in two splits: what is measured on them proves nothing."""
    found = []
    for one, other in (("train", "test"), ("train", "valid"), ("valid", "test")):
        if one not in parts or other not in parts:
            continue
        known = {_row_hash(row): row.place for row in parts[one]}
        asked = {pair[0]: row.place for row in parts[one] if (pair := _prompt_and_answer(row))}
        rows, prompts = [], []
        for row in parts[other]:
            key, pair = _row_hash(row), _prompt_and_answer(row)
            if key in known:
                rows.append(f"{row.place} = {known[key]}")
            elif pair and pair[0] in asked:
                prompts.append(f"{row.place} ~ {asked[pair[0]]}")
        share = f"{_rows(len(rows))} of {len(parts[other]):,} also in {one}"
        if rows:
            severity: Severity = "error" if one == "train" else "warning"
            fix = f"Delete them from {one} or from {other}: a score on them proves nothing."
            found.append(Finding("shared", severity, f"{other}: {share}", tuple(rows), fix))
        if prompts:
            message = f"{other}: {_rows(len(prompts))} with a prompt of {one} and another answer"
            fix = "Check which answer is right."
            found.append(Finding("shared-prompt", "warning", message, tuple(prompts), fix))
        told = {place.split(" ")[0] for place in rows + prompts}
        near = [pair for pair in _nearly(parts[one], parts[other]) if pair.split(" ")[0] not in told]
        if near:
            message = f"{other}: {_rows(len(near))} asked nearly what a row of {one} is"
            fix = f"Delete them from {one} or from {other}, or split with `lorimer data split`."
            found.append(Finding("near-shared", "warning", message, tuple(near), fix))
    return found


def _nearly(ones: Sequence[Checked], others: Sequence[Checked]) -> list[str]:
    found = near_prompts(*([one.conversation.asked for one in part] for part in (ones, others)))
    return [f"{others[near.other].place} ~ {ones[near.one].place}" for near in found]


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
