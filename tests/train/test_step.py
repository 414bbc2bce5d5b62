"""A step that runs out of memory is split and computed again, whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lorimer.config import LoraConfig, TrainConfig
from lorimer.data.pack import split_into_packs
from lorimer.data.template import Example
from lorimer.errors import LorimerError
from lorimer.kernels import products
from lorimer.lora.adapter import new_adapter
from lorimer.lora.layers import LoraDropout
from lorimer.model.load import load_decoder
from lorimer.train import step as step_module
from lorimer.train.optimizer import AdamW
from lorimer.train.step import StepResult, is_out_of_memory, train_step
from tiny import FP32, make_tiny

CPU_SAYS = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
FAILURES = [RuntimeError(CPU_SAYS), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]


def examples(lengths: list[int]) -> list[Example]:
    numbers = np.random.Generator(np.random.PCG64(1))
    return [
        Example(numbers.integers(3, 90, n).astype(np.int32), np.arange(n) >= n // 2, f"row {i}")
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny(tmp_path_factory.mktemp("base") / "tiny").base


def a_step(
    base: Any, rows: list[Example], *, dropout: float = 0.0, share: bool = False
) -> tuple[StepResult, torch.Tensor]:
    decoder = load_decoder(base, FP32)
    adapter, _ = new_adapter(decoder, LoraConfig(r=4), seed=0)
    with torch.no_grad():
        adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)) / 9)
    adapter.refresh()
    masks = LoraDropout(dropout, 0, torch.float32, torch.device("cpu")) if dropout else None
    split = partial(split_into_packs, rows, share=share)
    optimizer = AdamW(adapter, TrainConfig())
    result = train_step(
        decoder,
        optimizer,
        split(100),
        step=3,
        learning_rate=1e-3,
        dropout=masks,
        split=split,
    )
    # After one step the first moment is the clipped gradient, times 1 - beta1.
    return result, optimizer.m.clone()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("call", [1, 9, 16, 22])
def test_the_same_step_is_computed_again_in_smaller_packs(
    base: Any, monkeypatch: pytest.MonkeyPatch, call: int, dropout: float
) -> None:
    """The n-th product of the step fails, in the forward pass or in the backward."""
    rows = examples([20, 31, 12, 25])
    whole, wanted = a_step(base, rows, dropout=dropout)
    calls = 0

    def counting(original: Any) -> Any:
        def product(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise FAILURES[call % len(FAILURES)]
            return original(*args, **settings)

        return product

    for name in ("forward", "input_grad"):
        monkeypatch.setattr(products, name, counting(getattr(products, name)))
    result, found = a_step(base, rows, dropout=dropout)
    assert calls > call
    assert whole.split is None
    assert result.split is not None
    assert result.split < 100
    assert (result.tokens, result.trained_tokens) == (whole.tokens, whole.trained_tokens)
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    # This base turns relative noise of 6e-8 in its weights into 5e-6 in the gradient.
    assert (found - wanted).norm() < 2e-5 * wanted.norm()


def test_a_row_that_does_not_fit_alone_ends_the_run_with_nothing_updated(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def failing(decoder: Any, pack: Any, **settings: Any) -> Any:
        sizes.append(pack.tokens)
        raise MemoryError

    monkeypatch.setattr(step_module, "pack_loss", failing)
    with pytest.raises(LorimerError, match="one row of 31 tokens"):
        a_step(base, examples([20, 31, 12, 25]))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_rows_behind_a_shared_prompt_are_split_too(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pack computes far fewer tokens than its rows have: half of these would be the same pack."""
    prompt = np.arange(3, 43, dtype=np.int32)
    rows = [
        Example(np.concatenate([prompt, np.full(5, 50 + n, np.int32)]), np.arange(45) >= 42, f"row {n}")
        for n in range(8)
    ]
    sizes: list[int] = []

    def failing(decoder: Any, pack: Any, **settings: Any) -> Any:
        sizes.append(pack.computed_tokens)
        assert len(sizes) < 9, "the same packs again and again"
        raise MemoryError

    monkeypatch.setattr(step_module, "pack_loss", failing)
    with pytest.raises(LorimerError, match="one row of 45 tokens"):
        a_step(base, rows, share=True)
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        *((error, True) for error in FAILURES),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_is(error: Exception, found: bool) -> None:
    assert is_out_of_memory(error) is found
