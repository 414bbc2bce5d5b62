"""Native attention on every instruction set of this machine, against float64 and bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lorimer.kernels import reference
from lorimer.kernels.native import attention, library
from lorimer.kernels.packed_attention import decode_attention, packed_attention
from tiny import difference

BF16, FP32 = torch.bfloat16, torch.float32
TYPES = {"bf16": BF16, "fp32": FP32}
# Largest difference against the largest value. In bf16 the twin in PyTorch is about 4e-3 off: one
# rounding is up to 2e-3 of the largest, and probabilities and results are rounded.
CLOSE = {FP32: 2e-6, BF16: 5e-3}
CLOSE_GRAD = {FP32: 3e-6, BF16: 8e-3}

isas = pytest.mark.parametrize("isa", library.available())
types = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)


class Case(NamedTuple):
    lengths: tuple[int, ...]
    prefix: int
    shape: tuple[int, int, int] = (9, 3, 64)  # N, K, D
    window: int | None = None
    softcap: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.shape[2] ** -0.5, "window": self.window, "softcap": self.softcap}

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([self.prefix, *accumulate(self.lengths, initial=self.prefix)][1:])


LENGTHS = (
    *((length,) for length in (1, 2, 15, 17, 64, 65, 130, 300)),
    (35,) * 6,
    (1, 1, 2, 1),
    (130, 1, 17),
    (3, 270, 64),
)
SHAPES = ((9, 3, 64), (4, 4, 16), (6, 1, 32), (3, 1, 80), (2, 2, 128), (14, 2, 48), (1, 1, 256))
WINDOWS = (None, 1, 33, None, 100)
CAPS = (0.0, 0.0, 5.0)
PREFIXES = (0, 28), (1, 70)
# Each length with two prefixes; shapes, windows and caps go round at their own pace.
CASES = [
    Case(
        lengths,
        PREFIXES[i % 2][second],
        *(each[(2 * i + second) % len(each)] for each in (SHAPES, WINDOWS, CAPS)),
    )
    for (i, lengths), second in product(enumerate(LENGTHS), range(2))
]


class Work(NamedTuple):
    """Random states in one stacked tensor, and the gradient of the output."""

    stacked: Tensor
    grad: Tensor


def heads_of(stacked: Tensor, shape: tuple[int, int, int]) -> list[Tensor]:
    n, k, d = shape
    return [part.unflatten(1, (-1, d)) for part in stacked.split([n * d, k * d, k * d], 1)]


def work_for(case: Case, dtype: torch.dtype) -> Work:
    torch.manual_seed(sum(case.lengths) + case.prefix)
    n, k, d = case.shape
    tokens = case.prefix + sum(case.lengths)
    stacked = torch.randn(tokens, (n + 2 * k) * d).to(dtype)
    return Work(stacked, torch.randn(tokens, n, d).to(dtype))


def by_twin(case: Case, work: Work, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and gradients from the twin, computed in `dtype`."""
    stacked = work.stacked.to(dtype).requires_grad_()
    out, lse = packed_attention(*heads_of(stacked, case.shape), case.offsets, case.prefix, **case.options)
    out.backward(work.grad.to(dtype))
    assert stacked.grad is not None
    return out.detach(), lse.detach(), stacked.grad


