"""Repaired copies of data files: what a check found is left out or mended; the originals stay."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorimer.config import DataConfig
from lorimer.data.checks import BROKEN, HIDDEN
from lorimer.data.doctor import Report
from lorimer.data.rows import Row, scan_rows
from lorimer.errors import DataError, UserError
from lorimer.storage import make_folder, write_file

# Findings whose rows are left out. Of rows in two splits it is the first's, so that what is measured stays.
LEFT_OUT = (
    "unreadable",
    "bad-row",
    "template",
    "nothing-trained",
    "end-not-trained",
    "double-bos",
    "duplicate",
    "empty-answer",
    "empty-question",
    "placeholder",
    "json-broken",
    "answer-cut-off",
)
LEFT_OUT_OF_THE_OTHER = ("shared", "near-shared")
ANSWERS = ("output", "completion", "response", "answer")
OWN_ROLES = ("assistant", "gpt", "model", "bot", "chatgpt")


@dataclass(frozen=True, slots=True)
class Mended:
    """One split: the file that was written, rows before and after, and why rows went or changed."""

    path: Path
    before: int
    after: int
    left_out: dict[str, int]
    changed: dict[str, int]


def mend(config: DataConfig, report: Report, out: Path) -> dict[str, Mended]:
    """Write a repaired JSONL file of each split into the folder `out`.

    Raises UserError if there is one already, StorageError if it cannot be written.
    """
    parts: dict[str, str | list[str]] = {"train": config.train}
    parts |= {name: source for name in ("valid", "test") if (source := getattr(config, name))}
    for name in parts:
        if (out / f"{name}.jsonl").exists():
            raise UserError(
                "there is something there already", fix="Choose a new folder.", path=out / f"{name}.jsonl"
            )
    gone, touched = _by_place(report)
    make_folder(out)
    return {name: _write(out / f"{name}.jsonl", source, gone, touched) for name, source in parts.items()}


def _by_place(report: Report) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Place -> why its row is left out; place -> what is mended in it."""
    gone: dict[str, str] = {}
    touched: dict[str, set[str]] = {}
    for finding in report.findings:
        for pair in finding.places:
            place, _, other = pair.partition(" ")
            if finding.code in LEFT_OUT:
                gone.setdefault(place, finding.code)
            elif finding.code in LEFT_OUT_OF_THE_OTHER:
                gone.setdefault(other.lstrip("=~ "), finding.code)
            elif finding.code in MENDERS:
                touched.setdefault(place, set()).add(finding.code)
    return gone, touched


def _write(
    path: Path, source: str | list[str], gone: dict[str, str], touched: dict[str, set[str]]
) -> Mended:
    lines: list[str] = []
    left_out: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    before = 0
    for row in scan_rows(source):
        before += 1
        if isinstance(row, DataError):
            left_out["unreadable"] += 1
        elif row.place in gone:
            left_out[gone[row.place]] += 1
        else:
            codes = touched.get(row.place, set())
            value = _mended(row, codes)
            if "broken-text" in codes and _each(value, lambda text: BROKEN.sub("", text)) != value:
                left_out["broken-text"] += 1
                continue
            changed.update(codes)
            lines.append(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    write_file(path, "".join(lines))
    return Mended(path, before, len(lines), dict(left_out), dict(changed))


def _mended(row: Row, codes: set[str]) -> Any:
    value = copy.deepcopy(row.value)
    for code in sorted(codes):
        value = MENDERS[code](value)
    return value


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """The value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    return [_each(item, change) for item in value] if isinstance(value, list) else value


def _without_hidden(value: Any) -> Any:
    return _each(value, lambda text: HIDDEN.sub("", text))


def _read_again(value: Any) -> Any:
    return _each(value, lambda text: _as_utf8(text) if BROKEN.search(text) else text)


def _as_utf8(text: str) -> str:
    """The text of the bytes that were read as Windows-1252 or Latin-1; as it is if they are no UTF-8."""
    try:
        return b"".join(map(_byte, text)).decode("utf-8")
    except UnicodeError:
        return text


def _byte(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:  # five bytes have no character there, and are read as in Latin-1
        return character.encode("latin-1")


def _turns(value: dict[str, Any]) -> list[dict[str, Any]]:
    turns = value.get("messages") or value.get("conversations") or []
    return [turn for turn in turns if isinstance(turn, dict)]


def _is_answer(turn: dict[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in OWN_ROLES


def _without_edges(value: dict[str, Any]) -> dict[str, Any]:
    for turn in filter(_is_answer, _turns(value)):
        for key in ("content", "value"):
            if isinstance(turn.get(key), str):
                turn[key] = turn[key].strip()
    for key in ANSWERS:
        if isinstance(value.get(key), str):
            value[key] = value[key].strip()
    return value


def _closed(value: dict[str, Any]) -> dict[str, Any]:
    """Up to the last answer."""
    for key in ("messages", "conversations"):
        turns = value.get(key)
        if isinstance(turns, list):
            last = max((i for i, turn in enumerate(turns) if _is_answer(turn)), default=len(turns) - 1)
            value[key] = turns[: last + 1]
    return value


MENDERS = {
    "broken-text": _read_again,
    "hidden-characters": _without_hidden,
    "edge-space": _without_edges,
    "open-end": _closed,
}
