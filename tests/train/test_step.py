"""A step that runs out of memory is split and computed again, whole."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lorimer.config import LoraConfig, TrainConfig
from lorimer.data.pack import make_pack, split_into_packs
from lorimer.data.template import Example
from lorimer.errors import DivergenceError, LorimerError
from lorimer.kernels import products
from lorimer.lora.adapter import new_adapter
from lorimer.lora.layers import LoraDropout
from lorimer.model.load import Place, load_decoder
from lorimer.model.loss import pack_loss, pack_losses
from lorimer.train import step as step_module
from lorimer.train.optimizer import AdamW
from lorimer.train.step import StepGivenUp, StepResult, is_out_of_memory, loss_scale, train_step
from tiny import FP32, make_tiny, our_logits, shake

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


@pytest.mark.trap(16)
@pytest.mark.parametrize("most_tokens", [1000, 40, 1], ids=["one pack", "three packs", "a pack a row"])
def test_a_smoothed_loss_is_that_of_pytorch_on_shifted_labels(base: Any, most_tokens: int) -> None:
    """However the step is split: over its trained tokens, each predicted by the token before it."""
    rows = examples([20, 31, 12, 25])
    decoder = load_decoder(base, FP32)
    adapter, _ = new_adapter(decoder, LoraConfig(r=4), seed=0)
    shake(adapter)
    optimizer = AdamW(adapter, TrainConfig())
    logits, labels = [], []
    for row, scores_TV in zip(rows, our_logits(decoder, [row.ids.tolist() for row in rows]), strict=True):
        logits.append(scores_TV[:-1][torch.from_numpy(row.trained[1:])])
        labels.append(torch.from_numpy(row.ids[row.trained]).long())
    exact = F.cross_entropy(torch.cat(logits).double(), torch.cat(labels), label_smoothing=0.2)
    packs = split_into_packs(rows, most_tokens)
    result = train_step(decoder, optimizer, packs, step=0, learning_rate=0.0, smoothing=0.2)
    assert result.loss == pytest.approx(float(exact), rel=2e-6)


@pytest.mark.trap(12)
@pytest.mark.trap(14)
@pytest.mark.parametrize("at_once", [1, 2, 4, 8])
def test_any_split_of_each_step_ends_in_the_same_weights(base: Any, at_once: int) -> None:
    """Steps of 16 rows and a last one of 5, all rows at once or so many."""
    rows = examples([7 + 5 * (n % 6) for n in range(21)])

    def ends(size: int) -> torch.Tensor:
        decoder = load_decoder(base, FP32)
        adapter, _ = new_adapter(decoder, LoraConfig(r=4), seed=0)
        optimizer = AdamW(adapter, TrainConfig())
        for step, first in enumerate((0, 16)):
            part = rows[first : first + 16]
            packs = [
                make_pack(part[i : i + size], range(i, min(i + size, len(part))))
                for i in range(0, len(part), size)
            ]
            train_step(decoder, optimizer, packs, step=step, learning_rate=1e-3)
        return optimizer.m.clone()

    whole = ends(16)
    assert (ends(at_once) - whole).norm() < 2e-5 * whole.norm()


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


def parts(base: Any, rank: int = 4) -> tuple[Any, Any, AdamW]:
    decoder = load_decoder(base, FP32)
    adapter, _ = new_adapter(decoder, LoraConfig(r=rank), seed=0)
    return decoder, adapter, AdamW(adapter, TrainConfig())


def test_the_losses_of_a_step_are_means_over_tokens(base: Any) -> None:
    """Of all tokens of the step, and of each row's, in the step's order; the packs do not matter."""
    decoder, _, optimizer = parts(base)
    rows = examples([20, 31, 12, 25])
    # Nothing is trained of the row that comes last in its pack, one token of the one that comes first.
    rows[1] = Example(rows[1].ids, np.zeros(31, bool), "row 1")
    rows[2] = Example(rows[2].ids, np.arange(12) == 7, "row 2")
    alone = [pack_losses(decoder, make_pack([row], [0])) for row in rows]
    wanted = [float(each.mean()) if len(each) else 0.0 for each in alone]
    result = train_step(decoder, optimizer, split_into_packs(rows, 45), step=0, learning_rate=0.0)
    assert result.row_losses == pytest.approx(wanted, rel=1e-5)
    assert result.loss == pytest.approx(float(torch.cat(alone).mean()), rel=1e-5)
    assert (result.tokens, result.trained_tokens) == (88, len(torch.cat(alone)))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_gradient_is_that_of_the_mean_over_the_steps_tokens(base: Any, smoothing: float) -> None:
    """However the rows lie in packs: one pack here, two there."""
    decoder, adapter, optimizer = parts(base)
    rows = examples([20, 31])
    loss, _ = pack_loss(decoder, make_pack(rows, [0, 1]), weight=1.0, smoothing=smoothing)
    trained = sum(int(row.trained[1:].sum()) for row in rows)
    (loss / trained).backward()
    assert adapter.flat.grad is not None
    norm = float(adapter.flat.grad.norm())
    optimizer.clear()
    given = {"smoothing": smoothing} if smoothing else {}
    result = train_step(decoder, optimizer, split_into_packs(rows, 31), step=0, learning_rate=0.0, **given)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert result.loss == pytest.approx(float(loss.detach()) / trained, rel=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_a_gradient_that_is_not_finite_names_step_rows_and_the_last_parameter(
    base: Any, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """The last that is not finite is the first that the backward pass came to."""
    decoder, adapter, optimizer = parts(base)
    before = adapter.flat.detach().clone()
    names = list(adapter.tensors)
    broken = {names[1], names[3], names[5]} if named else set()
    monkeypatch.setattr(optimizer, "step", lambda *given: float("inf"))
    monkeypatch.setattr(
        step_module,
        "_finite_gradient",
        lambda tensor: not any(tensor is adapter.tensors[name] for name in broken),
    )
    packs = split_into_packs(examples([20, 31]), 31)
    with pytest.raises(DivergenceError) as caught:
        train_step(decoder, optimizer, packs, step=4, learning_rate=1.0)
    where = f"; the first that is not finite comes from `{names[5]}`" if named else ""
    assert caught.value.problem == f"the gradient's norm is inf at step 5, in rows [1]; rows [0]{where}"
    assert torch.equal(adapter.flat, before)


@pytest.mark.parametrize(("given", "tried"), [(None, [1.0]), (1.0, [1.0]), (4.0, [4.0, 2.0, 1.0])])
def test_the_scale_is_halved_down_to_one(
    base: Any, monkeypatch: pytest.MonkeyPatch, given: float | None, tried: list[float]
) -> None:
    decoder, _, optimizer = parts(base)
    seen: list[float] = []
    monkeypatch.setattr(optimizer, "step", lambda rate, scale: seen.append(scale) or float("inf"))
    packs = split_into_packs(examples([20, 31]), 31)
    settings = {} if given is None else {"scale": given}
    with pytest.raises(DivergenceError):
        train_step(decoder, optimizer, packs, step=4, learning_rate=1.0, **settings)
    assert seen == tried


def test_a_row_of_which_nothing_is_trained_has_no_loss(base: Any) -> None:
    decoder, _, optimizer = parts(base)
    rows = examples([20, 9, 31])
    rows[2] = replace(rows[2], trained=np.zeros(31, dtype=bool))
    result = train_step(decoder, optimizer, [make_pack(rows, [0, 1, 2])], step=0, learning_rate=0.0)
    assert min(result.row_losses[:2]) > 1
    assert result.row_losses[2] == 0


def test_a_gradient_is_finite_where_all_of_it_is_or_there_is_none() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    assert step_module._finite_gradient(tensor)
    for grad, finite in (([1.0, 2.0, 3.0], True), ([1.0, float("nan"), 3.0], False)):
        tensor.grad = torch.tensor(grad)
        assert step_module._finite_gradient(tensor) is finite


def test_a_loss_that_is_not_finite_names_the_module_it_comes_from(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for with the pack as it was: its ids, its lengths, its shared prefix."""
    decoder, adapter, optimizer = parts(base)
    prompt = np.arange(3, 23, dtype=np.int32)
    rows = [
        Example(np.concatenate([prompt, np.full(5, 50 + n, np.int32)]), np.arange(25) >= 22, f"row {n}")
        for n in range(2)
    ]
    pack = make_pack(rows, [0, 1], share=True)
    real, seen = type(decoder).first_not_finite, []

    def looked(self: Any, ids_T: Any, lengths: Any, prefix: int = 0) -> Any:
        seen.append((ids_T.tolist(), lengths, prefix))
        return real(self, ids_T, lengths, prefix)

    monkeypatch.setattr(type(decoder), "first_not_finite", looked)
    with torch.no_grad():
        adapter.tensors["model.layers.1.self_attn.o_proj.lora_B.weight"].fill_(float("nan"))
    adapter.refresh()
    with pytest.raises(DivergenceError) as caught:
        train_step(decoder, optimizer, [pack], step=4, learning_rate=1.0)
    assert caught.value.problem == (
        "the loss is nan at step 5, in rows [0, 1]; the first that is not finite comes from "
        "`model.layers.1.self_attn.o_proj`"
    )
    assert seen == [(pack.ids_T.tolist(), pack.lengths, 20)]


