"""A weight in quantised storage computes what its dequantised weight computes, in every use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gguf_files import matrix
from lorimer.config import QuantConfig
from lorimer.kernels.products import LowRank
from lorimer.quant import linear as linear_module
from lorimer.quant.linear import DenseLinear, QuantLinear
from lorimer.quant.part import Part, whole
from lorimer.quant.storage import is_finite, keep, numbers, quantise

GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
KINDS = ("nf4", "fp4", "int8", "nf4 plain", *GGUF)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_part(kind: str, rows: int, columns: int = 256, seed: int = 0) -> Part:
    if kind in GGUF:
        return keep(matrix(kind, rows, columns, seed).reshape(-1), kind, (rows, columns), None)
    name, _, plain = kind.partition(" ")
    weight = random(rows, columns, seed=seed)
    weight[:, 3] *= 20  # kept apart by int8
    quant = QuantConfig(kind=name, block_size=128, double=not plain)
    return quantise(whole(weight), (rows, columns), quant)


def low_rank(inputs: int) -> LowRank:
    up = torch.zeros(51, 6)
    up[:20, :2], up[31:, 2:] = random(20, 2, seed=3), random(20, 4, seed=4)
    return LowRank(random(6, inputs, seed=5), up, ((0, 20, 0, 2, 1.0), (31, 20, 2, 4, 1.0)))


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[QuantLinear, DenseLinear]:
    """Three parts of two kinds, and the dense weight of the same numbers."""
    parts = [a_part(request.param, 20), a_part("Q8_0", 11, seed=1), a_part(request.param, 20, seed=2)]
    dense = torch.cat([numbers(part, 0, part.shape[0]) for part in parts])
    return QuantLinear(parts, torch.float32), DenseLinear(dense)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_forward_and_input_grad_are_those_of_the_numbers(
    both: tuple[QuantLinear, DenseLinear], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, dense = both
    assert mine.shape == dense.shape == (51, 256)
    monkeypatch.setattr(linear_module, "STRIP", 256 * 7)
    states, grad, ranks = random(tokens, 256, seed=6), random(tokens, 51, seed=7), low_rank(256)
    down = states @ ranks.down_RI.t()
    extras = {"bias_O": random(51, seed=8), "onto_TO": random(tokens, 51, seed=9)}
    close(mine.forward(states), dense.forward(states))
    close(
        mine.forward(states, low_rank=ranks, down_TR=down, **extras),
        dense.forward(states, low_rank=ranks, down_TR=down, **extras),
    )
    close(mine.input_grad(grad), dense.input_grad(grad))
    grad_down = grad @ ranks.up_OR
    close(
        mine.input_grad(grad, low_rank=ranks, grad_down_TR=grad_down),
        dense.input_grad(grad, low_rank=ranks, grad_down_TR=grad_down),
    )


def test_rows_logits_and_loss_are_those_of_the_numbers(both: tuple[QuantLinear, DenseLinear]) -> None:
    mine, dense = both
    ids = torch.tensor([50, 0, 19, 20, 30, 31, 0])
    assert torch.equal(mine.rows(ids), dense.rows(ids))
    assert torch.equal(mine.dequantise(), dense.dequantise())
    states, labels = random(9, 256, seed=1) / 16, torch.tensor([0, 50, 20, 3, 31, 8, 19, 30, 1])
    close(mine.logits(states), dense.logits(states))
    for smoothing, softcap in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.7), (0.1, 0.7)):
        settings = {"weight": 1 / 9, "smoothing": smoothing, "softcap": softcap, "need_grad": True}
        losses, grad = mine.head_loss(states, labels, **settings)
        wanted_losses, wanted_grad = dense.head_loss(states, labels, **settings)
        close(losses, wanted_losses)
        close(grad, wanted_grad)


def test_in_bf16_numbers_are_rounded_once_before_the_product() -> None:
    parts = [a_part("nf4", 24), a_part("Q6_K", 8)]
    mine = QuantLinear(parts, torch.bfloat16)
    dense = torch.cat([numbers(part, 0, part.shape[0]) for part in parts]).bfloat16()
    states, grad = random(40, 256).bfloat16(), random(40, 32).bfloat16()
    for found, wanted in (
        (mine.forward(states), states.double() @ dense.double().t()),
        (mine.input_grad(grad), grad.double() @ dense.double()),
    ):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 3e-3 * wanted.norm()
    assert torch.equal(mine.rows(torch.tensor([31, 0])), dense[[31, 0]])


def test_bytes_are_counted() -> None:
    four, eight = a_part("nf4", 64), a_part("int8", 64)
    numbers_of_it = 64 * 256
    assert four.nbytes == numbers_of_it // 2 + numbers_of_it // 128 + 4
    assert eight.nbytes == numbers_of_it + 4 * 64 + 8 + 2 * 64  # codes, scales, one column and its place
    assert QuantLinear([four, eight], torch.float32).nbytes == four.nbytes + eight.nbytes


@pytest.mark.parametrize("kind", GGUF)
def test_a_scale_that_is_not_finite_is_found(kind: str) -> None:
    part = a_part(kind, 4)
    assert is_finite(part)
    at = 208 if kind == "Q6_K" else 0
    part.data.view(4, -1)[2, at : at + 2] = torch.from_numpy(np.array([0x00, 0x7E], np.uint8))
    assert not is_finite(part)
    assert not torch.isfinite(numbers(part, 0, 4)).all()
