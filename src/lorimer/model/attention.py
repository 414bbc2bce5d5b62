"""How the rows of a pack attend: each to what it shares and to itself, rows of like length together.

A pack may begin with a prefix that all its rows share. Its keys and values are computed once; in
each row's grid it stands before the row's own tokens, so attention itself knows nothing of it. The
gradients that the rows send back to the prefix are added up.

Letters: T tokens, P shared prefix, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorimer.kernels import packed_attention, reference
from lorimer.kernels.dispatch import Scores
from lorimer.kernels.native import attention as native_attention
from lorimer.kernels.native.library import usable

# A group of rows is padded to its longest: scores of short rows cost next to nothing, so fewer
# calls win there; for long rows the padding's scores would cost more than a call.
SHORT = 128
PADDING_SHORT, PADDING_LONG = 1.6, 1.15
# Grids of few sizes: the matrix library builds and keeps code for every size it meets.
GRID_STEP = 16


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows that attend in one call; their own tokens are first to last of the pack.

    `index` picks, for each slot of the padded [rows, longest] grid, a token of the group
    (padding repeats token 0: a later position, which causal attention never shows to a real one);
    `inverse` gives each token its slot. Both are None when all rows are equally long.
    """

    first: int
    last: int
    rows: int
    longest: int
    prefix: int
    index: Tensor | None
    inverse: Tensor | None

    def grid(self, states_TND: Tensor) -> Tensor:
        """Tokens of the pack -> [rows, N, prefix + longest, D]."""
        own = states_TND[self.first : self.last]
        if self.index is not None:
            own = own.index_select(0, self.index)
        own = own.unflatten(0, (self.rows, self.longest))
        if self.prefix:
            shared = states_TND[: self.prefix].expand(self.rows, *states_TND[: self.prefix].shape)
            own = torch.cat([shared, own], 1)
        return own.transpose(1, 2)

    def own_tokens(self, grid: Tensor) -> Tensor:
        """[rows, N, prefix + longest, D] -> the group's own tokens, in the order of the pack."""
        own = grid.transpose(1, 2)[:, self.prefix :].flatten(0, 1)
        return own if self.inverse is None else own.index_select(0, self.inverse)

    def output_grad(self, grad_TND: Tensor, *, holds_prefix: bool) -> Tensor:
        """The grid of an output's gradient: zeros in the padding, and in every copy of the prefix but
        the first row's of the group that its output was taken from."""
        tokens = grad_TND.new_zeros((self.rows, self.prefix + self.longest, *grad_TND.shape[1:]))
        own = grad_TND[self.first : self.last]
        if self.inverse is None:
            tokens[:, self.prefix :] = own.unflatten(0, (self.rows, self.longest))
        else:
            slots = grad_TND.new_zeros((self.rows * self.longest, *grad_TND.shape[1:]))
            slots.index_copy_(0, self.inverse, own)
            tokens[:, self.prefix :] = slots.unflatten(0, (self.rows, self.longest))
        if holds_prefix:
            tokens[0, : self.prefix] = grad_TND[: self.prefix]
        return tokens.transpose(1, 2)


@dataclass(slots=True)
class PackRows:
    """The rows of a pack as attention sees them: `lengths` tokens each, behind a shared prefix."""

    lengths: Sequence[int]
    prefix: int
    device: torch.device
    offsets: Tensor = field(init=False)
    _groups: list[Group] | None = None

    def __post_init__(self) -> None:
        self.offsets = self.prefix + torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def positions_T(self) -> Tensor:
        """Each token's place in its row; the prefix is the beginning of every row."""
        parts = [torch.arange(self.prefix)]
        parts += [torch.arange(self.prefix, self.prefix + length) for length in self.lengths]
        return torch.cat(parts).to(self.device)

    @property
    def groups(self) -> list[Group]:
        if self._groups is None:
            self._groups = group_rows(self.lengths, self.device, self.prefix)
        return self._groups


def group_rows(lengths: Sequence[int], device: torch.device, prefix: int = 0) -> list[Group]:
    """Split a pack's rows, in their order, into groups of like length.

    `lengths` count each row's own tokens, which follow the `prefix` shared ones.
    """
    groups: list[Group] = []
    members: list[int] = []
    start = prefix
    for length in lengths:
        longest = prefix + max([length, *members])
        limit = PADDING_SHORT if longest <= SHORT else PADDING_LONG
        real = prefix * (len(members) + 1) + sum(members) + length
        if members and longest * (len(members) + 1) > limit * real:
            groups.append(_group(members, start, prefix, device))
            start += sum(members)
            members = []
        members.append(length)
    groups.append(_group(members, start, prefix, device))
    return groups


