"""Scores and comparisons as plain lines of at most 60 columns, and as a table for a terminal."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorimer.evaluate.compare import Difference
from lorimer.evaluate.run import Change, Comparison, Scores
from lorimer.evaluate.text import METRICS, Metric

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 60
# Characters of a prompt or an answer that are shown.
SHOWN = 180
HEADLINES = ("loss", "exact_match")
CORPUS_NOTE = (
    "bleu and chrf are those of the corpus; their change and interval are of the mean over the rows."
)


def scores_text(scores: Scores) -> str:
    """Each metric with its value and what it means."""
    lines = [f"{len(scores.rows):,} rows, {scores.answered:,} answered", ""]
    for name, value in scores.metrics.items():
        metric = METRICS[name]
        lines.append(f"{name:<15}{value_text(metric, value):>10}  {metric.text}")
    return "\n".join(lines)


def comparison_text(comparison: Comparison) -> str:
    """Before, after, difference and interval of each metric; then what is clear and what is not."""
    lines = [f"{'':<14}{'before':>9}{'after':>9}{'change':>9}  95 % interval"]
    for item in comparison.differences:
        values = f"{value_text(item.metric, item.before):>9}{value_text(item.metric, item.after):>9}"
        lines.append(
            f"{item.name:<14}{values}{change_text(item.metric, item.difference):>9}  {interval_text(item)}"
        )
    lines.append("")
    for text in (*sentences(comparison), *comparison.notes):
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> Table:
    """The same as a table with colours: green for clearly better, red for clearly worse."""
    from rich.table import Table

    table = Table(
        box=None, pad_edge=False, caption="\n".join(sentences(comparison)), caption_justify="left"
    )
    table.add_column("")
    for title in ("before", "after", "change", "95 % interval", "won/lost/tied"):
        table.add_column(title, justify="right", no_wrap=True)
    for item in comparison.differences:
        style = ("green" if item.better else "red") if item.clear else None
        table.add_row(
            item.name,
            value_text(item.metric, item.before),
            value_text(item.metric, item.after),
            change_text(item.metric, item.difference),
            interval_text(item),
            f"{item.won}/{item.lost}/{item.tied}",
            style=style,
        )
    return table


def answers_text(changes: Sequence[Change]) -> str:
    """Changed answers, each under its row: what was asked, wanted, answered before and after."""
    lines: list[str] = []
    for number, change in enumerate(changes, 1):
        title = f"{number}. {change['kind']}: {printable(change['place'])}"
        lines += ["", *textwrap.wrap(title, WIDTH, subsequent_indent="   ")]
        parts = {"asked": change["prompt"], "wanted": change["reference"]}
        parts |= {"before": change["before"], "after": change["after"]}
        for name, text in parts.items():
            # Of a prompt the end is what is answered; of an answer the beginning tells most.
            lines += _labelled(name, text, keep_end=name == "asked")
    return "\n".join(lines[1:])


def printable(text: str) -> str:
    """A model's text for a terminal: one line, and nothing that a terminal obeys."""
    plain = "".join(" " if c.isspace() else "?" if _commands(c) else c for c in text)
    return " ".join(plain.split())


def _commands(character: str) -> bool:
    """Escape codes, and marks that turn the direction of writing."""
    return (
        unicodedata.category(character) in ("Cc", "Cs")
        or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def _labelled(name: str, text: str, *, keep_end: bool) -> list[str]:
    plain = printable(text)
    if len(plain) > SHOWN:
        plain = "…" + plain[1 - SHOWN :] if keep_end else plain[: SHOWN - 1] + "…"
    first = f"   {name:<8}"
    return textwrap.wrap(
        plain or "(nothing)", WIDTH, initial_indent=first, subsequent_indent=" " * len(first)
    )


def sentences(comparison: Comparison) -> list[str]:
    """What is clear of the metrics that matter most, and how to read the others."""
    shown = [item for item in comparison.differences if item.name in HEADLINES]
    sentences = [item.sentence() for item in shown or comparison.differences[:1]]
    return [*sentences, CORPUS_NOTE] if "bleu" in comparison else sentences


def value_text(metric: Metric, value: float) -> str:
    """A score in its metric's unit."""
    if metric.unit == "fraction":
        return f"{100 * value:.1f} %"
    if metric.unit == "points":
        return f"{value:.1f}"
    return f"{value:.4f}" if metric.unit == "nats" else f"{value:.4g}"


def change_text(metric: Metric, value: float) -> str:
    """A difference; that of a fraction in percentage points."""
    if metric.unit == "fraction":
        return f"{100 * value:+.1f}"
    if metric.unit == "points":
        return f"{value:+.1f}"
    return f"{value:+.3f}" if metric.unit == "nats" else f"{value:+.3g}"


def interval_text(item: Difference) -> str:
    """The bounds of a difference, as it is written itself."""
    return f"[{change_text(item.metric, item.low)}, {change_text(item.metric, item.high)}]"
