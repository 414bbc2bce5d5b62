"""Each optimizer over the flat buffer against torch's, or the paper's formula, over separate tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorimer.config import LoraConfig, TrainConfig
from lorimer.errors import UserError
from lorimer.lora.adapter import new_adapter
from lorimer.lora.layers import Adapter
from lorimer.train import optimizer as optimizers
from lorimer.train.optimizer import AdamW, make_optimizer
from tiny import Tiny, make_tiny, our_logits, random_rows

SETTINGS: dict[str, Any] = {
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
}


# Those that run without a GPU.
KINDS = ("adamw", "adamw_8bit", "lion", "sgd", "adafactor")


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


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_loraplus_gives_b_a_learning_rate_of_its_own(tiny: Tiny, kind: str) -> None:
    adapter = make_adapter(tiny)
    given = {"optimizer": kind, "loraplus_lr_ratio": 8.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
    mine = make_optimizer(adapter, TrainConfig.model_validate(given))
    copies = {name: t.detach().clone() for name, t in adapter.tensors.items() if name != "lm_head.weight"}
    ups = [t for name, t in copies.items() if ".lora_B." in name]
    assert sum(t.numel() for t in ups) == adapter.ups.stop - adapter.ups.start
    groups = [
        {"params": ups, "lr": 8e-3},
        {"params": [t for name, t in copies.items() if ".lora_B." not in name], "lr": 1e-3},
    ]
    theirs = (
        torch.optim.AdamW(groups, weight_decay=0.0)
        if kind == "adamw"
        else torch.optim.SGD(groups, momentum=0.9)
    )
    for step in range(5):
        set_gradient(adapter, step)
        for name, t in copies.items():
            t.grad = adapter.tensors[name].grad.clone()  # type: ignore[union-attr]
        mine.step(1e-3)
        theirs.step()
    for name, t in copies.items():
        torch.testing.assert_close(adapter.tensors[name].detach(), t, rtol=2e-5, atol=1e-7)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny: Tiny, bad: float, kind: str) -> None:
    adapter = make_adapter(tiny)
    optimizer = make_optimizer(adapter, TrainConfig(optimizer=kind))
    set_gradient(adapter, 0)
    optimizer.step(0.1)
    before, state = adapter.flat.detach().clone(), {k: v.clone() for k, v in optimizer.state().items()}
    set_gradient(adapter, 1)
    assert adapter.flat.grad is not None
    adapter.flat.grad[-1] = bad
    assert not math.isfinite(optimizer.step(0.1))
    assert torch.equal(adapter.flat, before)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.state().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_restored_state_goes_on_bit_for_bit(tiny: Tiny, plain: bool, kind: str) -> None:
    config = TrainConfig(optimizer=kind, weight_decay=0.3)
    adapter = make_adapter(tiny, plain=plain)
    optimizer = make_optimizer(adapter, config)
    for step in range(3):
        set_gradient(adapter, step)
        optimizer.step(0.1)
    kept = adapter.flat.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state().items()}
    for step in (3, 4):
        set_gradient(adapter, step)
        optimizer.step(0.1)

    again = make_adapter(tiny, plain=plain)
    with torch.no_grad():
        again.flat.copy_(kept)
    restored = make_optimizer(again, config)
    restored.restore(state)
    for step in (3, 4):
        set_gradient(again, step)
        restored.step(0.1)
    assert torch.equal(again.flat, adapter.flat)
    assert all(torch.equal(value, restored.state()[key]) for key, value in optimizer.state().items())


def copies_of(
    adapter: Adapter,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The trained tensors, copies of them, and torch's groups of these: matrices decay."""
    names = {name: t for name, t in adapter.tensors.items() if name != "lm_head.weight"}
    copies = {name: t.detach().clone().requires_grad_() for name, t in names.items()}
    groups = [
        {"params": [t for t in copies.values() if t.dim() > 1], "weight_decay": 0.3},
        {"params": [t for t in copies.values() if t.dim() == 1], "weight_decay": 0.0},
    ]
    return names, copies, groups