def _group(lengths: list[int], first: int, prefix: int, device: torch.device) -> Group:
    longest, total = max(lengths), sum(lengths)
    if len(lengths) > 1:
        longest = -(-(prefix + longest) // GRID_STEP) * GRID_STEP - prefix
    if min(lengths) == longest:
        return Group(first, first + total, len(lengths), longest, prefix, None, None)
    index = torch.zeros(len(lengths) * longest, dtype=torch.int64)
    slots = []
    start = 0
    for row, length in enumerate(lengths):
        slots.append(torch.arange(row * longest, row * longest + length))
        index[slots[-1]] = torch.arange(start, start + length)
        start += length
    inverse = torch.cat(slots).to(device)
    return Group(first, first + total, len(lengths), longest, prefix, index.to(device), inverse)


def attend(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    groups: Sequence[Group],
    scores: Scores,
) -> Tensor:
    """Causal attention of every row of a pack to its prefix and itself: [T, N * D]."""
    result: Tensor = _PackAttention.apply(  # type: ignore[no-untyped-call]
        query_TND, key_TKD, value_TKD, groups, scores
    )
    return result.flatten(1)


class _PackAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        groups: Sequence[Group],
        scores: Scores,
    ) -> Tensor:
        output_TND = torch.empty_like(query_TND, memory_format=torch.contiguous_format)
        for number, group in enumerate(groups):
            grids = (group.grid(states) for states in (query_TND, key_TKD, value_TKD))
            grid = reference.causal_attention(*grids, **scores._asdict())
            output_TND[group.first : group.last] = group.own_tokens(grid)
            if number == 0 and group.prefix:
                # Every copy of the prefix has the same output: it sees nothing but itself.
                output_TND[: group.prefix] = grid[0, :, : group.prefix].transpose(0, 1)
        ctx.groups, ctx.scores = groups, scores
        ctx.save_for_backward(query_TND, key_TKD, value_TKD, output_TND)
        return output_TND

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Any, ...]:
        states = ctx.saved_tensors
        prefix = ctx.groups[0].prefix
        grads = tuple(
            torch.zeros_like(state, memory_format=torch.contiguous_format) for state in states[:3]
        )
        shared = [grad.new_zeros((prefix, *grad.shape[1:]), dtype=torch.float32) for grad in grads]
        for number, group in enumerate(ctx.groups):
            query, key, value, output = (group.grid(state) for state in states)
            upper = group.output_grad(grad_TND, holds_prefix=number == 0)
            parts = reference.causal_attention_backward(
                upper, query, key, value, output, **ctx.scores._asdict()
            )
            for grad, total, part in zip(grads, shared, parts, strict=True):
                grad[group.first : group.last] = group.own_tokens(part)
                total += part[:, :, :prefix].transpose(1, 2).sum(0, dtype=torch.float32)
        for grad, total in zip(grads, shared, strict=True):
            grad[:prefix] = total
        return (*grads, None, None)


def attend_cache(
    query_BND: Tensor,
    key_BKCD: Tensor,
    value_BKCD: Tensor,
    lengths_B: Tensor,
    scores: Scores,
) -> Tensor:
    """One new token of each row to the first `lengths_B` places of its cache: [B, N * D]."""
    if usable(query_BND) and native_attention.takes(query_BND.shape[-1]):
        mixed = native_attention.decode(query_BND, key_BKCD, value_BKCD, lengths_B, **scores._asdict())
        return mixed.flatten(1)
    if scores.softcap:
        mixed = packed_attention.decode_attention(
            query_BND, key_BKCD, value_BKCD, lengths_B, **scores._asdict()
        )
        return mixed.flatten(1)
    window = scores.window
    seen = int(lengths_B.max())
    age = lengths_B.unsqueeze(1) - 1 - torch.arange(seen, device=lengths_B.device)
    visible = age >= 0 if window is None else (age >= 0) & (age < window)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query_BND.unsqueeze(2),
        key_BKCD[:, :, :seen],
        value_BKCD[:, :, :seen],
        visible[:, None, None],
        scale=scores.scale,
        enable_gqa=True,
    )
    return mixed.flatten(1)
