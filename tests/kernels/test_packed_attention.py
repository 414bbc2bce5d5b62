"""The meaning of packed attention: each row as if it stood alone behind the prefix."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorimer.kernels.packed_attention import decode_attention, packed_attention
from tiny import difference

N, K, D, P = 4, 2, 6, 3
LENGTHS = (2, 1, 5)
OFFSETS = torch.tensor([3, 5, 6, 11])


def states(tokens: int, *, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(tokens, heads, D, dtype=torch.float64, requires_grad=True) for heads in (N, K, K)]


def alone(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """One sequence through PyTorch's attention with a mask written out."""
    age = torch.arange(len(query)).unsqueeze(1) - torch.arange(len(query))
    seen = (age >= 0) & (age < (window or len(query)))
    heads_first = (all.transpose(0, 1).unsqueeze(0) for all in (query, key, value))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=0.4, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 2, 4])
def test_rows_see_the_prefix_and_themselves(window: int | None) -> None:
    query, key, value = states(P + sum(LENGTHS))
    out, lse = packed_attention(query, key, value, OFFSETS, P, scale=0.4, window=window)
    assert out.shape == (P + sum(LENGTHS), N, D)
    assert lse.shape == (P + sum(LENGTHS), N)
    for row in range(len(LENGTHS)):
        tokens = [*range(P), *range(OFFSETS[row], OFFSETS[row + 1])]
        expected = alone(*(all[tokens] for all in (query, key, value)), window)
        assert difference(out[tokens[P:]].detach(), expected[P:].detach()) < 1e-14
        if row == 0:
            assert difference(out[:P].detach(), expected[:P].detach()) < 1e-14
            grads = [
                torch.autograd.grad(each.square().sum(), [query, key, value], retain_graph=True)
                for each in (out[tokens], expected)
            ]
            for mine, exact in zip(*grads, strict=True):
                assert difference(mine, exact) < 1e-13


def test_softcap_and_log_sum_exp_by_hand() -> None:
    """Scores 3 and 1 with cap 2: 2 tanh(1.5) and 2 tanh(0.5)."""
    query = torch.tensor([[[1.0]], [[1.0]]])
    key, value = torch.tensor([[[3.0]], [[1.0]]]), torch.tensor([[[10.0]], [[20.0]]])
    offsets = torch.tensor([0, 2])
    out, lse = packed_attention(query, key, value, offsets, 0, scale=1.0, softcap=2.0)
    first, second = math.exp(2 * math.tanh(1.5)), math.exp(2 * math.tanh(0.5))
    expected = (10 * first + 20 * second) / (first + second)
    assert out.flatten().tolist() == pytest.approx([10.0, expected], rel=1e-6)
    logs = [math.log(first), math.log(first + second)]
    assert lse.flatten().tolist() == pytest.approx(logs, rel=1e-6)


@pytest.mark.parametrize("window", [None, 2])
def test_decoding_is_the_last_token_of_a_row(window: int | None) -> None:
    query, key, value = (all.detach() for all in states(5))
    options = {"scale": 0.4, "window": window, "softcap": 3.0}
    full, _ = packed_attention(query, key, value, torch.tensor([0, 5]), 0, **options)
    caches = [torch.full((1, K, 8, D), float("nan"), dtype=torch.float64) for _ in range(2)]
    for cache, all in zip(caches, (key, value), strict=True):
        cache[0, :, :5] = all.transpose(0, 1)
    last = decode_attention(query[4:], *caches, torch.tensor([5]), **options)
    assert difference(last, full[4:]) < 1e-14
