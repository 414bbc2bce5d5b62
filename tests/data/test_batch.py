"""The stream of steps: which rows, how often, and how many steps."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest

from lorimer.data.batch import StepStream


def stream(rows: int = 10, batch_size: int = 4, epochs: float = 1, **named: object) -> StepStream:
    values = {"max_steps": None, "seed": 0, "shuffle": True} | named
    return StepStream(rows, batch_size, epochs, **values)  # type: ignore[arg-type]


def steps(made: StepStream) -> list[list[int]]:
    return [made.step_rows(step) for step in range(made.total_steps)]


def test_by_hand() -> None:
    made = stream(epochs=2)
    assert (made.steps_per_epoch, made.total_steps) == (3, 6)
    assert [len(rows) for rows in steps(made)] == [4, 4, 2, 4, 4, 2]


def test_without_shuffling_the_order_is_that_of_the_file() -> None:
    assert steps(stream(epochs=2, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2


@pytest.mark.trap(66)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("epochs", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 80])
@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 17, 70])
@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_every_row_comes_exactly_once_an_epoch(
    rows: int, batch_size: int, epochs: int, seed: int, shuffle: bool
) -> None:
    made = stream(rows, batch_size, epochs, seed=seed, shuffle=shuffle)
    seen: Counter[int] = Counter()
    for step, members in enumerate(steps(made)):
        assert 1 <= len(members) <= batch_size
        seen.update(members)
        if made.ends_epoch(step):
            epoch = (step + 1) // made.steps_per_epoch
            assert seen == dict.fromkeys(range(rows), epoch)
            assert made.epoch_at(step + 1) == epoch
    assert set(seen.values()) == {epochs}


@pytest.mark.trap(24)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_of_like_length_do_not_come_together(seed: int) -> None:
    """Of a file that is sorted by length, which row number n stands for here."""
    means = [sum(rows) / len(rows) for rows in steps(stream(8000, 8, seed=seed))]
    assert abs(statistics.correlation(means[:-1], means[1:])) < 0.1
    assert statistics.pstdev(means) == pytest.approx(8000 / 12**0.5 / 8**0.5, rel=0.1)


@pytest.mark.trap(66)
@pytest.mark.parametrize(
    ("epochs", "max_steps", "total", "ends"),
    [
        (1, None, 3, [2]),
        (2, None, 6, [2, 5]),
        (0.1, None, 1, [0]),
        (1 / 3, None, 1, [0]),
        (0.5, None, 2, [1]),
        (1.5, None, 5, [2, 4]),
        (2, 1, 1, [0]),
        (2, 4, 4, [2, 3]),
        (1, 7, 7, [2, 5, 6]),
    ],
)
def test_totals(epochs: float, max_steps: int | None, total: int, ends: list[int]) -> None:
    made = stream(epochs=epochs, max_steps=max_steps)
    assert made.total_steps == total
    assert [step for step in range(total) if made.ends_epoch(step)] == ends


@pytest.mark.parametrize(("step", "epoch"), [(0, 0.0), (1, 0.4), (2, 0.8), (3, 1.0), (4, 1.4), (6, 2.0)])
def test_epochs_done(step: int, epoch: float) -> None:
    assert stream().epoch_at(step) == pytest.approx(epoch)


@pytest.mark.trap(24)
def test_the_order_is_a_function_of_the_seed_and_the_step() -> None:
    made = stream(100, 100, 2, seed=5)
    first, second = steps(made)
    assert stream(100, 100, 2, seed=5).step_rows(1) == second
    assert first != second
    assert first != sorted(first)
    assert steps(stream(100, 100, 1, seed=6))[0] != first
    # Longer runs begin as shorter ones: more epochs change nothing before them.
    assert stream(100, 100, 9, seed=5).step_rows(1) == second
