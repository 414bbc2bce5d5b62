"""Numbers into the block types of GGUF files: the inverse of gguf_blocks.py, which draws the layouts.

The types of 32 numbers are those of ggml's reference, bit for bit: the scale is the largest number, or
the range, over the largest code. The K types choose each group's scale (and minimum) by weighted least
squares: codes are made for about 20 scales near the plain one, the best line through them is solved
for, and the one with the least error stays. Large numbers weigh more, since they move the product more.

Letters: B blocks, G groups of 16 or 32 numbers within the blocks, N numbers of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorimer.errors import UserError
from lorimer.quant.gguf_blocks import BLOCKS, PLAIN

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
# Numbers encoded at once: what the search for scales touches stays in the cache.
CHUNK = 131_072
# The largest number that a float16, and so a block's scale, can hold.
LARGEST = 65_504.0


def encoded_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor of this shape in this type; its rows must be whole blocks."""
    numbers = 1
    for size in shape:
        numbers *= size
    if dtype in PLAIN:
        return numbers * PLAIN[dtype].itemsize
    size, elements, _ = BLOCKS[dtype]
    return numbers // elements * size


def encode(values: Tensor, dtype: str) -> Bytes:
    """A float32 tensor as the bytes of a GGUF type, row after row.

    Raises UserError for a type that cannot be written, rows that are not whole blocks, or numbers that
    are not finite or too large for the type's float16 scales.
    """
    if dtype not in PLAIN and dtype not in ENCODERS:
        raise UserError(f"the type {dtype} cannot be written", fix=f"Known: {', '.join(ENCODERS)}.")
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not np.isfinite(largest) or (largest > LARGEST and dtype not in ("F32", "BF16")):
        raise UserError(f"a weight is {largest:g}, which {dtype} cannot hold")
    if dtype in PLAIN:
        return _bytes(values.to(PLAIN[dtype]).contiguous().flatten())
    size, elements, _ = BLOCKS[dtype]
    if not values.shape or values.shape[-1] % elements:
        raise UserError(f"rows of {list(values.shape)} are not whole {dtype} blocks of {elements}")
    blocks = values.contiguous().view(-1, elements)
    out = np.empty((blocks.shape[0], size), np.uint8)
    step = CHUNK // elements
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = ENCODERS[dtype](blocks[start : start + step])
    return out.reshape(-1)


def _bytes(values: Tensor) -> Bytes:
    raw = values.view(torch.uint8)
    return np.frombuffer(raw.numpy(), np.uint8).reshape(raw.shape)


def _halves(values: Floats) -> Bytes:
    """[B, 1] float32 -> the two bytes of each as float16."""
    return values.astype(np.float16).view(np.uint8)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where that is not finite: such a block is stored as zeros anyhow."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: Floats = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _two_halves(codes: Bytes) -> Bytes:
    """[B, 32] codes -> [B, 16]: number j in the low half of byte j, 16 + j in the high one."""
    return (codes[:, :16] & np.uint8(15)) | (codes[:, 16:] << np.uint8(4))


def _fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=-1, bitorder="little")


def _signed(x: Floats, most: int) -> tuple[Floats, Bytes]:
    """Scale and codes 0 to 2 most - 1 about the middle; the largest number gets the code 0 exactly."""
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    scale: Floats = largest / np.float32(-most)
    codes = np.trunc(x * _inverse(scale) + np.float32(most + 0.5))
    return scale, codes.astype(np.uint8).clip(0, 2 * most - 1)


