"""How the rows of a pack attend: each to itself only, rows of like length in one call.

Letters: T tokens, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorimer.kernels import dispatch

# A group of rows is padded to its longest: scores of short rows cost next to nothing, so fewer
# calls win there; for long rows the padding's scores would cost more than a call.
SHORT = 128
PADDING_SHORT, PADDING_LONG = 1.6, 1.15
# Grids of few sizes: the matrix library builds and keeps code for every size it meets.
GRID_STEP = 16


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows that attend in one call; tokens first to last of the pack.

    `index` picks, for each slot of the padded [rows, longest] grid, a token of the group
    (padding repeats token 0: a later position, which causal attention never shows to a real one);
    `inverse` gives each token its slot. Both are None when all rows are equally long.
    """

    first: int
    last: int
    rows: int
    longest: int
    index: Tensor | None
    inverse: Tensor | None


def group_rows(lengths: Sequence[int], device: torch.device) -> list[Group]:
    """Split a pack's rows, in their order, into groups of like length."""
    groups: list[Group] = []
    members: list[int] = []
    start = 0
    for length in lengths:
        longest = max([length, *members])
        limit = PADDING_SHORT if longest <= SHORT else PADDING_LONG
        if members and longest * (len(members) + 1) > limit * (sum(members) + length):
            groups.append(_group(members, start, device))
            start += sum(members)
            members = []
        members.append(length)
    groups.append(_group(members, start, device))
    return groups


def _group(lengths: list[int], first: int, device: torch.device) -> Group:
    longest, total = max(lengths), sum(lengths)
    if len(lengths) > 1:
        longest = -(-longest // GRID_STEP) * GRID_STEP
    if min(lengths) == longest:
        return Group(first, first + total, len(lengths), longest, None, None)
    index = torch.zeros(len(lengths) * longest, dtype=torch.int64)
    slots = []
    start = 0
    for row, length in enumerate(lengths):
        slots.append(torch.arange(row * longest, row * longest + length))
        index[slots[-1]] = torch.arange(start, start + length)
        start += length
    inverse = torch.cat(slots)
    return Group(first, first + total, len(lengths), longest, index.to(device), inverse.to(device))


def attend(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    groups: Sequence[Group],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of every row of a pack to itself: [T, N * D]."""
    outputs = []
    for group in groups:
        part = slice(group.first, group.last)
        query, key, value = (_grid(states[part], group) for states in (query_TND, key_TKD, value_TKD))
        output = dispatch.causal_attention(query, key, value, scale, window).transpose(1, 2)
        flat = output.reshape(group.rows * group.longest, -1)
        if group.index is not None and group.inverse is not None:
            flat = _Scatter.apply(flat, group.index, group.inverse)  # type: ignore[no-untyped-call]
        outputs.append(flat)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _grid(states_TND: Tensor, group: Group) -> Tensor:
    """[tokens, N, D] of a group -> [rows, N, longest, D]."""
    if group.index is not None and group.inverse is not None:
        states_TND = dispatch.gather(states_TND, group.index, group.inverse)
    return states_TND.view(group.rows, group.longest, *states_TND.shape[1:]).transpose(1, 2)


class _Scatter(torch.autograd.Function):
    """Drop the padding of a grid. Backward: zeros in the padding, so that it sends no gradient."""

    @staticmethod
    def forward(ctx, grid, index, inverse):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        ctx.slots = grid.shape[0]
        return grid.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        grid = grad.new_zeros((ctx.slots, *grad.shape[1:]))
        return grid.index_copy_(0, inverse, grad), None, None
