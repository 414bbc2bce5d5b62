"""The autograd operations against plain autograd in float64."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorimer.kernels import dispatch
from lorimer.kernels.dispatch import Dropout, Gate, HeadNorms, Heads, Linear, LowRank, Norm
from lorimer.kernels.native import library
from lorimer.quant.linear import DenseLinear
from tiny import difference

T, INPUTS = 9, 6
ROWS = (5, 4, 3)  # the second is not adapted
RANKS, SCALES = (2, 3), (0.5, 1.7)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, dtype: torch.dtype) -> LowRank:
    up = torch.zeros(sum(ROWS), sum(RANKS))
    up[:5, :2] = b1 * SCALES[0]
    up[9:, 2:] = b2 * SCALES[1]
    spans = ((0, 5, 0, 2, SCALES[0]), (9, 3, 2, 3, SCALES[1]))
    return LowRank(torch.cat([a1, a2]).to(dtype), up.to(dtype), spans)


@pytest.mark.parametrize(
    ("before", "residual", "bias", "drop", "lora"),
    [
        case
        for case in itertools.product(
            ("none", "norm", "gate"), (False, True), (False, True), (False, True), (False, True)
        )
        if case[4] or not case[3]
    ],
)
def test_project(before: str, residual: bool, bias: bool, drop: bool, lora: bool) -> None:
    """Every gradient: input, residual, norm weight, bias, and the factors of two outputs out of three."""
    x = randn(T, 2 * INPUTS if before == "gate" else INPUTS, seed=1).requires_grad_()
    weight, rest = randn(sum(ROWS), INPUTS, seed=2), randn(T, sum(ROWS), seed=3).requires_grad_()
    norm, offset = (
        (1 + 0.3 * randn(INPUTS, seed=4)).requires_grad_(),
        randn(sum(ROWS), seed=5).requires_grad_(),
    )
    a1, b1 = randn(2, INPUTS, seed=6), randn(5, 2, seed=7).requires_grad_()
    a2, b2 = randn(3, INPUTS, seed=8), randn(3, 3, seed=9).requires_grad_()
    stacked = torch.cat([a1, a2]).requires_grad_()
    pool, picks = (randn(4, INPUTS, seed=10) > 0).float() * 2, torch.arange(T) % 4
    grad = randn(T, sum(ROWS), seed=11)

    leaves = {"x": x, "rest": rest, "norm": norm, "offset": offset, "stacked": stacked, "b1": b1, "b2": b2}
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    states = wide["x"]
    if before == "norm":
        states = states / torch.sqrt(states.square().mean(-1, keepdim=True) + 1e-3) * wide["norm"]
    elif before == "gate":
        states = F.silu(states[:, :INPUTS]) * states[:, INPUTS:]
    exact = states @ weight.double().t()
    if residual:
        exact = exact + wide["rest"]
    if bias:
        exact = exact + wide["offset"]
    if lora:
        dropped = states * pool[picks] if drop else states
        down = dropped @ wide["stacked"].t()
        first = down[:, :2] @ wide["b1"].t() * SCALES[0]
        second = down[:, 2:] @ wide["b2"].t() * SCALES[1]
        exact = exact + torch.cat([first, exact.new_zeros(T, 4), second], 1)
    exact.backward(grad.double())

    linear = Linear(
        DenseLinear(weight),
        offset.detach() if bias else None,
        low_rank(a1, b1.detach(), a2, b2.detach(), torch.float32) if lora else None,
    )
    rule = {"none": None, "norm": Norm(norm.detach(), 1e-3), "gate": Gate()}[before]
    output = dispatch.project(
        x,
        linear,
        before=rule,
        residual_TO=rest if residual else None,
        dropout=Dropout(pool, picks) if drop else None,
        norm_parameters=(norm if before == "norm" else None, None),
        bias_parameter=offset if bias else None,
        factors=(stacked, b1, b2) if lora else (),
    )
    output.backward(grad)
    assert difference(output.detach(), exact.detach()) < 1e-6
    for name, leaf in leaves.items():
        if wide[name].grad is None:
            assert leaf.grad is None, name
        else:
            assert leaf.grad is not None, name
            assert difference(leaf.grad, wide[name].grad) < 3e-6, name


def test_project_in_bf16_keeps_factor_gradients_in_float32() -> None:
    """Factors are float32 parameters; products are bf16, so 2^-8 relative is what can be expected."""
    x, weight = randn(T, INPUTS, seed=1), randn(sum(ROWS), INPUTS, seed=2)
    parts = [randn(2, INPUTS, seed=6), randn(5, 2, seed=7), randn(3, INPUTS, seed=8), randn(3, 3, seed=9)]
    factors = {}
    for dtype in (torch.float32, torch.bfloat16):
        leaves = (
            torch.cat([parts[0], parts[2]]).requires_grad_(),
            *(parts[i].clone().requires_grad_() for i in (1, 3)),
        )
        linear = Linear(DenseLinear(weight.to(dtype)), None, low_rank(*parts, dtype))
        dispatch.project(x.to(dtype).requires_grad_(), linear, factors=leaves).square().sum().backward()
        factors[dtype] = [leaf.grad for leaf in leaves]
    for exact, mine in zip(*factors.values(), strict=True):
        assert mine is not None
        assert mine.dtype == torch.float32
        assert difference(mine, exact) < 3e-2


def test_frozen_input_gets_no_gradient_and_frozen_weight_neither() -> None:
    weight = randn(sum(ROWS), INPUTS, seed=2).requires_grad_()
    parts = [randn(2, INPUTS, seed=6), randn(5, 2, seed=7), randn(3, INPUTS, seed=8), randn(3, 3, seed=9)]
    leaves = (
        torch.cat([parts[0], parts[2]]).requires_grad_(),
        *(parts[i].requires_grad_() for i in (1, 3)),
    )
    linear = Linear(DenseLinear(weight), None, low_rank(*[p.detach() for p in parts], torch.float32))
    x = randn(T, INPUTS, seed=1)
    dispatch.project(x, linear, factors=leaves).sum().backward()
    assert x.grad is None
    assert weight.grad is None
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("trained", [False, True])
def test_rms_norm_over_heads(trained: bool) -> None:
    x, weight, grad = randn(4, 3, 5, seed=1).requires_grad_(), 1 + randn(5, seed=2), randn(4, 3, 5, seed=3)
    parameter = weight.clone().requires_grad_()
    wide, wide_weight = x.detach().double().requires_grad_(), weight.double().requires_grad_()
    exact = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-3) * wide_weight
    exact.backward(grad.double())
    output = dispatch.normed(x, Norm(weight, 1e-3), (parameter if trained else None, None))
    output.backward(grad)
    assert difference(output.detach(), exact.detach()) < 1e-6
    assert x.grad is not None
    assert difference(x.grad, wide.grad) < 3e-6
    if trained:
        assert parameter.grad is not None
        assert difference(parameter.grad, wide_weight.grad) < 3e-6


def rms64(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_norm_heads(kernels: str, whole: bool, trained: bool) -> None:
    """3 query heads, 2 key/value heads of 4: gradients of the stack and of both weights."""
    heads = Heads(3, 2, 4)
    x, grad = randn(5, 28, seed=1).requires_grad_(), randn(5, 28, seed=2)
    weights = [1 + 0.3 * randn(n if whole else 4, seed=n) for n in (12, 8)]
    leaves = [weight.clone().requires_grad_() for weight in weights]
    wide = [t.detach().double().requires_grad_() for t in (x, *leaves)]
    query, key, value = wide[0].split([12, 8, 8], 1)
    shape = (5, 1, -1) if whole else (5, -1, 4)
    exact = torch.cat(
        [
            rms64(query.reshape(shape), wide[1]).flatten(1),
            rms64(key.reshape(shape), wide[2]).flatten(1),
            value,
        ],
        1,
    )
    exact.backward(grad.double())
    norms = HeadNorms(Norm(weights[0], 1e-3), Norm(weights[1], 1e-3), whole)
    with library.using(library.REFERENCE) if kernels == "reference" else nullcontext():
        output = dispatch.norm_heads(x, heads, norms, tuple(leaves) if trained else (None, None))
        output.backward(grad)
        with torch.no_grad():
            assert torch.equal(dispatch.norm_heads(x.clone(), heads, norms), output)
    assert difference(output.detach(), exact.detach()) < 1e-6
    for leaf, known in zip((x, *leaves), wide, strict=True):
        if leaf is not x and not trained:
            assert leaf.grad is None
            continue
        assert leaf.grad is not None
        assert difference(leaf.grad, known.grad) < 3e-6


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_norm_heads_by_weights_of_their_own(kernels: str) -> None:
    """3 query heads, 2 key/value heads of 4: LayerNorms without bias."""
    heads = Heads(3, 2, 4)
    x, grad = randn(5, 28, seed=1).requires_grad_(), randn(5, 28, seed=2)
    weights = [1 + 0.3 * randn(count, 4, seed=count) for count in (3, 2)]
    wide = x.detach().double().requires_grad_()
    *sides, value = (part.unflatten(1, (-1, 4)) for part in wide.split([12, 8, 8], 1))
    exact = [
        torch.nn.functional.layer_norm(side, (4,), eps=1e-3) * weight.double()
        for side, weight in zip(sides, weights, strict=True)
    ]
    wanted = torch.cat([part.flatten(1) for part in (*exact, value)], 1)
    wanted.backward(grad.double())
    query, key = (Norm(weight, 1e-3, layer=True) for weight in weights)
    with library.using(library.REFERENCE) if kernels == "reference" else nullcontext():
        output = dispatch.norm_heads(x, heads, HeadNorms(query, key, own=True))
        output.backward(grad)
        with torch.no_grad():
            assert torch.equal(
                dispatch.norm_heads(x.clone(), heads, HeadNorms(query, key, own=True)), output
            )
    assert difference(output.detach(), wanted.detach()) < 1e-6
    assert x.grad is not None
    assert difference(x.grad, wide.grad) < 3e-6


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_add_normed(kernels: str, layer: bool, trained: bool) -> None:
    x, rest, grad = (randn(5, 7, seed=s) for s in (1, 2, 3))
    weight, bias = 1 + randn(7, seed=4), randn(7, seed=5) if layer else None
    leaves = [
        t.clone().requires_grad_() for t in (x, rest, weight, torch.zeros(7) if bias is None else bias)
    ]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = F.layer_norm(wide[0], (7,), wide[2], wide[3], 1e-3) if layer else rms64(wide[0], wide[2])
    exact = exact + wide[1]
    exact.backward(grad.double())
    norm = Norm(weight, 1e-3, layer=layer, bias_H=bias)
    with library.using(library.REFERENCE) if kernels == "reference" else nullcontext():
        parameters = (leaves[2], leaves[3] if layer else None) if trained else (None, None)
        output = dispatch.add_normed(leaves[1], leaves[0], norm, parameters)
        output.backward(grad)
        with torch.no_grad():
            assert torch.equal(dispatch.add_normed(rest, x, norm), output)
    assert difference(output.detach(), exact.detach()) < 1e-6
    for i, (leaf, known) in enumerate(zip(leaves, wide, strict=True)):
        if i > 1 and not (trained and (i == 2 or layer)):
            assert leaf.grad is None
            continue
        assert leaf.grad is not None
        assert difference(leaf.grad, known.grad) < 3e-6


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_add_scaled(kernels: str, scale: float) -> None:
    x, rest = (randn(5, 7, seed=s).requires_grad_() for s in (1, 2))
    grad = randn(5, 7, seed=3)
    with library.using(library.REFERENCE) if kernels == "reference" else nullcontext():
        output = dispatch.add_scaled(rest, x, scale)
        output.backward(grad)
        alone = dispatch.scaled(x, scale)
        frozen = dispatch.add_scaled(rest.detach(), x, scale)
        assert torch.autograd.grad(frozen.sum(), x)[0].allclose(torch.full((5, 7), scale))
        assert torch.autograd.grad(alone.sum(), x)[0].allclose(torch.full((5, 7), scale))
    assert difference(output.detach(), (rest + scale * x).detach().double()) < 1e-6
    assert difference(alone.detach(), (scale * x).detach().double()) < 1e-6
    assert rest.grad is not None
    assert torch.equal(rest.grad, grad)
    assert x.grad is not None
    assert difference(x.grad, scale * grad.double()) < 1e-6


def test_rotate_backward() -> None:
    x, grad, angles = randn(4, 2, 6, seed=1).requires_grad_(), randn(4, 2, 6, seed=2), randn(4, 3, seed=3)
    dispatch.rotate(x, angles.cos(), angles.sin()).backward(grad)
    wide = x.detach().double().requires_grad_()
    cos, sin = angles.double().cos().unsqueeze(1), angles.double().sin().unsqueeze(1)
    left, right = wide.chunk(2, -1)
    torch.cat([left * cos - right * sin, right * cos + left * sin], -1).backward(grad.double())
    assert x.grad is not None
    assert difference(x.grad, wide.grad) < 1e-6


@pytest.mark.trap(16)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [0.0, 1.3])
@pytest.mark.parametrize("head_trained", [False, True])
def test_head_loss(smoothing: float, softcap: float, head_trained: bool) -> None:
    hidden, head = randn(5, 4, seed=1).requires_grad_(), randn(11, 4, seed=2).requires_grad_(head_trained)
    labels = torch.tensor([0, 10, 3, 3, 7])
    wide, wide_head = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = wide @ wide_head.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    exact = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    (3 * exact).backward()
    loss, losses = dispatch.head_loss(
        hidden, head, labels, weight=1 / 5, smoothing=smoothing, softcap=softcap
    )
    assert not losses.requires_grad
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    assert float(losses.mean()) == pytest.approx(float(exact.detach()), rel=1e-6)
    (3 * loss).backward()
    assert hidden.grad is not None
    assert difference(hidden.grad, wide.grad) < 3e-6
    if head_trained:
        assert head.grad is not None
        assert difference(head.grad, wide_head.grad) < 3e-6
    else:
        assert head.grad is None
