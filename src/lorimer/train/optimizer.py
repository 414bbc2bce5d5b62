"""The optimizers, each over the adapter's flat buffer, with clipping by the global norm.

adamw          float32 state, fused (arXiv 1711.05101)
adamw_8bit     its state in 8 bits, by blocks (arXiv 2110.02861)
paged_adamw    bitsandbytes' on CUDA, whose state moves to the host when the GPU is full
lion           one moment, steps of one size (arXiv 2302.06675)
sgd            with momentum
adafactor      torch's: a row and a column of moments for each matrix (arXiv 1804.04235)

Biases and norm weights do not decay; the adapter keeps them at the end of its buffer. With LoRA+ (arXiv
2402.12354) B's learning rate is a multiple of A's.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lorimer.config import TrainConfig
from lorimer.errors import UserError
from lorimer.kernels import reference, trace
from lorimer.kernels.native import elementwise
from lorimer.kernels.native.library import usable
from lorimer.lora.layers import Adapter
from lorimer.quant.nf4 import dynamic_table

BLOCK = 256  # numbers of 8-bit state that share a scale
CHUNK = 1 << 20  # numbers of 8-bit state that are wide at once, whole blocks


class Optimizer(ABC):
    """One update of the adapter from its gradients, and the state that resuming needs."""

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        self.adapter = adapter
        self.config = config
        self.steps = 0

    def step(self, learning_rate: float, scale: float = 1.0) -> float:
        """Clip, update, and clear the gradients, which were computed `scale` times too large; returns the
        gradient's norm before clipping.

        A norm that is not finite changes nothing: the caller stops the run.
        """
        grad = self._grad
        kernels: Any = elementwise if usable(grad) else reference
        if scale != 1.0:
            grad.mul_(1.0 / scale)
        norm = math.sqrt(kernels.squared_norm(grad))
        if not math.isfinite(norm):
            return norm
        most = self.config.max_grad_norm
        self.steps += 1
        clip = most / (norm + 1e-6) if most and norm > most else 1.0
        with torch.no_grad():
            if (ratio := self.config.loraplus_lr_ratio) == 1.0:
                self._update(learning_rate, clip)
            else:
                # What every optimizer here does to a number is proportional to the learning rate.
                ups = self.adapter.flat.data[self.adapter.ups]
                before = ups.clone()
                self._update(learning_rate, clip)
                torch.lerp(before, ups, ratio, out=ups)
        with trace.stage("refresh"):
            self.adapter.refresh()
        return norm

    @property
    def _grad(self) -> Tensor:
        assert self.adapter.flat.grad is not None
        return self.adapter.flat.grad

    @abstractmethod
    def _update(self, learning_rate: float, grad_scale: float) -> None:
        """Change the parameters by the gradients times `grad_scale`, and clear these."""

    def _decay(self, learning_rate: float) -> None:
        """Decoupled weight decay, of matrices."""
        decaying = self.adapter.flat.data[: self.adapter.decaying]
        decaying.mul_(1.0 - learning_rate * self.config.weight_decay)

    def clear(self) -> None:
        """Forget the gradients of a step that was not finished; nothing else has changed."""
        self._grad.zero_()

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The state besides the count of steps, by name, as it is."""

    def state(self) -> dict[str, Tensor]:
        """The whole state by name, as it is."""
        return self.tensors() | {"steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back; the next step is the one that would have followed."""
        self.steps = int(state["steps"])
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])


class AdamW(Optimizer):
    """One sweep over all parameters."""

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        super().__init__(adapter, config)
        self.m, self.v = torch.zeros_like(adapter.flat.data), torch.zeros_like(adapter.flat.data)

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        flat, config = self.adapter.flat, self.config
        kernels: Any = elementwise if usable(flat.data) else reference
        kernels.adamw(
            *(flat.data, flat.grad, self.m, self.v),
            step=self.steps,
            decay_until=self.adapter.decaying,
            lr=learning_rate,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            grad_scale=grad_scale,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"m": self.m, "v": self.v}


