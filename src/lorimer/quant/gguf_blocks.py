"""The block types of GGUF files, decoded to float32, bit for bit as ggml's own decoder does.

A row is cut into blocks of 32 numbers, or 256 for the K types. Each block has a float16 scale d
(and a minimum m where the name ends in _1 or K) and small integers q:

    Q4_0  d, 16 bytes of q          x = d (q - 8)     number j in the low half of byte j, 16 + j high
    Q4_1  d, m, 16 bytes            x = d q + m
    Q5_0  d, 4 bytes of 5th bits    x = d (q - 16)
    Q5_1  d, m, 4 bytes, 16 bytes   x = d q + m
    Q8_0  d, 32 signed bytes        x = d q
    Q4_K  d, dm, 12 bytes           8 groups of 32, each with a 6-bit scale and minimum: x = d s q - dm m
    Q5_K  the same, and 32 bytes of 5th bits
    Q6_K  16 signed 8-bit scales    x = d s (q - 32), 6 bits of q in two places

With d = 0.5, m = 1 and the byte 0x73, a Q4_1 block has 0.5 * 3 + 1 = 2.5 at j and 4.5 at 16 + j.

Letters: B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorimer.errors import BaseError
from lorimer.kernels.codes import BLOCKS as STORED

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def _halves(raw_B: Tensor, start: int) -> Tensor:
    """One float16 of each block as float32 [B, 1]."""
    return raw_B[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(raw_B: Tensor) -> Tensor:
    """[B, n] bytes -> [B, 2n]: all low halves, then all high halves."""
    return torch.cat([raw_B & 15, raw_B >> 4], -1)


def _fifth_bits(raw_B: Tensor) -> Tensor:
    """4 bytes of each block -> [B, 32] with 16 where number j's bit is set."""
    bits = torch.arange(8, dtype=torch.uint8, device=raw_B.device)
    return ((raw_B.unsqueeze(-1) >> bits) & 1).flatten(1) << 4


def _q4_0(raw: Tensor) -> Tensor:
    return (_nibbles(raw[:, 2:]).float() - 8) * _halves(raw, 0)


def _q4_1(raw: Tensor) -> Tensor:
    return (_nibbles(raw[:, 4:]).float() * _halves(raw, 0)).add_(_halves(raw, 2))


def _q5_0(raw: Tensor) -> Tensor:
    return ((_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])).float() - 16) * _halves(raw, 0)


def _q5_1(raw: Tensor) -> Tensor:
    five = _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return (five.float() * _halves(raw, 0)).add_(_halves(raw, 2))


def _q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float() * _halves(raw, 0)


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minimums of 6 bits: the first four of each lie in the low bits of
    bytes 0-3 and 4-7, the rest are put together from bytes 8-11 and the top bits of the others."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], -1)
    minimums = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], -1)
    return scales, minimums


def _k_blocks(raw: Tensor, q_B832: Tensor) -> Tensor:
    scales, minimums = _k_scales(raw[:, 4:16])
    scale = (_halves(raw, 0) * scales.float()).unsqueeze(-1)
    minimum = (_halves(raw, 2) * minimums.float()).unsqueeze(-1)
    return (q_B832.float() * scale).sub_(minimum).flatten(1)


def _k_nibbles(raw: Tensor) -> Tensor:
    """128 bytes -> [B, 8, 32]: each 32 bytes hold two groups, low halves then high."""
    quarters = raw.unflatten(1, (4, 32))
    return torch.stack([quarters & 15, quarters >> 4], 2).flatten(1, 2)


def _q4_k(raw: Tensor) -> Tensor:
    return _k_blocks(raw, _k_nibbles(raw[:, 16:]))


def _q5_k(raw: Tensor) -> Tensor:
    bits = torch.arange(8, dtype=torch.uint8, device=raw.device).view(8, 1)
    fifth = ((raw[:, 16:48].unsqueeze(1) >> bits) & 1) << 4
    return _k_blocks(raw, _k_nibbles(raw[:, 48:]) | fifth)


