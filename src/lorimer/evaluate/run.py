"""A model and conversations -> Scores; two Scores of the same rows -> Comparison; the gate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from lorimer.data.conversation import Conversation, Message
from lorimer.errors import ConfigError, DataError, DivergenceError, GateError
from lorimer.evaluate.compare import Difference, Pairs, compare_pairs, perplexity
from lorimer.evaluate.text import METRICS, combine, score_answer

if TYPE_CHECKING:
    from lorimer.data.template import ChatTemplate, Example

FORMAT = 1
# Rows whose losses are measured in one call, whatever `batch_size` is: the same rows lie beside each
# other each time, so the losses are the same to the last bit.
LOSS_ROWS = 256


class Scored(Protocol):
    """What is evaluated; `lorimer.generate.model.Model` is one."""

    template: ChatTemplate

    @property
    def generate(self) -> Callable[..., Any]: ...

    def token_losses(self, examples: Sequence[Example]) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class RowScore:
    """One held-out row. A row without a question has a loss only: reference and prediction are None.

    `metrics` holds None where a metric does not apply to the reference. `loss_sum` is in nats over
    the `trained_tokens`.
    """

    place: str
    prompt: str
    reference: str | None
    prediction: str | None
    metrics: Mapping[str, float | None]
    loss_sum: float
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """All rows of one model, in the order of the data, and the metrics over them."""

    rows: tuple[RowScore, ...]
    metrics: Mapping[str, float]
    name: str = ""
    max_new_tokens: int = 256
    seed: int = 0

    @property
    def answered(self) -> int:
        """Rows that have an answer."""
        return sum(row.prediction is not None for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """What eval/before.json and eval/after.json hold."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Scores:
        """The inverse of `to_json`. Raises DataError for anything else."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']} (wanted: {FORMAT})")
            fields = {key: item for key, item in value.items() if key != "format"}
            fields["rows"] = tuple(RowScore(**row) for row in value["rows"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"these are not the scores of an evaluation ({error})"
            raise DataError(problem, fix="Run `lorimer eval` again.") from error


def read_scores(path: Path) -> Scores:
    """Scores from a file of `eval/`. Raises DataError that names the file."""
    try:
        return Scores.from_json(json.loads(path.read_text(encoding="utf-8")))
    except DataError as error:
        raise DataError(error.problem, fix=error.fix, path=path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read ({error})", fix="Run `lorimer eval` again.", path=path) from error


# --- a model and conversations -> Scores ------------------------------------------------------


def evaluate_rows(
    model: Scored,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    train_on: str = "assistant",
    name: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Losses of all rows, and greedy answers in place of each row's last assistant turn.

    The loss is the sum over all trained tokens divided by their number, never a mean of means.
    `batch_size` changes no loss, and answers only as far as it changes the model's rounding: in bf16
    a near tie between two words may then fall the other way. `seed` is that of the intervals when
    these scores are compared.
    `on_progress` gets the steps done and in all: one for each loss and each answer. Raises DataError
    for no rows, DivergenceError for a loss that is not finite.
    """
    if not conversations:
        raise DataError("there are no rows to evaluate", fix="Give a file with held-out rows.")
    parts = [model.template.examples(conversation, train_on) for conversation in conversations]
    examples = [part[-1] for part in parts]  # the longest of each row
    turns = [_last_answer(conversation) for conversation in conversations]
    asked = [row for row, turn in enumerate(turns) if turn is not None]
    total = len(conversations) + len(asked)
    losses = _row_losses(model, parts, lambda done: on_progress(min(done, len(parts)), total))
    answers: dict[int, str] = {}
    for part in _batches(asked, conversations, examples, batch_size):
        prompts = [conversations[row].messages[: turns[row]] for row in part]
        tools = conversations[part[0]].tools
        settings: dict[str, Any] = {"tools": tools} if tools else {}
        settings |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "temperature": 0.0}
        answers |= zip(part, model.generate(prompts, **settings), strict=True)
        on_progress(len(conversations) + len(answers), total)
    rows = [
        _row(
            conversation, turn, answers.get(row), losses[row], sum(int(e.trained.sum()) for e in parts[row])
        )
        for row, (conversation, turn) in enumerate(zip(conversations, turns, strict=True))
    ]
    return Scores(tuple(rows), _metrics(rows), name, max_new_tokens, seed)


def _last_answer(conversation: Conversation) -> int | None:
    """Which message is to be answered: the last assistant turn, if something is said before it.

    None for plain text and for a turn that calls tools, which is not its content alone.
    """
    messages = conversation.messages
    number = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=0)
    return None if number == 0 or messages[number].tool_calls else number


