"""The elementwise kernels, for every instruction set here: against float64, against their twins in
PyTorch, and bit for bit where a result must not depend on layout or threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lorimer.kernels import reference
from lorimer.kernels.native import elementwise as native
from lorimer.kernels.native import library

FP32, BF16 = torch.float32, torch.bfloat16
TYPES = [FP32, BF16]
# Around the widths of vectors (4, 8, 16), a hidden size, and one that ends in a rest of 1.
SIZES = [1, 3, 7, 15, 16, 17, 31, 576, 1537]
KINDS: list[native.Activation] = ["silu", "gelu_tanh", "gelu", "relu"]
# One rounding to the nearest, relative to the result: anything rounded twice in bf16 is beyond it.
UNIT = {FP32: 2.0**-24, BF16: 2.0**-8}
# Twins round in between.
CLOSE = {FP32: 1e-5, BF16: 3e-2}


@pytest.fixture(params=library.available(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within_a_buffer(tensor: Tensor, dim: int = 1) -> Tensor:
    """The same values as a part of a wider buffer, whose other values are NaN."""
    shape = list(tensor.shape)
    shape[dim] += 5
    wide = torch.full(shape, math.nan, dtype=tensor.dtype)
    view = wide.narrow(dim, 2, tensor.shape[dim])
    return view.copy_(tensor)


def near(mine: Tensor, exact: Tensor, slack: Tensor | float) -> None:
    """One rounding of a result that is itself off by at most `slack`."""
    assert mine.shape == exact.shape
    error = (mine.double() - exact).abs()
    assert bool((error <= UNIT[mine.dtype] * exact.abs() + slack).all()), float(error.max())


def like_twin(mine: Tensor, twin: Tensor) -> None:
    assert (mine.shape, mine.dtype) == (twin.shape, twin.dtype)
    assert float((mine - twin).abs().max()) <= CLOSE[mine.dtype] * float(twin.abs().max())


def same(mine: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    whole = {4: torch.int32, 2: torch.int16, 8: torch.int64}[mine.element_size()]
    return torch.equal(mine.contiguous().view(whole), other.contiguous().view(whole))


# --- RMSNorm ------------------------------------------------------------------------------------


def norm64(x: Tensor, factors: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * factors


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    x, weight = randn(5, size, seed=1, dtype=dtype), 1 + 0.3 * randn(size, seed=2)
    exact = norm64(x.double(), weight.double(), 1e-3)
    normed, rstd = native.rms_norm(x, weight, 1e-3)
    near(normed, exact, 1e-6 * exact.abs())
    exact_rstd = (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    near(rstd, exact_rstd, 1e-6 * exact_rstd)
    twin, twin_rstd = reference.rms_norm(x, weight, 1e-3)
    like_twin(normed, twin)
    like_twin(rstd, twin_rstd)
    assert same(native.rms_norm(within_a_buffer(x), weight, 1e-3)[0], normed)
    assert same(native.rms_norm_apply(within_a_buffer(x), rstd, weight), normed)
    onto = randn(5, size, seed=3, dtype=dtype)
    added, _ = native.rms_norm(within_a_buffer(x), weight, 1e-3, onto_TH=within_a_buffer(onto))
    near(added, exact + onto.double(), 1e-6 * (exact.abs() + onto.double().abs()))
    like_twin(added, reference.rms_norm(x, weight, 1e-3, onto_TH=onto)[0])
    # A weight around 0, as Gemma keeps it, is the same norm.
    shifted, _ = native.rms_norm(x, weight - 1, 1e-3, offset=1.0)
    near(shifted, exact, 1e-6 * (1 + exact.abs()))
    assert same(native.rms_norm_apply(x, rstd, weight - 1, offset=1.0), shifted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wide_grad", [False, True])
def test_rms_norm_backward(dtype: torch.dtype, size: int, wide_grad: bool) -> None:
    x, grad = randn(5, size, seed=1, dtype=dtype), randn(5, size, seed=2, dtype=dtype)
    grad = grad.float() + 0.01 * randn(5, size, seed=4) if wide_grad else grad
    onto, weight = randn(5, size, seed=5, dtype=dtype), 1 + 0.3 * randn(size, seed=3)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    norm64(x64, weight64, 1e-3).backward(grad.double())
    _, rstd = native.rms_norm(x, weight, 1e-3)
    mine, none = native.rms_norm_backward(grad, x, rstd, weight, weight_grad=False)
    assert none is None
    slack = 3e-6 * float((rstd * weight * grad).abs().max()) * (1 + float((rstd * x).abs().max()))
    near(mine, x64.grad, slack)
    more, grad_weight = native.rms_norm_backward(
        *(within_a_buffer(grad), within_a_buffer(x), rstd, weight - 1),
        weight_grad=True,
        onto_TH=within_a_buffer(onto),
        offset=1.0,
    )
    assert grad_weight is not None
    near(more, x64.grad + onto.double(), slack + 1e-6)
    near(grad_weight, weight64.grad, 3e-6 * float((grad * x * rstd).abs().sum(0).max()))
    twin, twin_weight = reference.rms_norm_backward(
        *(grad, x, rstd, weight - 1), weight_grad=True, onto_TH=onto, offset=1.0
    )
    assert twin_weight is not None
    like_twin(more, twin)
    like_twin(grad_weight, twin_weight)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("over", ["grad", "onto"])
def test_rms_norm_backward_over_what_it_reads(dtype: torch.dtype, over: str) -> None:
    x, grad, onto = (randn(5, 31, seed=s, dtype=dtype) for s in (1, 2, 3))
    weight = randn(31, seed=4)
    _, rstd = native.rms_norm(x, weight, 1e-3)
    apart, _ = native.rms_norm_backward(grad, x, rstd, weight, weight_grad=False, onto_TH=onto)
    out = grad if over == "grad" else onto
    narrow = dtype == BF16
    native._rms_norm_backward(
        *(grad, 31, not narrow, x, 31, rstd, weight, onto, 31, out, 31, None, 5, 1, 31, 0.0, narrow, 1)
    )
    assert same(out, apart)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [7, 64, 96, 256])
def test_head_norms_are_norms_of_each_head(dtype: torch.dtype, size: int) -> None:
    """Heads within a stacked buffer: bit for bit what each row alone gives."""
    heads, grads, onto = (within_a_buffer(randn(6, 3, size, seed=s, dtype=dtype)) for s in (1, 2, 3))
    weight = randn(size, seed=4)
    rows, grad_rows, onto_rows = (t.reshape(18, size) for t in (heads, grads, onto))
    normed, rstd = native.rms_norm(heads, weight, 1e-5)
    normed_rows, rstd_rows = native.rms_norm(rows, weight, 1e-5)
    assert rstd.shape == (6, 3, 1)
    assert same(normed.view(18, size), normed_rows)
    assert same(rstd.view(18, 1), rstd_rows)
    assert same(native.rms_norm_apply(heads, rstd, weight), normed)
    mine, grad_weight = native.rms_norm_backward(grads, heads, rstd, weight, weight_grad=True, onto_TH=onto)
    apart, _ = native.rms_norm_backward(
        grad_rows, rows, rstd_rows, weight, weight_grad=False, onto_TH=onto_rows
    )
    assert same(mine.view(18, size), apart)
    assert grad_weight is not None
    exact = (grad_rows.double() * rows.double() * rstd_rows.double()).sum(0)
    near(grad_weight, exact, 1e-5)


# --- norms of query and key -----------------------------------------------------------------------

# Rows of query and of key, features of each, and what follows.
STACKS = [((3, 7), (1, 7), 7), ((2, 64), (1, 64), 64), ((4, 16), (2, 16), 0), ((1, 96), (1, 31), 5)]
Stack = tuple[tuple[int, int], tuple[int, int], int]


def parts_of(stacked: Tensor, stack: Stack) -> list[Tensor]:
    """Query and key as rows, and what follows."""
    (m, a), (n, b), rest = stack
    query, key, value = stacked.split([m * a, n * b, rest], 1)
    return [query.unflatten(1, (m, a)), key.unflatten(1, (n, b)), value]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("tokens", [1, 6, 130])
def test_query_key_norm(dtype: torch.dtype, stack: Stack, tokens: int) -> None:
    """Bit for bit what each norm alone gives, and the value untouched; and so the gradients."""
    query, key, rest = stack
    x, grad = (randn(tokens, math.prod(query) + math.prod(key) + rest, seed=s, dtype=dtype) for s in (1, 2))
    weights = randn(query[1], seed=3), randn(key[1], seed=4)
    normed, rstd = native.query_key_norm(within_a_buffer(x), query, key, weights, 1e-3, offset=1.0)
    over = within_a_buffer(x)
    assert native.query_key_norm(over, query, key, weights, 1e-3, offset=1.0, in_place=True)[0] is over
    assert same(over, normed)
    assert over._base is not None
    assert int(over._base.isnan().sum()) == over._base.numel() - over.numel()
    back, *weight_grads = native.query_key_norm_backward(
        *(within_a_buffer(grad), within_a_buffer(x), rstd, query, key, weights),
        offset=1.0,
        weight_grads=(True, True),
    )
    without = native.query_key_norm_backward(grad, x, rstd, query, key, weights, offset=1.0)
    assert same(without[0], back)
    assert without[1:] == (None, None)
    assert same(parts_of(normed, stack)[2], parts_of(x, stack)[2])
    assert same(parts_of(back, stack)[2], parts_of(grad, stack)[2])
    for i, weight in enumerate(weights):
        states, above = parts_of(x, stack)[i], parts_of(grad, stack)[i]
        alone, factor = native.rms_norm(states, weight, 1e-3, offset=1.0)
        assert same(parts_of(normed, stack)[i], alone)
        mine, weight_grad = native.rms_norm_backward(
            above, states, factor, weight, weight_grad=True, offset=1.0
        )
        assert same(parts_of(back, stack)[i], mine)
        assert weight_grad is not None
        assert same(weight_grads[i], weight_grad)


# --- LayerNorm ------------------------------------------------------------------------------------


def layer_norm64(x: Tensor, weight: Tensor, bias: Tensor | float, eps: float) -> Tensor:
    away = x - x.mean(-1, keepdim=True)
    return away / torch.sqrt(away.square().mean(-1, keepdim=True) + eps) * weight + bias


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layer_norm(dtype: torch.dtype, size: int, biased: bool, mean: float) -> None:
    """A mean far above the deviation does not cost the variance its digits."""
    x = (randn(5, size, seed=1) + mean).to(dtype)
    weight, bias = 1 + 0.3 * randn(size, seed=2), randn(size, seed=3) if biased else None
    bias64 = bias.double() if bias is not None else 0.0
    exact = layer_norm64(x.double(), weight.double(), bias64, 1e-3)
    normed, facts = native.layer_norm(x, weight, bias, 1e-3)
    # The mean is rounded to a float, and each of the states less it.
    slack = 1e-6 * (exact.abs() + 1) + 3e-7 * mean * facts[:, 1:].double() * weight.abs()
    near(normed, exact, slack)
    assert facts.shape == (5, 2)
    near(facts[:, 0], x.double().mean(-1), 1e-6 * (1 + mean))
    variance = x.double().var(-1, correction=0) if size > 1 else torch.zeros(5).double()
    near(facts[:, 1], (variance + 1e-3).rsqrt(), 1e-5 * (variance + 1e-3).rsqrt())
    like_twin(normed, reference.layer_norm(x, weight, bias, 1e-3)[0])
    assert same(native.layer_norm(within_a_buffer(x), weight, bias, 1e-3)[0], normed)
    assert same(native.layer_norm_apply(within_a_buffer(x), facts, weight, bias), normed)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [5, 131])
def test_layer_norm_backward(dtype: torch.dtype, size: int, tokens: int) -> None:
    x, grad = randn(tokens, size, seed=1, dtype=dtype) + 2, randn(tokens, size, seed=2, dtype=dtype)
    weight = 1 + 0.3 * randn(size, seed=3)
    wide = [t.double().requires_grad_() for t in (x, weight, torch.zeros(size))]
    layer_norm64(wide[0], wide[1], wide[2], 1e-2).backward(grad.double())
    _, facts = native.layer_norm(x, weight, None, 1e-2)
    mine, *nothing = native.layer_norm_backward(grad, x, facts, weight, weight_grad=False)
    assert nothing == [None, None]
    normed = (x - facts[:, :1]) * facts[:, 1:]
    per_row = (facts[:, 1:] * weight * grad).abs().amax(1, keepdim=True) * (
        1 + normed.abs().amax(1, keepdim=True)
    )
    assert wide[0].grad is not None
    near(mine, wide[0].grad, 5e-6 * per_row.double())
    more, grad_weight, grad_bias = native.layer_norm_backward(
        within_a_buffer(grad), within_a_buffer(x), facts, weight, weight_grad=True
    )
    assert same(more, mine)
    assert grad_weight is not None
    assert grad_bias is not None
    assert wide[1].grad is not None
    assert wide[2].grad is not None
    near(grad_weight, wide[1].grad, 5e-6 * float((grad * normed).abs().sum(0).max()))
    near(grad_bias, wide[2].grad, 1e-6 * float(grad.abs().sum(0).max()))
    twin = reference.layer_norm_backward(grad, x, facts, weight, weight_grad=True)
    for ours, theirs in zip((more, grad_weight, grad_bias), twin, strict=True):
        assert theirs is not None
        scale = float(per_row.max()) if ours is more else float(theirs.abs().max())
        assert float((ours - theirs).abs().max()) <= CLOSE[dtype] * scale


@pytest.mark.parametrize("dtype", TYPES)
def test_layer_norms_of_heads_are_norms_of_each(dtype: torch.dtype) -> None:
    heads, grads = (within_a_buffer(randn(6, 3, 31, seed=s, dtype=dtype)) for s in (1, 2))
    weight, bias = randn(31, seed=4), randn(31, seed=5)
    normed, facts = native.layer_norm(heads, weight, bias, 1e-5)
    rows, row_facts = native.layer_norm(heads.reshape(18, 31), weight, bias, 1e-5)
    assert facts.shape == (6, 3, 2)
    assert same(normed.view(18, 31), rows)
    assert same(facts.view(18, 2), row_facts)
    mine, *_ = native.layer_norm_backward(grads, heads, facts, weight, weight_grad=True)
    alone, *_ = native.layer_norm_backward(
        grads.reshape(18, 31), heads.reshape(18, 31), row_facts, weight, weight_grad=False
    )
    assert same(mine.view(18, 31), alone)


# --- rotation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide_table", [False, True])
@pytest.mark.parametrize("half", [1, 3, 7, 15, 16, 17, 31, 48])
@pytest.mark.parametrize("rest", [0, 5])
def test_rotate(dtype: torch.dtype, wide_table: bool, half: int, rest: int) -> None:
    states, angles = randn(6, 3, 2 * half + rest, seed=1, dtype=dtype), randn(6, half, seed=2)
    table = FP32 if wide_table else dtype
    cos, sin = angles.cos().to(table), angles.sin().to(table)
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    a, b, kept = (t.double() for t in states.split([half, half, rest], -1))
    exact = torch.cat([a * c - b * s, b * c + a * s, kept], -1)
    back = torch.cat([a * c + b * s, b * c - a * s, kept], -1)
    turned = native.rotate(states, cos, sin)
    near(turned, exact, 1e-6)
    like_twin(turned, reference.rotate(states, cos, sin).to(dtype))
    assert same(native.rotate(within_a_buffer(states), cos, sin), turned)
    part = within_a_buffer(states)
    assert native.rotate_in_place(part, cos, sin) is part
    assert same(part, turned)
    # The heads on both sides, which are NaN, are as they were.
    assert part._base is not None
    assert int(part._base.isnan().sum()) == part._base.numel() - part.numel()
    near(native.rotate_in_place(states.clone(), cos, sin, backward=True), back, 1e-6)


def test_rotate_in_place_refuses_what_it_would_copy() -> None:
    table = torch.ones(3, 2)
    with pytest.raises(AssertionError):
        native.rotate_in_place(torch.ones(3, 4, 2).transpose(1, 2), table, table)


# --- gated units --------------------------------------------------------------------------------


def activate64(x: Tensor, kind: native.Activation) -> Tensor:
    """In the form that keeps the digits of small results."""
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "relu":
        return x.clamp(min=0)
    if kind == "gelu":
        return x * torch.special.erfc(-x / math.sqrt(2)) / 2
    # The cube, bounded so that its slope at huge values is 0 rather than infinity times 0.
    bounded = x.clamp(-1e3, 1e3)
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (bounded + 0.044715 * bounded**3))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_gated(dtype: torch.dtype, size: int, kind: native.Activation) -> None:
    gate_up = 2 * randn(5, 2 * size, seed=1, dtype=dtype)
    grad = randn(5, size, seed=2, dtype=dtype)
    wide = gate_up.double().requires_grad_()
    exact = activate64(wide[:, :size], kind) * wide[:, size:]
    exact.backward(grad.double())
    result = native.gated(gate_up, kind)
    # The digits of the smallest results have a test of their own below.
    near(result, exact.detach(), 1e-6 * exact.detach().abs() + 1e-8 * gate_up[:, size:].double().abs())
    like_twin(result, reference.gated(gate_up, kind))
    mine, again = native.gated_backward(grad, gate_up, kind, again=True)
    assert again is not None
    assert same(again, result)
    assert wide.grad is not None
    near(mine, wide.grad, 4e-6 * float(wide.grad.abs().max()))
    like_twin(mine, reference.gated_backward(grad, gate_up, kind)[0])
    alone, none = native.gated_backward(grad, gate_up, kind)
    assert none is None
    assert same(alone, mine)
    over, _ = native.gated_backward(grad, gate_up, kind, in_place=True)
    assert over is gate_up
    assert same(over, mine)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_activate(dtype: torch.dtype, size: int, kind: native.Activation) -> None:
    """Bit for bit a gated unit's activation, with 1 for the other half."""
    x, grad = 2 * randn(5, size, seed=1, dtype=dtype), randn(5, size, seed=2, dtype=dtype)
    stacked = torch.cat([x, torch.ones_like(x)], 1)
    result = native.activate(within_a_buffer(x), kind)
    assert same(result, native.gated(stacked, kind))
    like_twin(result, reference.activate(x, kind))
    mine, again = native.activate_backward(within_a_buffer(grad), within_a_buffer(x), kind, again=True)
    assert again is not None
    assert same(again, result)
    assert same(mine, native.gated_backward(grad, stacked, kind)[0][:, :size])
    like_twin(mine, reference.activate_backward(grad, x, kind)[0])
    alone, none = native.activate_backward(grad, x, kind)
    assert none is None
    assert same(alone, mine)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 0.22, -3.0])