def _q6_k(raw: Tensor) -> Tensor:
    low = raw[:, :128].unflatten(1, (2, 64))
    high = raw[:, 128:192].unflatten(1, (2, 32))
    four = torch.cat([low & 15, low >> 4], -1).unflatten(-1, (4, 32))
    two = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    q = (four | (two << 4)).flatten(1).unflatten(1, (16, 16)).float() - 32
    scales = raw[:, 192:208].contiguous().view(torch.int8).float() * _halves(raw, 208)
    numbers: Tensor = (q * scales.unsqueeze(-1)).flatten(1)
    return numbers


# For each type: bytes of a block, numbers in it, and its decoder from [B, bytes] to [B, numbers].
BLOCKS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (*STORED["Q4_0"], _q4_0),
    "Q4_1": (*STORED["Q4_1"], _q4_1),
    "Q5_0": (*STORED["Q5_0"], _q5_0),
    "Q5_1": (*STORED["Q5_1"], _q5_1),
    "Q8_0": (*STORED["Q8_0"], _q8_0),
    "Q4_K": (*STORED["Q4_K"], _q4_k),
    "Q5_K": (*STORED["Q5_K"], _q5_k),
    "Q6_K": (*STORED["Q6_K"], _q6_k),
}
# Where the float16 scales of a block lie, and how many there are.
SCALES = {
    "Q4_0": (0, 1), "Q4_1": (0, 2), "Q5_0": (0, 1), "Q5_1": (0, 2), "Q8_0": (0, 1),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1),
}  # fmt: skip
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Blocks decoded at once: what is alive between input and output stays in the cache.
CHUNK = 16_384


def dequantise(raw: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The numbers stored in `raw` as a float32 tensor of this shape. Errors as `stored`."""
    return stored(raw, dtype, shape).float()


def stored(raw: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The numbers in `raw` in this shape: plain ones of up to 32 bits as they lie there, others as float32.

    Raises BaseError for a type that is not known or bytes that do not fill the shape.
    """
    if dtype in PLAIN:
        wanted = math.prod(shape) * PLAIN[dtype].itemsize
        if raw.nbytes != wanted:
            raise BaseError(
                f"{raw.nbytes:,} bytes of {dtype} do not fill {list(shape)} ({wanted:,} wanted)"
            )
        numbers = torch.from_numpy(raw).view(PLAIN[dtype]).view(shape)
        return numbers.float() if dtype == "F64" else numbers
    if dtype not in BLOCKS:
        raise BaseError(f"weights of the type {dtype} cannot be read", fix=f"Known: {', '.join(BLOCKS)}.")
    size, elements, _ = BLOCKS[dtype]
    if raw.nbytes % size:
        raise BaseError(f"{raw.nbytes:,} bytes are not whole {dtype} blocks of {size} bytes")
    row = shape[-1] if shape else 1
    if row % elements or raw.nbytes // size * elements != math.prod(shape):
        raise BaseError(f"{raw.nbytes:,} bytes of {dtype} do not fill {list(shape)} in rows of {elements}")
    return decoded(torch.from_numpy(raw), dtype).view(shape)


def block_scales(raw: Tensor, dtype: str) -> Tensor:
    """The float16 scales and minimums of whole blocks [blocks, 1 or 2]."""
    start, count = SCALES[dtype]
    blocks = raw.view(-1, BLOCKS[dtype][0])
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16)


def decoded(raw: Tensor, dtype: str) -> Tensor:
    """Whole blocks, uint8, as float32 numbers [blocks, numbers of one]."""
    size, elements, decode = BLOCKS[dtype]
    blocks = raw.view(-1, size)
    numbers = torch.empty((blocks.shape[0], elements), dtype=torch.float32, device=raw.device)
    for start in range(0, blocks.shape[0], CHUNK):
        numbers[start : start + CHUNK] = decode(blocks[start : start + CHUNK])
    return numbers
