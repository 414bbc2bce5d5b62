"""A prediction and its reference -> scores.

Every scorer takes (prediction, reference), both text, and gives one number for the row, or None
where the metric does not apply to the reference. Fractions lie in 0..1; BLEU and chrF are
sacrebleu's points, 0..100.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric is: its unit, which direction is better, whether a row is only 0 or 1."""

    name: str
    unit: Literal["fraction", "points", "nats", "ratio"]
    text: str
    lower_is_better: bool = False
    binary: bool = False


# In the order in which they are shown.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "nats", "nats per trained token", lower_is_better=True),
        Metric("perplexity", "ratio", "e to the loss", lower_is_better=True),
        Metric("exact_match", "fraction", "answers equal to the reference", binary=True),
        Metric("json_valid", "fraction", "answers that are JSON", binary=True),
        Metric("json_precision", "fraction", "answered fields that are right"),
        Metric("json_recall", "fraction", "wanted fields answered right"),
        Metric("json_f1", "fraction", "harmonic mean of the two"),
        Metric("bleu", "points", "BLEU of the corpus (sacrebleu)"),
        Metric("chrf", "points", "chrF2 of the corpus (sacrebleu)"),
        Metric("rouge1", "fraction", "ROUGE-1 F1"),
        Metric("rouge2", "fraction", "ROUGE-2 F1"),
        Metric("rougeL", "fraction", "ROUGE-L F1"),
    )
}


def score_answer(prediction: str, reference: str) -> dict[str, float | None]:
    """Every text metric of one row. None: the metric does not apply to this reference."""
    fields = json_fields(prediction, reference)
    return {
        "exact_match": exact_match(prediction, reference),
        "json_valid": None if fields is None else json_valid(prediction),
        "json_precision": None if fields is None else fields.precision,
        "json_recall": None if fields is None else fields.recall,
        "json_f1": None if fields is None else fields.f1,
        "bleu": bleu(prediction, reference),
        "chrf": chrf(prediction, reference),
        "rouge1": rouge_n(prediction, reference, 1),
        "rouge2": rouge_n(prediction, reference, 2),
        "rougeL": rouge_l(prediction, reference),
    }


