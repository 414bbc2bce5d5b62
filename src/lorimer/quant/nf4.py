"""NF4 and FP4: four bits a number and a scale for each block, with the bytes of bitsandbytes.

A block's scale is its largest magnitude; each number over the scale becomes the nearest of 16 values
(QLoRA, arXiv 2305.14314, section 3; the values of NF4 are quantiles of a normal distribution). With
double quantisation the scales, less their mean, are stored in 8 bits in blocks of 256. Ties, rounding
and a last block that is short are handled as bitsandbytes does on the CPU, bit for bit.

What is written here in PyTorch says what the native kernels do, and runs where they do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lorimer.kernels.codes import CODES
from lorimer.kernels.native import quantiser
from lorimer.quant.part import NESTED_BLOCK, Part, Rows, check_finite, inverse_of, whole

SMALLEST = 1e-38  # a block of zeros is divided by this instead
CHUNK = 1 << 20  # numbers that PyTorch quantises at once, a multiple of every block size


def table(kind: str) -> Tensor:
    """The 16 values of `nf4` or `fp4`, float32."""
    return CODES[kind]


@cache
def dynamic_table(*, signed: bool = True) -> Tensor:
    """The 256 values of the 8-bit dynamic type (arXiv 2110.02861, section 1.3), ascending, float32.

    Seven decades of magnitudes; each larger one has twice as many values, of either sign or, without
    signs, of one.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        means = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1) if signed else (1,):
            values += (sign * 10 ** (decade - 6) * means).tolist()
    return torch.tensor(sorted(values))


@cache
def _borders(kind: str) -> tuple[Tensor, Tensor]:
    """The values' midpoints in order, and the code of each interval between them."""
    values = table(kind)
    order = torch.argsort(values, stable=True)
    return (values[order[:-1]] + values[order[1:]]) / 2, order.to(torch.uint8)


def quantise(weight: Tensor, kind: str, block_size: int, *, double: bool) -> Part:
    """A weight [O, I] as NF4 or FP4. Raises NotFinite for NaN and infinity."""
    shape = (weight.shape[0], weight.shape[1])
    return quantise_rows(whole(weight), shape, kind, block_size, double=double)


def quantise_rows(rows: Rows, shape: tuple[int, int], kind: str, block_size: int, *, double: bool) -> Part:
    """The same of a weight that is given by stretches of rows."""
    count = shape[0] * shape[1]
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-count // block_size))
    start = 0
    for numbers in _whole_blocks(rows, block_size):
        stop = start + numbers.numel()
        packed = codes[start // 2 : (stop + 1) // 2]
        scales = absmax[start // block_size : -(-stop // block_size)]
        _quantise_blocks(numbers, kind, block_size, packed, scales)
        start = stop
    check_finite(absmax)
    if not double:
        return Part(kind, shape, codes, block_size, absmax)
    mean = absmax.mean()
    check_finite(mean)
    offset = float(mean)
    nested, scale = _scales_in_8_bits(absmax, offset)
    return Part(kind, shape, codes, block_size, nested, dynamic_table(), scale, offset)


def _whole_blocks(rows: Rows, block_size: int) -> Iterator[Tensor]:
    """The flattened numbers in stretches of whole blocks but for the last; only blocks that lie in two
    stretches are copied."""
    rest = torch.empty(0)
    for stretch in rows():
        flat = stretch.reshape(-1)
        if rest.numel():
            missing = block_size - rest.numel()
            rest, flat = torch.cat([rest, flat[:missing]]), flat[missing:]
            if rest.numel() < block_size:
                continue
            yield rest
        full = flat.numel() // block_size * block_size
        rest = flat[full:].clone()
        if full:
            yield flat[:full]
    if rest.numel():
        yield rest


def _quantise_blocks(numbers: Tensor, kind: str, block_size: int, codes: Tensor, absmax: Tensor) -> None:
    """Blocks of any type into (numbers + 1) // 2 bytes and a scale each."""
    if quantiser.takes(numbers):
        quantiser.quantise_blocks(numbers, *_borders(kind), block_size, codes, absmax)
        return
    for start in range(0, numbers.numel(), CHUNK):
        packed, scales = _quantise_chunk(numbers[start : start + CHUNK].float(), kind, block_size)
        codes[start // 2 : start // 2 + len(packed)] = packed
        absmax[start // block_size : start // block_size + len(scales)] = scales


def _quantise_chunk(numbers: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Whole blocks times their scale's inverse; a short last block over its scale."""
    full = numbers.numel() // block_size * block_size
    blocks, rest = numbers[:full].view(-1, block_size), numbers[full:]
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1)).clamp_(-1, 1).view(-1)
    if rest.numel():
        last = rest.abs().max().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (rest / last).clamp_(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    midpoints, order = _borders(kind)
    codes = order[torch.bucketize(scaled, midpoints, out_int32=True)]
    return (codes[::2] << 4) | codes[1::2], absmax


@cache
def _nearest_codes() -> Tensor:
    """The code of the value nearest to k / 32767.5 - 1, for k below 65,536."""
    values = dynamic_table()
    places = torch.arange(1 << 16) / 32767.5 - 1
    return torch.bucketize(places, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def _scales_in_8_bits(absmax: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Scales less their mean: codes, and the float32 scale of each block."""
    if quantiser.takes(absmax):
        return quantiser.quantise_scales(absmax, offset, _nearest_codes(), NESTED_BLOCK)
    return _quantise_scales(absmax - offset)


def _quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of the dynamic type and each block's float32 scale.

    A number is first rounded to one of 65,536 places, as bitsandbytes does to look its code up; so a
    few are not the nearest, and a zero is 1.5e-5. A block of zeros has the code 0.
    """
    blocks = torch.nn.functional.pad(scales, (0, -scales.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(-1)
    inverse = inverse_of(largest).unsqueeze(1)
    places = (blocks * inverse).add_(1).mul_(32767.5).add_(0.5).int()
    codes = torch.where(largest.unsqueeze(1) > 0, _nearest_codes()[places], 0)
    return codes.view(-1)[: scales.numel()].to(torch.uint8), largest


def numbers(part: Part, first: int, last: int) -> Tensor:
    """Rows first to last as float32 [rows, I]: value * scale, rounded once."""
    width, size = part.shape[1], part.block_size
    start, stop = first * width, last * width
    packed = part.data[start // 2 : (stop + 1) // 2]
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[start % 2 :][: stop - start]
    scales = part.scales(start // size, -(-stop // size)).repeat_interleave(size)
    values = table(part.kind).to(codes.device)[codes.int()]
    return values.mul_(scales[start % size :][: stop - start]).view(last - first, width)
