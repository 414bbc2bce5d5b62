"""AdamW over the adapter's flat buffer, with clipping by the global norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lorimer.config import TrainConfig
from lorimer.kernels import reference, trace
from lorimer.kernels.native import elementwise
from lorimer.kernels.native.library import usable
from lorimer.lora.layers import Adapter


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), one sweep over all parameters.

    Biases and norm weights do not decay; the adapter keeps them at the end of its buffer.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.steps = 0
        self.m, self.v = torch.zeros_like(adapter.flat.data), torch.zeros_like(adapter.flat.data)

    def step(self, learning_rate: float) -> float:
        """Clip, update, and clear the gradients; returns the gradient's norm before clipping.

        A norm that is not finite changes nothing: the caller stops the run.
        """
        flat, config = self.adapter.flat, self.config
        assert flat.grad is not None
        kernels: Any = elementwise if usable(flat.data) else reference
        norm = math.sqrt(kernels.squared_norm(flat.grad))
        if not math.isfinite(norm):
            return norm
        clipped = bool(config.max_grad_norm) and norm > config.max_grad_norm
        self.steps += 1
        kernels.adamw(
            *(flat.data, flat.grad, self.m, self.v),
            step=self.steps,
            decay_until=self.adapter.decaying,
            lr=learning_rate,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            grad_scale=config.max_grad_norm / (norm + 1e-6) if clipped else 1.0,
        )
        with trace.stage("refresh"):
            self.adapter.refresh()
        return norm

    def clear(self) -> None:
        """Forget the gradients of a step that was not finished; nothing else has changed."""
        assert self.adapter.flat.grad is not None
        self.adapter.flat.grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """Both moments and the step count, by name, as they are."""
        return {"m": self.m, "v": self.v, "steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back; the next step is the one that would have followed."""
        self.m.copy_(state["m"])
        self.v.copy_(state["v"])
        self.steps = int(state["steps"])