def test_add_scaled(dtype: torch.dtype, size: int, scale: float) -> None:
    x, residual = randn(5, size, seed=1, dtype=dtype), randn(5, size, seed=2, dtype=dtype)
    by = float(torch.tensor(scale))
    exact = x.double() * by
    terms = exact.abs() + residual.double().abs()
    result = native.add_scaled(within_a_buffer(residual), within_a_buffer(x), scale)
    near(result, exact + residual.double(), 1e-7 * terms)
    like_twin(result, reference.add_scaled(residual, x, scale))
    alone = native.add_scaled(None, x, scale)
    near(alone, exact, 0.0)
    like_twin(alone, reference.add_scaled(None, x, scale))


def every_bf16() -> Tensor:
    """All 65,536 upper halves of a float, as float32."""
    return (torch.arange(65536, dtype=torch.int32) << 16).view(FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_from_end_to_end(kind: native.Activation, isa: str) -> None:
    """Every finite bf16 value, and the range where exponentials live, with the digits right."""
    values = every_bf16()
    x = torch.cat([values[values.isfinite()], torch.linspace(-110, 30, 50_001)])
    wide = x.double().requires_grad_()
    exact = activate64(wide, kind)
    exact.sum().backward()
    gate_up = torch.cat([x, torch.ones_like(x)]).unsqueeze(0)
    mine = native.gated(gate_up, kind).squeeze(0).double()
    # What an exponent's own rounding makes of e^u: it grows with u.
    u = {
        "silu": 0.0 * x,
        "relu": 0.0 * x,
        "gelu": x**2 / 2 if isa == "portable" else 0.0 * x,
        "gelu_tanh": 3 * x.abs() ** 3,
    }
    # Below 1e-36 the sigmoid is 0, since 1 + e^-x is infinite.
    bound = 5e-7 * (1 + u[kind].double().clamp(max=100)) * exact.detach().abs() + 1e-36
    error = (mine - exact.detach()).abs()
    assert bool((error <= bound).all()), float(x[(error - bound).argmax()])
    zero = x == 0
    assert same(mine.float()[zero], x[zero])
    grads, _ = native.gated_backward(torch.ones_like(x).unsqueeze(0), gate_up, kind)
    exact_grad = wide.grad if kind != "relu" else (x > 0).double()  # torch takes 1 at 0
    near(grads[0, : len(x)], exact_grad, 3e-6)
    assert same(grads[0, len(x) :], mine.float())


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_what_is_not_finite(kind: native.Activation) -> None:
    """Infinity stays; minus infinity times a probability of 0 is NaN, as in torch; NaN stays."""
    gate = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]])
    result = native.gated(torch.cat([gate, torch.ones(1, 4)], 1), kind)
    assert result[0, 0] == math.inf
    assert bool(result[0, 1] == 0 if kind == "relu" else result[0, 1].isnan())
    assert result[0, 2].isnan()
    assert result[0, 3].isfinite()
    ones = torch.ones(1, 4)
    slopes, _ = native.gated_backward(ones, torch.cat([gate, ones], 1), kind)
    assert slopes[0, 2].isnan()
    assert slopes[0, 3].isfinite()
    with_reference = reference.activate_backward(ones, gate, kind)[0]
    assert torch.equal(with_reference.isnan()[0, 2:], slopes[0, 2:4].isnan())
    assert torch.equal(native.activate(gate, kind).isnan(), result.isnan())