def _row_losses(
    model: Scored, parts: Sequence[Sequence[Example]], on_done: Callable[[int], None]
) -> list[float]:
    """The sum of nats of each row, which has one example or several."""
    sums = iter(_losses(model, [example for part in parts for example in part], on_done))
    return [math.fsum(next(sums) for _ in part) for part in parts]


def _losses(model: Scored, examples: Sequence[Example], on_done: Callable[[int], None]) -> list[float]:
    """The sum of nats of each example, in order."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    sums = [0.0] * len(examples)
    for start in range(0, len(order), LOSS_ROWS):
        part = order[start : start + LOSS_ROWS]
        for row, nats in zip(part, model.token_losses([examples[row] for row in part]), strict=True):
            sums[row] = math.fsum(float(value) for value in nats)
            if not math.isfinite(sums[row]):
                raise DivergenceError(
                    f"the loss of the row at {examples[row].place} is not finite",
                    fix="Check the adapter, or try `train.dtype=fp32`.",
                )
        on_done(start + len(part))
    return sums


def _batches(
    asked: Sequence[int],
    conversations: Sequence[Conversation],
    examples: Sequence[Example],
    batch_size: int,
) -> Iterator[list[int]]:
    """Rows to answer together: like in length, so that they end together, and with the same tools."""

    def tools(row: int) -> str:
        return json.dumps(conversations[row].tools, default=dict) if conversations[row].tools else ""

    order = sorted(asked, key=lambda row: (tools(row), len(examples[row].ids), row))
    for _, group in groupby(order, key=tools):
        rows = list(group)
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def _row(
    conversation: Conversation, turn: int | None, answer: str | None, loss_sum: float, tokens: int
) -> RowScore:
    if turn is None or answer is None:
        prompt = conversation.text if conversation.text is not None else _spoken(conversation.messages)
        return RowScore(conversation.place, prompt, None, None, {}, loss_sum, tokens)
    prompt, reference = _spoken(conversation.messages[:turn]), conversation.messages[turn].content
    metrics = score_answer(answer, reference)
    return RowScore(conversation.place, prompt, reference, answer, metrics, loss_sum, tokens)


def _spoken(messages: Sequence[Message]) -> str:
    """Messages to read: a single user's words as they are, else each with its role before it."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def _metrics(rows: Sequence[RowScore]) -> dict[str, float]:
    """All metrics over the rows, in the order of METRICS; those that apply to no row are left out."""
    metrics: dict[str, float] = {}
    tokens = sum(row.trained_tokens for row in rows)
    if tokens:
        loss = math.fsum(row.loss_sum for row in rows) / tokens
        metrics = {"loss": loss, "perplexity": perplexity(loss)}
    answered = [row for row in rows if row.prediction is not None]
    predictions = [row.prediction or "" for row in answered]
    references = [row.reference or "" for row in answered]
    metrics |= combine([row.metrics for row in answered], predictions, references)
    return {name: metrics[name] for name in METRICS if name in metrics}


# --- two Scores -> Comparison -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed from one model to another on the same rows; `notes` says what was not compared."""

    differences: tuple[Difference, ...]
    rows: int
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Difference:
        return next(item for item in self.differences if item.name == name)

    def __contains__(self, name: object) -> bool:
        return any(item.name == name for item in self.differences)

    def to_json(self) -> dict[str, Any]:
        metrics = {item.name: item.to_json() for item in self.differences}
        return {"rows": self.rows, "metrics": metrics, "notes": list(self.notes)}


def compare_scores(before: Scores, after: Scores) -> Comparison:
    """Each metric before and after, with a 95 % interval of the difference and rows won, lost, tied.

    Raises DataError if the two are not of the same rows in the same order.
    """
    mine, theirs = ([(row.place, row.reference) for row in scores.rows] for scores in (before, after))
    if mine != theirs:
        raise DataError(
            f"the two evaluations are not of the same rows ({len(mine)} before, {len(theirs)} after)",
            fix="Evaluate both on one file.",
        )
    pairs, notes = [], []
    if all(b.trained_tokens == a.trained_tokens for b, a in zip(before.rows, after.rows, strict=True)):
        pairs = [_loss_pairs(name, before, after) for name in ("loss", "perplexity")]
    else:
        notes.append("loss and perplexity are not compared: the two count other tokens")
    pairs += [_metric_pairs(name, before, after) for name in before.metrics if name in _row_names(before)]
    return Comparison(tuple(compare_pairs(pairs, seed=after.seed)), len(mine), tuple(notes))


def _row_names(scores: Scores) -> set[str]:
    return {name for row in scores.rows for name in row.metrics}


def _loss_pairs(name: str, before: Scores, after: Scores) -> Pairs:
    """The mean loss of each row by its trained tokens: the mean of all is that of all tokens."""
    old, new = ([row.loss_sum / max(1, row.trained_tokens) for row in s.rows] for s in (before, after))
    return Pairs(name, old, new, [row.trained_tokens for row in before.rows])


