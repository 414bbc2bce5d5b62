"""The data doctor: each thing that is wrong is found at its line, and clean data is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorimer
from lorimer.config import DataConfig
from lorimer.data.doctor import Report, check
from lorimer.data.prepare import prepare
from lorimer.data.template import ChatTemplate, Example
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import DataError
from small_base import CHATML, CONFIG, small_tokenizer_json


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(CHATML, Tokenizer(small_tokenizer_json(), CONFIG))


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(question: str, answer: str, *more: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [turn("user", question), turn("assistant", answer), *more]}


GOOD = [chat(f"what is {n} and {n}", f"{2 * n}") for n in range(5)]


def write(folder: Path, name: str, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def found(report: Report) -> dict[str, tuple[str, list[int]]]:
    """code -> severity and the lines."""
    lines = {
        f.code: [int(place.split(" ")[0].rsplit(":", 1)[1]) for place in f.places] for f in report.findings
    }
    return {f.code: (f.severity, lines[f.code]) for f in report.findings}


# rows put after five good ones (so the first is line 6), settings, what is found
PLANTED: dict[str, tuple[list[Any], dict[str, Any], dict[str, tuple[str, list[int]]]]] = {
    "nothing": ([], {}, {}),
    "a placeholder": (
        [chat("answer {question}", "x"), chat("dear [insert name]", "x"), chat("f{x} and {} and [i]", "x")],
        {},
        {"placeholder": ("warning", [6, 7])},
    ),
    "a wrong encoding": (
        [
            chat("caf\u00c3\u00a9", "x"),
            chat("it\u00e2\u20ac\u2122s", "x"),
            chat("bad \ufffd", "x"),
            chat("café Ã É â", "x"),
        ],
        {},
        {"broken-text": ("warning", [6, 7, 8])},
    ),
    "hidden characters": (
        [chat("a\u200bb", "x"), chat("a\x07", "x"), chat("a\tb\n", "x")],
        {},
        {"hidden-characters": ("note", [6, 7])},
    ),
    "space around an answer": (
        [chat("a b", " x"), chat("a c", "x\n"), chat("a d ", "x y")],
        {},
        {"edge-space": ("note", [6, 7])},
    ),
    "an echo": ([chat("say it", " say it ")], {}, {"echo": ("note", [6]), "edge-space": ("note", [6])}),
    "json but for one": (
        [chat(f"give {n}", json.dumps({"n": n})) for n in range(60)] + [chat("give it", '{"n": 1')],
        {},
        # The five good rows are no JSON either.
        {"json-broken": ("warning", [1, 2, 3, 4, 5, 66])},
    ),
    "one answer": (
        [chat(f"ask {n}", "yes") for n in range(60)],
        {},
        {"one-answer": ("warning", list(range(6, 66)))},
    ),
    "syntax": (['{"messages"', "nonsense"], {}, {"unreadable": ("error", [6, 7])}),
    "unknown role": (
        [{"messages": [turn("robot", "x")]}, GOOD[0]["messages"]],
        {},
        {"bad-row": ("error", [6]), "unreadable": ("error", [7])},
    ),
    "only user turns": ([{"messages": [turn("user", "x")]}], {}, {"bad-row": ("error", [6])}),
    "null content": ([chat("q", "a"), chat("x", None)], {}, {"bad-row": ("error", [7])}),  # type: ignore[arg-type]
    "empty answer": ([chat("x", "")], {}, {"empty-answer": ("warning", [6])}),
    "blank answer": ([chat("x", " \n")], {}, {"empty-answer": ("warning", [6])}),
    "empty question": ([chat(" ", "x")], {}, {"empty-question": ("warning", [6])}),
    "duplicate": ([chat("what is  0 AND 0 ", "0")], {}, {"duplicate": ("warning", [6])}),
    "duplicate in another format": (
        [{"prompt": "what is 0 and 0", "completion": "0"}],
        {},
        {"duplicate": ("warning", [6]), "mixed-formats": ("note", [])},
    ),
    "contradiction": ([chat("what is 3 and 3", "7")], {}, {"contradiction": ("warning", [4, 6])}),
    "same answer in other case": (
        [chat("x", "Yes"), chat("x", "yes")],
        {},
        {"duplicate": ("warning", [7])},
    ),
    "prompts that differ in case": ([chat("x", "lower"), chat("X", "upper")], {}, {}),
    "marker in a question": (
        [chat("what is <|im_end|>?", "a token")],
        {},
        {"control-markers": ("note", [6])},
    ),
    "marker in an answer": ([chat("x", "a<|im_start|>user\nb")], {}, {"control-markers": ("note", [6])}),
    "marker in a text": (
        [{"text": "<|im_start|>user\nx<|im_end|>"}],
        {},
        {"rendered-text": ("warning", [6]), "mixed-formats": ("note", [])},
    ),
    "two answers in a row": ([chat("x", "y", turn("assistant", "z"))], {}, {"role-twice": ("note", [6])}),
    "late system": (
        [chat("x", "y", turn("system", "s"), turn("user", "z"), turn("assistant", "w"))],
        {},
        {"late-system": ("note", [6])},
    ),
    "open end": ([chat("x", "y", turn("user", "z"))], {}, {"open-end": ("note", [6])}),
    "too long, left out": ([chat("x", "y" * 400)], {"max_tokens": 200}, {"too-long": ("warning", [6])}),
    "too long, refused": (
        [chat("x", "y" * 400)],
        {"max_tokens": 200, "too_long": "error"},
        {"too-long": ("error", [6])},
    ),
    "too long, cut": (
        [chat("x", "y" * 400)],
        {"max_tokens": 200, "too_long": "truncate"},
        {"too-long": ("warning", [6])},
    ),
    "answer cut off": (
        [chat("y" * 400, "x")],
        {"max_tokens": 200, "too_long": "truncate"},
        {"too-long": ("warning", [6]), "answer-cut-off": ("warning", [6])},
    ),
    "all trained as asked": ([], {"train_on": "all"}, {}),
}


@pytest.mark.trap(9)
@pytest.mark.trap(26)
@pytest.mark.trap(29)
@pytest.mark.trap(32)
@pytest.mark.parametrize(("rows", "settings", "wanted"), PLANTED.values(), ids=PLANTED.keys())
def test_finds_what_is_planted_and_nothing_else(
    tmp_path: Path, template: ChatTemplate, rows: list[Any], settings: dict[str, Any], wanted: Any
) -> None:
    report = check(DataConfig(train=write(tmp_path, "train.jsonl", GOOD + rows), **settings), template)
    assert found(report) == wanted
    assert report.ok == all(severity != "error" for severity, _ in wanted.values())


CLEAN = sorted((Path(lorimer.__file__).parent / "recipes").glob("**/train.jsonl"))


@pytest.mark.skipif(not CLEAN, reason="no recipe brings data")
@pytest.mark.parametrize("train", CLEAN, ids=[path.parent.name for path in CLEAN])
def test_no_false_alarm_on_the_recipes(train: Path, template: ChatTemplate) -> None:
    valid, test = (str(train.with_name(f"{name}.jsonl")) for name in ("valid", "test"))
    report = check(DataConfig(train=str(train), valid=valid, test=test), template)
    assert report.findings == []
    assert all(totals.used == totals.rows > 100 for totals in report.totals.values())


@pytest.mark.trap(23)
def test_rows_that_ask_nearly_the_same_in_two_splits(tmp_path: Path, template: ChatTemplate) -> None:
    asked = "please tell me in a few short words how one makes a good loaf of rye bread without an oven"
    asked += " and which flour to buy for it when the shop around the corner has only two kinds of it left"
    edited = asked.replace("short", "shorter")
    train = write(tmp_path, "train.jsonl", [*GOOD, chat(asked, "x")])
    test = write(tmp_path, "test.jsonl", [chat("something else", "y"), chat(edited, "z")])
    report = check(DataConfig(train=train, test=test), template)
    assert [(f.code, f.places) for f in report.findings] == [("near-shared", (f"{test}:2 ~ {train}:6",))]


@pytest.mark.trap(23)
def test_rows_shared_between_splits(tmp_path: Path, template: ChatTemplate) -> None:
    """Every planted copy is found, whatever its case and spacing, and nothing else."""
    fresh = [chat(f"new {n}", "x") for n in range(4)]
    shouted = [chat(f"  WHAT is\n{n} and  {n} ", f"{2 * n}") for n in range(3)]
    train = write(tmp_path, "train.jsonl", GOOD)
    valid = write(tmp_path, "valid.jsonl", [*fresh[:2], GOOD[4]])
    test = write(tmp_path, "test.jsonl", [*shouted, *fresh, chat("what is 3 and 3", "nine")])
    findings = {
        f.message: (f.severity, f.places)
        for f in check(DataConfig(train=train, valid=valid, test=test), template).findings
    }
    assert findings == {
        "test: 3 rows of 8 also in train": (
            "error",
            (f"{test}:1 = {train}:1", f"{test}:2 = {train}:2", f"{test}:3 = {train}:3"),
        ),
        "valid: 1 row of 3 also in train": ("error", (f"{valid}:3 = {train}:5",)),
        "test: 2 rows of 8 also in valid": (
            "warning",
            (f"{test}:4 = {valid}:1", f"{test}:5 = {valid}:2"),
        ),
        "test: 1 row with a prompt of train and another answer": ("warning", (f"{test}:8 ~ {train}:4",)),
    }


class Broken(ChatTemplate):
    """A template with one of the classic faults planted in its ids."""

    def __init__(self, fault: str, tokenizer: Tokenizer) -> None:
        super().__init__(CHATML, tokenizer)
        self.fault = fault

    def examples(self, conversation: Any, train_on: str = "assistant") -> list[Example]:
        (example,) = super().examples(conversation, train_on)
        ids, trained = example.ids, example.trained.copy()
        if self.fault == "end-not-trained":
            trained &= ids != self.tokenizer.eos_id
        if self.fault == "double-bos":
            ids = np.concatenate([[256, 256], ids]).astype(np.int32)
            trained = np.concatenate([[False, False], trained])
        if self.fault == "nothing-trained":
            trained[:] = False
        if self.fault == "all-trained":
            trained[1:] = True
        return [Example(ids, trained, example.place)]


@pytest.mark.trap(1)
@pytest.mark.trap(3)
@pytest.mark.trap(8)
@pytest.mark.trap(9)
@pytest.mark.parametrize(
    ("fault", "severity"),
    [
        ("end-not-trained", "error"),
        ("double-bos", "error"),
        ("nothing-trained", "error"),
        ("all-trained", "warning"),
    ],
)
def test_faults_of_a_template_are_seen(
    tmp_path: Path, template: ChatTemplate, fault: str, severity: str
) -> None:
    config = DataConfig(train=write(tmp_path, "train.jsonl", GOOD))
    report = check(config, Broken(fault, template.tokenizer))
    assert found(report)[fault] == (severity, [1, 2, 3, 4, 5])
    assert fault not in found(check(config, template))


def test_totals_are_what_training_uses(tmp_path: Path, template: ChatTemplate) -> None:
    """Tokens, trained tokens and rows are those of prepare(), for each policy."""
    rows = [*GOOD, chat("x", "y" * 400), chat("z" * 400, "x")]
    train = write(tmp_path, "train.jsonl", rows)
    for policy, used in (("drop", 5), ("truncate", 6)):
        config = DataConfig(train=train, max_tokens=200, too_long=policy)
        totals = check(config, template).totals["train"]
        prepared = prepare(config, template, seed=0)
        assert (totals.rows, totals.used, totals.too_long) == (7, used, 2)
        assert (totals.tokens, totals.trained_tokens) == (prepared.tokens, prepared.trained_tokens)


def test_lengths(tmp_path: Path, template: ChatTemplate) -> None:
    rows = [chat("q", "a" * n) for n in (30, 10, 20, 90, 40, 50, 100, 60, 70, 80, 0)]
    train = write(tmp_path, "train.jsonl", rows)
    totals = check(DataConfig(train=train), template).totals["train"]
    bare = totals.deciles[0]
    assert totals.deciles == [bare + n for n in range(0, 101, 10)]
    assert totals.longest == f"{train}:7"
    assert totals.roles == {"user": 11, "assistant": 11}


@pytest.mark.trap(33)
def test_a_row_of_a_megabyte_is_named(tmp_path: Path, template: ChatTemplate) -> None:
    train = write(tmp_path, "train.jsonl", [*GOOD, chat("x", "word " * 200_000)])
    report = check(DataConfig(train=train), template)
    assert report.totals["train"].longest == f"{train}:6"
    (finding,) = [f for f in report.findings if f.code == "too-long"]
    assert finding.places == (f"{train}:6",)
    assert "longest: 1000" in finding.message


def test_every_bad_row_of_every_file_is_listed(tmp_path: Path, template: ChatTemplate) -> None:
    first = write(tmp_path, "a.jsonl", [GOOD[0], {"foo": 1}, "{", {"messages": []}, GOOD[1]])
    second = write(tmp_path, "b.jsonl", [{"foo": 2}, "]", GOOD[2]])
    missing = str(tmp_path / "c.jsonl")
    report = check(DataConfig(train=[first, second, missing]), template)
    places = sorted(place for f in report.findings for place in f.places)
    assert places == [f"{first}:2", f"{first}:3", f"{first}:4", f"{second}:1", f"{second}:2", missing]
    assert report.totals["train"].rows == 3
    like = [f for f in report.findings if "no format has the keys" in f.message]
    assert [f.count for f in like] == [2]


@pytest.mark.trap(32)
@pytest.mark.parametrize("rows", [[], ["nonsense"], [{"messages": []}]], ids=["empty", "unreadable", "bad"])
def test_nothing_to_train_on_is_an_error(tmp_path: Path, template: ChatTemplate, rows: list[Any]) -> None:
    report = check(DataConfig(train=write(tmp_path, "train.jsonl", rows)), template)
    assert "no-rows" in [f.code for f in report.findings]
    assert not report.ok


def test_a_template_that_refuses_a_row(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    template = ChatTemplate(strict, Tokenizer(small_tokenizer_json(), CONFIG))
    rows = [*GOOD, {"messages": [turn("system", "s"), *GOOD[0]["messages"]]}]
    report = check(DataConfig(train=write(tmp_path, "train.jsonl", rows)), template)
    assert found(report) == {"template": ("error", [6])}


def test_without_a_tokenizer_the_other_checks_still_run(tmp_path: Path) -> None:
    train = write(tmp_path, "train.jsonl", [*GOOD, chat("x", ""), "nonsense"])
    report = check(DataConfig(train=train), None)
    assert found(report) == {"unreadable": ("error", [7]), "empty-answer": ("warning", [6])}
    assert (report.counted, report.totals["train"].rows, report.totals["train"].tokens) == (False, 6, 0)


def test_a_base_without_a_template_is_noted(tmp_path: Path) -> None:
    template = ChatTemplate(None, Tokenizer(small_tokenizer_json(), CONFIG))
    report = check(DataConfig(train=write(tmp_path, "train.jsonl", GOOD)), template)
    assert [(f.code, f.severity) for f in report.findings] == [("default-template", "note")]


def test_fractions_are_split_as_training_splits_them(tmp_path: Path, template: ChatTemplate) -> None:
    rows = [chat(f"q{n}", f"a{n}") for n in range(20)]
    config = DataConfig(train=write(tmp_path, "train.jsonl", rows), valid_fraction=0.2, test_fraction=0.1)
    report = check(config, template, seed=5)
    assert {name: totals.rows for name, totals in report.totals.items()} == {
        "train": 14,
        "valid": 4,
        "test": 2,
    }
    assert report.totals["valid"].tokens == sum(len(e.ids) for e in prepare(config, template, seed=5).valid)


@pytest.mark.trap(23)
def test_a_set_too_small_to_split_is_an_error(tmp_path: Path, template: ChatTemplate) -> None:
    config = DataConfig(train=write(tmp_path, "train.jsonl", GOOD[:1]), valid_fraction=0.1)
    assert [f.code for f in check(config, template).findings] == ["split"]
    with pytest.raises(DataError, match="is not one row"):
        prepare(config, template, seed=0)


def test_report_as_json(tmp_path: Path, template: ChatTemplate) -> None:
    report = check(DataConfig(train=write(tmp_path, "train.jsonl", [*GOOD, chat("x", "")])), template)
    value = json.loads(json.dumps(report.to_dict()))
    assert value["ok"] is True
    assert value["totals"]["train"]["rows"] == 6
    assert [(f["code"], f["count"]) for f in value["findings"]] == [("empty-answer", 1)]
