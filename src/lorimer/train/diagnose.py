"""What a run's losses say, in words: how it went wrong, if it did, and which rows are worth a look.

Each rule speaks only where its case is plain; a run that went well is told nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lorimer.data.template import Example

# Fewer steps than these say nothing about a learning rate, fewer rows nothing about one of them.
LEAST_STEPS, LEAST_ROWS = 20, 20
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Curve:
    """A run's losses in ten windows: the mean of each, and the step that it ends with."""

    means: list[float]
    ends: list[int]

    @classmethod
    def of(cls, losses: Sequence[float]) -> Curve:
        parts = [part for part in np.array_split(np.array(losses), 10) if len(part)]
        ends = np.cumsum([len(part) for part in parts])
        return cls([float(part.mean()) for part in parts], [int(end) for end in ends])


def diagnose(
    losses: Sequence[float], valid: Sequence[tuple[int, float]], learning_rate: float
) -> list[str]:
    """Sentences about divergence, overfitting and a learning rate that is too high or too low.

    `losses` are those of the steps in order, `valid` steps and validation losses.
    """
    said = []
    if len(losses) >= LEAST_STEPS:
        curve = Curve.of(losses)
        first, last, best = curve.means[0], curve.means[-1], min(curve.means)
        lowest = curve.means.index(best)
        if last > 1.3 * best and last > best + 0.3 and lowest < len(curve.means) - 2:
            said.append(
                f"it diverged: the loss was {best:.2f} until step {curve.ends[lowest]:,} and ended at "
                f"{last:.2f}. The learning rate is too high: "
                f"try train.learning_rate={learning_rate / 3:.0e}"
            )
        elif first > 0.3 and last > 0.95 * first:
            said.append(
                f"it hardly learned: the loss went from {first:.2f} to {last:.2f}. The learning rate is "
                f"too low: try train.learning_rate={learning_rate * 5:.0e}, or train longer"
            )
    if len(valid) >= 3:
        step, best = min(valid, key=lambda pair: pair[1])
        end, last = valid[-1]
        if last > 1.05 * best + 0.01 and step < end:
            said.append(
                f"it overfitted: the validation loss was {best:.3f} at step {step:,} and ended at "
                f"{last:.3f}. The adapter of step {step:,} is kept; fewer epochs, a lower lora.r or more "
                "rows would help"
            )
    return said


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Rows that stand out: why, and each with its place and what was found."""

    kind: str
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{place} ({what})" for place, what in self.rows[:SHOWN])
        more = f" and {len(self.rows) - SHOWN:,} more" if len(self.rows) > SHOWN else ""
        return f"{len(self.rows):,} {self.kind}: {shown}{more}"


def read_row_losses(path: Path) -> dict[int, list[float]]:
    """Each row's losses, one for each time that it was trained, from row_losses.jsonl."""
    found: dict[int, list[float]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            value: dict[str, Any] = json.loads(line)
            for row, loss in zip(value["rows"], value["losses"], strict=True):
                found.setdefault(row, []).append(loss)
    return found


def suspicious(losses: dict[int, list[float]], examples: Sequence[Example]) -> list[Suspicion]:
    """Rows that were never learned, that were known from the start, or that contradict each other."""
    found = []
    if len(losses) >= LEAST_ROWS:
        last = {row: seen[-1] for row, seen in losses.items()}
        usual = median(last.values())
        spread = 1.4826 * median(abs(loss - usual) for loss in last.values())
        limit = usual + max(6 * spread, 0.5)
        hard = sorted((row for row, loss in last.items() if loss > limit), key=lambda row: -last[row])
        found += _suspicion("rows were never learned", hard, examples, last)
        first = {row: seen[0] for row, seen in losses.items()}
        at_start = list(first)[: max(1, len(first) // 4)]  # in the order in which they were trained
        known = [row for row in at_start if first[row] < 0.02]
        if median(first[row] for row in at_start) > 0.5:
            found += _suspicion("rows were known before they were trained", known, examples, first)
    against = _contradictions(examples)
    if against:
        found.append(Suspicion("rows have another answer to the same prompt", tuple(against)))
    return found


def _suspicion(
    kind: str, rows: Iterable[int], examples: Sequence[Example], losses: dict[int, float]
) -> list[Suspicion]:
    named = tuple((examples[row].place, f"loss {losses[row]:.2f}") for row in rows)
    return [Suspicion(kind, named)] if named else []


def _contradictions(examples: Sequence[Example]) -> list[tuple[str, str]]:
    answers: dict[bytes, tuple[bytes, str]] = {}
    found = []
    for example in examples:
        first = int(np.argmax(example.trained))
        if first <= 1:  # plain text has no prompt
            continue
        answer, place = answers.setdefault(
            example.ids[:first].tobytes(), (example.ids[first:].tobytes(), example.place)
        )
        if answer != example.ids[first:].tobytes():
            found.append((example.place, f"against {place}"))
    return found
