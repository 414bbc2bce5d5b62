"""A frozen weight: stored in some way, never trained.

Every storage kind offers the same five things: forward, input gradient, rows (for an embedding),
nbytes and dequantise. Nothing ever computes a gradient of the weight itself.

Letters: T tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorimer.kernels import products
from lorimer.kernels.products import LowRank


class FrozenLinear(Protocol):
    """A weight [O, I] in some storage."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of inputs and outputs, whatever the storage."""
        ...

    def forward(
        self,
        input_TI: Tensor,
        *,
        bias_O: Tensor | None = None,
        onto_TO: Tensor | None = None,
        low_rank: LowRank | None = None,
        down_TR: Tensor | None = None,
    ) -> Tensor:
        """input @ W^T, plus the bias, `onto_TO` and down @ up^T where given: [T, O]."""
        ...

    def input_grad(
        self, grad_TO: Tensor, *, low_rank: LowRank | None = None, grad_down_TR: Tensor | None = None
    ) -> Tensor:
        """grad @ W, plus grad_down @ down where given: [T, I]."""
        ...

    def rows(self, ids_T: Tensor) -> Tensor:
        """The rows of W at these indices: [T, I]."""
        ...

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a dense [O, I] tensor."""
        ...


class DenseLinear:
    """A weight kept as it is computed with: bf16 or fp32."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight_OI.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        return self.weight_OI.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_OI.dtype

    def forward(
        self,
        input_TI: Tensor,
        *,
        bias_O: Tensor | None = None,
        onto_TO: Tensor | None = None,
        low_rank: LowRank | None = None,
        down_TR: Tensor | None = None,
    ) -> Tensor:
        return products.forward(
            input_TI, self.weight_OI, bias_O=bias_O, onto_TO=onto_TO, low_rank=low_rank, down_TR=down_TR
        )

    def input_grad(
        self, grad_TO: Tensor, *, low_rank: LowRank | None = None, grad_down_TR: Tensor | None = None
    ) -> Tensor:
        return products.input_grad(grad_TO, self.weight_OI, low_rank=low_rank, grad_down_TR=grad_down_TR)

    def rows(self, ids_T: Tensor) -> Tensor:
        return self.weight_OI.index_select(0, ids_T)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight_OI.to(dtype)
