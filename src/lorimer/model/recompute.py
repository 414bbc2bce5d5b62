"""The memory ladder: what a training step keeps of each layer, and what its backward computes again.

none     every layer keeps the inputs of its projections and of attention; norms and gates are always
         computed again
mlp      not the stacked gate and up outputs, half of what is kept: their product is computed again
layers   only each layer's input; the layer is computed again
offload  as `layers`, and these inputs leave for the host's memory, or from a CPU for a file

All give the same gradients: dropout is a function of seed, step, row and position.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Tensors smaller than this are not worth a file.
LEAST_BYTES = 1 << 16


def layer_again(run: Callable[[int, Tensor], Tensor], number: int, hidden_TH: Tensor) -> Tensor:
    """The layer's output; its backward runs it once more."""
    from torch.utils.checkpoint import checkpoint

    output: Tensor = checkpoint(
        run, number, hidden_TH, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )
    return output


def kept_elsewhere(rung: str, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, what autograd keeps leaves this device's memory, if the rung says so."""
    if rung != "offload" or not torch.is_grad_enabled():
        return nullcontext()
    if device.type != "cpu":
        return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
    return torch.autograd.graph.saved_tensors_hooks(_to_file, _from_file)


class _File:
    """A tensor in a file without a name, which goes with the last reference, however the run ends."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self._file = tempfile.TemporaryFile(prefix="lorimer-offload-")  # noqa: SIM115
        self._file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._file.flush()

    def tensor(self) -> Tensor:
        self._file.seek(0)
        return torch.frombuffer(bytearray(self._file.read()), dtype=self.dtype).view(self.shape)

    def __del__(self) -> None:
        self._file.close()


def _to_file(tensor: Tensor) -> Tensor | _File:
    small = tensor.nbytes < LEAST_BYTES or not tensor.is_floating_point()
    return tensor if small else _File(tensor)


def _from_file(kept: Tensor | _File) -> Tensor:
    return kept.tensor() if isinstance(kept, _File) else kept