def _ranged(x: Floats, most: int) -> tuple[Floats, Floats, Bytes]:
    """Scale, minimum and codes 0 to most over the range of each block."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale: Floats = (high - low) / np.float32(most)
    codes = np.trunc((x - low) * _inverse(scale) + np.float32(0.5))
    return scale, low, codes.astype(np.uint8).clip(0, most)


def _q4_0(blocks: Tensor) -> Bytes:
    scale, codes = _signed(blocks.numpy(), 8)
    return np.concatenate([_halves(scale), _two_halves(codes)], -1)


def _q5_0(blocks: Tensor) -> Bytes:
    scale, codes = _signed(blocks.numpy(), 16)
    return np.concatenate([_halves(scale), _fifth_bits(codes), _two_halves(codes)], -1)


def _q4_1(blocks: Tensor) -> Bytes:
    scale, low, codes = _ranged(blocks.numpy(), 15)
    return np.concatenate([_halves(scale), _halves(low), _two_halves(codes)], -1)


def _q5_1(blocks: Tensor) -> Bytes:
    scale, low, codes = _ranged(blocks.numpy(), 31)
    return np.concatenate([_halves(scale), _halves(low), _fifth_bits(codes), _two_halves(codes)], -1)


def _q8_0(blocks: Tensor) -> Bytes:
    x = blocks.numpy()
    scale: Floats = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += size - whole >= 0.5  # halves go away from zero
    codes = np.copysign(whole, scaled).astype(np.int8)
    return np.concatenate([_halves(scale), codes.view(np.uint8)], -1)


def _fit_line(x_BGN: Tensor, most: int, offsets: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and minimum, both [B, G] and not negative, such that x is near scale * code - minimum."""
    x_NG = x_BGN.flatten(0, 1).t().contiguous()
    weight_NG = x_NG.abs() + x_NG.square().mean(0).sqrt()
    low_G = x_NG.amin(0).clamp_max_(0)
    # From its lowest number on, so that a narrow range far from zero loses no digits.
    y_NG = x_NG - low_G
    range_G = y_NG.amax(0)
    flat_G = range_G <= 0
    safe_G = range_G.masked_fill(flat_G, 1)
    weighted_NG = weight_NG * y_NG
    w_G, wy_G, wyy_G = weight_NG.sum(0), weighted_NG.sum(0), (weighted_NG * y_NG).sum(0)
    best_G, scale_G, shift_G = torch.full_like(low_G, torch.inf), range_G / most, torch.zeros_like(low_G)
    code_NG, product_NG = torch.empty_like(x_NG), torch.empty_like(x_NG)
    # A plain cut of the range comes first, then the lines through the codes of other scales.
    for number, offset in enumerate((0.0, *offsets)):
        # Codes begin at the best line's start so far, as in ggml: the search moves on from what it found.
        unit_G = (most + offset) / (safe_G - shift_G)
        torch.sub(y_NG, shift_G, out=code_NG).mul_(unit_G).round_().clamp_(0, most)
        wly_G = torch.mul(code_NG, weighted_NG, out=product_NG).sum(0)
        wl_G = torch.mul(code_NG, weight_NG, out=product_NG).sum(0)
        wll_G = product_NG.mul_(code_NG).sum(0)
        if number == 0:
            line_G, start_G = scale_G, shift_G
        else:
            line_G, start_G = _solve(w_G, wl_G, wll_G, wy_G, wly_G, low_G)
        error_G = line_G * (line_G * wll_G + 2 * (start_G * wl_G - wly_G)) + wyy_G
        error_G += start_G * (start_G * w_G - 2 * wy_G)
        better_G = error_G < best_G
        best_G = torch.where(better_G, error_G, best_G)
        scale_G = torch.where(better_G, line_G, scale_G)
        shift_G = torch.where(better_G, start_G, shift_G)
    scale_G = scale_G.clamp_min(0).masked_fill(flat_G, 0)
    minimum_G = -(shift_G + low_G).clamp_max(0)
    return scale_G.view(x_BGN.shape[:2]), minimum_G.view(x_BGN.shape[:2])


def _solve(
    w: Tensor, wl: Tensor, wll: Tensor, wy: Tensor, wly: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    """The line y = scale * code + start of least weighted squares; low + start may not be above 0."""
    determinant = w * wll - wl * wl
    usable = determinant > 0
    inverse = 1 / determinant.masked_fill(~usable, 1)
    scale, start = (w * wly - wy * wl) * inverse, (wll * wy - wl * wly) * inverse
    above = start + low > 0
    bounded = (wly + low * wl) / wll.clamp_min(torch.finfo(wll.dtype).tiny)
    scale, start = torch.where(above, bounded, scale), torch.where(above, -low, start)
    # Without a line the error must lose: a scale of infinity makes it infinite or NaN.
    return torch.where(usable, scale, torch.inf), start


def _k_block(blocks: Tensor, most: int, offsets: Sequence[float]) -> tuple[list[Bytes], Tensor]:
    """The head of a Q4_K or Q5_K block (two float16, 12 bytes of scales) and its codes [B, 8, 32]."""
    x_BGN = blocks.unflatten(1, (8, 32))
    scale_BG, minimum_BG = _fit_line(x_BGN, most, offsets)
    halves, sixes = [], []
    for value_BG in (scale_BG, minimum_BG):
        largest_B1 = value_BG.amax(1, keepdim=True)
        inverse_B1 = torch.where(largest_B1 > 0, 63 / largest_B1, 0)
        sixes.append((value_BG * inverse_B1).round_().clamp_(0, 63))
        halves.append((largest_B1 / 63).half())
    unit_BG1 = (halves[0].float() * sixes[0]).unsqueeze(-1)
    shift_BG1 = (halves[1].float() * sixes[1]).unsqueeze(-1)
    codes = ((x_BGN + shift_BG1) / unit_BG1.masked_fill(unit_BG1 == 0, 1)).round_().clamp_(0, most)
    codes = codes.masked_fill_(unit_BG1 == 0, 0).to(torch.uint8)
    scales, minimums = (six.to(torch.uint8) for six in sixes)
    packed = torch.cat(
        [
            scales[:, :4] | ((scales[:, 4:] >> 4) << 6),
            minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6),
            (scales[:, 4:] & 15) | ((minimums[:, 4:] & 15) << 4),
        ],
        -1,
    )
    return [half.view(torch.uint8).numpy() for half in halves] + [packed.numpy()], codes


