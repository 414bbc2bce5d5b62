"""The loss head in one sweep, for every instruction set here, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lorimer.errors import UserError
from lorimer.kernels import reference
from lorimer.kernels.native import library
from lorimer.kernels.native.matmul import head_loss
from product_cases import BF16, FP32, Head, check_head, head_inputs, same

TYPES = [FP32, BF16]


@pytest.fixture(params=library.available(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with library.using(request.param):
        yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("m", [1, 2, 15, 33, 70])
def test_losses_and_gradients(dtype: torch.dtype, smoothing: float, m: int) -> None:
    # Tiles are 32, 64 or 128 tokens wide, panels 8 to 32 features; odd sizes of both.
    for h, v in ((1, 2), (7, 33), (33, 129), (64, 640), (65, 1001)):
        case = Head(m, h, v, dtype, smoothing, seed=h, scale=3.0)
        check_head(*head_inputs(case), smoothing=smoothing)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.5, 4.0, 30.0])
def test_capped_logits(dtype: torch.dtype, smoothing: float, softcap: float) -> None:
    """From where nearly all are at the cap to where hardly one is near it."""
    for m, h, v in ((1, 1, 2), (15, 7, 33), (33, 33, 129), (70, 64, 640), (200, 65, 1001)):
        case = Head(m, h, v, dtype, smoothing, seed=h, scale=3.0)
        check_head(*head_inputs(case), smoothing=smoothing, softcap=softcap)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_a_capped_vocabulary(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for smoothing in (0.0, 0.1):
        for v in (1001, 70):
            inputs = head_inputs(Head(17, 33, v, dtype, scale=3.0))
            check_head(*inputs, smoothing=smoothing, softcap=2.0)


def test_a_cap_far_away_is_none() -> None:
    inputs = head_inputs(Head(9, 33, 333))
    for mine, other in zip(
        head_loss(*inputs, weight=1.0, softcap=1e5), head_loss(*inputs, weight=1.0), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m", [191, 192, 193, 400])
def test_more_positions_than_share_a_sweep(dtype: torch.dtype, m: int) -> None:
    check_head(*head_inputs(Head(m, 33, 257, dtype)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_vocabulary(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for smoothing in (0.0, 0.1):
        # The second has fewer tiles than threads.
        for v in (1001, 70):
            inputs = head_inputs(Head(17, 33, v, dtype, scale=3.0))
            check_head(*inputs, smoothing=smoothing)
            losses, grad = head_loss(*inputs, weight=1.0)
            again, grad_again = head_loss(*inputs, weight=1.0)
            assert grad is not None
            assert grad_again is not None
            assert same(again, losses)
            assert same(grad_again, grad)


def falling_and_rising(v: int) -> list[Tensor]:
    """Logits along the vocabulary: rising and falling slowly, in steps, and out of one token's reach."""
    place = torch.arange(v, dtype=torch.float32)
    steps = (place // 128 * 25) % 90
    peak = torch.full((v,), -40.0)
    peak[v // 2] = 60.0
    return [place / v * 200, place / v * -200, steps, peak, place / v * 2000 - 1000]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threads", [1, 3])
def test_logits_that_grow_along_the_vocabulary(dtype: torch.dtype, smoothing: float, threads: int) -> None:
    """The reference of the exponentials moves with them, and all sums so far with the reference."""
    torch.set_num_threads(threads)
    v = 6001
    hidden, head, _ = head_inputs(Head(5, 9, v, dtype))
    hidden[:, 0] = 1.0
    hidden[:, 1:] *= 0.1
    for logits in falling_and_rising(v):
        head[:, 0] = logits
        labels = torch.tensor([0, 127, 128, v // 2, v - 1])
        check_head(hidden, head, labels, smoothing=smoothing)


def added_one_by_one(terms: Tensor) -> float:
    return float(np.add.accumulate(terms.float().numpy())[-1])


@pytest.mark.parametrize("dtype", TYPES)
def test_small_terms_are_not_lost_in_a_large_sum(dtype: torch.dtype) -> None:
    """49,153 terms of 1.0009: float32 that adds them one by one loses the 9 or counts it double. Here
    the loss stays within 5e-6, and so does the gradient."""
    v = 49_153
    head = torch.full((v, 5), 1.0)
    head[:, 0] = 9e-4
    head[:128, 0] = 0.0
    head[:, 1] = head[:, 0].exp()
    head = head.to(dtype)
    hidden = torch.zeros(3, 5, dtype=dtype)
    hidden[:, 0] = 1.0
    labels = torch.tensor([0, 200, v - 1])
    terms = head[:, 0].double().exp()
    probs = terms / terms.sum()
    assert abs(math.log(added_one_by_one(terms)) - float(terms.sum().log())) > 1e-4
    assert (
        abs(added_one_by_one(terms * head[:, 2]) / float(terms.sum()) - float(probs @ head[:, 2].double()))
        > 1e-4
    )
    check_head(hidden, head, labels)
    if dtype == FP32:
        _, grad = head_loss(hidden, head, labels, weight=1.0)
        assert grad is not None
        exact_grad = probs @ head.double() - head[labels].double()
        assert float((grad - exact_grad).abs().max()) < 5e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_a_real_vocabulary(dtype: torch.dtype) -> None:
    check_head(*head_inputs(Head(4, 33, 50_257, dtype, scale=3.0)), smoothing=0.1)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_sure_prediction_has_a_loss_of_nothing(dtype: torch.dtype) -> None:
    hidden, head, labels = head_inputs(Head(3, 8, 200, dtype))
    head[:, 0] = 0.0
    head[labels[1], 0] = 100.0
    hidden[1] = torch.eye(8)[0]
    labels[:] = labels[1]
    losses, grad = head_loss(hidden, head, labels, weight=1.0)
    assert grad is not None
    assert abs(float(losses[1])) < 1e-6
    assert float(grad[1].abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bad", "softcap"), [(math.nan, 0.0), (math.inf, 0.0), (math.nan, 3.0)])
def test_a_position_depends_on_no_other(dtype: torch.dtype, bad: float, softcap: float) -> None:
    for m in (3, 33):
        hidden, head, labels = head_inputs(Head(m, 35, 333, dtype))
        losses, grad = head_loss(hidden, head, labels, weight=1.0, softcap=softcap)
        hidden[1, 34] = bad
        spoilt, spoilt_grad = head_loss(hidden, head, labels, weight=1.0, softcap=softcap)
        assert grad is not None
        assert spoilt_grad is not None
        assert not bool(spoilt[1].isfinite())
        assert not bool(spoilt_grad[1].isfinite().any())
        others = torch.arange(m) != 1
        assert same(spoilt[others], losses[others])
        assert same(spoilt_grad[others], grad[others])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_like_its_twin(smoothing: float, softcap: float) -> None:
    inputs = head_inputs(Head(150, 33, 1001))
    mine = head_loss(*inputs, weight=0.1, smoothing=smoothing, softcap=softcap)
    twin = reference.cross_entropy_head(*inputs, weight=0.1, smoothing=smoothing, softcap=softcap)
    assert twin.grad_hidden_MH is not None
    torch.testing.assert_close(mine[0], twin.losses_M, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(mine[1], twin.grad_hidden_MH, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("label", "said"), [(-100, "token -100"), (333, "token 333")])
def test_a_label_that_is_no_token_is_refused(label: int, said: str) -> None:
    hidden, head, labels = head_inputs(Head(3, 8, 333))
    labels[2] = label
    with pytest.raises(UserError, match=f"{said}, but the head knows 333 tokens"):
        head_loss(hidden, head, labels, weight=1.0)


def test_no_position() -> None:
    losses, grad = head_loss(
        torch.empty(0, 8), torch.zeros(9, 8), torch.empty(0, dtype=torch.int64), weight=1.0
    )
    assert losses.shape == (0,)
    assert grad is not None
    assert grad.shape == (0, 8)
