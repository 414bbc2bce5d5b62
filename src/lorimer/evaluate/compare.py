"""Two scores of each row -> the difference, its interval, rows won and lost.

The same rows are scored before and after, so rows are resampled in pairs (Efron and Tibshirani
1993, chapter 13; Koehn 2004 for text metrics): what makes a row hard or easy cancels out.

Letters: N rows, M metrics, S resamples, C resamples drawn at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorimer.evaluate.text import METRICS, Metric

Floats = NDArray[np.float64]

RESAMPLES = 10_000
# Numbers drawn at once, to bound memory: 8 MB.
DRAWN = 1_000_000
# With fewer differing rows no two-sided sign test can reach 5 %: 2 * 0.5**5 is 0.0625.
FEWEST = 6
# A difference of this size is then seen in 4 of 5 repetitions: 1.96 + 0.84 standard errors.
POWER = 2.8
# Two losses of a row that differ by less are the same computation, rounded elsewhere.
SAME = 1e-9
# e to this is the last power that a float holds.
MOST_LOSS = 700.0


@dataclass(frozen=True, slots=True)
class Pairs:
    """One metric of N rows before and after. A row of weight 0 does not count.

    The score is the mean of the values by weight. `before_total` and `after_total` are what is shown
    where it is another number: BLEU and chrF of the corpus.
    """

    name: str
    before_N: Sequence[float]
    after_N: Sequence[float]
    weight_N: Sequence[float]
    before_total: float | None = None
    after_total: float | None = None

    @property
    def metric(self) -> Metric:
        return METRICS[self.name]


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric before and after. `low` and `high` bound the difference with 95 % confidence."""

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    rows: int
    won: int
    lost: int
    tied: int
    p: float | None  # exact McNemar test, for metrics that are 0 or 1 on a row
    clear: bool
    rows_needed: int | None  # in all, to see a difference of this size; None if clear or if there is none
    metric: Metric = field(repr=False, compare=False)

    @property
    def better(self) -> bool:
        return self.difference < 0 if self.metric.lower_is_better else self.difference > 0

    def sentence(self) -> str:
        """Whether the difference is clear, or how many rows would show it."""
        count = f"{self.won} won, {self.lost} lost, {self.tied} tied of {self.rows} rows"
        if self.clear:
            p = "" if self.p is None else f" ({_p_text(self.p)})"
            return f"{self.name}: {count}; clearly {'better' if self.better else 'worse'}{p}."
        if self.rows_needed is None:
            return f"{self.name}: {count}; no difference."
        more = max(1, self.rows_needed - self.rows)
        return f"{self.name}: {count}; not clear: a difference of this size needs about {more:,} rows more."

    def to_json(self) -> dict[str, Any]:
        names = ("before", "after", "difference", "low", "high", "rows", "won", "lost", "tied", "p")
        values = {name: getattr(self, name) for name in (*names, "clear", "rows_needed")}
        return values | {"sentence": self.sentence()}


def compare_pairs(pairs: Sequence[Pairs], *, seed: int = 0, resamples: int = RESAMPLES) -> list[Difference]:
    """The difference of each metric, all from the same resamples of the rows.

    The interval is the middle 95 % of the resampled differences. A difference is clear if its interval
    leaves out 0, at least 6 rows differ and, for a metric of 0 and 1, McNemar's exact p is below 5 %.
    """
    kept = [pair for pair in pairs if any(pair.weight_N)]
    if not kept:
        return []
    weight_NM = np.array([pair.weight_N for pair in kept], np.float64).T
    before_NM = np.array([pair.before_N for pair in kept], np.float64).T
    after_NM = np.array([pair.after_N for pair in kept], np.float64).T
    before_SM, after_SM = resample(before_NM, after_NM, weight_NM, seed=seed, resamples=resamples)
    return [
        _difference(pair, before_NM[:, m], after_NM[:, m], weight_NM[:, m], before_SM[:, m], after_SM[:, m])
        for m, pair in enumerate(kept)
    ]


