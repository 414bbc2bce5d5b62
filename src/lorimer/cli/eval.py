"""lorimer eval: scores on held-out rows, against the base, and a gate on them."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorimer.config import RunConfig
    from lorimer.data.conversation import Conversation
    from lorimer.evaluate.run import Comparison, Scores
    from lorimer.generate.model import Model


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER", help="A run, an adapter, or a base alone.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Held-out rows. The run's own test rows if not given.", show_default=False),
    ] = None,
    min_score: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=X",
            help="End with 3 if the score is worse; may be repeated.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer in tokens. The run's own, or 256.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers made side by side.")] = 32,
    with_base: Annotated[
        bool, typer.Option("--base/--no-base", help="Compare with the base without the adapter.")
    ] = True,
    json: Annotated[
        bool, typer.Option("--json", help="Print metrics, intervals and every answer as JSON.")
    ] = False,
) -> None:
    """Scores on held-out rows, against the base, with a 95 % interval.

    Example: lorimer eval runs/home --min-score exact_match=0.75

    Metrics: loss, perplexity, exact_match, json_valid, json_precision, json_recall, json_f1, bleu,
    chrf, rouge1, rouge2, rougeL.
    """
    from lorimer.evaluate.run import compare_scores, read_gate
    from lorimer.generate.model import load

    for expression in min_score or []:
        read_gate(expression)
    config = run_config(Path(target), need_files=data is None)
    conversations = held_out(config, data)[:rows]
    # As it was trained, so that the scores are those of the run's own proof.
    place = config.train.model_dump(include={"dtype", "device", "threads"}) if config else {}
    model = load(target, **place)
    longest = max_new_tokens or (config.evaluate.max_new_tokens if config else 256)
    train_on = config.data.train_on if config else "assistant"
    after = _scores(model, conversations, "after", longest, batch_size, train_on)
    before = comparison = None
    if model.adapter is not None and with_base:
        with model.adapter_enabled(False):
            before = _scores(model, conversations, "base", longest, batch_size, train_on)
        comparison = compare_scores(before, after)
    if json:
        typer.echo(json_text.dumps(_as_dict(target, after, before, comparison), indent=2))
    else:
        _print(after, comparison)
    _gates(after, min_score or [])


def run_config(target: Path, need_files: bool) -> RunConfig | None:
    """The settings of the run that the target is, or whose adapter it is."""
    from lorimer.config import read_config

    for folder in (target, target.absolute().parent):
        if (folder / "config.yaml").is_file():
            return read_config(folder / "config.yaml", need_files=need_files)
    return None


def held_out(config: RunConfig | None, data: str | None) -> list[Conversation]:
    """The rows to answer: a file's, or what the run kept aside."""
    from lorimer.data.conversation import to_conversation
    from lorimer.data.rows import read_rows, split_rows
    from lorimer.errors import ConfigError

    settings = config.data if config else None
    if data is not None or (settings and settings.test):
        rows = read_rows(data or (settings and settings.test) or "")
    elif config and settings and settings.test_fraction:
        everything = read_rows(settings.train)
        fractions = settings.valid_fraction, settings.test_fraction
        rows = split_rows(everything, *fractions, config.train.seed)[2]
    else:
        raise ConfigError("there are no held-out rows to answer", fix="Give a file with --data.")
    # The run's format is that of its own files; another file's is looked up anew.
    form = settings.format if settings and data is None else "auto"
    return [to_conversation(row, form, settings.system if settings else None) for row in rows]


def _scores(
    model: Model, conversations: list[Conversation], name: str, longest: int, batch_size: int, train_on: str
) -> Scores:
    from lorimer.evaluate.run import evaluate_rows

    return evaluate_rows(
        model,
        conversations,
        max_new_tokens=longest,
        batch_size=batch_size,
        train_on=train_on,
        name=name,
        on_progress=_progress(name),
    )


def _progress(name: str) -> Callable[[int, int], None]:
    """A line that is rewritten in a terminal; nothing into a pipe."""
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        end = "\r\033[K" if done >= total else ""
        print(f"\r{name}: {done} of {total}{end}", end="", file=sys.stderr, flush=True)

    return show


def _print(after: Scores, comparison: Comparison | None) -> None:
    from lorimer.evaluate.show import comparison_table, comparison_text, scores_text

    if comparison is None:
        typer.echo(scores_text(after))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(comparison_table(comparison))
    else:
        typer.echo(comparison_text(comparison))


def _as_dict(
    target: str, after: Scores, before: Scores | None, comparison: Comparison | None
) -> dict[str, object]:
    return {
        "target": target,
        "metrics": dict(after.metrics),
        "comparison": comparison.to_json() if comparison else None,
        "scores": after.to_json(),
        "base_scores": before.to_json() if before else None,
    }


def _gates(scores: Scores, wanted: list[str]) -> None:
    """Hold the scores to every bound; all that fail are named."""
    from lorimer.errors import GateError
    from lorimer.evaluate.run import gate

    failed = []
    for expression in wanted:
        try:
            print(gate(scores, expression), file=sys.stderr)
        except GateError as error:
            failed.append(error.problem)
    if failed:
        raise GateError("; ".join(failed))