def _k_nibbles(codes_BGN: Tensor) -> Bytes:
    pairs = codes_BGN.unflatten(1, (4, 2))
    return _bytes(((pairs[:, :, 0] & 15) | (pairs[:, :, 1] << 4)).flatten(1))


def _q4_k(blocks: Tensor) -> Bytes:
    head, codes = _k_block(blocks, 15, [step / 10 for step in range(-10, 11)])
    return np.concatenate([*head, _k_nibbles(codes)], -1)


def _q5_k(blocks: Tensor) -> Bytes:
    head, codes = _k_block(blocks, 31, [step / 10 for step in range(-5, 11)])
    places = torch.arange(8, dtype=torch.uint8).view(8, 1)
    fifth = ((codes >> 4) << places).sum(1, dtype=torch.uint8)
    return np.concatenate([*head, fifth.numpy(), _k_nibbles(codes)], -1)


def _fit_scale(x_BGN: Tensor, most: int) -> Tensor:
    """Signed scales [B, G] such that x is near scale * code, codes -most to most - 1."""
    x_NG = x_BGN.flatten(0, 1).t()
    largest_G = x_NG.gather(0, x_NG.abs().argmax(0, keepdim=True)).squeeze(0)
    # In units of the largest number, so that squares of small ones do not vanish.
    y_NG = (x_NG / largest_G.masked_fill(largest_G == 0, 1)).contiguous()
    weight_NG = y_NG.square()
    weighted_NG = weight_NG * y_NG
    best_G, scale_G = torch.full_like(largest_G, -1), torch.zeros_like(largest_G)
    code_NG, product_NG = torch.empty_like(y_NG), torch.empty_like(y_NG)
    for step in (0, *range(-9, 0), *range(1, 10)):
        torch.mul(y_NG, -(most + step / 10), out=code_NG).round_().clamp_(-most, most - 1)
        wly_G = torch.mul(code_NG, weighted_NG, out=product_NG).sum(0)
        wll_G = torch.mul(code_NG, weight_NG, out=product_NG).mul_(code_NG).sum(0)
        solved_G = wly_G / wll_G.clamp_min(torch.finfo(wll_G.dtype).tiny)
        gain_G = solved_G * wly_G
        scale_G = torch.where(gain_G > best_G, solved_G, scale_G)
        best_G = torch.maximum(best_G, gain_G)
    return (scale_G * largest_G).view(x_BGN.shape[:2])


def _q6_k(blocks: Tensor) -> Bytes:
    x_BGN = blocks.unflatten(1, (16, 16))
    scale_BG = _fit_scale(x_BGN, 32)
    largest_B1 = scale_BG.gather(1, scale_BG.abs().argmax(1, keepdim=True))
    d_B1 = (largest_B1 / -128).half()
    steps_BG = (scale_BG * (-128 / largest_B1.masked_fill(largest_B1 == 0, 1))).round_().clamp_(-128, 127)
    unit_BG1 = (d_B1.float() * steps_BG).unsqueeze(-1)
    codes = (
        (x_BGN / unit_BG1.masked_fill(unit_BG1 == 0, 1))
        .round_()
        .clamp_(-32, 31)
        .masked_fill_(unit_BG1 == 0, 0)
    )
    quarters = (codes + 32).to(torch.uint8).flatten(1).unflatten(1, (2, 4, 32))
    low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
    places = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    high = ((quarters >> 4) << places).sum(2, dtype=torch.uint8)
    parts = [
        low.flatten(1),
        high.flatten(1),
        steps_BG.to(torch.int8).view(torch.uint8),
        d_B1.view(torch.uint8),
    ]
    return torch.cat(parts, -1).numpy()


# For each type its encoder from [B, numbers] to [B, bytes].
ENCODERS: dict[str, Callable[[Tensor], Bytes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