def test_a_step_is_given_up_before_a_pack_and_changes_nothing(base: Any) -> None:
    decoder, adapter, optimizer = parts(base)
    before, asked = adapter.flat.detach().clone(), []

    def given_up() -> bool:
        asked.append(1)
        return len(asked) == 2

    packs = split_into_packs(examples([20, 31]), 31)
    with pytest.raises(StepGivenUp):
        train_step(decoder, optimizer, packs, step=0, learning_rate=1.0, given_up=given_up)
    assert len(asked) == 2
    assert torch.equal(adapter.flat, before)


def test_a_pack_that_does_not_fit_is_halved(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _, optimizer = parts(base)
    rows, asked = examples([20, 31, 12, 26]), []
    real = step_module.pack_loss

    def once(*given: Any, **named: Any) -> Any:
        if not asked:
            raise MemoryError
        return real(*given, **named)

    def split(most: int) -> Any:
        asked.append(most)
        return split_into_packs(rows, most)

    monkeypatch.setattr(step_module, "pack_loss", once)
    result = train_step(
        decoder, optimizer, split_into_packs(rows, 100), step=0, learning_rate=0.0, split=split
    )
    assert asked == [44]
    assert isinstance(asked[0], int)
    assert result.split == 44


@pytest.mark.parametrize("recompute", ["none", "mlp", "layers"])
def test_nothing_of_a_pack_is_held_while_the_next_is_computed(
    recompute: str, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, _, optimizer = parts(base)
    monkeypatch.setattr(decoder, "recompute", recompute)
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(*given: Any, **settings: Any) -> Any:
        assert not any(loss() is not None for loss in seen)
        loss, each_M = pack_loss(*given, **settings)
        seen.append(weakref.ref(loss))
        return loss, each_M

    monkeypatch.setattr(step_module, "pack_loss", watched)
    train_step(decoder, optimizer, split_into_packs(examples([9, 30, 14]), 31), step=0, learning_rate=0.0)
    assert len(seen) > 1


def test_the_stages_of_a_step_have_their_names(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _, optimizer = parts(base)
    names: list[str] = []

    def stage(name: str) -> Any:
        names.append(name)
        return nullcontext()

    monkeypatch.setattr(step_module.trace, "stage", stage)
    packs = split_into_packs(examples([20, 31]), 31)
    train_step(decoder, optimizer, packs, step=0, learning_rate=0.0)
    own = [name for name in names if name in ("forward", "backward", "optimizer")]
    assert own == ["forward", "backward"] * 2 + ["optimizer"]
    assert all(isinstance(name, str) for name in names)


def test_dropout_drops(base: Any) -> None:
    rows = examples([20, 31])
    assert a_step(base, rows, dropout=0.5)[0].loss != pytest.approx(a_step(base, rows)[0].loss, rel=1e-3)


def half_step(base: Any, scale: float) -> tuple[StepResult, torch.Tensor]:
    """A float16 step from a trained adapter: what came of it, and the adapter after it."""
    decoder = load_decoder(base, Place(torch.device("cpu"), torch.float16))
    adapter, _ = new_adapter(decoder, LoraConfig(r=4), seed=0)
    with torch.no_grad():
        adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)) / 9)
    adapter.refresh()
    optimizer = AdamW(adapter, TrainConfig())
    packs = split_into_packs(examples([9, 24, 17]), 100)
    result = train_step(decoder, optimizer, packs, step=0, learning_rate=1e-3, scale=scale)
    return result, adapter.flat.detach().clone()