def combine(
    rows: Sequence[Mapping[str, float | None]], predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """The scores of all rows together; a metric that applies to no row is left out.

    The mean over the rows it applies to, except for BLEU and chrF, which are those of the corpus.
    """
    if not rows:
        return {}
    means: dict[str, float] = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        if values:
            means[name] = math.fsum(values) / len(values)
    return means | corpus_scores(predictions, references)


def exact_match(prediction: str, reference: str) -> float:
    """1 if the two are equal after `str.strip()` on both, else 0.

    Only whitespace (Unicode's) at both ends is ignored. Case, inner spaces, punctuation and the
    Unicode form count, and so do the order of JSON keys and the spelling of numbers.
    """
    return float(prediction.strip() == reference.strip())


# --- JSON -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fields:
    """Fields of an answer against those of the reference."""

    precision: float
    recall: float
    f1: float


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a repeated key is not lost."""


_INVALID = object()


def json_valid(prediction: str) -> float:
    """1 if the whole answer is one JSON value (RFC 8259), else 0.

    Text or a code fence around it, NaN and Infinity make it invalid. A repeated key does not.
    """
    return float(_parse(prediction) is not _INVALID)


def json_fields(prediction: str, reference: str) -> Fields | None:
    """Precision, recall and F1 over the fields of two JSON texts.

    A field is a leaf with the whole path to it: object keys by name, list items by index, and an
    empty object or list is a leaf. 1 and 1.0 are equal, 1 and true are not; the order of keys is
    free. A repeated key gives a field each time, so a needless repetition costs precision. None if
    the reference is not a JSON object or list: a plain number or quoted word is text as much as
    JSON. An answer that is not JSON has 0 everywhere.

    For the reference {"a": 1, "b": [2, 3]} the answer {"a": 1.0, "b": [2]} has precision 2/2,
    recall 2/3, F1 0.8.
    """
    wanted_value = _parse(reference)
    if not isinstance(wanted_value, list):
        return None
    found_value = _parse(prediction)
    if found_value is _INVALID:
        return Fields(0.0, 0.0, 0.0)
    wanted, found = Counter(_leaves(wanted_value)), Counter(_leaves(found_value))
    return Fields(*_overlap(found, wanted))


def _parse(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text.strip(), object_pairs_hook=_Object, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _INVALID


def _leaves(value: Any) -> Iterable[tuple[tuple[str | int, ...], str, Any]]:
    """(path, kind, value) of every leaf. A stack, since answers may nest as deep as they like."""
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while todo:
        path, node = todo.pop()
        if isinstance(node, list) and node:
            items = node if isinstance(node, _Object) else enumerate(node)
            todo.extend(((*path, key), item) for key, item in items)
        elif isinstance(node, list):
            yield path, "object" if isinstance(node, _Object) else "list", None
        else:
            # JSON has one kind of number, Python two; and for Python True == 1.
            kind = "number" if type(node) in (int, float) else type(node).__name__
            yield path, kind, node


def _overlap(found: Counter[Any], wanted: Counter[Any]) -> tuple[float, float, float]:
    """Precision, recall and F1 of two bags."""
    common = (found & wanted).total()
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / found.total(), common / wanted.total()
    return precision, recall, 2 * common / (found.total() + wanted.total())


# --- BLEU and chrF ----------------------------------------------------------------------------


@cache
def _sacrebleu() -> tuple[Any, Any, Any]:
    """BLEU for a row, BLEU for the corpus, chrF. Imported when first used."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # A short answer has no 4-grams: for a row only the orders that exist count (sacrebleu's advice
    # for sentences). `force`: answers that end in " ." are no reason for a warning here.
    return BLEU(effective_order=True, force=True), BLEU(force=True), CHRF()


def bleu(prediction: str, reference: str) -> float:
    """BLEU of one row, 0..100 (Papineni 2002; tokenizer 13a, exponential smoothing)."""
    return _points(_sacrebleu()[0].sentence_score(prediction, [reference]).score)


def chrf(prediction: str, reference: str) -> float:
    """chrF2 of one row, 0..100 (Popovic 2015; characters up to 6-grams, no word n-grams)."""
    return _points(_sacrebleu()[2].sentence_score(prediction, [reference]).score)


def corpus_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of the corpus: n-grams are counted over all rows, which no mean of rows gives."""
    _, corpus_bleu, corpus_chrf = _sacrebleu()
    return {
        "bleu": _points(corpus_bleu.corpus_score(list(predictions), [list(references)]).score),
        "chrf": _points(corpus_chrf.corpus_score(list(predictions), [list(references)]).score),
    }


def _points(score: float) -> float:
    """exp(log(100)) comes out as 100.00000000000004."""
    return min(float(score), 100.0)


# --- ROUGE ------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+")


def rouge_n(prediction: str, reference: str, n: int) -> float | None:
    """ROUGE-N F1 (Lin 2004): n-grams in common, each counted at most as often as in the reference.

    Words are runs of letters and digits in lower case, without stemming. None if the reference is
    too short to have an n-gram.
    """
    wanted = _ngrams(_words(reference), n)
    if not wanted:
        return None
    return _overlap(_ngrams(_words(prediction), n), wanted)[2]


def rouge_l(prediction: str, reference: str) -> float | None:
    """ROUGE-L F1 (Lin 2004): the longest common subsequence of words, as one sentence."""
    found, wanted = _words(prediction), _words(reference)
    if not wanted:
        return None
    return 2 * _common_subsequence(found, wanted) / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one
    integer (Hyyrö 2004, "Bit-parallel LCS-length computation revisited")."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        hit = row & places.get(word, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(one) - row.bit_count()
