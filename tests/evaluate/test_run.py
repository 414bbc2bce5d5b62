"""Scores of a fake model whose losses and answers are known."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorimer.data.conversation import Conversation, Message
from lorimer.errors import ConfigError, DataError, DivergenceError, GateError
from lorimer.evaluate import run as run_module
from lorimer.evaluate.run import (
    Scores,
    changed_answers,
    compare_scores,
    evaluate_rows,
    gate,
    read_scores,
)
from lorimer.evaluate.show import answers_text, comparison_table, comparison_text, printable, scores_text


class FakeTemplate:
    """A token for each character; those of answers, or of a plain text, are trained."""

    def examples(self, conversation: Conversation, train_on: str = "assistant") -> list[Any]:
        parts = [(m.content, m.role == "assistant") for m in conversation.messages]
        parts = parts if conversation.text is None else [(conversation.text, True)]
        if train_on == "last_assistant":
            parts = [(text, trained and i == len(parts) - 1) for i, (text, trained) in enumerate(parts)]
        trained = [flag for text, flag in parts for _ in text]
        ids = np.array([ord(c) for text, _ in parts for c in text], np.int32)
        return [SimpleNamespace(ids=ids, trained=np.array(trained, bool), place=conversation.place)]


class FakeModel:
    """Answers by a table on the last message; a token's loss is its number over 100, times `scale`."""

    def __init__(self, answers: dict[str, str], scale: float = 1.0) -> None:
        self.template: Any = FakeTemplate()
        self.answers, self.scale = answers, scale
        self.calls: list[tuple[list[Sequence[Message]], dict[str, Any]]] = []

    def token_losses(self, examples: Sequence[Any]) -> list[Any]:
        return [(e.ids[e.trained] / 100 * self.scale).astype(np.float32) for e in examples]

    def generate(self, prompt: Any, **settings: Any) -> list[str]:
        self.calls.append((list(prompt), settings))
        return [self.answers.get(messages[-1].content, "?") for messages in prompt]


def chat(*contents: str, place: str = "f:1", **more: Any) -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    messages = tuple(Message(role, text) for role, text in zip(roles, contents, strict=False))
    return Conversation(messages, more.get("tools"), None, place)


ROWS = [
    chat(f"question {'x' * (i * 7 % 5)}{i}", f"answer {i}" * (1 + i % 3), place=f"f:{i}") for i in range(9)
]
ANSWERS = {row.messages[0].content: row.messages[1].content for row in ROWS[:6]}


def test_rows_keep_their_order_with_what_was_asked_wanted_and_answered() -> None:
    scores = evaluate_rows(FakeModel(ANSWERS), ROWS, batch_size=2)
    assert [row.place for row in scores.rows] == [f"f:{i}" for i in range(9)]
    assert [row.prompt for row in scores.rows] == [row.messages[0].content for row in ROWS]
    assert [row.reference for row in scores.rows] == [row.messages[1].content for row in ROWS]
    assert [row.prediction for row in scores.rows] == [*ANSWERS.values(), "?", "?", "?"]
    nats = [sum(map(ord, row.messages[1].content)) / 100 for row in ROWS]
    assert [row.loss_sum for row in scores.rows] == pytest.approx(nats, rel=1e-6)
    assert scores.metrics["exact_match"] == pytest.approx(6 / 9)
    assert "json_f1" not in scores.metrics