# --- what is not finite stays in its row ----------------------------------------------------------

Rows = Callable[[Tensor], Tensor]
WEIGHT = 1 + 0.3 * randn(50, seed=9)
ROW_KERNELS: dict[str, Rows] = {
    "rms_norm": lambda x: native.rms_norm(x, WEIGHT, 1e-5)[0],
    "rms_norm_backward": lambda x: native.rms_norm_backward(
        x, x, native.rms_norm(x, WEIGHT, 1e-5)[1], WEIGHT, weight_grad=False, onto_TH=x
    )[0],
    "rms_norm onto": lambda x: native.rms_norm(x, WEIGHT, 1e-5, onto_TH=x)[0],
    "query_key_norm": lambda x: native.query_key_norm(x, (2, 10), (1, 10), (WEIGHT[:10],) * 2, 1e-5)[0],
    "query_key_norm_backward": lambda x: native.query_key_norm_backward(
        *(x, x, native.query_key_norm(x, (2, 10), (1, 10), (WEIGHT[:10],) * 2, 1e-5)[1]),
        *((2, 10), (1, 10), (WEIGHT[:10],) * 2),
    )[0],
    "layer_norm": lambda x: native.layer_norm(x, WEIGHT, WEIGHT, 1e-5)[0],
    "layer_norm_backward": lambda x: native.layer_norm_backward(
        x, x, native.layer_norm(x, WEIGHT, None, 1e-5)[1], WEIGHT, weight_grad=True
    )[0],
    "activate": lambda x: native.activate(x, "gelu_tanh") + native.activate(-x, "relu"),
    "activate_backward": lambda x: (
        native.activate_backward(x, x, "relu")[0] + native.activate_backward(x, -x, "silu")[0]
    ),
    "add_scaled": lambda x: native.add_scaled(x, x, 0.3),
    "rotate": lambda x: native.rotate(x.view(-1, 2, 25), x[:, :12], x[:, 12:24]).flatten(1),
    "gated": lambda x: native.gated(x, "silu"),
    "gated gelu": lambda x: native.gated(x, "gelu"),
    "gated_backward": lambda x: native.gated_backward(torch.ones_like(x[:, :25]), x, "silu")[0],
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_a_bad_value_stays_in_its_row(dtype: torch.dtype, bad: float, name: str) -> None:
    x = randn(7, 50, seed=1, dtype=dtype)
    before = ROW_KERNELS[name](x)
    x[3, 19] = bad
    after = ROW_KERNELS[name](x)
    others = [0, 1, 2, 4, 5, 6]
    assert same(after[others], before[others])
    assert not after[3].isfinite().all()


# --- the optimizer --------------------------------------------------------------------------------


def far_apart(mine: Tensor, theirs: Tensor) -> int:
    """How many floats lie between the two at most."""
    whole = [t.view(torch.int32).long() for t in (mine, theirs)]
    ordered = [torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) for bits in whole]
    return int((ordered[0] - ordered[1]).abs().max())


