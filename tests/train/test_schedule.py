"""Learning rates, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from lorimer.config import TrainConfig
from lorimer.train.schedule import learning_rate, warmup_steps


def rates(total: int, **settings: Any) -> list[float]:
    config = TrainConfig(learning_rate=8.0, **({"warmup_ratio": 0.0} | settings))
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler": "constant"}, [8, 8, 8, 8]),
        ({"lr_scheduler": "constant", "warmup_steps": 2}, [8, 8, 8, 8]),
        ({"lr_scheduler": "constant", "warmup_ratio": 0.5}, [8, 8, 8, 8]),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 2}, [4, 8, 8, 8]),
        ({"lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.5}, [4, 8, 8, 8]),
        ({"lr_scheduler": "linear"}, [8, 6, 4, 2]),
        ({"lr_scheduler": "linear", "warmup_steps": 2}, [4, 8, 8, 4]),
        ({"lr_scheduler": "linear", "warmup_steps": 4}, [2, 4, 6, 8]),
        ({"lr_scheduler": "linear", "warmup_steps": 8}, [1, 2, 3, 4]),
        ({"lr_scheduler": "cosine"}, [8, 4 + 4 * 0.5**0.5, 4, 4 - 4 * 0.5**0.5]),
        ({"lr_scheduler": "cosine", "warmup_steps": 1}, [8, 8, 6, 2]),
        ({"lr_scheduler": "cosine", "warmup_steps": 0, "warmup_ratio": 0.5}, [8, 6.8284271, 4, 1.1715729]),
    ],
)
def test_rates(settings: dict[str, Any], expected: list[float]) -> None:
    assert rates(4, **settings) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "total", "steps"), [(0.0, 100, 0), (0.03, 100, 3), (0.03, 101, 4), (0.03, 1, 1), (0.5, 3, 2)]
)
def test_warmup_share_is_rounded_up(ratio: float, total: int, steps: int) -> None:
    assert warmup_steps(TrainConfig(warmup_ratio=ratio), total) == steps


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 37])
def test_the_first_step_learns_and_the_last_too(name: str, total: int) -> None:
    made = rates(total, lr_scheduler=name, warmup_ratio=0.1)
    assert all(0 < rate <= 8 for rate in made)
    assert max(made) == pytest.approx(8)
    if total > 2:
        assert made[-1] < 0.6
        assert made[4:] == sorted(made[4:], reverse=True)
