"""Keys and values of the tokens so far, one slot for each row being generated.

Letters: B rows, K key/value heads, L positions, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.kernels.native import attention as native_attention
from lorimer.kernels.native.library import usable
from lorimer.kernels.tape import Tape
from lorimer.model.spec import ModelSpec


class KVCache:
    """Room for `capacity` positions in each of `rows` rows; row b holds `lengths[b]` of them.

    Rows are aligned at position 0 whatever their lengths, so a row's keys do not depend on its
    neighbours. Memory: 2 * layers * rows * capacity * kv_heads * head_dim elements.
    """

    def __init__(
        self, spec: ModelSpec, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (rows, spec.kv_heads, capacity, spec.head_dim)
        # Zeros and not empty: positions past a row's end are masked, but NaN times zero is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self.lengths = [0] * rows
        self.index = torch.arange(rows, device=device)
        self._tapes: dict[bool, Tape] = {}

    def tape(self, adapted: bool) -> Tape:
        """What the next token's kernels are kept on, as long as keys and values stay where they are."""
        return self._tapes.setdefault(adapted, Tape())

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def store_row(self, layer: int, row: int, key_TKD: Tensor, value_TKD: Tensor) -> None:
        """The keys and values of a whole prompt, from position 0."""
        length = key_TKD.shape[0]
        self.keys[layer][row, :, :length] = key_TKD.transpose(0, 1)
        self.values[layer][row, :, :length] = value_TKD.transpose(0, 1)

    def append(self, layer: int, lengths_B: Tensor, key_BKD: Tensor, value_BKD: Tensor) -> None:
        """One token for each row, at the last of the `lengths_B` places that it then has."""
        if usable(key_BKD):
            native_attention.append(key_BKD, value_BKD, self.keys[layer], self.values[layer], lengths_B)
            return
        self.keys[layer][self.index, :, lengths_B - 1] = key_BKD
        self.values[layer][self.index, :, lengths_B - 1] = value_BKD

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, in this order."""
        index = torch.tensor(rows, device=self.index.device)
        self._tapes = {}
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer].index_select(0, index)
            self.values[layer] = self.values[layer].index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
        self.index = torch.arange(len(rows), device=index.device)

    def grow(self, capacity: int) -> None:
        """Room for more positions."""
        self._tapes = {}
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                wide = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                wide[:, :, : old.shape[2]] = old
                tensors[layer] = wide
