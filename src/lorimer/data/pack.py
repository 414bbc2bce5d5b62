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

    ids_T        int64 token ids: the shared prefix, then row after row without it
    lengths      tokens of each row that are computed after the prefix
    rows         which row of the step each is
    predict_M    int64 positions whose next token is trained
    labels_M     int64 that next token
    owner_M      int64 index into `rows` for each trained position
    tokens       tokens of the rows, whether they are shared, computed or not
    prefix       first tokens that all rows share; none of them is trained
    """

    ids_T: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    predict_M: Tensor
    labels_M: Tensor
    owner_M: Tensor
    tokens: int
    prefix: int = 0

    @property
    def computed_tokens(self) -> int:
        """Tokens that are computed: shared ones once."""
        return int(self.ids_T.shape[0])

    @property
    def trained_tokens(self) -> int:
        return int(self.labels_M.shape[0])


# A shorter prefix saves less than the sharing costs.
LEAST_PREFIX = 8


def make_pack(
    examples: Sequence[Example], rows: Sequence[int], *, share: bool = False, trim: bool = False
) -> Pack:
    """Lay these examples one after the other. A row's first token is never predicted.

    Two rows [5, 6*, 7*] and [8, 9*] (* trained) give ids [8, 9, 5, 6, 7], lengths (2, 3),
    predict [0, 2, 3], labels [9, 6, 7], owner [0, 1, 1]. With `share`, what all rows begin with is
    laid once, up to the first token that is trained in any of them. With `trim`, tokens from a row's
    last trained one on are left out: nothing that is predicted sees them.
    """
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), rows[i]))
    prefix = shared_prefix(examples) if share else 0
    ends = [_last_seen(examples[i], prefix) if trim else len(examples[i].ids) for i in order]
    parts = [examples[i].ids[prefix:end] for i, end in zip(order, ends, strict=True)]
    ids = np.concatenate([examples[0].ids[:prefix], *parts]).astype(np.int64)
    starts = prefix + np.cumsum([0, *(len(part) for part in parts[:-1])])
    predict, labels, owner = [], [], []
    for place, (i, start) in enumerate(zip(order, starts, strict=True)):
        trained = np.flatnonzero(examples[i].trained[1:]) + 1
        before = trained - 1
        # What predicts a row's first own token is the prefix's last.
        predict.append(np.where(before < prefix, before, before - prefix + start))
        labels.append(examples[i].ids[trained])
        owner.append(np.full(len(trained), place))
    return Pack(
        ids_T=torch.from_numpy(ids),
        lengths=tuple(len(part) for part in parts),
        rows=tuple(rows[i] for i in order),
        predict_M=torch.from_numpy(np.concatenate(predict).astype(np.int64)),
        labels_M=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        owner_M=torch.from_numpy(np.concatenate(owner).astype(np.int64)),
        tokens=sum(len(example.ids) for example in examples),
        prefix=prefix,
    )


def _last_seen(example: Example, prefix: int) -> int:
    """How many first tokens the predictions of a row see; one of its own at least."""
    found = np.flatnonzero(example.trained[1:])
    return max(prefix + 1, int(found[-1]) + 1 if len(found) else len(example.ids))


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many first tokens all examples have in common, before any token that is trained.

    At least one token of each stays its own. 0 for a single example, or less than LEAST_PREFIX.
    """
    if len(examples) < 2:
        return 0
    most = min(min(_first_trained(example), len(example.ids) - 1) for example in examples)
    first = examples[0].ids[:most]
    for example in examples[1:]:
        differs = np.flatnonzero(first != example.ids[: len(first)])
        if len(differs):
            first = first[: differs[0]]
    return len(first) if len(first) >= LEAST_PREFIX else 0


def _first_trained(example: Example) -> int:
    found = np.flatnonzero(example.trained[1:]) + 1
    return int(found[0]) if len(found) else len(example.ids)


def split_into_packs(
    examples: Sequence[Example],
    most_tokens: int,
    *,
    together: bool = True,
    share: bool = False,
    trim: bool = False,
) -> list[Pack]:
    """The rows of one step in packs of at most `most_tokens`, each row whole and in exactly one pack.

    First-fit decreasing; a row longer than `most_tokens` is a pack of its own. With `together`
    false every row is a pack of its own, which gives the same losses more slowly; with `share` what
    the rows of a pack begin with is computed once, and what all rows of the step begin with fills a
    pack once; with `trim` what nothing sees is left out.
    """
    prefix = shared_prefix(examples) if share and together else 0
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        size = len(examples[i].ids) - prefix
        fits = next((b for b, left in enumerate(room) if left >= size), None) if together else None
        if fits is None:
            bins.append([i])
            room.append(most_tokens - prefix - size)
        else:
            bins[fits].append(i)
            room[fits] -= size
    return [make_pack([examples[i] for i in rows], rows, share=share, trim=trim) for rows in bins]
