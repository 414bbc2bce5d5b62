"""NF4 and FP4 against bitsandbytes' own functions on the CPU: the same bytes, the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lorimer.kernels.native import library
from lorimer.quant import nf4
from lorimer.quant.part import Part

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(params=[library.REFERENCE, *library.available()[-1:]], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.using(request.param):
        yield


SHAPES = [
    (1, 1),
    (1, 64),
    (3, 5),
    (7, 33),
    (64, 64),
    (5, 1000),
    (96, 576),
    (1, 4097),
    (300, 255),
    (2, 65536),
]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] + shape[1])) * 0.05
    numbers.view(-1)[::7] *= 9
    numbers.view(-1)[::11] = 0
    return numbers.to(dtype)


def theirs(given: torch.Tensor, kind: str, size: int, double: bool):
    return functional.quantize_4bit(given, blocksize=size, compress_statistics=double, quant_type=kind)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_type_is_that_of_bitsandbytes(signed: bool) -> None:
    assert torch.equal(nf4.dynamic_table(signed=signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.trap(57)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_bitsandbytes(kind: str, size: int, shape: tuple[int, int]) -> None:
    given = weight(shape)
    data, state = theirs(given, kind, size, double=False)
    part = nf4.quantise(given, kind, size, double=False)
    assert torch.equal(part.data, data.flatten())
    assert torch.equal(part.absmax, state.absmax)
    numbers = nf4.numbers(part, 0, shape[0])
    values = torch.stack([part.data >> 4, part.data & 15], 1).flatten()[: given.numel()]
    scales = torch.tensor([float(part.absmax[n // size]) for n in range(given.numel())])
    assert torch.equal(numbers.flatten(), nf4.table(kind)[values.long()] * scales)
    # Its own CPU kernel takes a block for the row's where a block is longer than a row.
    if shape[1] % size == 0:
        assert torch.equal(numbers, functional.dequantize_4bit(data, state))


@pytest.mark.trap(57)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_quantised_again_are_those_of_bitsandbytes(
    kind: str, size: int, shape: tuple[int, int]
) -> None:
    given = weight(shape)
    data, state = theirs(given, kind, size, double=True)
    part = nf4.quantise(given, kind, size, double=True)
    assert torch.equal(part.data, data.flatten())
    assert torch.equal(part.absmax, state.absmax)
    assert torch.equal(part.absmax_scale, state.state2.absmax)
    assert torch.equal(part.absmax_table, state.state2.code)
    assert part.absmax_offset == float(state.offset)
    if shape[1] % size == 0:
        assert torch.equal(nf4.numbers(part, 0, shape[0]), functional.dequantize_4bit(data, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_widened_first(dtype: torch.dtype) -> None:
    given = weight((96, 576), dtype)
    data, state = theirs(given, "nf4", 64, double=True)
    part = nf4.quantise(given, "nf4", 64, double=True)
    assert torch.equal(part.data, data.flatten())
    assert torch.equal(part.absmax, state.absmax)


@pytest.mark.trap(57)
@pytest.mark.parametrize("shape", [(7, 33), (64, 64), (300, 255)])
def test_a_strip_of_rows_is_that_of_the_whole(shape: tuple[int, int]) -> None:
    part: Part = nf4.quantise(weight(shape), "nf4", 64, double=True)
    whole = nf4.numbers(part, 0, shape[0])
    for first, last in [(0, 1), (1, 2), (2, 7), (shape[0] - 1, shape[0])]:
        assert torch.equal(nf4.numbers(part, first, last), whole[first:last])


@pytest.mark.trap(57)
def test_numbers_beyond_two_to_the_31_are_those_that_lie_there() -> None:
    """The weight is zeros that no memory is taken for, but for its last row."""
    width, rows = 32_768, 65_537
    last = nf4.quantise(weight((1, width)), "nf4", 64, double=False)
    assert last.absmax is not None
    data = torch.from_numpy(np.zeros(rows * width // 2, np.uint8))
    absmax = torch.from_numpy(np.zeros(rows * width // 64, np.float32))
    data[-width // 2 :], absmax[-width // 64 :] = last.data, last.absmax
    part = Part("nf4", (rows, width), data, 64, absmax)
    assert torch.equal(nf4.numbers(part, rows - 1, rows), nf4.numbers(last, 0, 1))
    assert not nf4.numbers(part, 65_535, 65_536).any()


def test_every_value_comes_back_from_its_own_code() -> None:
    for kind in ("nf4", "fp4"):
        values = nf4.table(kind).repeat(4).view(1, 64)
        assert torch.equal(nf4.numbers(nf4.quantise(values, kind, 64, double=False), 0, 1), values)


def test_zeros_stay_zeros() -> None:
    for double in (False, True):
        part = nf4.quantise(torch.zeros(4, 100), "nf4", 64, double=double)
        assert torch.equal(nf4.numbers(part, 0, 4), torch.zeros(4, 100))


def test_scales_that_hardly_differ_are_their_mean() -> None:
    """Less their mean they are too small to have an inverse."""
    given = torch.linspace(-1, 1, 512).view(4, 128) * 1e-39
    part = nf4.quantise(given, "nf4", 64, double=True)
    assert float(nf4.numbers(part, 0, 4).abs().max()) < 2e-39


def test_every_place_of_the_8_bit_type_has_its_code() -> None:
    places = (torch.arange(1 << 16) / 32767.5 - 1).view(-1, 128)
    given = torch.cat([torch.ones(512, 1), places, torch.zeros(512, 127)], 1).flatten()
    expected, state = functional.quantize_blockwise(given, blocksize=256)
    codes, scales = nf4._scales_in_8_bits(given, 0.0)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, state.absmax)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_weight_in_stretches_gives_the_same_bytes(
    size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stretches end anywhere in a block."""
    given = weight((21, 101))
    wanted = nf4.quantise(given, "nf4", size, double=True)
    monkeypatch.setattr(nf4, "CHUNK", 512)
    found = nf4.quantise_rows(lambda: iter(given.split(rows)), (21, 101), "nf4", size, double=True)
    for name in ("data", "absmax", "absmax_scale"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert found.absmax_offset == wanted.absmax_offset
