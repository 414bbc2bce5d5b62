"""A step on tape gives what the step gives, and what is no kernel's call keeps a step off it."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import Tensor

from lorimer.kernels import trace
from lorimer.kernels.native import elementwise, library
from lorimer.kernels.native.matmul import matmul
from lorimer.kernels.tape import Tape

pytestmark = pytest.mark.skipif(not library.available(), reason="no native kernels")
isas = pytest.mark.parametrize("isa", library.available())

WEIGHT = torch.randn(24, 16)
NORM = torch.rand(16)


class Step:
    """norm(x) W^T halved, and how often Python computed it."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, states: Tensor) -> Tensor:
        self.runs += 1
        normed, _ = elementwise.rms_norm(states, NORM, 1e-5)
        return matmul(normed, WEIGHT, b_turned=True, alpha=0.5)


def expected(states: Tensor) -> Tensor:
    return Step()(states)


@isas
def test_the_step_runs_once_and_the_tape_after_it(isa: str) -> None:
    with library.using(isa):
        step, tape = Step(), Tape()
        for _ in range(4):
            states = torch.randn(3, 16)
            assert torch.equal(tape(step, states), expected(states))
        assert step.runs == 1


def test_inputs_given_once_may_change_afterwards() -> None:
    """The tape's own memory is not what the caller gave at a later call."""
    step, tape = Step(), Tape()
    tape(step, torch.randn(3, 16))
    given = torch.randn(3, 16)
    first = tape(step, given).clone()
    before = given.clone()
    tape(step, torch.randn(3, 16))
    assert torch.equal(given, before)
    assert torch.equal(tape(step, given), first)


def test_what_pytorch_computes_keeps_a_step_off_the_tape(caplog: pytest.LogCaptureFixture) -> None:
    step, tape = Step(), Tape()

    def mixed(states: Tensor) -> Tensor:
        return step(states * 2)

    with caplog.at_level(logging.DEBUG, "lorimer.kernels"):
        for _ in range(3):
            states = torch.randn(3, 16)
            assert torch.equal(tape(mixed, states), expected(states * 2))
    assert step.runs == 3
    assert sum("aten.mul" in message for message in caplog.messages) == 1


def test_views_and_fresh_memory_do_not() -> None:
    step, tape = Step(), Tape()

    def viewed(states: Tensor) -> Tensor:
        torch.empty_like(states)
        return step(states.view(2, 3, 16)[1])

    for _ in range(2):
        states = torch.randn(6, 16)
        assert torch.equal(tape(viewed, states), expected(states[3:]))
    assert step.runs == 1


def test_a_kernel_that_no_tape_can_call() -> None:
    tape = Tape()
    runs = []

    def step(states: Tensor) -> Tensor:
        runs.append(1)
        return elementwise.column_sums(states)

    for _ in range(2):
        states = torch.randn(3, 16)
        assert torch.equal(tape(step, states), elementwise.column_sums(states))
    assert len(runs) == 2


def test_another_thread_is_not_written_down() -> None:
    tape, step = Tape(), Step()
    other = torch.randn(3, 16)
    runs = []

    def busy(states: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 1:
            thread = threading.Thread(target=lambda: other.copy_(expected(other)[:, :16]))
            thread.start()
            thread.join()
        return step(states)

    tape(busy, torch.randn(3, 16))
    kept = other.clone()
    states = torch.randn(3, 16)
    assert torch.equal(tape(busy, states), expected(states))
    assert torch.equal(other, kept)
    assert len(runs) == 1


def test_a_step_that_fails_leaves_no_tape() -> None:
    tape = Tape()

    def broken(states: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        tape(broken, torch.zeros(3, 16))
    assert trace.recorder is None
    states = torch.randn(3, 16)
    assert torch.equal(tape(Step(), states), expected(states))


def test_a_profile_sees_every_kernel() -> None:
    step, tape = Step(), Tape()
    tape(step, torch.randn(3, 16))
    recorder = trace.start()
    try:
        tape(step, torch.randn(3, 16))
    finally:
        trace.stop()
    assert [call.name for call in recorder.calls] == ["rms_norm", "matmul"]
    with library.using(library.REFERENCE):
        assert Tape()(lambda states: states + 1, torch.zeros(2)).tolist() == [1, 1]
