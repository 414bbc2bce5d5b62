"""Memory for what the kernels write: taken from the system once, then used again.

A step's large tensors have the same few sizes each time. The C library cuts freed blocks to whatever
is asked for next, so its heap grows to half as much again within some steps; here a block is given
back whole, and is there for the next tensor of about its size. A tensor's block comes back when
nothing refers to the tensor any more, wherever that is: autograd's records need not be told.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 18  # bytes; for smaller tensors the C library is quicker, and cuts less to waste
GRAIN = 1 << 16  # sizes of blocks are multiples of this
SLACK = 1.25  # a block serves tensors that fill at least 1 / SLACK of it


class Pool:
    """Free blocks by size, and how many bytes tensors hold of others."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # ascending
        self._blocks: list[Tensor] = []
        self.free = 0
        self.taken = 0

    def take(self, size: int) -> Tensor:
        """A block of at least `size` bytes."""
        place = bisect_left(self._sizes, size)
        if place < len(self._sizes) and self._sizes[place] <= size * SLACK + GRAIN:
            block = self._drop(place)
        else:
            # Sizes that are not asked for any more must not pile up.
            while self._blocks and self.free > self.taken:
                self._drop(0)
            block = torch.empty(-(-size // GRAIN) * GRAIN, dtype=torch.uint8)
        self.taken += block.nbytes
        return block

    def give(self, block: Tensor) -> None:
        place = bisect_left(self._sizes, block.nbytes)
        self._sizes.insert(place, block.nbytes)
        self._blocks.insert(place, block)
        self.free += block.nbytes
        self.taken -= block.nbytes

    def _drop(self, place: int) -> Tensor:
        self.free -= self._sizes.pop(place)
        return self._blocks.pop(place)


class _Lease(np.ndarray[Any, Any]):
    """The bytes of a block on loan: a tensor made of them holds this, and its end ends the loan."""

    block: Tensor | None = None

    def __del__(self) -> None:
        if self.block is not None:
            _pool.give(self.block)


_pool = Pool()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU: a contiguous tensor whose numbers are whatever was there."""
    count = math.prod(shape)
    if count * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype)
    block = _pool.take(count * dtype.itemsize)
    lease = block.numpy().view(_Lease)
    lease.block = block
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def pooled_bytes() -> tuple[int, int]:
    """Bytes that tensors hold, and bytes that are free for the next."""
    return _pool.taken, _pool.free
