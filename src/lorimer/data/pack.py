"""Examples -> packs: rows laid one after the other, without padding.

A pack says where each row begins, so that rows never see each other, and which positions predict
a trained token. Rows are ordered by length within a pack: rows of like length attend in one call.

Letters: T tokens of the pack, M trained positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorimer.data.template import Example


@dataclass(frozen=True, slots=True)
class Pack:
    """Some rows of one optimizer step, computed together.

    ids_T        int64 token ids, row after row
    lengths      tokens of each row
    rows         which row of the step each is
    predict_M    int64 positions whose next token is trained
    labels_M     int64 that next token
    owner_M      int64 index into `rows` for each trained position
    """

    ids_T: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    predict_M: Tensor
    labels_M: Tensor
    owner_M: Tensor

    @property
    def tokens(self) -> int:
        return int(self.ids_T.shape[0])

    @property
    def trained_tokens(self) -> int:
        return int(self.labels_M.shape[0])


def make_pack(examples: Sequence[Example], rows: Sequence[int]) -> Pack:
    """Lay these examples one after the other. A row's first token is never predicted.

    Two rows [5, 6*, 7*] and [8, 9*] (* trained) give ids [8, 9, 5, 6, 7], lengths (2, 3),
    predict [0, 2, 3], labels [9, 6, 7], owner [0, 1, 1].
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), rows[i]))
    ids = np.concatenate([examples[i].ids for i in order]).astype(np.int64)
    lengths = [len(examples[i].ids) for i in order]
    starts = np.cumsum([0, *lengths[:-1]])
    predict, owner = [], []
    for place, (i, start) in enumerate(zip(order, starts, strict=True)):
        trained = np.flatnonzero(examples[i].trained[1:])
        predict.append(trained + start)
        owner.append(np.full(len(trained), place))
    positions = np.concatenate(predict).astype(np.int64)
    return Pack(
        ids_T=torch.from_numpy(ids),
        lengths=tuple(lengths),
        rows=tuple(rows[i] for i in order),
        predict_M=torch.from_numpy(positions),
        labels_M=torch.from_numpy(ids[positions + 1]),
        owner_M=torch.from_numpy(np.concatenate(owner).astype(np.int64)),
    )


def split_into_packs(examples: Sequence[Example], most_tokens: int, *, together: bool = True) -> list[Pack]:
    """The rows of one step in packs of at most `most_tokens`, each row whole and in exactly one pack.

    First-fit decreasing; a row longer than `most_tokens` is a pack of its own. With `together`
    false every row is a pack of its own, which gives the same losses more slowly.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        size = len(examples[i].ids)
        fits = next((b for b, left in enumerate(room) if left >= size), None) if together else None
        if fits is None:
            bins.append([i])
            room.append(most_tokens - size)
        else:
            bins[fits].append(i)
            room[fits] -= size
    return [make_pack([examples[i] for i in rows], rows) for rows in bins]