@cache
def exact(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return by_twin(case, work_for(case, dtype), torch.float64)


def native(case: Case, work: Work, isa: str, threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    states, place = heads_of(work.stacked, case.shape), (case.offsets, case.prefix)
    torch.set_num_threads(threads)
    try:
        with library.using(isa):
            out, lse = attention.forward(*states, *place, **case.options)
            return out, lse, attention.backward(work.grad, *states, out, lse, *place, **case.options)
    finally:
        torch.set_num_threads(1)


@isas
@types
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_float64_and_the_same_on_two_threads(case: Case, dtype: torch.dtype, isa: str) -> None:
    work = work_for(case, dtype)
    out, lse, grads = native(case, work, isa)
    exact_out, exact_lse, exact_grads = exact(case, dtype)
    assert difference(out, exact_out) < CLOSE[dtype]
    assert (lse - exact_lse).abs().max() < 2e-6 * max(1.0, exact_lse.abs().max().item())
    for mine, wanted in zip(heads_of(grads, case.shape), heads_of(exact_grads, case.shape), strict=True):
        # A single visible key has no gradient through its score: all that is left is rounding.
        largest = max(wanted.abs().max().item(), 0.3 * exact_grads.abs().max().item())
        assert (mine - wanted).abs().max().item() < CLOSE_GRAD[dtype] * largest
    for one, two in zip((out, lse, grads), native(case, work, isa, threads=2), strict=True):
        assert torch.equal(one, two)


@isas
def test_bf16_is_as_close_to_float64_as_the_twin(isa: str) -> None:
    case = Case((300, 35), 28)
    work = work_for(case, BF16)
    wanted = exact(case, BF16)
    for mine, twin, best in zip(
        native(case, work, isa)[::2], by_twin(case, work, BF16)[::2], wanted[::2], strict=True
    ):
        errors = [(each.double() - best).square().mean().sqrt() for each in (mine, twin)]
        assert errors[0] < 1.1 * errors[1]


@isas
@types
@pytest.mark.parametrize("window", [None, 20])
def test_agrees_with_the_padded_reference(window: int | None, dtype: torch.dtype, isa: str) -> None:
    case = Case((65, 65), 0, window=window)
    work = work_for(case, dtype)
    grids = [
        states.unflatten(0, (2, 65)).transpose(1, 2)
        for states in (*heads_of(work.stacked, case.shape), work.grad)
    ]
    options = {"scale": case.options["scale"], "window": window}
    grid = reference.causal_attention(*grids[:3], **options)
    grads = reference.causal_attention_backward(grids[3], *grids[:3], grid, **options)
    out, _, mine = native(case, work, isa)
    assert difference(out, grid.transpose(1, 2).flatten(0, 1)) < 2 * CLOSE[dtype]
    for part, other in zip(heads_of(mine, case.shape), grads, strict=True):
        assert difference(part, other.transpose(1, 2).flatten(0, 1)) < 2 * CLOSE_GRAD[dtype]


# --- rows do not touch each other -----------------------------------------------------------------

ROWS = Case((17, 64, 140, 3), 5, window=90, softcap=4.0)
OTHERS = [*range(5, 22), *range(86, 229)]  # every row's own tokens but the second's


@isas
@types
@pytest.mark.parametrize("value", [7.0, float("nan"), float("inf")])
def test_a_rows_values_stay_in_it(value: float, dtype: torch.dtype, isa: str) -> None:
    clean, spoiled = work_for(ROWS, dtype), work_for(ROWS, dtype)
    spoiled.stacked[32] = value  # the second row's token 10
    spoiled.grad[32] = value
    before, after = native(ROWS, clean, isa), native(ROWS, spoiled, isa, threads=2)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[OTHERS], second[OTHERS])
    for first, second in zip(before[:2], after[:2], strict=True):
        assert torch.equal(first[:5], second[:5])
    if value != value:
        assert after[0][32:86].isnan().all()
        assert after[2][32].isnan().all()


@isas
@types
def test_a_hidden_key_counts_nothing_however_large(dtype: torch.dtype, isa: str) -> None:
    case = Case((40,), 3)
    plain, large = work_for(case, dtype), work_for(case, dtype)
    plain.stacked[42, -3 * 64 :], large.stacked[42, -3 * 64 :] = 0.0, 1e36  # the last token's values
    plain.grad[42], large.grad[42] = 0.0, 0.0
    before, after = native(case, plain, isa), native(case, large, isa)
    assert torch.equal(before[0][:42], after[0][:42])
    assert torch.equal(before[2], after[2])
    assert not after[2][42].any()


@isas
@types
def test_a_rows_place_in_the_pack_does_not_matter(dtype: torch.dtype, isa: str) -> None:
    case, turned = Case((17, 64, 140), 5), Case((140, 17, 64), 5)
    work = work_for(case, dtype)
    order = [*range(5), *range(86, 226), *range(5, 86)]
    moved = native(turned, Work(work.stacked[order], work.grad[order]), isa)
    for first, second in zip(native(case, work, isa), moved, strict=True):
        assert torch.equal(first[order][5:], second[5:])


@isas
def test_empty_rows_and_separate_tensors(isa: str) -> None:
    """Rows without tokens, no rows, and states that are not stacked."""
    case = Case((3, 2), 2, (2, 1, 16))
    work = work_for(case, FP32)
    states = [part.contiguous() for part in heads_of(work.stacked, case.shape)]
    expected, _, _ = native(case, work, isa)
    with library.using(isa):
        gaps = torch.tensor([2, 2, 5, 5, 7])
        out, _ = attention.forward(*states, gaps, 2, **case.options)
        assert torch.equal(out, expected)
        only, _ = attention.forward(*(all[:2] for all in states), torch.tensor([2]), 2, **case.options)
        assert torch.equal(only, expected[:2])


# --- decoding -------------------------------------------------------------------------------------

CAPACITY = 1100


@isas
@types
@pytest.mark.parametrize("shape", [(9, 3, 64), (1, 1, 16), (16, 1, 80)], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (600, 5.0), (7, 0.0)])
def test_decoding(
    window: int | None, softcap: float, shape: tuple[int, int, int], dtype: torch.dtype, isa: str
) -> None:
    n, k, d = shape
    torch.manual_seed(d)
    lengths = torch.tensor([1, 2, 33, 512, 513, 1100])
    query = torch.randn(len(lengths), n, d).to(dtype)
    caches = [torch.full((len(lengths), k, CAPACITY, d), float("nan"), dtype=dtype) for _ in range(2)]
    for cache_, (row, length) in product(caches, enumerate(lengths.tolist())):
        cache_[row, :, :length] = torch.randn(k, length, d)
    options: dict[str, Any] = {"scale": d**-0.5, "window": window, "softcap": softcap}
    wanted = decode_attention(query.double(), *(all.double() for all in caches), lengths, **options)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with library.using(isa):
            results.append(attention.decode(query, *caches, lengths, **options))
    torch.set_num_threads(1)
    for row in range(len(lengths)):
        assert difference(results[0][row], wanted[row]) < CLOSE[dtype]
    assert torch.equal(*results)


