"""A frozen weight: stored in some way, never trained.

Every storage kind offers the same: forward and input gradient (for a layer), rows (for an embedding),
logits and loss (for a head), nbytes and dequantise. Nothing ever computes a gradient of the weight itself.

Letters: T tokens, I input features, O output features, M positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorimer.kernels import products
from lorimer.kernels.native import quantised
from lorimer.kernels.native.library import usable
from lorimer.kernels.products import LowRank
from lorimer.quant.part import Part
from lorimer.quant.storage import numbers

STRIP = 1 << 22  # numbers decoded at once where there are no native kernels


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

    def logits(self, states_MI: Tensor) -> Tensor:
        """The products of a head, for choosing tokens: float32 [M, O]."""
        ...

    def head_loss(
        self,
        hidden_MI: Tensor,
        labels_M: Tensor,
        *,
        weight: float,
        smoothing: float,
        need_grad: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The losses of a head, float32 [M], and the gradient [M, I] of weight * their sum."""
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

    def logits(self, states_MI: Tensor) -> Tensor:
        return products.logits(states_MI, self.weight_OI)

    def head_loss(
        self,
        hidden_MI: Tensor,
        labels_M: Tensor,
        *,
        weight: float,
        smoothing: float,
        need_grad: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        return products.head_loss(
            *(hidden_MI, self.weight_OI, labels_M),
            weight=weight,
            smoothing=smoothing,
            softcap=softcap,
            need_grad=need_grad,
        )

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight_OI.to(dtype)


class QuantLinear:
    """Parts in quantised storage, stacked by rows: each may be of another kind.

    A product is that of the dequantised weight, its numbers rounded once to the type of the states. The
    native kernels decode a stretch where they use it; without them a strip of rows is decoded at a time.
    """

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype) -> None:
        self.parts = tuple(parts)
        self._dtype = dtype
        self._native = quantised.Weight(self.parts) if quantised.able(self.parts, dtype) else None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def _native_for(self, states: Tensor) -> quantised.Weight | None:
        return self._native if usable(states) else None

    def _strips(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """The first row of each strip, and its numbers."""
        start = 0
        for part in self.parts:
            rows = max(1, STRIP // part.shape[1])
            for first in range(0, part.shape[0], rows):
                yield start + first, numbers(part, first, min(first + rows, part.shape[0])).to(dtype)
            start += part.shape[0]

    def forward(
        self,
        input_TI: Tensor,
        *,
        bias_O: Tensor | None = None,
        onto_TO: Tensor | None = None,
        low_rank: LowRank | None = None,
        down_TR: Tensor | None = None,
    ) -> Tensor:
        if weight := self._native_for(input_TI):
            return quantised.matmul(
                *(input_TI, weight),
                turned=True,
                a2=down_TR,
                b2=low_rank.up_OR if low_rank else None,
                b2_turned=True,
                bias_N=bias_O,
                onto=onto_TO,
                spans=low_rank.by_rows if low_rank else None,
            )
        output_TO = input_TI.new_empty((len(input_TI), self.shape[0]))
        for row, strip in self._strips(input_TI.dtype):
            output_TO[:, row : row + len(strip)] = input_TI @ strip.t()
        for addend in (onto_TO, bias_O):
            if addend is not None:
                output_TO += addend
        if low_rank is not None and down_TR is not None:
            output_TO.addmm_(down_TR, low_rank.up_OR.t())
        return output_TO

    def input_grad(
        self, grad_TO: Tensor, *, low_rank: LowRank | None = None, grad_down_TR: Tensor | None = None
    ) -> Tensor:
        if weight := self._native_for(grad_TO):
            down = low_rank.down_RI if low_rank and grad_down_TR is not None else None
            return quantised.matmul(
                grad_TO, weight, turned=False, a2=grad_down_TR if down is not None else None, b2=down
            )
        # Sums over strips in float32: a bf16 sum would be rounded once for each.
        total_TI = torch.zeros((len(grad_TO), self.shape[1]), dtype=torch.float32, device=grad_TO.device)
        for row, strip in self._strips(grad_TO.dtype):
            total_TI += grad_TO[:, row : row + len(strip)] @ strip
        if low_rank is not None and grad_down_TR is not None:
            total_TI += grad_down_TR @ low_rank.down_RI
        return total_TI.to(grad_TO.dtype)

    def rows(self, ids_T: Tensor) -> Tensor:
        if self._native is not None:
            return quantised.rows(self._native, ids_T, self._dtype)
        unique, places = ids_T.unique(return_inverse=True)
        found = [self._row(int(row)) for row in unique]
        return torch.cat(found).to(self._dtype).index_select(0, places)

    def _row(self, row: int) -> Tensor:
        for part in self.parts:
            if row < part.shape[0]:
                return numbers(part, row, row + 1)
            row -= part.shape[0]
        raise IndexError(f"a row outside the {self.shape[0]} of the weight")

    def logits(self, states_MI: Tensor) -> Tensor:
        if weight := self._native_for(states_MI):
            out_MO = torch.empty((len(states_MI), self.shape[0]), dtype=torch.float32)
            return quantised.matmul(states_MI, weight, turned=True, out=out_MO)
        return self.forward(states_MI).float()

    def head_loss(
        self,
        hidden_MI: Tensor,
        labels_M: Tensor,
        *,
        weight: float,
        smoothing: float,
        need_grad: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        if native := self._native_for(hidden_MI):
            return quantised.head_loss(
                *(hidden_MI, native, labels_M),
                weight=weight,
                smoothing=smoothing,
                softcap=softcap,
                need_grad=need_grad,
            )
        return products.head_loss(
            *(hidden_MI, self.dequantise(hidden_MI.dtype), labels_M),
            weight=weight,
            smoothing=smoothing,
            softcap=softcap,
            need_grad=need_grad,
        )

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dense = torch.empty(self.shape, dtype=dtype, device=self.parts[0].data.device)
        for row, strip in self._strips(dtype):
            dense[row : row + len(strip)] = strip
        return dense
