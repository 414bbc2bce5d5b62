"""Scores of answers, held to values worked out by hand and to slow, plain definitions."""

from __future__ import annotations

import random

import pytest

from lorimer.evaluate.text import (
    METRICS,
    bleu,
    chrf,
    combine,
    exact_match,
    json_fields,
    json_valid,
    rouge_l,
    rouge_n,
    score_answer,
)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("yes", "yes", 1),
        ("  yes\n", "yes\t", 1),
        ("\u00a0yes\u2003", "yes", 1),
        ("Yes", "yes", 0),
        ("yes.", "yes", 0),
        ("a  b", "a b", 0),
        ("e\u0301", "\u00e9", 0),
        ('{"b":1,"a":2}', '{"a":2,"b":1}', 0),
        ("", "  ", 1),
        ("", "yes", 0),
    ],
)
def test_exact_match_ignores_space_at_the_ends_alone(prediction: str, reference: str, score: int) -> None:
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, null, "x"]}', 1),
        (' [1] \n', 1),
        ("12", 1),
        ('{"a": 1, "a": 2}', 1),
        ("1e999", 1),
        ("", 0),
        ("{'a': 1}", 0),
        ('{"a": 1,}', 0),
        ('{"a": NaN}', 0),
        ("[-Infinity]", 0),
        ('```json\n{"a": 1}\n```', 0),
        ('{"a": 1} and more', 0),
        ("[" * 100_000, 0),
        ("9" * 5000, 0),
    ],
)  # fmt: skip
def test_json_validity_is_strict(text: str, valid: int) -> None:
    assert json_valid(text) == valid


REFERENCE = '{"a": 1, "b": {"c": [2, 3]}, "d": {}}'  # fields: a, b.c.0, b.c.1, d


@pytest.mark.parametrize(
    ("prediction", "precision", "recall"),
    [
        (REFERENCE, 1, 1),
        ('{"d": {}, "b": {"c": [2.0, 3e0]}, "a": 1.0}', 1, 1),
        ('{"a": 1, "b": {"c": [2]}}', 1, 2 / 4),
        ('{"a": 1, "b": {"c": [3, 2]}, "d": {}}', 2 / 4, 2 / 4),
        ('{"a": "1", "b": {"c": [2, 3]}, "d": []}', 2 / 4, 2 / 4),
        ('{"a": true, "x": 5}', 0, 0),
        ('{"a": 1, "a": 1, "b": {"c": [2, 3]}, "d": {}}', 4 / 5, 1),
        ('{"a": 1, "a": 9}', 1 / 2, 1 / 4),
        ('{"b": {"c": {"0": 2, "1": 3}}}', 0, 0),
        ("{}", 0, 0),
        ("not JSON", 0, 0),
        ("[" * 100_000 + "]" * 100_000, 0, 0),
    ],
)
def test_json_fields_by_hand(prediction: str, precision: float, recall: float) -> None:
    fields = json_fields(prediction, REFERENCE)
    assert fields is not None
    assert (fields.precision, fields.recall) == pytest.approx((precision, recall))
    total = precision + recall
    assert fields.f1 == pytest.approx(2 * precision * recall / total if total else 0)


def test_json_of_empty_and_list_references() -> None:
    assert json_fields("{}", "{}") == json_fields("[]", "[]")
    assert json_fields("[]", "{}").f1 == 0  # type: ignore[union-attr]
    assert json_fields('["a", "b"]', '["a", "c"]').f1 == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize("reference", ["a word", '"a word"', "42", "true", "", "{broken"])
def test_json_metrics_do_not_apply_where_the_reference_is_no_object_or_list(reference: str) -> None:
    scores = score_answer('{"a": 1}', reference)
    assert [scores[name] for name in scores if name.startswith("json")] == [None] * 4


@pytest.mark.parametrize(
    ("prediction", "reference", "one", "two", "longest"),
    [
        # Lin 2004, section 3: "police kill the gunman" and "the gunman kill police" against
        # "police killed the gunman": the same unigrams, other subsequences.
        ("police kill the gunman", "police killed the gunman", 3 / 4, 1 / 3, 3 / 4),
        ("the gunman kill police", "police killed the gunman", 3 / 4, 1 / 3, 2 / 4),
        ("the the the", "the cat", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2), 0, 0.4),
        ("The CAT, sat!", "the cat sat", 1, 1, 1),
        ("", "the cat", 0, 0, 0),
        ("cat", "cat", 1, None, 1),
        ("a b", "!?", None, None, None),
        ("größe naïve", "Größe naive", 1 / 2, 0, 1 / 2),
    ],
)
def test_rouge_by_hand(
    prediction: str, reference: str, one: float | None, two: float | None, longest: float | None
) -> None:
    found = (
        rouge_n(prediction, reference, 1),
        rouge_n(prediction, reference, 2),
        rouge_l(prediction, reference),
    )
    assert found == pytest.approx((one, two, longest))


def plain_subsequence(one: list[str], other: list[str]) -> int:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_equals_the_plain_table() -> None:
    draw = random.Random(0)
    for _ in range(200):
        one, other = ([draw.choice("abcd") for _ in range(draw.randint(1, 80))] for _ in range(2))
        wanted = 2 * plain_subsequence(one, other) / (len(one) + len(other))
        assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(wanted)


def test_bleu_and_chrf_are_sacrebleus() -> None:
    import sacrebleu

    predictions = ["the cat sat on the mat", "no", "a b c d ."]
    references = ["the cat sat on a mat", "yes", "a b c e ."]
    rows = [score_answer(*pair) for pair in zip(predictions, references, strict=True)]
    combined = combine(rows, predictions, references)
    assert combined["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score)
    assert combined["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)
    assert combined["bleu"] != pytest.approx(sum(row["bleu"] or 0 for row in rows) / 3)
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        assert row["bleu"] == pytest.approx(sacrebleu.sentence_bleu(prediction, [reference]).score)
        assert row["chrf"] == pytest.approx(sacrebleu.sentence_chrf(prediction, [reference]).score)


@pytest.mark.parametrize("text", ["x", "Paris", "the cat sat on the mat today", '{"intent":"a"}'])
def test_an_equal_answer_has_all_points(text: str) -> None:
    assert (bleu(text, text), chrf(text, text)) == pytest.approx((100, 100))


def test_an_empty_answer_is_scored_in_silence() -> None:
    assert (bleu("", "x y"), chrf("", "x y")) == (0, 0)


def test_means_are_over_the_rows_a_metric_applies_to() -> None:
    pairs = [('{"a":1}', '{"a":1}'), ("no", '{"a":1}'), ("words here", "words here")]
    predictions, references = [a for a, _ in pairs], [b for _, b in pairs]
    combined = combine([score_answer(*pair) for pair in pairs], predictions, references)
    assert combined["exact_match"] == pytest.approx(2 / 3)
    assert combined["json_valid"] == combined["json_f1"] == 0.5
    assert "json_f1" not in combine([score_answer("a", "a")], ["a"], ["a"])
    assert combine([], [], []) == {}


def test_every_score_is_a_known_metric() -> None:
    assert ["loss", "perplexity", *score_answer("a", "b")] == list(METRICS)