class _Blocks:
    """Numbers in 8 bits: a code of the dynamic type each, and a float32 scale for each block."""

    def __init__(self, like: Tensor, *, signed: bool) -> None:
        self.table = dynamic_table(signed=signed).to(like.device)
        self.borders = (self.table[:-1] + self.table[1:]) / 2
        count = like.numel()
        zero = int(torch.searchsorted(self.table, torch.zeros((), device=like.device)))
        self.codes = torch.full((count,), zero, dtype=torch.uint8, device=like.device)
        self.scales = torch.zeros(-(-count // BLOCK), device=like.device)

    def read(self, part: slice) -> Tensor:
        """The numbers of whole blocks, wide."""
        values = self.table[self.codes[part].int()]
        scales = self.scales[part.start // BLOCK : -(-part.stop // BLOCK)]
        return values.mul_(scales.repeat_interleave(BLOCK)[: len(values)])

    def write(self, part: slice, numbers: Tensor) -> None:
        padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
        scales = padded.abs().amax(1)
        shares = padded / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        codes = torch.bucketize(shares.view(-1)[: len(numbers)], self.borders, out_int32=True)
        self.codes[part] = codes.to(torch.uint8)
        self.scales[part.start // BLOCK : -(-part.stop // BLOCK)] = scales


class AdamW8bit(Optimizer):
    """AdamW with a quarter of its state.

    The second moment is kept as its root: squares span twice as many decades as the first moment, and
    those that became zero beside a larger one of their block would be divided by.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        super().__init__(adapter, config)
        self.m = _Blocks(adapter.flat.data, signed=True)
        self.root = _Blocks(adapter.flat.data, signed=False)

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        flat, config = self.adapter.flat.data, self.config
        for start in range(0, flat.numel(), CHUNK):
            part = slice(start, min(start + CHUNK, flat.numel()))
            m, v = self.m.read(part), self.root.read(part).square_()
            reference.adamw(
                *(flat[part], self._grad[part], m, v),
                step=self.steps,
                decay_until=max(0, min(self.adapter.decaying - start, part.stop - start)),
                lr=learning_rate,
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
                grad_scale=grad_scale,
            )
            self.m.write(part, m)
            self.root.write(part, v.sqrt_())

    def tensors(self) -> dict[str, Tensor]:
        return {
            "m": self.m.codes,
            "m_scales": self.m.scales,
            "root_v": self.root.codes,
            "root_v_scales": self.root.scales,
        }


class Lion(Optimizer):
    """The sign of a blend of gradient and moment."""

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        super().__init__(adapter, config)
        self.m = torch.zeros_like(adapter.flat.data)

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        grad = self._grad.mul_(grad_scale)
        self._decay(learning_rate)
        blend = self.m.lerp(grad, 1.0 - self.config.adam_beta1)
        self.adapter.flat.data.sub_(blend.sign_(), alpha=learning_rate)
        self.m.lerp_(grad, 1.0 - self.config.adam_beta2)
        grad.zero_()

    def tensors(self) -> dict[str, Tensor]:
        return {"m": self.m}


class SGD(Optimizer):
    """Momentum sums gradients, as torch has it."""

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        super().__init__(adapter, config)
        self.m = torch.zeros_like(adapter.flat.data)

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        self._decay(learning_rate)
        self.m.mul_(self.config.momentum).add_(self._grad, alpha=grad_scale)
        self.adapter.flat.data.sub_(self.m, alpha=learning_rate)
        self._grad.zero_()

    def tensors(self) -> dict[str, Tensor]:
        return {"m": self.m}


class _Theirs(Optimizer):
    """An optimizer of torch's kind, over views of the flat buffer."""

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        super().__init__(adapter, config)
        views = {tensor.data_ptr(): tensor for tensor in adapter.tensors.values()}
        self._views = [torch.nn.Parameter(tensor.detach()) for tensor in views.values()]
        for view, tensor in zip(self._views, views.values(), strict=True):
            view.grad = tensor.grad
        groups = [
            {
                "params": [view for view in self._views if view.dim() > 1],
                "weight_decay": config.weight_decay,
            },
            {"params": [view for view in self._views if view.dim() == 1], "weight_decay": 0.0},
        ]
        self._theirs = self._make([group for group in groups if group["params"]])

    @abstractmethod
    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer: ...

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        self._grad.mul_(grad_scale)
        for group in self._theirs.param_groups:
            group["lr"] = learning_rate
        self._theirs.step()
        self._grad.zero_()

    def tensors(self) -> dict[str, Tensor]:
        state = self._theirs.state_dict()["state"]
        return {
            f"{number}.{name}": value
            for number, facts in state.items()
            for name, value in facts.items()
            if isinstance(value, Tensor)
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        found: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            number, _, name = key.partition(".")
            if name:
                found.setdefault(int(number), {})[name] = value.clone()
        self._theirs.load_state_dict({**self._theirs.state_dict(), "state": found})


class Adafactor(_Theirs):
    """torch's: `learning_rate` bounds the step relative to each tensor's size."""

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups, foreach=False)


class PagedAdamW(_Theirs):
    """bitsandbytes', in 32 bits. Raises UserError without a CUDA device or the package."""

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        device = self.adapter.flat.device
        if device.type != "cuda":
            raise UserError(
                f"`train.optimizer: paged_adamw` moves its state between a CUDA device and the host, and "
                f"this run is on {device}",
                fix="Use adamw, or adamw_8bit for a quarter of its state.",
            )
        try:
            theirs: Any = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise UserError(
                "`train.optimizer: paged_adamw` is that of bitsandbytes, which is not installed",
                fix="pip install bitsandbytes, or use adamw_8bit.",
            ) from error
        config = self.config
        made: torch.optim.Optimizer = theirs.PagedAdamW(
            groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
        )
        return made


KINDS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "lion": Lion,
    "sgd": SGD,
    "adafactor": Adafactor,
}


def make_optimizer(adapter: Adapter, config: TrainConfig) -> Optimizer:
    """The optimizer that the settings name."""
    return KINDS[config.optimizer](adapter, config)
