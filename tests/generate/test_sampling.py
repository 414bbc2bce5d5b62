"""The next token: filters against transformers' own, draws against their probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorimer.errors import UserError
from lorimer.generate.sampling import Sampling, _filter, _penalise, choose, row_key

KEYS = [row_key(0, [1, 2, 3], n) for n in range(4000)]


def logits(rows: int = 5, vocab: int = 31) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))


def one(logits_BV: Tensor, sampling: Sampling, seen: Any = None) -> list[int]:
    rows = len(logits_BV)
    return choose(logits_BV, sampling, seen or [[]] * rows, KEYS[:rows], [0] * rows)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 4, 31, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.01, 0.5, 0.97])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_equal_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    mine = _filter(logits() / temperature, sampling).softmax(-1)
    torch.testing.assert_close(mine, warpers(None, logits()).softmax(-1))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    seen = [[3, 3, 7], [1, 2, 30], [0, 0, 0], [5, 6, 7], [9, 8, 9]]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), logits())
    given = logits()
    torch.testing.assert_close(_penalise(given, penalty, seen), theirs)
    assert torch.equal(given, logits())


def test_repetition_penalty_by_hand() -> None:
    """Positive logits are divided, negative multiplied; what was not seen stays."""
    changed = _penalise(torch.tensor([[2.0, -2.0, 2.0]]), 2.0, [[0, 1, 0]])
    assert changed.tolist() == [[1.0, -4.0, 2.0]]
    sampling = Sampling(repetition_penalty=3.0)
    assert one(torch.tensor([[2.0, 1.0]]), sampling, [[0]]) == [1]


def test_greedy_takes_the_largest_whatever_the_filters_say() -> None:
    given = logits()
    assert one(given, Sampling(top_p=0.3, top_k=2, min_p=0.5)) == given.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, top_k=3),
        Sampling(temperature=2.0, top_p=0.6),
        Sampling(temperature=1.0, min_p=0.2),
    ],
)
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    """4000 draws: each share within four standard errors, and never a token that was filtered out."""
    row = logits(1, 9)
    probs = _filter(row / sampling.temperature, sampling).softmax(-1)[0]
    drawn = choose(row.expand(len(KEYS), -1), sampling, [], KEYS, [3] * len(KEYS))
    shares = torch.bincount(torch.tensor(drawn), minlength=9) / len(KEYS)
    error = 4 * (probs * (1 - probs) / len(KEYS)).sqrt() + 1e-9
    assert bool(((shares - probs).abs() <= error).all())


def test_a_draw_is_a_function_of_key_and_position_alone() -> None:
    given, sampling = logits(), Sampling(temperature=2.0)
    together = choose(given, sampling, [], KEYS[:5], [0, 1, 2, 3, 4])
    alone = [choose(given[i : i + 1], sampling, [], KEYS[i : i + 1], [i])[0] for i in range(5)]
    assert together == alone
    same = given[:1].expand(40, -1)
    by_position = choose(same, sampling, [], [KEYS[0]] * 40, range(40))
    by_key = choose(same, sampling, [], KEYS[:40], [0] * 40)
    assert len(set(by_position)) > 4
    assert len(set(by_key)) > 4


def test_keys() -> None:
    keys = {row_key(s, p, n) for s in (0, 1) for p in ([1, 2], [12], [1, 2, 0], []) for n in (0, 1)}
    assert len(keys) == 16
    assert row_key(0, [1, 2], 0) == row_key(0, (1, 2), 0)


def test_a_certain_token_is_always_drawn() -> None:
    row = torch.full((1, 5), -math.inf)
    row[0, 4] = 0.0
    drawn = choose(row.expand(500, -1), Sampling(temperature=1.0), [], KEYS[:500], [0] * 500)
    assert set(drawn) == {4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sampling(**settings)
