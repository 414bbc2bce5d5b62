"""What is wrong with a data set, row by row, and what it comes to in tokens.

    check(config, template) -> Report: findings (error, warning, note) and totals of each split

Every row is read as training would read it, and reading goes on after a bad one. Then the checks of
checks.py look at the rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lorimer.config import DataConfig
from lorimer.data.checks import (
    SEVERITIES,
    Checked,
    Context,
    Finding,
    between,
    row_findings,
    too_long,
    within,
)
from lorimer.data.conversation import detect_format, to_conversation
from lorimer.data.prepare import marks_text, split_text
from lorimer.data.rows import Row, scan_rows, split_rows
from lorimer.data.template import ChatTemplate, Example
from lorimer.errors import DataError, UserError


@dataclass(slots=True)
class Totals:
    """One split. Tokens are those of the rows that are used: not left out, and as they are cut.

    rows       sound rows; those that cannot be read are findings
    used       what of them is trained on, or held out
    deciles    lengths in tokens of the sound rows: the shortest, 10 %, 20 %, ..., the longest
    longest    place of the longest row
    """

    rows: int = 0
    used: int = 0
    too_long: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    deciles: list[int] = field(default_factory=list)
    longest: str | None = None
    formats: dict[str, int] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Report:
    """All findings, errors first, and the totals of `train`, `valid` and `test` as they are given."""

    findings: list[Finding]
    totals: dict[str, Totals]
    max_tokens: int
    counted: bool  # whether there was a tokenizer to count tokens with

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "max_tokens": self.max_tokens,
            "totals": {
                name: asdict(part) | {"trained_share": part.trained_share}
                for name, part in self.totals.items()
            },
            "findings": [asdict(finding) | {"count": finding.count} for finding in self.findings],
        }


def check(
    config: DataConfig,
    template: ChatTemplate | None,
    *,
    eos_ids: Iterable[int] = (),
    seed: int = 0,
) -> Report:
    """Look through the rows that the settings name. Bad rows and files are findings, not exceptions.

    Without a template the checks that need tokens are left out. `eos_ids` are ids that end an answer
    besides the tokenizer's own, as the base's settings name them.
    """
    ends = frozenset([*eos_ids, *(template.tokenizer.eos_ids + template.end_ids if template else ())])
    context = Context(config, template, ends)
    bad = _BadRows()
    parts = {name: bad.sound(rows, context) for name, rows in _read_parts(config, seed, bad).items()}
    findings = bad.findings()
    totals = {}
    for name, rows in parts.items():
        totals[name] = _totals(name, rows, context)
        findings += _taken_apart(name, rows)
        findings += row_findings(name, rows, context)
        findings += too_long(name, rows, context)
        findings += within(name, rows)
        if not totals[name].used:
            fix = "Mend the rows named above, or raise `data.max_tokens`."
            findings.append(Finding("no-rows", "error", f"{name}: no row is left to use", (), fix))
    findings += between(parts)
    if template is not None and template.is_default:
        message = "the base has no chat template: the default (ChatML) is used"
        fix = "Take an instruct base, or give its template as `data.chat_template`."
        findings.append(Finding("default-template", "note", message, (), fix))
    if template is not None and template.marks_otherwise is not None:
        fix = "Nothing to do. `lorimer data show` shows what is trained."
        findings.append(Finding("marked-otherwise", "note", marks_text(template.marks_otherwise), (), fix))
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Report(findings, totals, config.max_tokens, template is not None)


def _taken_apart(name: str, rows: Sequence[Checked]) -> list[Finding]:
    """Chats of several examples: not a fault, but not what a reader of the file expects."""
    several = [one for one in rows if len(one.examples) > 1]
    if not several:
        return []
    message = split_text(name, len(several), sum(len(one.examples) for one in several))
    fix = "Nothing to do; with `data.train_on: last_assistant` there is one for each chat."
    return [Finding("split-chats", "note", message, tuple(one.place for one in several), fix)]


class _BadRows:
    """Rows and files that cannot be used, gathered by what is wrong with them."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], list[tuple[UserError, str]]] = {}

    def add(self, code: str, error: UserError, place: str | None = None) -> None:
        if place is None:
            place = f"{error.path}:{error.line}" if error.line else str(error.path or "")
        problem = error.problem.removeprefix(f"{place}: ")
        # Syntax errors differ in what they quote, others in which message of the row they are in.
        kind = "not JSON" if "not JSON" in problem else re.sub(r"\d+", "0", problem)
        self._groups.setdefault((code, kind), []).append((error, place))

    def findings(self) -> list[Finding]:
        found = []
        for (code, _), cases in self._groups.items():
            first, place = cases[0]
            message = first.problem.removeprefix(f"{place}: ")
            places = tuple(place for _, place in cases if place)
            found.append(Finding(code, "error", message, places, first.fix or "Mend or delete the rows."))
        return found

    def readable(self, source: str | list[str]) -> list[Row]:
        rows = []
        for row in scan_rows(source):
            if isinstance(row, DataError):
                self.add("unreadable", row)
            else:
                rows.append(row)
        return rows

    def sound(self, rows: Sequence[Row], context: Context) -> list[Checked]:
        found = []
        for row in rows:
            config, template = context.config, context.template
            try:
                kind = detect_format(row) if config.format == "auto" else config.format
                conversation = to_conversation(row, kind, config.system)
                examples = template.examples(conversation, config.train_on) if template else []
                found.append(Checked(kind, conversation, tuple(examples)))
            except UserError as error:
                code = "bad-row" if isinstance(error, DataError) else "template"
                self.add(code, error, row.place)
        return found


