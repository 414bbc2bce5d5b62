"""GGUF's block types, bit for bit against the gguf package and against blocks worked out by hand."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorimer.errors import BaseError
from lorimer.quant.gguf_blocks import BLOCKS, CHUNK, dequantise

torch.set_num_threads(1)

PLAIN = ("F32", "F16", "BF16")
# Where the float16 scales (and minimums) of a block begin.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
# Zeros of both signs, subnormals, the largest, infinities.
EDGES = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00], np.uint16)


def sizes(dtype: str) -> tuple[int, int]:
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    return int(elements), int(size)


def random_blocks(dtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes; scales are finite, as in a real file."""
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (count, sizes(dtype)[1]), np.uint8)
    for start in HALVES.get(dtype, ()):
        halves = generator.standard_normal(count).astype("<f2")
        raw[:, start : start + 2] = halves.view(np.uint8).reshape(count, 2)
    return raw


def theirs(raw: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        decoded = gguf.quants.dequantize(raw, GGMLQuantizationType[dtype])
    return np.ascontiguousarray(decoded, np.float32)


def assert_same_bits(mine: torch.Tensor, wanted: np.ndarray) -> None:
    assert mine.dtype == torch.float32
    mine_bits, wanted_bits = mine.numpy().ravel().view(np.uint32), wanted.ravel().view(np.uint32)
    both_nan = np.isnan(mine.numpy().ravel()) & np.isnan(wanted.ravel())
    assert np.array_equal(mine_bits[~both_nan], wanted_bits[~both_nan])


@pytest.mark.parametrize("dtype", BLOCKS)
def test_random_blocks_equal_the_gguf_package(dtype: str) -> None:
    elements, _ = sizes(dtype)
    raw = random_blocks(dtype, 7 * 12)
    decoded = dequantise(raw.reshape(-1), dtype, (7, 12 * elements))
    assert decoded.shape == (7, 12 * elements)
    assert_same_bits(decoded, theirs(raw, dtype))


@pytest.mark.parametrize("dtype", BLOCKS)
def test_edge_values_equal_the_gguf_package(dtype: str) -> None:
    """Every pair of edge scale and minimum, over bytes that are all zeros, all ones and mixed."""
    elements, size = sizes(dtype)
    rows = []
    for fill in (0x00, 0xFF, 0x80, 0x7F, 0x5A):
        for first in EDGES:
            for second in EDGES:
                row = np.full(size, fill, np.uint8)
                for start, half in zip(HALVES[dtype], (first, second), strict=False):
                    row[start : start + 2] = np.array([half], "<u2").view(np.uint8)
                rows.append(row)
    raw = np.stack(rows)
    decoded = dequantise(raw.reshape(-1), dtype, (len(rows), elements))
    assert_same_bits(decoded, theirs(raw, dtype))


@pytest.mark.parametrize("dtype", ["Q4_0", "Q6_K"])
def test_nothing_is_lost_where_a_chunk_ends(dtype: str) -> None:
    elements, _ = sizes(dtype)
    raw = random_blocks(dtype, CHUNK + 3)
    assert_same_bits(dequantise(raw.reshape(-1), dtype, (CHUNK + 3, elements)), theirs(raw, dtype))


@pytest.mark.parametrize("dtype", PLAIN)
def test_plain_types_equal_the_gguf_package_wherever_their_bytes_begin(dtype: str) -> None:
    generator = np.random.default_rng(1)
    size = sizes(dtype)[1]
    raw = generator.integers(0, 256, 1 + 6 * 5 * size, np.uint8)
    for start in (0, 1):
        part = raw[start : start + 6 * 5 * size]
        assert_same_bits(dequantise(part, dtype, (6, 5)), theirs(part.copy(), dtype))


# One block each, worked out from the layout at the top of gguf_blocks.py: d = 0.5 is 00 38, m = 1 is 00 3c.
HALF, ONE = bytes.fromhex("0038"), bytes.fromhex("003c")
BY_HAND = [
    ("Q4_0", HALF + b"\x73" * 16, 32, {0: -2.5, 15: -2.5, 16: -0.5, 31: -0.5}),
    ("Q4_1", HALF + ONE + b"\x73" * 16, 32, {0: 2.5, 15: 2.5, 16: 4.5, 31: 4.5}),
    # The fifth bits of numbers 1 and 16 only.
    ("Q5_0", HALF + bytes.fromhex("02000100") + b"\x73" * 16, 32, {0: -6.5, 1: 1.5, 16: 3.5, 17: -4.5}),
    ("Q5_1", HALF + ONE + bytes.fromhex("02000100") + b"\x73" * 16, 32, {0: 2.5, 1: 10.5, 16: 12.5}),
    ("Q8_0", HALF + bytes([0, 1, 127, 128, 255]) + bytes(27), 32, {0: 0, 1: 0.5, 2: 63.5, 3: -64, 4: -0.5}),
    # Group 0: scale 2, minimum 3; group 1: scale 1, minimum 0; the other groups nothing.
    ("Q4_K", HALF + ONE + bytes([2, 1, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]) + b"\x73" * 128, 256,
     {0: 0.0, 31: 0.0, 32: 3.5, 63: 3.5, 64: 0.0}),
    # Group 4: scale 1 + 16, put together from byte 8 and the top bits of byte 0.
    ("Q4_K", HALF + ONE + bytes([64, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]) + b"\x73" * 128, 256,
     {0: 0.0, 127: 0.0, 128: 25.5, 159: 25.5, 160: 0.0}),
    # Fifth bit of group 1 (bit 1) for all its numbers.
    ("Q5_K", HALF + ONE + bytes([2, 1, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]) + b"\x02" * 32 + b"\x73" * 128, 256,
     {0: 0.0, 32: 11.5, 63: 11.5, 64: 0.0}),
    # q = 3 | 2 << 4 = 35 up to number 63, 7 | 2 << 4 = 39 from there; scales 1, then -2 from there.
    ("Q6_K", b"\x73" * 128 + b"\xaa" * 64 + bytes([1, 1, 1, 1, 254, 254] + [0] * 10) + HALF, 256,
     {0: 1.5, 31: 1.5, 63: 1.5, 64: -7.0, 95: -7.0, 96: 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "block", "count", "wanted"), BY_HAND)
def test_blocks_worked_out_by_hand(dtype: str, block: bytes, count: int, wanted: dict[int, float]) -> None:
    numbers = dequantise(np.frombuffer(bytearray(block), np.uint8), dtype, (count,)).tolist()
    assert {place: numbers[place] for place in wanted} == wanted


def test_a_type_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(BaseError, match="IQ2_XXS cannot be read") as caught:
        dequantise(np.zeros(66, np.uint8), "IQ2_XXS", (256,))
    assert "Q4_K" in str(caught.value)


@pytest.mark.parametrize("dtype", BLOCKS)
def test_half_a_block_is_refused(dtype: str) -> None:
    elements, size = sizes(dtype)
    with pytest.raises(BaseError, match=f"not whole {dtype} blocks of {size} bytes"):
        dequantise(np.zeros(2 * size - 1, np.uint8), dtype, (2, elements))


# Bytes that do not fill the shape, and rows that end inside a block.
ODD = [
    ("Q4_0", 36, (32,)),
    ("Q4_0", 18, (2, 32)),
    ("Q8_0", 5 * 34, (4, 40)),
    ("Q6_K", 210, (8, 32)),
    ("F32", 24, (7,)),
    ("F16", 15, (7,)),
]


@pytest.mark.parametrize(("dtype", "size", "shape"), ODD)
def test_bytes_that_do_not_fit_the_shape_are_refused(dtype: str, size: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(BaseError, match=dtype):
        dequantise(np.zeros(size, np.uint8), dtype, shape)
