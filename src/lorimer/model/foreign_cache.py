"""What transformers keeps of the tokens so far, for rows that are answered side by side.

Letters: B rows of a group, S tokens so far.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorimer.model.cache import KVCache

# Where a model's output has its cache; it goes back in under the same name.
PAST = ("past_key_values", "cache_params", "state")


@dataclass(slots=True)
class Group:
    """Rows of one length, which stay so: each gets a token at a time. `rows` says which row of the batch
    each is, None once it has left; without a `past` the whole rows are computed again."""

    rows: list[int | None]
    ids_BS: Tensor
    past: tuple[str, Any] | None

    def next_ids(self, ids_B: Tensor) -> Tensor:
        """The new tokens [B, 1] of this group; one that left goes on with its last."""
        last = self.ids_BS[:, -1:]
        new = [last[i] if row is None else ids_B[row : row + 1] for i, row in enumerate(self.rows)]
        return torch.stack(new)


class RowsCache(KVCache):
    """Groups of rows in place of keys and values; it is never full."""

    def __init__(self, rows: int) -> None:
        self.groups: list[Group] = []
        self.lengths = [0] * rows

    @property
    def capacity(self) -> int:
        return sys.maxsize

    def add(self, rows: Sequence[int], ids_BS: Tensor, past: tuple[str, Any] | None) -> None:
        """Rows of one length, computed so far."""
        self.groups.append(Group(list(rows), ids_BS, past))
        for row in rows:
            self.lengths[row] = ids_BS.shape[1]

    def keep(self, rows: list[int]) -> None:
        places = {old: new for new, old in enumerate(rows)}
        for group in self.groups:
            group.rows = [None if row is None else places.get(row) for row in group.rows]
        self.groups = [group for group in self.groups if any(row is not None for row in group.rows)]
        self.lengths = [self.lengths[row] for row in rows]
