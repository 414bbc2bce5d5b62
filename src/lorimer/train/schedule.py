"""The learning rate as a function of the step: nothing to save, nothing to get out of step."""

from __future__ import annotations

import math

from lorimer.config import TrainConfig


def warmup_steps(config: TrainConfig, total: int) -> int:
    """`warmup_steps`, else `warmup_ratio` of all steps, rounded up; none for `constant`."""
    if config.lr_scheduler == "constant":
        return 0
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of step 0 to total - 1.

    During the warm-up it rises from peak / warmup to the peak; the first step already learns.
    Then linear and cosine fall so that a step after the last would have rate 0: with no warm-up and
    4 steps linear gives 1, 0.75, 0.5, 0.25 of the peak.
    """
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler == "linear":
        return config.learning_rate * max(0.0, 1.0 - share)
    if config.lr_scheduler == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return config.learning_rate
