"""AdamW over the adapter's flat buffer, with clipping by the global norm."""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.config import TrainConfig
from lorimer.lora.layers import Adapter


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), one fused pass over all parameters.

    Biases and norm weights do not decay; the adapter keeps them at the end of its buffer.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        self.max_norm = config.max_grad_norm
        self.adapter = adapter
        groups = []
        for part, decay in zip(adapter.decay_parts(), (config.weight_decay, 0.0), strict=True):
            if part.numel():
                groups.append({"params": [part], "weight_decay": decay})
        self._torch = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=adapter.flat.device.type in ("cpu", "cuda"),
        )

    def step(self, learning_rate: float) -> float:
        """Clip, update, and clear the gradients; returns the gradient's norm before clipping.

        A norm that is not finite changes nothing: the caller stops the run.
        """
        gradient = self.adapter.flat.grad
        assert gradient is not None
        norm = float(torch.linalg.vector_norm(gradient))
        if not torch.isfinite(torch.tensor(norm)):
            return norm
        if self.max_norm and norm > self.max_norm:
            gradient.mul_(self.max_norm / (norm + 1e-6))
        for group in self._torch.param_groups:
            group["lr"] = learning_rate
        self._torch.step()
        gradient.zero_()
        self.adapter.refresh()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Both moments and the step count, by name, as they are."""
        return {
            f"{number}.{name}": value
            for number, part in enumerate(self._parts())
            for name, value in sorted(self._torch.state[part].items())
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back; the next step is the one that would have followed."""
        for number, part in enumerate(self._parts()):
            prefix = f"{number}."
            mine = {k.removeprefix(prefix): v.clone() for k, v in state.items() if k.startswith(prefix)}
            self._torch.state[part] = mine

    def _parts(self) -> list[Tensor]:
        return [part for group in self._torch.param_groups for part in group["params"]]