def resample(
    before_NM: Floats, after_NM: Floats, weight_NM: Floats, *, seed: int, resamples: int
) -> tuple[Floats, Floats]:
    """Means by weight of `resamples` draws of N rows with repetition, before and after: two [S, M].

    A draw in which every row has weight 0 is nan.
    """
    rows, metrics = weight_NM.shape
    columns = np.concatenate([before_NM * weight_NM, after_NM * weight_NM, weight_NM], axis=1)
    sums = np.concatenate([drawn_CN @ columns for drawn_CN in _draws(rows, seed, resamples)])
    before, after, weight = sums[:, :metrics], sums[:, metrics : 2 * metrics], sums[:, 2 * metrics :]
    with np.errstate(invalid="ignore"):
        return before / weight, after / weight


def _draws(rows: int, seed: int, resamples: int) -> Iterator[Floats]:
    """How often each row is drawn, [C, N] at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWN // rows)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        picks = generator.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        counts = np.bincount(picks.ravel(), minlength=count * rows)
        yield counts.reshape(count, rows).astype(np.float64)


def _difference(
    pair: Pairs, before_N: Floats, after_N: Floats, weight_N: Floats, before_S: Floats, after_S: Floats
) -> Difference:
    counted = weight_N > 0
    change_N = after_N - before_N
    before, after = (float(np.average(values, weights=weight_N)) for values in (before_N, after_N))
    if pair.name == "perplexity":  # e to the mean loss, not the mean of e to the losses
        before, after = perplexity(before), perplexity(after)
        before_S, after_S = np.exp(np.minimum(before_S, MOST_LOSS)), np.exp(np.minimum(after_S, MOST_LOSS))
    low, high = (float(bound) for bound in np.nanpercentile(after_S - before_S, (2.5, 97.5)))
    gain_N = (-change_N if pair.metric.lower_is_better else change_N)[counted]
    won, lost = int((gain_N > SAME).sum()), int((gain_N < -SAME).sum())
    p = sign_test(won, lost) if pair.metric.binary else None
    clear = (low > 0 or high < 0) and won + lost >= FEWEST and (p is None or p < 0.05)
    rows = int(counted.sum())
    return Difference(
        name=pair.name,
        before=before if pair.before_total is None else pair.before_total,
        after=after if pair.after_total is None else pair.after_total,
        difference=after - before,
        low=low,
        high=high,
        rows=rows,
        won=won,
        lost=lost,
        tied=rows - won - lost,
        p=p,
        clear=clear,
        rows_needed=None if clear else _rows_needed(change_N[counted], weight_N[counted], won + lost),
        metric=pair.metric,
    )


def perplexity(loss: float) -> float:
    """e to the loss, cut off below what a float can hold."""
    return math.exp(min(loss, MOST_LOSS))


def _rows_needed(change_N: Floats, weight_N: Floats, differing: int) -> int | None:
    """Rows in all with which a difference like the observed one would be clear in 4 of 5 repetitions."""
    mean = float(np.average(change_N, weights=weight_N))
    if not differing or abs(mean) <= SAME:
        return None
    # How far each row pulls the mean away, for a mean by weight (the usual linear approximation).
    pull_N = weight_N * (change_N - mean) / weight_N.mean()
    rows = len(change_N)
    by_spread = (POWER / mean) ** 2 * float((pull_N**2).mean())
    return max(rows + 1, math.ceil(by_spread), math.ceil(FEWEST * rows / differing))


def sign_test(won: int, lost: int) -> float:
    """Two-sided p of the exact sign test; on results of 0 and 1 it is McNemar's exact test.

    Ties do not count. 6 won and 0 lost: 2 / 2**6 = 0.03125.
    """
    n, fewer = won + lost, min(won, lost)
    if not n:
        return 1.0
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1))
    return min(1.0, 2 * math.fsum(math.exp(value - n * math.log(2)) for value in logs))


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