@pytest.mark.parametrize(
    ("n", "decay_until", "beta1"),
    [(1, 1, 0.9), (17, 3, 0.9), (9001, 5003, 0.9), (9001, 0, 0.9), (9001, 9001, 0.3)],
)
def test_adamw_is_that_of_torch(n: int, decay_until: int, beta1: float, isa: str) -> None:
    """50 steps, with clipping: at most two floats apart where torch computes in vectors as we do."""
    mine = 0.05 * randn(n, seed=1)
    theirs = [t.clone().requires_grad_() for t in mine.tensor_split([decay_until])]
    rule = {"lr": 2e-3, "eps": 1e-8}
    decays = [(part, decay) for part, decay in zip(theirs, (0.1, 0.0), strict=True) if part.numel()]
    groups = [{"params": [part], "weight_decay": decay} for part, decay in decays]
    optimizer = torch.optim.AdamW(groups, betas=(beta1, 0.999), fused=True, **rule)
    m, v = torch.zeros(n), torch.zeros(n)
    twin = [mine.clone(), m.clone(), v.clone()]
    for step in range(1, 51):
        grad = 1e-2 * randn(n, seed=100 + step)
        for part, grad_part in zip(theirs, grad.tensor_split([decay_until]), strict=True):
            part.grad = 0.37 * grad_part
        optimizer.step()
        how = {"decay_until": decay_until, "beta1": beta1, "beta2": 0.999, "weight_decay": 0.1, **rule}
        copy = grad.clone()
        reference.adamw(twin[0], copy, *twin[1:], step=step, grad_scale=0.37, **how)
        native.adamw(mine, grad, m, v, step=step, grad_scale=0.37, **how)
        assert same(grad, torch.zeros(n))
    states = [optimizer.state[part] for part, _ in decays]
    results = [
        (mine, torch.cat([part.detach() for part in theirs]), twin[0]),
        (m, torch.cat([state["exp_avg"] for state in states]), twin[1]),
        (v, torch.cat([state["exp_avg_sq"] for state in states]), twin[2]),
    ]
    for ours, torchs, plain in results:
        scale = float(torchs.abs().max())
        assert float((ours - plain).abs().max()) < 3e-6 * scale
        if isa == "portable" or n < 9001:
            # Single operations there, and in what torch has left over beyond whole vectors.
            assert float((ours - torchs).abs().max()) < 1e-6 * scale
        else:
            vectors = slice(0, n // 64 * 64) if decay_until in (0, n) else slice(0, decay_until // 64 * 64)
            assert far_apart(ours[vectors], torchs[vectors]) <= 2


@pytest.mark.parametrize("n", [0, 1, 17, 65_536, 65_537, 200_003])
def test_squared_norm(n: int) -> None:
    """Values whose squares a float32 cannot hold."""
    values = 1e25 * randn(n, seed=1)
    assert native.squared_norm(values) == pytest.approx(reference.squared_norm(values), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_squared_norm_of_what_is_not_finite(bad: float) -> None:
    values = torch.ones(70_000)
    values[69_999] = bad
    assert not math.isfinite(native.squared_norm(values))


# --- copies and sums ------------------------------------------------------------------------------


def test_narrowing_is_that_of_torch(isa: str) -> None:
    """Every upper half of a float with the lower halves that decide the rounding: ties included."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    upper = torch.arange(65536, dtype=torch.int32) << 16
    source = (upper.unsqueeze(1) | lower).view(FP32)
    target = torch.empty(source.shape, dtype=BF16)
    native.ScaledCopies([(source, target, 1.0)]).refresh()
    expected = source.to(BF16)
    nan = source.isnan()
    assert torch.equal(target.isnan(), nan)
    if isa == "avx512_bf16":
        # The processor's own instruction takes what is below the smallest normal number for 0.
        tiny = source.abs() < torch.finfo(FP32).tiny
        assert bool((target[tiny].float().abs() <= expected[tiny].float().abs()).all())
        nan |= tiny
    assert same(target[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", TYPES)
def test_scaled_copies(dtype: torch.dtype) -> None:
    """Matrices of all sizes, whole or into a part of a wider one, each with its own scale."""
    shapes = [(1, 1), (3, 7), (16, 576), (31, 17), (64, 16), (5, 1537), (0, 4)]
    sources = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    targets = [torch.empty(shape, dtype=dtype) for shape in shapes]
    parts = [within_a_buffer(target) for target in targets]
    scales = [0.5 + i for i in range(len(shapes))]
    copies = [*zip(sources, targets, scales, strict=True), *zip(sources, parts, scales, strict=True)]
    table = native.ScaledCopies(copies)
    for source in sources:
        source.add_(1.0)
    table.refresh()
    for source, target, part, scale in zip(sources, targets, parts, scales, strict=True):
        assert same(target, (source * scale).to(dtype))
        assert same(part, target)
        assert part._base is not None
        assert int(part._base.isnan().sum()) == part._base.numel() - part.numel()
    native.ScaledCopies([]).refresh()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 2, 127, 301])
def test_column_sums(dtype: torch.dtype, size: int, rows: int) -> None:
    grad = randn(rows, size, seed=1, dtype=dtype)
    sums = native.column_sums(within_a_buffer(grad))
    near(sums, grad.double().sum(0), 1e-6 * float(grad.double().abs().sum(0).max()))
    like_twin(sums, reference.column_sums(grad))


# --- threads --------------------------------------------------------------------------------------


def everything(dtype: torch.dtype) -> list[Tensor]:
    """Every kernel once, on inputs that are worth several threads."""
    x, grad, onto = (randn(97, 1538, seed=s, dtype=dtype) for s in (1, 2, 3))
    weight, table = randn(1538, seed=4), randn(97, 300, seed=5, dtype=dtype)
    normed, rstd = native.rms_norm(x, weight, 1e-5)
    back, grad_weight = native.rms_norm_backward(grad, x, rstd, weight, weight_grad=True, onto_TH=onto)
    heads = x.view(97, 2, 769)
    results = [normed, rstd, native.rms_norm_apply(x, rstd, weight), back, grad_weight]
    results += [*native.rms_norm(heads, weight[:769], 1e-5), native.rotate(heads, table, table)]
    results += [native.rms_norm(x, weight, 1e-5, onto_TH=onto)[0], native.add_scaled(onto, x, 0.3)]
    layer, facts = native.layer_norm(x, weight, weight, 1e-5)
    results += [layer, facts, native.layer_norm_apply(x, facts, weight, weight)]
    results += [*native.layer_norm_backward(grad, x, facts, weight, weight_grad=True)]
    stack = ((3, 400), (1, 300))
    weights = weight[:400], weight[:300]
    results += [*native.query_key_norm(x, *stack, weights, 1e-5)]
    results += [
        *native.query_key_norm_backward(grad, x, results[-1], *stack, weights, weight_grads=(True, True))
    ]
    for kind in KINDS:
        results += [native.gated(x, kind), *native.gated_backward(grad[:, :769], x, kind, again=True)]
        results += [native.activate(x, kind), *native.activate_backward(grad, x, kind, again=True)]
    flat, flat_grad, m = (randn(300_003, seed=s) for s in (6, 7, 8))
    v = m.square()
    results.append(torch.tensor(native.squared_norm(flat_grad), dtype=torch.float64))
    how = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    native.adamw(flat, flat_grad, m, v, step=3, decay_until=100_001, **how)
    copies = [torch.empty(97, 1538, dtype=dtype) for _ in range(5)]
    source = x.float()
    native.ScaledCopies([(source, copy, 0.3 * i) for i, copy in enumerate(copies)]).refresh()
    return [t for t in results if t is not None] + [
        flat,
        flat_grad,
        m,
        v,
        *copies,
        native.column_sums(grad),
    ]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    alone = everything(dtype)
    torch.set_num_threads(threads)
    together = everything(dtype)
    assert [i for i, pair in enumerate(zip(alone, together, strict=True)) if not same(*pair)] == []


@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_of_no_tokens(dtype: torch.dtype) -> None:
    none, weight = torch.empty(0, 6, dtype=dtype), torch.ones(6)
    normed, rstd = native.rms_norm(none, weight, 1e-5)
    back, grad_weight = native.rms_norm_backward(none, none, rstd, weight, weight_grad=True, onto_TH=none)
    assert [normed.shape, rstd.shape, back.shape] == [(0, 6), (0, 1), (0, 6)]
    assert grad_weight is not None
    assert same(grad_weight, torch.zeros(6))
    assert native.rotate(none.view(0, 2, 3), none[:, :1], none[:, :1]).shape == (0, 2, 3)
    assert native.gated(none, "gelu").shape == (0, 3)
    assert native.gated_backward(none[:, :3], none, "silu")[0].shape == (0, 6)
    assert same(native.column_sums(none), torch.zeros(6))
    assert native.rms_norm(none, weight, 1e-5, onto_TH=none)[0].shape == (0, 6)
    layer, facts = native.layer_norm(none, weight, weight, 1e-5)
    assert (layer.shape, facts.shape) == ((0, 6), (0, 2))
    _, *both = native.layer_norm_backward(none, none, facts, weight, weight_grad=True)
    heads = ((1, 2), (1, 2), (weight[:2], weight[:2]))
    stacked, factors = native.query_key_norm(none, *heads, 1e-5)
    assert stacked.shape == (0, 6)
    both += native.query_key_norm_backward(none, none, factors, *heads, weight_grads=(True, True))[1:]
    assert all(grad is not None and not grad.any() for grad in both)
    assert native.activate(none, "relu").shape == (0, 6)
    assert native.activate_backward(none, none, "gelu")[0].shape == (0, 6)
    assert native.add_scaled(none, none, 0.5).shape == (0, 6)