@pytest.mark.trap(22)
def test_loss_is_the_sum_over_tokens_not_a_mean_of_means() -> None:
    rows = [chat("q", "a"), chat("q", "b" * 99)]
    scores = evaluate_rows(FakeModel({}), rows)
    wanted = (ord("a") + 99 * ord("b")) / 100 / 100
    assert scores.metrics["loss"] == pytest.approx(wanted, rel=1e-6)
    assert scores.metrics["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-6)
    assert [row.trained_tokens for row in scores.rows] == [1, 99]


@pytest.mark.trap(22)
def test_scores_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = evaluate_rows(FakeModel(ANSWERS), ROWS, batch_size=1)
    for batch_size in (2, 3, 9, 100):
        assert evaluate_rows(FakeModel(ANSWERS), ROWS, batch_size=batch_size) == wanted
    monkeypatch.setattr(run_module, "LOSS_ROWS", 2)
    assert evaluate_rows(FakeModel(ANSWERS), ROWS, batch_size=4) == wanted


def test_batches_hold_rows_of_like_length_and_settings_reach_the_model() -> None:
    model = FakeModel(ANSWERS)
    evaluate_rows(model, ROWS, batch_size=4, max_new_tokens=17)
    assert [len(prompts) for prompts, _ in model.calls] == [4, 4, 1]
    by_question = {row.messages[0].content: sum(len(m.content) for m in row.messages) for row in ROWS}
    lengths = [by_question[p[-1].content] for prompts, _ in model.calls for p in prompts]
    assert lengths == sorted(lengths)
    assert model.calls[0][1] == {"max_new_tokens": 17, "batch_size": 4, "temperature": 0.0}


def test_the_last_answer_is_asked_for_with_all_that_was_said_before() -> None:
    row = Conversation(
        (
            Message("system", "be short"),
            Message("user", "one"),
            Message("assistant", "1"),
            Message("user", "two"),
            Message("assistant", "2"),
            Message("user", "thanks"),
        ),
        None,
        None,
        "f:1",
    )
    model = FakeModel({"two": "2"})
    scores = evaluate_rows(model, [row])
    assert model.calls[0][0] == [row.messages[:4]]
    assert scores.rows[0].prompt == "system: be short\nuser: one\nassistant: 1\nuser: two"
    assert scores.rows[0].metrics["exact_match"] == 1


def test_rows_without_a_question_give_a_loss_alone() -> None:
    call = Message("assistant", "", tool_calls=({"name": "f"},))
    rows = [
        Conversation((), None, "plain words", "f:1"),
        Conversation((Message("assistant", "hello"),), None, None, "f:2"),
        Conversation((Message("user", "go"), call), None, None, "f:3"),
    ]
    model = FakeModel({})
    scores = evaluate_rows(model, rows)
    assert model.calls == []
    assert list(scores.metrics) == ["loss", "perplexity"]
    assert [row.prediction for row in scores.rows] == [None] * 3
    assert scores.rows[0].trained_tokens == len("plain words")
    assert scores.rows[2].trained_tokens == 0
    assert compare_scores(scores, scores)["loss"].difference == 0
    assert changed_answers(scores, scores, 3) == []


def test_rows_with_other_tools_are_not_answered_together() -> None:
    tools = [({"name": name},) for name in ("f", "g", "f")]
    rows = [chat(str(i), "a", tools=given) for i, given in enumerate([*tools, None])]
    model = FakeModel({str(i): f"answer {i}" for i in range(4)})
    scores = evaluate_rows(model, rows)
    asked = [([p[-1].content for p in prompts], settings.get("tools")) for prompts, settings in model.calls]
    assert asked == [(["3"], None), (["0", "2"], tools[0]), (["1"], tools[1])]
    assert [row.prediction for row in scores.rows] == [f"answer {i}" for i in range(4)]


def test_train_on_chooses_the_tokens_of_the_loss() -> None:
    row = chat("q", "aa", "q", "bbb")
    counts = [
        evaluate_rows(FakeModel({}), [row], train_on=how).rows[0].trained_tokens
        for how in ("assistant", "last_assistant")
    ]
    assert counts == [5, 3]


def test_progress_counts_losses_and_answers_up_to_all() -> None:
    seen: list[tuple[int, int]] = []
    evaluate_rows(
        FakeModel({}), ROWS, batch_size=4, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(9, 18), (13, 18), (17, 18), (18, 18)]


def test_no_rows_and_a_loss_that_is_not_finite_are_errors() -> None:
    with pytest.raises(DataError, match="no rows"):
        evaluate_rows(FakeModel({}), [])
    with pytest.raises(DivergenceError, match="f:0 is not finite"):
        evaluate_rows(FakeModel({}, math.nan), ROWS[:1])


def test_scores_survive_their_json_form(tmp_path: Path) -> None:
    rows = [*ROWS, chat("j", '{"a": 1}'), Conversation((), None, "text", "f:9")]
    scores = evaluate_rows(FakeModel({**ANSWERS, "j": '{"a": 2}'}), rows, name="a base", seed=3)
    path = tmp_path / "before.json"
    path.write_text(json.dumps(scores.to_json()), encoding="utf-8")
    assert read_scores(path) == scores


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "rows": [{"x": 1}], "metrics": {}}']
)
def test_what_is_not_scores_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"scores\.json"):
        read_scores(path)


def many(right: Sequence[bool], scale: float = 1.0) -> Scores:
    """Scores on rows that the model has right or not."""
    rows = [chat(f"q{i:02}", f'{{"n": {i}}}', place=f"f:{i}") for i in range(len(right))]
    answers = {f"q{i:02}": f'{{"n": {i}}}' if ok else f"no {scale}" for i, ok in enumerate(right)}
    return evaluate_rows(FakeModel(answers, scale), rows)


BEFORE = many([False] * 16 + [True] * 4)
AFTER = many([True] * 14 + [False] * 4 + [True] * 2, scale=0.5)


