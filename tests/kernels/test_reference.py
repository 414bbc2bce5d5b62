"""Each kernel, forward and backward, against its formula in float64 and against values by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorimer.kernels import reference
from tiny import difference

# Largest difference against the largest value. bf16 keeps 8 bits: one rounding is 2^-9, and a few
# of them follow one another in a backward.
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
TYPES = list(CLOSE)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors]


def close(mine: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert mine.shape == exact.shape
    assert difference(mine, exact) < CLOSE[dtype]


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def test_rms_norm_by_hand() -> None:
    normed, rstd = reference.rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
    torch.testing.assert_close(rstd, torch.tensor([[1 / math.sqrt(12.5)]]))
    torch.testing.assert_close(normed, torch.tensor([[0.8485, 1.1314]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, grad = randn(5, 7, seed=1, dtype=dtype), randn(5, 7, seed=2, dtype=dtype)
    weight = 1 + 0.3 * randn(7, seed=3)
    x64, weight64 = wide(x, weight)
    exact = norm64(x64, weight64, 1e-3)
    exact.backward(grad.double())
    normed, rstd = reference.rms_norm(x, weight, 1e-3)
    assert normed.dtype == dtype
    assert rstd.dtype == torch.float32
    close(normed, exact.detach(), dtype)
    assert torch.equal(reference.rms_norm_apply(x, rstd, weight), normed)
    grad_x, grad_weight = reference.rms_norm_backward(grad, x, rstd, weight, weight_grad=True)
    assert grad_weight is not None
    close(grad_x, x64.grad, dtype)
    close(grad_weight, weight64.grad, dtype)
    assert reference.rms_norm_backward(grad, x, rstd, weight, weight_grad=False)[1] is None


def test_rms_norm_statistics_are_float32() -> None:
    """In bf16, 300^2 * 64 summed would lose the ones; the factor keeps them."""
    x = torch.cat([torch.full((1, 1), 256.0), torch.ones(1, 1023)], 1).bfloat16()
    _, rstd = reference.rms_norm(x, torch.ones(1024), 0.0)
    assert float(rstd) == pytest.approx(((65536 + 1023) / 1024) ** -0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    x, grad = randn(5, 14, seed=1, dtype=dtype), randn(5, 7, seed=2, dtype=dtype)
    (x64,) = wide(x)
    exact = F.silu(x64[:, :7]) * x64[:, 7:]
    exact.backward(grad.double())
    close(reference.gated(x, "silu"), exact.detach(), dtype)
    close(reference.gated_backward(grad, x, "silu")[0], x64.grad, dtype)


def test_rotate_by_hand() -> None:
    """A quarter turn of features 0 and 2; features 1 and 3 half a turn; the fifth stays."""
    states = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
    turned = reference.rotate(states, torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]]))
    assert turned.tolist() == [[[-3.0, -2.0, 1.0, -4.0, 5.0]]]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("features", [8, 11])
def test_rotate(dtype: torch.dtype, features: int) -> None:
    """Rotation of pairs as complex numbers; backward is the turn back."""
    states, grad = randn(6, 3, features, seed=1, dtype=dtype), randn(6, 3, features, seed=2, dtype=dtype)
    angles = randn(6, 4, seed=3)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    (states64,) = wide(states)
    pairs = torch.complex(states64[..., :4], states64[..., 4:8]) * torch.complex(
        cos.double(), sin.double()
    ).unsqueeze(1)
    exact = torch.cat([pairs.real, pairs.imag, states64[..., 8:]], -1)
    exact.backward(grad.double())
    close(reference.rotate(states, cos, sin), exact.detach(), dtype)
    close(reference.rotate(grad, cos, -sin), states64.grad, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("count", [1, 9, reference.HEAD_CHUNK, 2 * reference.HEAD_CHUNK + 3])
def test_cross_entropy_head(dtype: torch.dtype, smoothing: float, count: int) -> None:
    hidden, head = randn(count, 7, seed=1, dtype=dtype), randn(13, 7, seed=2, dtype=dtype)
    labels = torch.randint(0, 13, (count,), generator=torch.Generator().manual_seed(3))
    hidden64, head64 = wide(hidden, head)
    logits64 = hidden64 @ head64.t()
    losses = F.cross_entropy(logits64, labels, reduction="none", label_smoothing=smoothing)
    (0.37 * losses.sum()).backward()
    result = reference.cross_entropy_head(
        hidden, head, labels, weight=0.37, smoothing=smoothing, need_head_grad=True
    )
    assert result.losses_M.dtype == torch.float32
    assert result.grad_hidden_MH is not None
    assert result.grad_head_VH is not None
    assert result.grad_head_VH.dtype == torch.float32
    close(result.losses_M, losses.detach(), dtype)
    close(result.grad_hidden_MH, hidden64.grad, dtype)
    close(result.grad_head_VH, head64.grad, dtype)


def test_cross_entropy_head_by_hand_and_without_gradients() -> None:
    """Two logits, 0 and ln 3: the second has probability 3/4."""
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    result = reference.cross_entropy_head(hidden, head, torch.tensor([1]), weight=2.0)
    assert float(result.losses_M) == pytest.approx(-math.log(0.75))
    assert float(result.grad_hidden_MH) == pytest.approx(2 * (0.75 - 1) * math.log(3.0))
    assert result.grad_head_VH is None
    alone = reference.cross_entropy_head(hidden, head, torch.tensor([1]), weight=2.0, need_grad=False)
    assert torch.equal(alone.losses_M, result.losses_M)
    assert alone.grad_hidden_MH is None


def test_cross_entropy_of_logits_too_large_to_exponentiate() -> None:
    head = torch.tensor([[1000.0], [-1000.0]])
    result = reference.cross_entropy_head(torch.ones(1, 1), head, torch.tensor([1]), weight=1.0)
    assert float(result.losses_M) == 2000.0
    assert float(result.grad_hidden_MH) == 2000.0


def attention64(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    per = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(per, 1), value.repeat_interleave(per, 1)
    age = torch.arange(query.shape[2]).unsqueeze(1) - torch.arange(query.shape[2])
    hidden = (age < 0) | (age >= (window or query.shape[2]))
    return (query @ key.transpose(-1, -2) * scale).masked_fill(hidden, -math.inf).softmax(-1) @ value


BLOCK = reference.QUERY_BLOCK


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("length", "window", "heads", "groups"),
    [
        (1, None, 2, 1),
        (5, None, 4, 2),
        (5, 1, 4, 4),
        (5, 3, 6, 2),
        (5, 99, 3, 1),
        (BLOCK, None, 2, 2),
        (BLOCK + 1, 7, 3, 1),
        (2 * BLOCK + 5, None, 4, 2),
        (2 * BLOCK + 5, BLOCK + 2, 4, 2),
        (2 * BLOCK + 5, BLOCK // 2, 3, 1),
    ],
)
def test_causal_attention(
    dtype: torch.dtype, length: int, window: int | None, heads: int, groups: int
) -> None:
    query, grad = (randn(2, heads, length, 6, seed=s, dtype=dtype) for s in (1, 2))
    key, value = (randn(2, groups, length, 6, seed=s, dtype=dtype) for s in (3, 4))
    wides = wide(query, key, value)
    exact = attention64(*wides, 0.4, window)
    exact.backward(grad.double())
    output = reference.causal_attention(query, key, value, scale=0.4, window=window)
    close(output, exact.detach(), dtype)
    grads = reference.causal_attention_backward(grad, query, key, value, output, scale=0.4, window=window)
    largest = max(float(leaf.grad.abs().max()) for leaf in wides)
    for mine, leaf in zip(grads, wides, strict=True):
        assert mine.dtype == dtype
        # One token that sees only itself has a gradient of zero: measured against the largest of all.
        assert float((mine.double() - leaf.grad).abs().max()) < CLOSE[dtype] * largest
