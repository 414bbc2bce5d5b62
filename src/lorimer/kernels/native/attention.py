"""Attention in C++: over packed rows, forward and backward, and of one new token against a cache.

What they compute is said in kernels/packed_attention.py. `takes` says whether a head size is theirs.

Letters: T tokens of the pack, N query heads, K key/value heads, D head size, B rows of a batch,
C places of a cache.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lorimer.kernels import workspace
from lorimer.kernels.native.library import Kernel, note

LARGEST_HEAD = 256

_OPTIONS = "flfii"  # scale, window, softcap, dtype, threads
_forward = Kernel("attention_forward", "pppppp" + "lllllll" + _OPTIONS)
_backward = Kernel("attention_backward", "pppppppppp" + "llllllll" + _OPTIONS)
_decode = Kernel("attention_decode", "ppppp" + "llllll" + _OPTIONS)
_append = Kernel("cache_append", "pplppp" + "lllli")


def takes(head_size: int) -> bool:
    """Whether the kernels take heads of this size: a multiple of 16 up to 256."""
    if head_size % 16 == 0 and 0 < head_size <= LARGEST_HEAD:
        return True
    note("attention", f"head size {head_size} is no multiple of 16 up to {LARGEST_HEAD}")
    return False


def forward(
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
    """The output [T, N, D] and the float32 log-sum-exp [T, N], which the backward needs.

    The states are bf16 or fp32, and may be views into one stacked [T, (N + 2K) * D] tensor.
    `scale` is above 0. Raises ValueError for shapes, strides or offsets that do not fit together.
    """
    shape = _check_pack(query_TND, key_TKD, value_TKD, offsets, prefix)
    tokens, heads, size = query_TND.shape
    out_TND = workspace.empty((tokens, heads, size), query_TND.dtype)
    lse_TN = workspace.empty((tokens, heads), torch.float32)
    _forward(
        *(query_TND, key_TKD, value_TKD, out_TND, lse_TN, offsets),
        *shape,
        *(query_TND.stride(0), key_TKD.stride(0), *_options(query_TND, scale, window, softcap)),
    )
    return out_TND, lse_TN


def backward(
    grad_TND: Tensor,
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    offsets: Tensor,
    prefix: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The gradients of query, key and value, stacked: [T, (N + 2K) * D].

    Sums over rows, query heads and tokens are in float32 and rounded once, in one order whatever the
    number of threads. Raises ValueError as `forward` does.
    """
    shape = _check_pack(query_TND, key_TKD, value_TKD, offsets, prefix)
    tokens, heads, size = query_TND.shape
    grad_TND, out_TND, lse_TN = grad_TND.contiguous(), out_TND.contiguous(), lse_TN.contiguous()
    _demand(grad_TND.shape == out_TND.shape == query_TND.shape, "the output's gradient has another shape")
    _demand(grad_TND.dtype == out_TND.dtype == query_TND.dtype, "the output's gradient has another type")
    _demand(lse_TN.shape == (tokens, heads) and lse_TN.dtype == torch.float32, "lse is no float32 [T, N]")
    kv_heads = key_TKD.shape[1]
    grads = workspace.empty((tokens, (heads + 2 * kv_heads) * size), query_TND.dtype)
    parts = grads.split([heads * size, kv_heads * size, kv_heads * size], 1)
    _backward(
        *(grad_TND, query_TND, key_TKD, value_TKD, out_TND, lse_TN, *parts, offsets, *shape),
        *(query_TND.stride(0), key_TKD.stride(0), grads.stride(0)),
        *_options(query_TND, scale, window, softcap),
    )
    return grads


