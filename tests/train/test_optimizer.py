"""One AdamW over the flat buffer against torch's over separate tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorimer.config import LoraConfig, TrainConfig
from lorimer.lora.adapter import new_adapter
from lorimer.lora.layers import Adapter
from lorimer.train.optimizer import AdamW
from tiny import Tiny, make_tiny, our_logits, random_rows

SETTINGS: dict[str, Any] = {
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return make_tiny(tmp_path, "qwen2", tie_word_embeddings=True, num_hidden_layers=2)


def make_adapter(tiny: Tiny, *, plain: bool = False) -> Adapter:
    more: dict[str, Any] = {} if plain else {"bias": "all", "modules_to_save": ["norm", "embed_tokens"]}
    return new_adapter(tiny.decoder, LoraConfig(r=2, **more), seed=1)[0]


def set_gradient(adapter: Adapter, step: int, size: float = 1.0) -> None:
    assert adapter.flat.grad is not None
    generator = torch.Generator().manual_seed(step)
    adapter.flat.grad.copy_(size * torch.randn(adapter.flat.shape, generator=generator))


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("plain", [False, True])
def test_equals_torch_on_separate_tensors(tiny: Tiny, max_norm: float, plain: bool) -> None:
    """Decay on matrices alone; the gradient's norm over everything."""
    adapter = make_adapter(tiny, plain=plain)
    mine = AdamW(adapter, TrainConfig(max_grad_norm=max_norm, **SETTINGS))
    names = {name: t for name, t in adapter.tensors.items() if plain or name != "lm_head.weight"}
    copies = {name: t.detach().clone().requires_grad_() for name, t in names.items()}
    groups = [
        {"params": [t for t in copies.values() if t.dim() > 1], "weight_decay": 0.3},
        {"params": [t for t in copies.values() if t.dim() == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    for step, rate in enumerate((0.1, 0.05, 0.2, 0.0, 0.01)):
        set_gradient(adapter, step)
        for name, tensor in names.items():
            assert tensor.grad is not None
            copies[name].grad = tensor.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(copies.values(), max_norm or math.inf)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        assert mine.step(rate) == pytest.approx(float(norm), rel=1e-5)
        for name, tensor in names.items():
            torch.testing.assert_close(tensor, copies[name], rtol=2e-6, atol=1e-7, msg=name)
    assert not adapter.flat.grad.any()  # type: ignore[union-attr]


def test_decay_by_hand(tiny: Tiny) -> None:
    """Without a gradient a matrix shrinks by rate * decay; a bias and a norm stay."""
    adapter = make_adapter(tiny)
    before = {name: t.detach().clone() for name, t in adapter.tensors.items()}
    AdamW(adapter, TrainConfig(weight_decay=0.5)).step(0.1)
    for name, tensor in adapter.tensors.items():
        factor = 0.95 if tensor.dim() > 1 else 1.0
        torch.testing.assert_close(tensor.detach(), before[name] * factor)


def test_the_model_computes_with_what_was_updated(tiny: Tiny) -> None:
    adapter, rows = make_adapter(tiny), random_rows([6])
    before = our_logits(tiny.decoder, rows)[0]
    optimizer = AdamW(adapter, TrainConfig())
    set_gradient(adapter, 0)
    optimizer.step(0.1)
    after = our_logits(tiny.decoder, rows)[0]
    assert not torch.equal(before, after)
    adapter.refresh()
    assert torch.equal(our_logits(tiny.decoder, rows)[0], after)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny: Tiny, bad: float) -> None:
    adapter = make_adapter(tiny)
    optimizer = AdamW(adapter, TrainConfig())
    set_gradient(adapter, 0)
    optimizer.step(0.1)
    before, state = adapter.flat.detach().clone(), {k: v.clone() for k, v in optimizer.state().items()}
    set_gradient(adapter, 1)
    assert adapter.flat.grad is not None
    adapter.flat.grad[-1] = bad
    assert not math.isfinite(optimizer.step(0.1))
    assert torch.equal(adapter.flat, before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state().items())


@pytest.mark.parametrize("plain", [False, True])
def test_a_restored_state_goes_on_bit_for_bit(tiny: Tiny, plain: bool) -> None:
    adapter = make_adapter(tiny, plain=plain)
    optimizer = AdamW(adapter, TrainConfig(**SETTINGS))
    for step in range(3):
        set_gradient(adapter, step)
        optimizer.step(0.1)
    kept = adapter.flat.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state().items()}
    assert sorted(state) == ["m", "steps", "v"]
    for step in (3, 4):
        set_gradient(adapter, step)
        optimizer.step(0.1)

    again = make_adapter(tiny, plain=plain)
    with torch.no_grad():
        again.flat.copy_(kept)
    restored = AdamW(again, TrainConfig(**SETTINGS))
    restored.restore(state)
    for step in (3, 4):
        set_gradient(again, step)
        restored.step(0.1)
    assert torch.equal(again.flat, adapter.flat)
    assert all(torch.equal(value, restored.state()[key]) for key, value in optimizer.state().items())
