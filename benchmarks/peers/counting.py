"""Steps of a transformers trainer: their exact losses, and the real tokens in them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from .job import StepLog


class Clock(TrainerCallback):
    """Ends a step of the log with the sums that the trainer gathered over its micro-batches."""

    def __init__(self, log: StepLog) -> None:
        self.log = log
        self.clear()

    def clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.rows = self.tokens = self.trained = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.log.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        loss = float(sum(self.losses))
        self.log.end(loss=loss, rows=self.rows, tokens=self.tokens, trained_tokens=self.trained)
        self.clear()

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        if "attention_mask" in inputs:
            self.rows += inputs["input_ids"].shape[0]
            self.tokens += int(inputs["attention_mask"].sum())
        else:  # packed: every row starts again at position 0
            self.rows += int((inputs["position_ids"] == 0).sum())
            self.tokens += inputs["position_ids"].numel()
        self.trained += int((inputs["labels"][..., 1:] != -100).sum())


def counted(trainer: type[Any], clock: Clock) -> type[Any]:
    """The trainer class, keeping the exact loss (the log's is averaged) and counting real tokens."""

    class Counted(trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            clock.count(inputs)
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
            clock.losses.append(loss)
            return loss

    return Counted