def decode(
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

    A row's query lies in one piece, perhaps in a wider buffer. The caches are contiguous; a length is an
    int64 from 1 to C. Raises ValueError for what does not fit.
    """
    batch, heads, size = query_BND.shape
    kv_heads, capacity = key_BKCD.shape[1:3]
    _check_heads(heads, kv_heads, size, query_BND, key_BKCD, value_BKCD)
    _check_cache(key_BKCD, value_BKCD, lengths_B, (batch, kv_heads, capacity, size))
    _demand(query_BND.stride()[1:] == (size, 1), "a query's heads do not lie next to each other")
    out_BND = torch.empty((batch, heads, size), dtype=query_BND.dtype)
    _decode(
        *(query_BND, key_BKCD, value_BKCD, out_BND, lengths_B, batch, capacity, heads, kv_heads, size),
        *(query_BND.stride(0), *_options(query_BND, scale, window, softcap)),
    )
    return out_BND


def append(
    key_BKD: Tensor, value_BKD: Tensor, key_BKCD: Tensor, value_BKCD: Tensor, lengths_B: Tensor
) -> None:
    """One new token of each row into its caches, at the last of the `lengths_B` places it has then.

    A row's new key and value lie each in one piece, perhaps in a wider buffer, as far apart in both.
    Raises ValueError for what does not fit.
    """
    batch, kv_heads, size = key_BKD.shape
    capacity = key_BKCD.shape[2]
    _check_cache(key_BKCD, value_BKCD, lengths_B, (batch, kv_heads, capacity, size))
    _demand(key_BKD.shape == value_BKD.shape, "key and value differ")
    _demand(key_BKD.stride() == value_BKD.stride(), "key and value have different strides")
    _demand(key_BKD.stride()[1:] == (size, 1), "a row's heads do not lie next to each other")
    _demand(key_BKD.dtype == value_BKD.dtype == key_BKCD.dtype == value_BKCD.dtype, "the types differ")
    _append(
        *(key_BKD, value_BKD, key_BKD.stride(0), key_BKCD, value_BKCD, lengths_B),
        *(batch, kv_heads, capacity, size, key_BKD.element_size()),
    )


def _check_cache(
    key_BKCD: Tensor, value_BKCD: Tensor, lengths_B: Tensor, shape: tuple[int, int, int, int]
) -> None:
    _demand(key_BKCD.shape == value_BKCD.shape == shape, "keys and values differ")
    _demand(key_BKCD.is_contiguous() and value_BKCD.is_contiguous(), "a cache is not contiguous")
    right = lengths_B.dtype == torch.int64 and lengths_B.shape == shape[:1] and lengths_B.is_contiguous()
    _demand(right, "lengths are no contiguous int64 [B]")
    _demand(all(0 < length <= shape[2] for length in lengths_B.tolist()), "a length is not 1 to capacity")


def _options(query: Tensor, scale: float, window: int | None, softcap: float) -> tuple[float, ...]:
    _demand(scale > 0, "the scale is not above 0")
    _demand(window is None or window > 0, "the window is not above 0")
    limit = -1 if window is None else window
    return scale, limit, softcap, int(query.dtype == torch.bfloat16), torch.get_num_threads()


def _check_pack(
    query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, offsets: Tensor, prefix: int
) -> tuple[int, ...]:
    """rows, prefix, heads, kv_heads and head size, when everything fits together."""
    tokens, heads, size = query_TND.shape
    kv_heads = key_TKD.shape[1]
    _check_heads(heads, kv_heads, size, query_TND, key_TKD, value_TKD)
    _demand(key_TKD.shape == value_TKD.shape == (tokens, kv_heads, size), "keys and values differ")
    _demand(key_TKD.stride() == value_TKD.stride(), "keys and values have different strides")
    lie = all(states.stride()[1:] == (size, 1) for states in (query_TND, key_TKD))
    _demand(lie, "a token's heads do not lie next to each other")
    _demand(offsets.dtype == torch.int64 and offsets.is_contiguous(), "offsets are no contiguous int64")
    ends = offsets.tolist()
    _demand(ends[0] == prefix >= 0 and ends[-1] == tokens, "the offsets do not go from the prefix to T")
    _demand(all(first <= last for first, last in pairwise(ends)), "the offsets fall")
    return len(ends) - 1, prefix, heads, kv_heads, size


def _check_heads(heads: int, kv_heads: int, size: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    _demand(takes(size), f"head size {size}")
    _demand(heads % kv_heads == 0, f"{kv_heads} key/value heads do not divide {heads} query heads")
    _demand(query.dtype == key.dtype == value.dtype, "the types differ")


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"native attention: {problem}")
