"""Paired differences: intervals, exact tests, and what is said about them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorimer.evaluate.compare import Difference, Pairs, compare_pairs, resample, sign_test


def one(
    name: str, before: list[float], after: list[float], weight: list[float] | None = None
) -> Difference:
    return compare_pairs([Pairs(name, before, after, weight or [1.0] * len(before))])[0]


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (6, 1, 2 * (1 + 7) / 2**7),
        (1, 9, 2 * (1 + 10) / 2**10),
        (5, 5, 1),
        (3000, 0, 0),
        (1040, 960, 0.0772),  # normal approximation with continuity correction: 0.0772
    ],
)
def test_sign_test_is_exact(won: int, lost: int, p: float) -> None:
    assert sign_test(won, lost) == pytest.approx(p, abs=2e-4 if won > 1000 else 1e-12)


def test_wins_and_losses_are_counted_and_a_clear_gain_is_called_one() -> None:
    found = one("exact_match", [0] * 20 + [1] * 10, [1] * 18 + [0] * 4 + [1] * 8)
    assert (found.won, found.lost, found.tied, found.rows) == (18, 2, 10, 30)
    assert found.difference == pytest.approx(16 / 30)
    assert found.clear
    assert found.better
    assert found.low < found.difference < found.high
    assert found.sentence().startswith(
        "exact_match: 18 won, 2 lost, 10 tied of 30 rows; clearly better (p "
    )


def test_interval_is_the_normal_one_on_many_rows() -> None:
    generator = np.random.default_rng(1)
    before = generator.normal(50, 20, 2000)
    change = generator.normal(1, 5, 2000)
    found = one("chrf", before.tolist(), (before + change).tolist())
    half = 1.96 * change.std() / math.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.03)


def test_interval_covers_the_truth_in_95_of_100() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        change = generator.exponential(1, 60)
        pair = Pairs("chrf", [0.0] * 60, change.tolist(), [1.0] * 60)
        found = compare_pairs([pair], seed=trial, resamples=1000)[0]
        covered += found.low <= 1 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_makes_a_small_steady_gain_clear() -> None:
    generator = np.random.default_rng(3)
    before = generator.normal(50, 20, 200)
    paired = one("chrf", before.tolist(), (before + 1 + generator.normal(0, 1, 200)).tolist())
    mixed = one("chrf", before.tolist(), generator.permutation(before + 1).tolist())
    assert paired.clear
    assert not mixed.clear


def test_loss_is_weighted_by_tokens_and_lower_is_better() -> None:
    # 10 rows of 1 token get worse by 1 nat, one row of 990 tokens better by 1.
    before, after = [2.0] * 11, [3.0] * 10 + [1.0]
    found = one("loss", before, after, [1.0] * 10 + [990.0])
    assert found.difference == pytest.approx((10 - 990) / 1000)
    assert (found.won, found.lost, found.better) == (1, 10, True)


def test_interval_of_a_weighted_mean_is_that_of_all_tokens() -> None:
    generator = np.random.default_rng(4)
    tokens = generator.integers(1, 50, 500)
    before = [generator.normal(3, 1, n) for n in tokens]
    after = [values - 0.1 * len(values) / 25 + generator.normal(0, 1, len(values)) for values in before]
    means = [[float(values.mean()) for values in side] for side in (before, after)]
    found = one("loss", *means, tokens.tolist())
    draws = []
    for _ in range(2000):
        picked = generator.integers(0, 500, 500)
        old, new = (np.concatenate([side[i] for i in picked]) for side in (before, after))
        draws.append(new.mean() - old.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))), abs=0.004)


def test_perplexity_is_the_power_of_the_mean() -> None:
    found = one("perplexity", [0.0, 2.0], [0.0, 0.0], [3.0, 1.0])
    assert found.before == pytest.approx(math.exp(0.5))
    assert found.difference == pytest.approx(1 - math.exp(0.5))
    assert one("perplexity", [5000.0], [5000.0]).before == math.exp(700)


def test_rows_without_weight_do_not_count() -> None:
    values = [Pairs("json_f1", [0, 0, 9], [1, 0, 0], [1, 1, 0]), Pairs("json_valid", [1], [0], [0])]
    found = compare_pairs(values[:1])[0]
    assert (found.before, found.after, found.rows, found.won, found.lost, found.tied) == (
        0,
        0.5,
        2,
        1,
        0,
        1,
    )
    assert compare_pairs(values[1:]) == []


def test_corpus_totals_are_shown_and_the_difference_is_of_rows() -> None:
    pair = Pairs("bleu", [10, 20], [20, 40], [1, 1], before_total=12.5, after_total=33.0)
    found = compare_pairs([pair])[0]
    assert (found.before, found.after, found.difference) == (12.5, 33.0, 15)


def test_few_rows_are_never_clear() -> None:
    for rows, name in ((rows, name) for rows in range(1, 6) for name in ("exact_match", "chrf")):
        found = one(name, [0] * rows, [1] * rows)
        assert not found.clear
        assert found.rows_needed is not None
        assert found.rows_needed > rows
    assert one("exact_match", [0] * 6, [1] * 6).clear


def test_the_rows_needed_would_show_the_difference() -> None:
    before, after = [0] * 20, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0] + [0] * 10
    before = [0, 0, 0, 0, 0, 1, 1, *before[7:]]
    found = one("exact_match", before, after)  # 5 won, 2 lost
    assert not found.clear
    assert found.rows_needed is not None
    assert f"needs about {found.rows_needed - 20:,} rows more" in found.sentence()
    times = math.ceil(found.rows_needed / 20)
    assert one("exact_match", before * times, after * times).clear


def test_no_difference_is_said_as_such() -> None:
    for before, after in ([[0, 1]] * 2, [[0, 1], [1, 0]]):
        found = one("exact_match", before, after)
        assert not found.clear
        assert found.rows_needed is None
        assert found.sentence().endswith("no difference.")


def test_the_same_seed_gives_the_same_interval_and_all_metrics_share_the_draws() -> None:
    before, after = [0.1, 0.5, 0.9, 0.3], [0.4, 0.2, 1.0, 0.9]
    pair = Pairs("json_f1", before, after, [1.0] * 4)
    twice = [compare_pairs([pair], seed=7)[0] for _ in range(2)]
    assert twice[0] == twice[1]
    both = compare_pairs([Pairs("chrf", after, before, [1.0] * 4), pair], seed=7)
    assert (both[1].low, both[1].high) == (twice[0].low, twice[0].high)
    assert both[0].low == pytest.approx(-both[1].high)
    other = compare_pairs([pair], seed=8, resamples=100)[0]
    assert (other.low, other.high) != (twice[0].low, twice[0].high)


def test_resamples_draw_every_row_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = np.ones((4, 1))
    values = np.array([[1.0], [10.0], [100.0], [1000.0]])
    before, after = resample(values, 2 * values, ones, seed=0, resamples=4000)
    assert before.shape == (4000, 1)
    assert before.mean() == pytest.approx(1111 / 4, rel=0.05)
    np.testing.assert_allclose(after, 2 * before)
    # How many are drawn at once bounds the memory and changes no number.
    monkeypatch.setattr("lorimer.evaluate.compare.DRAWN", 40)
    np.testing.assert_array_equal(resample(values, values, ones, seed=0, resamples=4000)[0], before)


def test_json_form_has_no_objects_in_it() -> None:
    import json

    value = json.loads(json.dumps(one("loss", [1.0, 2.0], [0.5, 1.0]).to_json()))
    assert value["won"] == 2
    assert value["p"] is None
    assert value["sentence"]