def _metric_pairs(name: str, before: Scores, after: Scores) -> Pairs:
    """A text metric of each row; rows to which it does not apply have no weight."""
    values = [[row.metrics.get(name) for row in scores.rows] for scores in (before, after)]
    old, new = ([0.0 if value is None else value for value in column] for column in values)
    weights = [float(value is not None) for value in values[0]]
    return Pairs(name, old, new, weights, before.metrics[name], after.metrics[name])


class Change(TypedDict):
    """A row whose answer changed; a dict, since samples.jsonl holds it as it is."""

    kind: Literal["fixed", "broken", "changed"]
    place: str
    prompt: str
    reference: str
    before: str
    after: str


def changed_answers(before: Scores, after: Scores, count: int) -> list[Change]:
    """Up to `count` rows whose answer changed: those that became right, and one that became wrong.

    Rows of a kind are taken at even distances, so that neighbours, which are often alike, do not
    crowd out the rest. The same scores always give the same rows.
    """
    kinds: dict[str, list[Change]] = {"fixed": [], "broken": [], "changed": []}
    for old, new in zip(before.rows, after.rows, strict=True):
        if old.prediction is None or new.prediction is None or old.reference is None:
            continue
        if old.prediction.strip() != new.prediction.strip():
            gain = (new.metrics["exact_match"] or 0.0) - (old.metrics["exact_match"] or 0.0)
            kind: Literal["fixed", "broken", "changed"] = "changed"
            if gain:
                kind = "fixed" if gain > 0 else "broken"
            kinds[kind].append(
                Change(
                    kind=kind,
                    place=old.place,
                    prompt=old.prompt,
                    reference=old.reference,
                    before=old.prediction,
                    after=new.prediction,
                )
            )
    broken = _spread(kinds["broken"], 1 if count > 1 else 0)
    fixed = _spread(kinds["fixed"], count - len(broken))
    changed = _spread(kinds["changed"], count - len(broken) - len(fixed))
    return fixed + changed + broken


def _spread(items: Sequence[Change], count: int) -> list[Change]:
    """`count` of the items at even distances, the first among them."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


# --- the gate ---------------------------------------------------------------------------------


def gate(scores: Scores, expression: str) -> str:
    """Hold scores to `exact_match=0.75`, `exact_match>=0.75` or `loss<=1.2`; `=` means at least as good.

    Returns one line that says it passed. Raises GateError if it did not, ConfigError for a metric
    that was not measured or an expression that makes no sense.
    """
    name, sign, wanted = read_gate(expression)
    if name not in scores.metrics:
        measured = ", ".join(scores.metrics)
        raise ConfigError(f"there is no metric `{name}` here", fix=f"Measured were: {measured}.")
    value, lower = scores.metrics[name], sign == "<="
    bound = f"{'at most' if lower else 'at least'} {wanted:g}"
    # Six digits are what is printed: a value that looks equal to the bound passes.
    passed = round(value, 6) <= round(wanted, 6) if lower else round(value, 6) >= round(wanted, 6)
    if not passed:
        raise GateError(f"{name} is {value:.6g} (wanted: {bound})")
    return f"{name} is {value:.6g} (wanted: {bound}): passed"


def read_gate(expression: str) -> tuple[str, str, float]:
    """A gate's metric, `>=` or `<=`, and its bound. Raises ConfigError before anything is measured."""
    name, sign, text = expression, "", ""
    for candidate in (">=", "<=", "="):
        if candidate in expression:
            name, text = (part.strip() for part in expression.split(candidate, 1))
            sign = candidate
            break
    try:
        wanted = float(text)
    except ValueError:
        wanted = math.nan
    if not math.isfinite(wanted):
        problem = f"`{expression}` is not a metric and a number"
        raise ConfigError(problem, fix="Write METRIC=NUMBER, for example exact_match=0.75.")
    if name not in METRICS:
        raise ConfigError(f"there is no metric `{name}`", fix=f"There are: {', '.join(METRICS)}.")
    metric = METRICS[name]
    right = "<=" if metric.lower_is_better else ">="
    if sign not in ("=", right):
        better = "lower" if metric.lower_is_better else "higher"
        raise ConfigError(
            f"`{expression}`: {name} is better the {better} it is", fix=f"Write {name}{right}{text}."
        )
    most = {"fraction": 1.0, "points": 100.0}.get(metric.unit, math.inf)
    if wanted > most:
        raise ConfigError(f"`{expression}`: {name} is never above {most:g}", fix=f"Give 0 to {most:g}.")
    return name, right, wanted
