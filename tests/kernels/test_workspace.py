"""Memory is used again, whole, and never while somebody still looks at it."""

from __future__ import annotations

import gc

import pytest
import torch

from lorimer.kernels import workspace
from lorimer.kernels.workspace import GRAIN, LARGE, Pool

FP32 = torch.float32
MANY = (LARGE // 4, 3)


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    fresh = Pool()
    monkeypatch.setattr(workspace, "_pool", fresh)
    return fresh


def test_shape_type_and_writing() -> None:
    for dtype in (torch.bfloat16, FP32):
        made = workspace.empty(MANY, dtype).fill_(3)
        assert made.shape == MANY
        assert made.dtype == dtype
        assert made.is_contiguous()
        assert float(made.float().sum()) == 3 * made.numel()


def test_small_tensors_are_left_to_the_system(pool: Pool) -> None:
    kept = workspace.empty((3, 5), FP32)
    assert kept.shape == (3, 5)
    assert (pool.taken, pool.free) == (0, 0)


def test_a_freed_block_serves_the_next_tensor(pool: Pool) -> None:
    first = workspace.empty(MANY, FP32)
    place = first.data_ptr()
    del first
    gc.collect()
    assert pool.taken == 0
    assert pool.free > 0
    again = workspace.empty(MANY, FP32)
    assert again.data_ptr() == place
    assert pool.free == 0


def test_a_view_holds_the_block(pool: Pool) -> None:
    view = workspace.empty(MANY, FP32).fill_(7)[1:3]
    gc.collect()
    assert pool.taken > 0
    other = workspace.empty(MANY, FP32).fill_(9)
    assert other.data_ptr() != view.data_ptr()
    assert view.flatten().tolist() == [7.0] * 6


def test_what_autograd_keeps_is_held(pool: Pool) -> None:
    weight = torch.ones(3, requires_grad=True)
    states = workspace.empty(MANY, FP32).fill_(2)
    total = (states * weight).sum()
    del states
    gc.collect()
    workspace.empty(MANY, FP32).fill_(5)
    total.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0 * MANY[0]] * 3
    del total
    gc.collect()
    assert pool.taken == 0


def test_a_block_does_not_serve_a_much_smaller_tensor() -> None:
    pool = Pool()
    pool.give(pool.take(100 * GRAIN))
    assert pool.take(50 * GRAIN).nbytes == 50 * GRAIN
    pool = Pool()
    pool.give(pool.take(100 * GRAIN))
    assert pool.take(90 * GRAIN).nbytes == 100 * GRAIN


def test_sizes_of_the_past_do_not_pile_up() -> None:
    pool = Pool()
    for size in range(10, 200):
        blocks = [pool.take(size * GRAIN) for _ in range(4)]
        for block in blocks:
            pool.give(block)
    assert pool.free <= 4 * 200 * GRAIN * 2
