"""Each trap of data is named by `lorimer data check` at its rows, or cannot be in a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.chat_families import template as template_of
from data.trap_rows import CANNOT, CHATML, FOUND, SOUND, Fall
from lorimer.config import DataConfig
from lorimer.data.checks import ROW_CHECKS
from lorimer.data.conversation import Conversation, Message
from lorimer.data.doctor import check
from lorimer.data.dropped import dropped
from lorimer.data.template import ChatTemplate
from lorimer.data.tokenizer import Tokenizer
from small_base import CONFIG, small_tokenizer_json

DATA_TRAPS = range(1, 35)
FALLS = [(number, fall) for number, falls in FOUND.items() for fall in falls]


def report_of(fall: Fall, rows: list[object], folder: Path) -> dict[str, list[int]]:
    """Code -> the lines that are named."""
    path = folder / "train.jsonl"
    given = [
        row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows
    ]
    path.write_bytes(b"".join(row + b"\n" for row in given))
    template = ChatTemplate(fall.template, Tokenizer(small_tokenizer_json(), CONFIG))
    report = check(DataConfig(train=str(path), **fall.settings), template)
    found: dict[str, list[int]] = {}
    for finding in report.findings:
        lines = [int(place.split(" ")[0].rpartition(":")[2]) for place in finding.places if ":" in place]
        found[finding.code] = sorted(found.get(finding.code, []) + lines)
    return found


def test_every_trap_of_data_has_its_checks_or_a_reason() -> None:
    assert sorted([*FOUND, *CANNOT]) == list(DATA_TRAPS)
    # And the other way round: each check of a row is there for a trap, but for those of a text's taste.
    used = {fall.check for _, fall in FALLS}
    assert {one.code for one in ROW_CHECKS} - used == {"edge-space", "echo"}


@pytest.mark.parametrize(
    ("name", "thought"),
    [("mistral v3", ""), ("mistral nemo", ""), ("deepseek r1", "why"), ("qwen3", "why")],
)
def test_what_a_template_shows_only_in_a_prompt_is_shown(name: str, thought: str) -> None:
    """The system text of Mistral's, the thought of R1's: the examples have them, the whole chat has not."""
    template = template_of(name)
    answer = Message("assistant", "x", extra={"reasoning_content": thought} if thought else {})
    talk = Conversation((Message("system", "Be terse."), Message("user", "q"), answer), None, None, "a:1")
    assert dropped(template, talk, template.examples(talk)) == []


@pytest.mark.trap(29)
def test_parts_that_no_prompt_shows_are_named() -> None:
    template = template_of("zephyr")
    call = {"type": "function", "function": {"name": "light", "arguments": {}}}
    tool = {"type": "function", "function": {"name": "light"}}
    answer = Message("assistant", "", (call,), {"reasoning_content": "why"})
    talk = Conversation((Message("user", "q"), answer, Message("assistant", "x")), (tool,), None, "a:1")
    assert dropped(template, talk, template.examples(talk)) == ["tools", "tool calls", "thoughts"]


@pytest.mark.parametrize(
    ("number", "fall"), FALLS, ids=[f"{number} {fall.check}" for number, fall in FALLS]
)
def test_rows_that_fall_into_a_trap_are_named(number: int, fall: Fall, tmp_path: Path) -> None:
    found = report_of(fall, [*SOUND[: fall.sound], *fall.rows], tmp_path)
    assert fall.check in found
    lines = found[fall.check]
    wanted = list(range(fall.sound + 1, fall.sound + 1 + len(fall.rows)))
    assert not lines or lines[-len(wanted) :] == wanted
    # A fault of the template is in the sound rows too; else these are not named.
    if fall.template == CHATML and fall.sound:
        assert fall.check not in report_of(fall, list(SOUND), tmp_path)