@isas
@types
def test_a_query_may_lie_in_a_wider_buffer(dtype: torch.dtype, isa: str) -> None:
    stacked = torch.randn(3, 5 * 16).to(dtype)
    caches = torch.randn(2, 3, 1, 4, 16).to(dtype)
    query, lengths = stacked[:, 16:64].view(3, 3, 16), torch.tensor([4, 1, 2])
    with library.using(isa):
        apart = attention.decode(query.contiguous(), *caches, lengths, scale=0.25)
        assert torch.equal(attention.decode(query, *caches, lengths, scale=0.25), apart)


@isas
@types
def test_appending_to_a_cache(dtype: torch.dtype, isa: str) -> None:
    stacked = torch.randn(3, 7 * 16).to(dtype)
    key, value = stacked[:, 16:48].view(3, 2, 16), stacked[:, 64:96].view(3, 2, 16)
    caches = torch.zeros(2, 3, 2, 5, 16, dtype=dtype)
    wanted = caches.clone()
    lengths = torch.tensor([5, 1, 3])
    for row, length in enumerate(lengths.tolist()):
        wanted[0, row, :, length - 1], wanted[1, row, :, length - 1] = key[row], value[row]
    with library.using(isa):
        attention.append(key, value, *caches, lengths)
    assert torch.equal(caches, wanted)


# --- what does not fit ----------------------------------------------------------------------------


def bad_calls() -> Iterator[tuple[str, dict[str, Any]]]:
    query, key = torch.zeros(4, 2, 16), torch.zeros(4, 1, 16)
    good = {"query_TND": query, "key_TKD": key, "value_TKD": key, "prefix": 1, "scale": 1.0}
    good["offsets"] = torch.tensor([1, 4])
    yield "offsets do not go", good | {"offsets": torch.tensor([0, 4])}
    yield "offsets do not go", good | {"offsets": torch.tensor([1, 3])}
    yield "offsets fall", good | {"offsets": torch.tensor([1, 3, 2, 4])}
    yield "int64", good | {"offsets": torch.tensor([1, 4], dtype=torch.int32)}
    yield "types differ", good | {"key_TKD": key.bfloat16()}
    yield (
        "do not divide",
        good | {"query_TND": torch.zeros(4, 3, 16)} | {"key_TKD": query, "value_TKD": query},
    )
    yield "differ", good | {"value_TKD": torch.zeros(3, 1, 16)}
    yield "next to each other", good | {"query_TND": torch.zeros(4, 2, 32)[..., ::2]}
    yield (
        "head size 10",
        good | {name: torch.zeros(4, 1, 10) for name in ("query_TND", "key_TKD", "value_TKD")},
    )
    yield "scale", good | {"scale": 0.0}
    yield "window", good | {"window": 0}


@pytest.mark.parametrize(("problem", "call"), list(bad_calls()))
def test_what_does_not_fit_is_refused(problem: str, call: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=problem):
        attention.forward(**call)


def test_lengths_beyond_the_cache_are_refused() -> None:
    query, cache_ = torch.zeros(1, 1, 16), torch.zeros(1, 1, 4, 16)
    for length in (0, 5):
        with pytest.raises(ValueError, match="length"):
            attention.decode(query, cache_, cache_, torch.tensor([length]), scale=1.0)
        with pytest.raises(ValueError, match="length"):
            attention.append(query, query, cache_, cache_, torch.tensor([length]))


def test_head_sizes(caplog: pytest.LogCaptureFixture) -> None:
    """The others are left to the twin, which is said once."""
    with caplog.at_level(logging.DEBUG, "lorimer.kernels"):
        assert [attention.takes(size) for size in (16, 80, 256)] == [True] * 3
        assert [attention.takes(size) for size in (0, 24, 272, 24)] == [False] * 4
    assert sum("head size 24" in message for message in caplog.messages) == 1