@pytest.mark.parametrize("kind", ["sgd", "adafactor"])
def test_others_equal_torch_on_separate_tensors(tiny: Tiny, kind: str) -> None:
    """Two ways of decaying: SGD's here is decoupled, so torch's is compared without."""
    decay = 0.0 if kind == "sgd" else 0.3
    more = {"momentum": 0.7} if kind == "sgd" else {}
    adapter = make_adapter(tiny)
    mine = make_optimizer(
        adapter,
        TrainConfig(optimizer=kind, max_grad_norm=0.5, weight_decay=decay, **more),  # type: ignore[arg-type]
    )
    names, copies, groups = copies_of(adapter)
    for group in groups:
        group["weight_decay"] *= decay / 0.3
    theirs: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr=1.0, momentum=0.7) if kind == "sgd" else torch.optim.Adafactor(groups)
    )
    for step, rate in enumerate((0.1, 0.05, 0.2, 0.01)):
        set_gradient(adapter, step)
        for name, tensor in names.items():
            assert tensor.grad is not None
            copies[name].grad = tensor.grad.clone()
        torch.nn.utils.clip_grad_norm_(copies.values(), 0.5)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        mine.step(rate)
        for name, tensor in names.items():
            torch.testing.assert_close(tensor, copies[name], rtol=1e-5, atol=1e-7, msg=name)
    assert adapter.flat.grad is not None
    assert not adapter.flat.grad.any()


@pytest.mark.parametrize("kind", ["sgd", "lion"])
def test_decoupled_decay_and_the_papers_step(tiny: Tiny, kind: str) -> None:
    adapter = make_adapter(tiny)
    config = TrainConfig(optimizer=kind, weight_decay=0.3, max_grad_norm=0.0)  # type: ignore[arg-type]
    mine = make_optimizer(adapter, config)
    names, copies, _ = copies_of(adapter)
    moments = {name: torch.zeros_like(t) for name, t in copies.items()}
    for step, rate in enumerate((0.1, 0.05, 0.2)):
        set_gradient(adapter, step)
        with torch.no_grad():
            for name, tensor in names.items():
                grad, copy, m = tensor.grad, copies[name], moments[name]
                assert grad is not None
                copy *= 1 - rate * 0.3 * (tensor.dim() > 1)
                if kind == "lion":
                    copy -= rate * torch.sign(0.9 * m + 0.1 * grad)
                    moments[name] = 0.999 * m + 0.001 * grad
                else:
                    moments[name] = 0.9 * m + grad
                    copy -= rate * moments[name]
        mine.step(rate)
        for name, tensor in names.items():
            torch.testing.assert_close(tensor, copies[name], rtol=1e-5, atol=1e-6, msg=name)


def test_eight_bits_follow_32(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps of noisy gradients whose sizes span six decades, and one within a block."""
    monkeypatch.setattr(optimizers, "CHUNK", 1024)
    flats = []
    for kind in ("adamw", "adamw_8bit"):
        adapter = make_adapter(tiny)
        begun = adapter.flat.detach().clone()
        optimizer = make_optimizer(adapter, TrainConfig(optimizer=kind))  # type: ignore[arg-type]
        sizes = torch.logspace(-6, 0, adapter.flat.numel())
        sizes *= torch.logspace(-1, 0, 7).repeat(len(sizes) // 7 + 1)[: len(sizes)]
        for step in range(30):
            set_gradient(adapter, step)
            assert adapter.flat.grad is not None
            adapter.flat.grad.add_(0.5).mul_(sizes)
            optimizer.step(0.01)
        flats.append(adapter.flat.detach() - begun)
    whole, narrow = flats
    assert (whole - narrow).norm() < 0.05 * whole.norm()
    assert (whole - narrow).abs().max() < 0.5 * whole.abs().max()
    stored = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    assert stored < 2.1 * len(begun)


def test_paged_state_wants_a_cuda_device(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="moves its state between a CUDA device"):
        make_optimizer(make_adapter(tiny), TrainConfig(optimizer="paged_adamw"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "sgd", "adam_beta1": 0.8}, "adam_beta1` is not read by the optimizer sgd"),
        ({"optimizer": "lion", "adam_epsilon": 1e-6}, "adam_epsilon"),
        ({"momentum": 0.5}, "momentum` is not read by the optimizer adamw"),
    ],
)
def test_a_setting_that_the_optimizer_does_not_read_is_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**changes)
