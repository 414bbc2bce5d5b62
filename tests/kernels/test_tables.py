"""Losses and gradients of a head with LoRA or rows of its own, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorimer.config import QuantConfig
from lorimer.kernels.dispatch import Dropout
from lorimer.kernels.tables import LowRankTable, OwnRows, TableUpdate, UpdatedHead
from lorimer.quant.linear import DenseLinear, FrozenLinear, QuantLinear
from lorimer.quant.part import whole
from lorimer.quant.storage import quantise
from tiny import difference

# Letters: M positions, V vocabulary, H hidden, R rank.
V, H, R = 141, 64, 3
WITHIN = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def made(dtype: torch.dtype, quant: str) -> tuple[FrozenLinear, Tensor]:
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(0)) / 8
    if quant == "none":
        frozen: FrozenLinear = DenseLinear(weight.to(dtype))
    else:
        frozen = QuantLinear([quantise(whole(weight), (V, H), QuantConfig(kind=quant))], dtype)
    return frozen, frozen.dequantise().double()


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("smoothing", "softcap"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1.5), (0.1, 1.5)])
@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.parametrize("what", ["LoRA", "LoRA, dropout", "rows"])
def test_a_head_with_an_update(
    what: str, count: int, smoothing: float, softcap: float, dtype: torch.dtype, quant: str
) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frozen, weight = made(dtype, quant)
    hidden = draw(count, H).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (count,), generator=generator)
    a, b, rows = (t.requires_grad_() for t in (draw(R, H) / 8, draw(V, R) / 2, draw(2, H) / 8))
    ids = torch.tensor([5, V - 1])
    wide = hidden.detach().double().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (a, b, rows)]
    dropout, dropped = None, wide
    if what == "rows":
        places = torch.full((V,), -1).index_copy(0, ids, torch.arange(2))
        update = TableUpdate(own=OwnRows(ids, rows, places))
        logits = wide @ weight.index_copy(0, ids, exact[2].to(dtype).double()).t()
    else:
        update = TableUpdate(low_rank=LowRankTable(a, b, 0.7, embedding=False))
        if "dropout" in what:
            dropout = Dropout((draw(4, H) > 0).to(dtype) * 2, torch.arange(count) % 4)
            dropped = wide * dropout.pool_PI[dropout.picks_T].double()
        logits = wide @ weight.t() + 0.7 * (dropped @ exact[0].t()) @ exact[1].t()
    head = UpdatedHead(frozen, update, dropout)
    loss, losses = head.loss(hidden, labels, weight=0.3, smoothing=smoothing, softcap=softcap)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    wanted = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    assert difference(losses, wanted.detach()) < WITHIN[dtype]
    (loss * 2).backward()
    (wanted.sum() * 0.3 * 2).backward()
    trained = [rows] if what == "rows" else [a, b]
    for mine, theirs in zip(
        [hidden, *trained], [wide, *(exact[2:] if what == "rows" else exact)], strict=False
    ):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert difference(mine.grad, theirs.grad) < 5 * WITHIN[dtype]


def test_without_gradients_nothing_is_kept() -> None:
    frozen, _ = made(torch.float32, "none")
    rows = torch.zeros(1, H, requires_grad=True)
    update = TableUpdate(own=OwnRows(torch.tensor([3]), rows, torch.full((V,), -1)))
    with torch.no_grad():
        loss, losses = UpdatedHead(frozen, update).loss(
            torch.ones(2, H), torch.tensor([1, 2]), weight=1.0, smoothing=0.0, softcap=0.0
        )
    assert not loss.requires_grad
    assert losses.shape == (2,)