def _read_parts(config: DataConfig, seed: int, bad: _BadRows) -> dict[str, list[Row]]:
    """The splits as training makes them: files, or fractions of the training rows."""
    parts = {"train": bad.readable(config.train)}
    for name, source in (("valid", config.valid), ("test", config.test)):
        if source:
            parts[name] = bad.readable(source)
    if parts["train"] and (config.valid_fraction or config.test_fraction):
        try:
            train, valid, test = split_rows(
                parts["train"], config.valid_fraction, config.test_fraction, seed
            )
        except DataError as error:
            bad.add("split", error)
            return parts
        parts |= {"train": train} | ({"valid": valid} if valid else {}) | ({"test": test} if test else {})
    return {name: parts[name] for name in ("train", "valid", "test") if name in parts}


def _totals(name: str, rows: Sequence[Checked], context: Context) -> Totals:
    totals = Totals(rows=len(rows), used=len(rows))
    totals.formats = dict(Counter(one.format for one in rows))
    totals.roles = dict(Counter(turn.role for one in rows for turn in one.conversation.messages))
    examples = [example for one in rows for example in one.examples]
    if not examples:
        return totals
    lengths = [len(example.ids) for example in examples]
    totals.deciles = [int(n) for n in np.quantile(lengths, np.linspace(0, 1, 11), method="nearest")]
    totals.longest = examples[int(np.argmax(lengths))].place
    limit = context.config.max_tokens
    totals.too_long = sum(length > limit for length in lengths)
    if name != "test":  # held-out rows are answered, not trained on: the limit is not theirs
        parts = [[e.trained[:limit] for e in one.examples if _fits(e, context)] for one in rows]
        parts = [[flags for flags in part if flags.any()] for part in parts]
    else:
        parts = [[example.trained for example in one.examples] for one in rows]
    trained = [flags for part in parts for flags in part]
    totals.used = sum(bool(part) for part in parts)
    totals.tokens = sum(len(flags) for flags in trained)
    totals.trained_tokens = sum(int(flags.sum()) for flags in trained)
    return totals


def _fits(example: Example, context: Context) -> bool:
    return len(example.ids) <= context.config.max_tokens or context.config.too_long == "truncate"