def test_comparison_of_two_models_on_the_same_rows() -> None:
    found = compare_scores(BEFORE, AFTER)
    exact = found["exact_match"]
    assert (exact.before, exact.after, exact.won, exact.lost, exact.tied) == (0.2, 0.8, 14, 2, 4)
    assert exact.clear
    loss = found["loss"]
    assert loss.after == pytest.approx(loss.before / 2)
    assert loss.before == pytest.approx(BEFORE.metrics["loss"])
    assert (loss.won, loss.lost, loss.clear, loss.better) == (20, 0, True, True)
    assert found["perplexity"].after == pytest.approx(AFTER.metrics["perplexity"])
    assert [item.name for item in found.differences] == list(BEFORE.metrics)
    assert json.loads(json.dumps(found.to_json()))["metrics"]["exact_match"]["won"] == 14


def test_other_rows_are_not_compared() -> None:
    with pytest.raises(DataError, match="not of the same rows"):
        compare_scores(many([True, True]), many([True]))


def test_losses_over_other_tokens_are_not_compared() -> None:
    row = chat("q", "aa", "q", "bbb")
    two = [evaluate_rows(FakeModel({}), [row], train_on=how) for how in ("assistant", "last_assistant")]
    found = compare_scores(*two)
    assert "loss" not in found
    assert "exact_match" in found
    assert "other tokens" in found.notes[0]


def test_changed_answers_are_fixed_ones_spread_out_and_one_broken() -> None:
    assert [(c["kind"], c["place"]) for c in changed_answers(BEFORE, AFTER, 3)] == [
        ("fixed", "f:0"),
        ("fixed", "f:7"),
        ("broken", "f:16"),
    ]
    assert [c["kind"] for c in changed_answers(BEFORE, AFTER, 1)] == ["fixed"]
    assert changed_answers(BEFORE, AFTER, 0) == []
    everything = changed_answers(BEFORE, AFTER, 100)
    assert [c["kind"] for c in everything] == ["fixed"] * 14 + ["changed"] * 2 + ["broken"]
    assert changed_answers(BEFORE, BEFORE, 3) == []
    assert json.loads(json.dumps(everything[0])) == {
        "kind": "fixed", "place": "f:0", "prompt": "q00", "reference": '{"n": 0}', "before": "no 1.0",
        "after": '{"n": 0}',
    }  # fmt: skip


@pytest.mark.parametrize(
    "expression",
    ["exact_match=0.8", "exact_match>=0.8", " exact_match = 0.1 ", "loss=9", "loss<=9", "bleu>=1"],
)
def test_a_gate_that_is_reached_passes(expression: str) -> None:
    assert gate(AFTER, expression).endswith("passed")


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("exact_match=0.81", "exact_match is 0.8 (wanted: at least 0.81)"),
        ("loss<=0.1", "(wanted: at most 0.1)"),
    ],
)
def test_a_gate_that_is_missed_says_value_and_wanted(expression: str, words: str) -> None:
    with pytest.raises(GateError) as error:
        gate(AFTER, expression)
    assert words in str(error.value)
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("accuracy=0.5", "loss, perplexity, exact_match, json_valid"),
        ("exact_match", "METRIC=NUMBER"),
        ("exact_match=high", "METRIC=NUMBER"),
        ("exact_match=nan", "METRIC=NUMBER"),
        ("exact_match=75", "never above 1"),
        ("exact_match<=0.5", "exact_match>=0.5"),
        ("loss>=0.5", "loss<=0.5"),
        ("=0.5", "no metric"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(expression: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        gate(AFTER, expression)
    assert words in str(error.value)


def test_plain_forms_fit_sixty_columns_and_say_what_is_clear() -> None:
    comparison = compare_scores(BEFORE, AFTER)
    text = comparison_text(comparison)
    assert "exact_match      20.0 %   80.0 %    +60.0  [" in text
    # A sentence may go over several lines.
    assert "14 won, 2 lost, 4 tied of 20 rows; clearly better (p = 0.004)" in " ".join(text.split())
    answers = answers_text(changed_answers(BEFORE, AFTER, 3))
    for lines in (text, answers, scores_text(AFTER)):
        assert max(map(len, lines.splitlines())) <= 60
    assert answers.splitlines()[:5] == [
        "1. fixed: f:0",
        "   asked   q00",
        '   wanted  {"n": 0}',
        "   before  no 1.0",
        '   after   {"n": 0}',
    ]


def test_the_table_has_a_line_for_each_metric() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(compare_scores(BEFORE, AFTER)))
    text = console.export_text()
    assert "14/2/4" in text
    assert all(name in text for name in AFTER.metrics)


def test_what_a_model_writes_cannot_command_a_terminal() -> None:
    assert printable("a\x1b[31mred\nnext\u202eline\x00 é 漢") == "a?[31mred next?line? é 漢"
    long = {
        "kind": "fixed",
        "place": "f:1",
        "prompt": "start " + "x " * 500 + "the end",
        "reference": "a" * 999,
    }
    text = answers_text([{**long, "before": "", "after": "b"}])  # type: ignore[typeddict-item]
    assert "the end" in text
    assert "start" not in text
    assert "(nothing)" in text
    assert len(text) < 800
