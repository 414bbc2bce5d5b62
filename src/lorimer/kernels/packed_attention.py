"""Attention of a pack's rows in plain PyTorch: what the native kernels mean.

A pack is one sequence of tokens: first a prefix that all rows share, then the rows one after another.
A row's token sees the prefix and its own row up to itself, as if the row stood alone behind the prefix.

Letters: T tokens of the pack, P shared prefix, L one row's tokens, S prefix and row, N query heads,
K key/value heads, D head size, B rows of a batch, C places of a cache.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def packed_attention(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    offsets: Tensor,
    prefix: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every row to the prefix and itself: [T, N, D] and the log-sum-exp [T, N].

    `offsets` (int64) holds each row's first token and, last, T; `offsets[0]` is `prefix`. K divides N.
    `window` w lets position i see positions i - w + 1 to i, where a row's first token has position P.
    `softcap` c makes scores c * tanh(scores / c) (arXiv 2408.00118); 0 for none. Statistics are at
    least float32, and autograd goes through all of it.
    """
    outputs, lses = [], []
    for first, last in [(0, prefix), *pairwise(offsets.tolist())]:
        shared = min(first, prefix)
        rows = slice(first, last)
        keys, values = (torch.cat([all[:shared], all[rows]]) for all in (key_TKD, value_TKD))
        position_L = torch.arange(shared, shared + last - first, device=query_TND.device).unsqueeze(1)
        age_LS = position_L - torch.arange(keys.shape[0], device=query_TND.device)
        hidden_LS = age_LS < 0 if window is None else (age_LS < 0) | (age_LS >= window)
        output, lse = _attend(query_TND[rows], keys, values, hidden_LS, scale, softcap)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


def decode_attention(
    query_BND: Tensor,
    key_BKCD: Tensor,
    value_BKCD: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """One new token of each row against its cache, whose first `lengths_B` places it sees: [B, N, D].

    The new token's own key and value are the last of them. With `window` w only the last w count.
    """
    outputs = []
    for row, length in enumerate(lengths_B.tolist()):
        seen = slice(0 if window is None else max(0, length - window), length)
        keys, values = (cache[row, :, seen].transpose(0, 1) for cache in (key_BKCD, value_BKCD))
        hidden = torch.zeros((1, keys.shape[0]), dtype=torch.bool, device=keys.device)
        outputs.append(_attend(query_BND[row : row + 1], keys, values, hidden, scale, softcap)[0])
    return torch.cat(outputs)


def _attend(
    query_LND: Tensor, key_SKD: Tensor, value_SKD: Tensor, hidden_LS: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """One row: its output [L, N, D] and log-sum-exp [L, N]."""
    wide = torch.promote_types(query_LND.dtype, torch.float32)
    grouped_LKGD = query_LND.unflatten(1, (key_SKD.shape[1], -1)).to(wide)
    scores_LKGS = torch.einsum("lkgd,skd->lkgs", grouped_LKGD, key_SKD.to(wide)) * scale
    if softcap:
        scores_LKGS = softcap * torch.tanh(scores_LKGS / softcap)
    scores_LKGS = scores_LKGS.masked_fill(hidden_LS[:, None, None, :], float("-inf"))
    lse_LKG = scores_LKGS.logsumexp(-1)
    probs = (scores_LKGS - lse_LKG.unsqueeze(-1)).exp().to(query_LND.dtype)
    output_LKGD = torch.einsum("lkgs,skd->lkgd", probs, value_SKD)
    return output_LKGD.flatten(1, 2), lse_LKG.flatten(1)