def test_a_float16_step_whose_gradient_overflows_is_computed_again_with_half_the_scale(base: Any) -> None:
    low, adapter = half_step(base, 64.0)
    high, same = half_step(base, 2.0**40)
    assert low.loss_scale == 64.0
    assert 64.0 < high.loss_scale < 2.0**30
    assert high.loss == low.loss
    assert high.grad_norm == pytest.approx(low.grad_norm, rel=1e-2)
    assert (same - adapter).abs().max() < 2e-3  # AdamW's first step is at most the rate


def test_a_float16_gradient_is_that_of_float32(base: Any) -> None:
    wide, _ = a_step(base, examples([9, 24, 17]))
    assert half_step(base, 1024.0)[0].grad_norm == pytest.approx(wide.grad_norm, rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "step", "before", "wanted"),
    [
        (torch.float32, 0, None, 1.0),
        (torch.bfloat16, 200, 1.0, 1.0),
        (torch.float16, 0, None, 65536.0),
        (torch.float16, 5, 1024.0, 1024.0),
        (torch.float16, 400, 1024.0, 2048.0),
        (torch.float16, 400, 65536.0, 65536.0),
    ],
)
def test_the_scale_of_the_loss(dtype: torch.dtype, step: int, before: float | None, wanted: float) -> None:
    assert loss_scale(dtype, step, before) == wanted
