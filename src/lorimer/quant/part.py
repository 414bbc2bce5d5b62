"""Rows of a frozen weight in one quantised storage: what the decoders and the native kernels read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

FOUR_BIT = ("nf4", "fp4")
NESTED_BLOCK = 256  # scales that share a scale of their own, where scales are quantised too


class NotFinite(ValueError):
    """A number that should be quantised is NaN or infinite."""


# A weight's rows from the first on, a stretch [rows, I] at a time, in the type that they lie in;
# called once for each pass over them.
Rows = Callable[[], Iterator[Tensor]]


def whole(weight_OI: Tensor) -> Rows:
    """A weight in memory, as one stretch."""
    return lambda: iter([weight_OI])


def check_finite(magnitudes: Tensor) -> None:
    """Raises NotFinite if one of the largest magnitudes of a weight's stretches is NaN or infinite."""
    if magnitudes.numel() and not math.isfinite(magnitudes.amax()):
        raise NotFinite


def inverse_of(scales: Tensor) -> Tensor:
    """1 / scale, or 0 where that is no number: what has such a scale is stored as zeros."""
    inverse = 1 / scales
    return torch.where((scales > 0) & torch.isfinite(inverse), inverse, 0.0)


@dataclass(frozen=True, slots=True)
class Part:
    """A weight [O, I], or some rows of one, quantised.

    `kind` is nf4, fp4, int8 or the name of a GGUF block type. `data` is uint8:

    - nf4, fp4: two codes a byte, the first number in the high half, over the flattened weight. Number
      n belongs to block n // block_size; blocks may cross rows, and the last may be short.
    - int8: one signed code a number, [O, I]. Columns kept apart have the code 0.
    - GGUF: the blocks as they lie in the file, row after row.

    `absmax` is float32 [blocks]. If it is quantised too, it is uint8 codes, and the scale of block b is
    absmax_table[absmax[b]] * absmax_scale[b // 256] + absmax_offset, each operation in float32.
    """

    kind: str
    shape: tuple[int, int]
    data: Tensor
    block_size: int = 0
    absmax: Tensor | None = None
    absmax_table: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_offset: float = 0.0
    row_scale: Tensor | None = None  # int8: float32 [O], so that number = code * row_scale
    outlier_columns: Tensor | None = None  # int8: int64 [C], ascending
    outliers: Tensor | None = None  # int8: [O, C], in 16 or 32 bits

    def to(self, device: torch.device) -> Part:
        """The same on another device."""
        return replace(
            self,
            **{
                item.name: getattr(self, item.name).to(device)
                for item in fields(self)
                if isinstance(getattr(self, item.name), Tensor)
            },
        )

    @property
    def nbytes(self) -> int:
        tensors = (
            self.data, self.absmax, self.absmax_scale, self.row_scale, self.outlier_columns, self.outliers
        )  # fmt: skip
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def scales(self, first: int, last: int) -> Tensor:
        """The float32 scales of blocks first to last of an nf4 or fp4 weight."""
        assert self.absmax is not None
        found = self.absmax[first:last]
        if self.absmax_table is None or self.absmax_scale is None:
            return found
        numbers = torch.arange(first, last, device=found.device) // NESTED_BLOCK
        return self.absmax_table[found.long()] * self.absmax_scale[numbers] + self.absmax_offset
