"""Numbers into four or eight bits in C++, to the bit as PyTorch's words in quant/nf4.py and quant/int8.py.

A stretch of a weight is taken in the type that it lies in, read once and never widened in memory. What is
not finite gives codes of no meaning, and a scale or maximum that is not finite.

Letters: N numbers, B blocks, O rows, I columns, C columns kept apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.kernels.native.library import REFERENCE, Kernel, active

_blocks = Kernel("quantise_blocks", "pill" + "pp" + "ppi")
_scales = Kernel("quantise_scales", "plfpppi")
_maxima = Kernel("column_maxima", "pillpi")
_rows = Kernel("quantise_int8", "pill" + "plp" + "ppi")

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def takes(numbers: Tensor) -> bool:
    """Whether the native kernels run here and take these numbers: fp32, bf16 or fp16 as they lie."""
    return (
        active() != REFERENCE
        and numbers.is_cpu
        and numbers.dtype in TYPES
        and numbers.is_contiguous()
        # A file's bytes may lie anywhere.
        and numbers.data_ptr() % numbers.element_size() == 0
    )


def _check(tensor: Tensor, dtype: torch.dtype, numbers: int, what: str) -> None:
    # Otherwise memory would be read as what it is not.
    assert tensor.is_cpu, f"{what}: not in the memory of the CPU"
    assert tensor.is_contiguous(), f"{what}: in pieces"
    assert tensor.dtype == dtype, f"{what}: {tensor.dtype} where {dtype} belongs"
    assert tensor.numel() == numbers, f"{what}: {tensor.numel()} numbers where {numbers} belong"


def quantise_blocks(
    numbers_N: Tensor, borders: Tensor, order: Tensor, block_size: int, codes: Tensor, absmax_B: Tensor
) -> None:
    """Blocks of which the last may be short: into (N + 1) // 2 bytes and a float32 scale each.

    `borders` are the 15 midpoints between the values in ascending order, `order` the 16 codes of what lies
    between them. The first number of a pair goes into a byte's high half.
    """
    count = numbers_N.numel()
    assert takes(numbers_N), "numbers that are not taken"
    assert block_size > 0, "blocks of no numbers"
    assert block_size % 2 == 0, "a byte across two blocks"
    _check(borders, torch.float32, 15, "borders")
    _check(order, torch.uint8, 16, "order")
    _check(codes, torch.uint8, (count + 1) // 2, "codes")
    _check(absmax_B, torch.float32, -(-count // block_size), "scales")
    kind = TYPES[numbers_N.dtype]
    _blocks(
        *(numbers_N, kind, count, block_size),
        *(borders, order),
        *(codes, absmax_B, torch.get_num_threads()),
    )


def quantise_scales(
    scales_N: Tensor, offset: float, nearest: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Finite float32 scales, less `offset`, as 8-bit codes, and each block's float32 scale.

    `nearest` is the code of each of 65,536 places from -1 to 1; `block_size` must be 256.
    """
    assert block_size == 256, "nested blocks of another size"
    count = scales_N.numel()
    _check(scales_N, torch.float32, count, "scales")
    _check(nearest, torch.uint8, 1 << 16, "places")
    codes, largest = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // block_size))
    _scales(scales_N, count, offset, nearest, codes, largest, torch.get_num_threads())
    return codes, largest


def column_maxima(numbers_OI: Tensor, largest_I: Tensor) -> None:
    """Raise each of `largest_I`, float32, to the largest magnitude of its column."""
    rows, columns = numbers_OI.shape
    assert takes(numbers_OI), "numbers that are not taken"
    _check(largest_I, torch.float32, columns, "maxima")
    _maxima(numbers_OI, TYPES[numbers_OI.dtype], rows, columns, largest_I, torch.get_num_threads())


def quantise_int8(
    numbers_OI: Tensor, wild_C: Tensor, outliers_OC: Tensor, scales_O: Tensor, codes_OI: Tensor
) -> None:
    """Rows as int8 codes and a float32 scale each; the columns `wild_C`, int64, go to bf16 outliers."""
    rows, columns = numbers_OI.shape
    wild = wild_C.numel()
    assert takes(numbers_OI), "numbers that are not taken"
    _check(wild_C, torch.int64, wild, "columns")
    assert bool(((wild_C >= 0) & (wild_C < columns)).all()), "a column outside the weight"
    _check(outliers_OC, torch.bfloat16, rows * wild, "outliers")
    _check(scales_O, torch.float32, rows, "scales")
    _check(codes_OI, torch.int8, rows * columns, "codes")
    _rows(
        *(numbers_OI, TYPES[numbers_OI.dtype], rows, columns),
        *(wild_C, wild, outliers_OC),
        *(scales_O, codes_OI, torch.get_num_threads()),
    )
