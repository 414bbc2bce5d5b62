"""The native quantiser: to the last bit what PyTorch's words of it give, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorimer.kernels.codes import CODES
from lorimer.kernels.native import library, quantiser
from lorimer.quant import int8, nf4
from lorimer.quant.part import NotFinite, Part

TYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["nf4", "fp4"]
SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
# Short and odd last blocks, rows across blocks, one number; the last has work for several threads.
SHAPES = [
    (1, 1),
    (1, 2),
    (1, 64),
    (3, 5),
    (7, 33),
    (5, 1000),
    (96, 576),
    (1, 4097),
    (300, 255),
    (301, 1031),
]


@pytest.fixture(params=library.available(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with library.using(request.param):
        yield request.param
    torch.set_num_threads(before)


def weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """With zeros, whole blocks of them, wild numbers, and magnitudes far apart."""
    draw = torch.Generator().manual_seed(seed + rows + columns)
    numbers = torch.randn((rows, columns), generator=draw) * 0.05
    flat = numbers.view(-1)
    flat[::7] *= 9
    flat[::11] = 0
    flat[100:400] = 0
    flat[500:600] *= 1e-4
    numbers[:, columns // 2] *= 30
    return numbers.to(dtype)


def equal(mine: Part, wanted: Part) -> None:
    for name in (
        "data",
        "absmax",
        "absmax_table",
        "absmax_scale",
        "row_scale",
        "outlier_columns",
        "outliers",
    ):
        left, right = getattr(mine, name), getattr(wanted, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), name
    assert mine.absmax_offset == wanted.absmax_offset


def both_four_bits(given: Tensor, kind: str, size: int, *, double: bool = False) -> Part:
    """The native result, which is the twin's to the last bit."""
    assert quantiser.takes(given)
    mine = nf4.quantise(given, kind, size, double=double)
    with library.using(library.REFERENCE):
        assert not quantiser.takes(given)
        equal(mine, nf4.quantise(given, kind, size, double=double))
    return mine


def both_int8(given: Tensor) -> Part:
    assert quantiser.takes(given)
    mine = int8.quantise(given)
    with library.using(library.REFERENCE):
        equal(mine, int8.quantise(given))
    return mine


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_four_bits_are_those_of_pytorch(kind: str, size: int, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES:
        both_four_bits(weight(rows, columns, dtype), kind, size)


@pytest.mark.parametrize("size", [2, 6, 30, 34, 100, 4094])
def test_blocks_of_any_even_size(size: int) -> None:
    for kind in KINDS:
        given = weight(37, 1021, torch.float32).view(-1)
        codes, absmax = (
            torch.empty((len(given) + 1) // 2, dtype=torch.uint8),
            torch.empty(-(-len(given) // size)),
        )
        quantiser.quantise_blocks(given, *nf4._borders(kind), size, codes, absmax)
        wanted_codes, wanted_absmax = nf4._quantise_chunk(given, kind, size)
        assert torch.equal(codes, wanted_codes)
        assert torch.equal(absmax, wanted_absmax)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, threads: int) -> None:
    given = weight(301, 1031, dtype)
    wanted = nf4.quantise(given, "nf4", 64, double=False), int8.quantise(given)
    scales = torch.rand(200_001)
    nested = quantiser.quantise_scales(scales, 0.5, nf4._nearest_codes(), 256)
    torch.set_num_threads(threads)
    equal(nf4.quantise(given, "nf4", 64, double=False), wanted[0])
    equal(int8.quantise(given), wanted[1])
    for left, right in zip(
        quantiser.quantise_scales(scales, 0.5, nf4._nearest_codes(), 256), nested, strict=True
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_at_a_border_and_beside_it(kind: str) -> None:
    borders, _ = nf4._borders(kind)
    up, down = torch.full_like(borders, 2.0), torch.full_like(borders, -2.0)
    near = [borders, torch.nextafter(borders, up), torch.nextafter(borders, down), CODES[kind]]
    numbers = torch.cat([torch.ones(1), *near, torch.tensor([-0.0, 0.0])])
    given = torch.nn.functional.pad(numbers, (0, 64 - numbers.numel())).view(1, 64)
    both_four_bits(given, kind, 64)
    # Over the scale, not times its inverse: a last block that is short.
    for scale in (3.0, 0.7, 1e-20):
        both_four_bits(given[:, :63].contiguous() * scale, kind, 64)
        both_four_bits(given * scale, kind, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    """Finite ones in fours with a larger one, so that each has codes of its own; and their magnitudes."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    finite = every[torch.isfinite(every)]
    largest = torch.finfo(dtype).max
    for factor in (1.0, 0.25):
        beside = (finite.float().abs() * 2 * factor).clamp(max=largest).to(dtype)
        given = torch.stack([finite, beside, (finite.float() * factor).to(dtype), -finite], 1)
        both_four_bits(given, "nf4", 64)
        both_four_bits(given.flatten().repeat_interleave(16).view(-1, 64), "fp4", 64)
        both_int8(given)
    maxima = torch.zeros(every.numel())
    quantiser.column_maxima(every.view(1, -1), maxima)
    wanted = every.float().abs()
    assert torch.equal(maxima.isnan(), wanted.isnan())
    assert torch.equal(maxima.nan_to_num(-1), wanted.nan_to_num(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_denormals(kind: str) -> None:
    smallest = 2.0**-149
    for scale in (0.0, smallest, 50 * smallest, 1e-39, 5e-39, 1e-38, 2e-38, 1e-30):
        for columns in (64, 100, 128, 99):
            given = torch.linspace(-1, 1, 3 * columns).view(3, columns) * scale
            part = both_four_bits(given, kind, 64)
            both_four_bits(given, kind, 64, double=True)
            assert float(nf4.numbers(part, 0, 3).abs().max()) <= 1.01 * max(scale, 1e-38)
            eight = both_int8(given)
            assert float(int8.numbers(eight, 0, 3).abs().max()) <= 1.01 * scale + smallest


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_numbers_do_not_overflow(kind: str) -> None:
    given = torch.linspace(-1, 1, 640).view(2, 320) * torch.finfo(torch.float32).max
    part = both_four_bits(given, kind, 64)
    assert bool(torch.isfinite(nf4.numbers(part, 0, 2)).all())
    both_int8(given)
    with pytest.raises(NotFinite):  # their mean does
        nf4.quantise(given.sign() * given.abs().max(), kind, 64, double=True)


@pytest.mark.parametrize("kind", KINDS)
def test_each_code_is_the_nearest_in_float64(kind: str) -> None:
    given = weight(40, 512, torch.float32)
    part = nf4.quantise(given, kind, 64, double=False)
    assert part.absmax is not None
    codes = torch.stack([part.data >> 4, part.data & 15], 1).view(-1, 64)
    blocks, scales = given.double().view(-1, 64), part.absmax.double().unsqueeze(1)
    assert torch.equal(scales, blocks.abs().amax(1, keepdim=True))
    apart = (blocks.unsqueeze(2) - CODES[kind].double() * scales.unsqueeze(2)).abs()
    chosen = apart.gather(2, codes.long().unsqueeze(2)).squeeze(2)
    assert bool((chosen <= apart.amin(2) + 2.0**-23 * scales).all())


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 5000, 150_001])
def test_nested_scales(count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    scales = torch.rand(count, generator=draw)
    scales[300:900] = 0.25
    for offset in (0.0, 0.25, float(scales.mean()), 3.0):
        codes, largest = quantiser.quantise_scales(scales, offset, nf4._nearest_codes(), 256)
        wanted = nf4._quantise_scales(scales - offset)
        assert torch.equal(codes, wanted[0])
        assert torch.equal(largest, wanted[1])


def test_nested_scales_at_every_place_and_of_any_size() -> None:
    places = (torch.arange(1 << 16) / 32767.5 - 1).view(-1, 128)
    given = torch.cat([torch.ones(512, 1), places, torch.zeros(512, 127)], 1).flatten()
    for scale in (1.0, 0.3, 1e-30, 1e-38, 2e-39, 1e-44):
        codes, largest = quantiser.quantise_scales(given * scale, 0.0, nf4._nearest_codes(), 256)
        wanted = nf4._quantise_scales(given * scale)
        assert torch.equal(codes, wanted[0])
        assert torch.equal(largest, wanted[1])


@pytest.mark.parametrize("size", [64, 1024])
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("dtype", TYPES)
def test_stretches_that_end_anywhere_in_a_block(dtype: torch.dtype, rows: int, size: int) -> None:
    given = weight(301, 101, dtype)
    wanted = nf4.quantise(given, "nf4", size, double=True)
    found = nf4.quantise_rows(lambda: iter(given.split(rows)), (301, 101), "nf4", size, double=True)
    equal(found, wanted)
    found = int8.quantise_rows(lambda: iter(given.split(rows)), (301, 101))
    equal(found, int8.quantise(given))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 64), (9, 200), (3, 9000)])
def test_int8_is_that_of_pytorch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    part = both_int8(weight(*shape, dtype))
    assert (part.outliers is None) == (shape[1] < 64)
    both_int8(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))


def test_int8_is_within_half_a_step_in_float64() -> None:
    given = weight(60, 400, torch.float32)
    part = int8.quantise(given)
    assert part.row_scale is not None
    assert part.outlier_columns is not None
    rest = torch.ones(400, dtype=torch.bool)
    rest[part.outlier_columns] = False
    codes, scales = part.data.view(torch.int8).double(), part.row_scale.double().unsqueeze(1)
    error = (codes * scales - given.double()).abs()[:, rest]
    assert bool((error <= (0.5 + 2.0**-15) * scales).all())
    assert bool((part.data.view(torch.int8)[:, part.outlier_columns] == 0).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_wherever_it_is(wrong: float, dtype: torch.dtype) -> None:
    for place in (0, 17, 63, 64, 100 * 33 - 37, 100 * 33 - 1):
        given = weight(100, 33, dtype)
        given.view(-1)[place] = wrong
        for double in (False, True):
            with pytest.raises(NotFinite):
                nf4.quantise(given, "nf4", 64, double=double)
        with pytest.raises(NotFinite):
            int8.quantise(given)


def test_what_the_kernels_do_not_take_runs_in_pytorch() -> None:
    given = weight(40, 200, torch.float32)
    wanted = nf4.quantise(given, "nf4", 64, double=True), int8.quantise(given)
    turned, wide = given.t().contiguous().t(), given.double()
    bytes_at_odd = torch.empty(given.nbytes + 1, dtype=torch.uint8)[1:]
    bytes_at_odd.copy_(given.view(torch.uint8).view(-1))
    odd = torch.from_numpy(bytes_at_odd.numpy()).view(torch.float32).view(40, 200)
    for other in (turned, wide, odd):
        assert not quantiser.takes(other)
        equal(int8.quantise(other), wanted[1])
    equal(nf4.quantise(wide, "nf4", 64, double=True), wanted[0])
    equal(nf4.quantise(odd, "nf4", 64, double=True), wanted[0])
    assert not quantiser.takes(torch.empty(4, device="meta"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": torch.empty(31, dtype=torch.uint8)},
        {"codes": torch.empty(32, dtype=torch.int8)},
        {"absmax_B": torch.empty(2)},
        {"absmax_B": torch.empty(1, dtype=torch.float64)},
        {"borders": torch.empty(16)},
        {"order": torch.empty(15, dtype=torch.uint8)},
        {"block_size": 63},
        {"block_size": 0},
        {"numbers_N": torch.empty(64, dtype=torch.float64)},
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_touched(wrong: dict[str, object]) -> None:
    borders, order = nf4._borders("nf4")
    right = {
        "numbers_N": torch.ones(64), "borders": borders, "order": order, "block_size": 64,
        "codes": torch.empty(32, dtype=torch.uint8), "absmax_B": torch.empty(1),
    }  # fmt: skip
    quantiser.quantise_blocks(**right)
    with pytest.raises(AssertionError):
        quantiser.quantise_blocks(**right | wrong)


def test_columns_outside_the_weight_are_refused() -> None:
    rest = torch.empty(2, 1, dtype=torch.bfloat16), torch.empty(2), torch.empty(2, 8, dtype=torch.int8)
    for column in (-1, 8):
        with pytest.raises(AssertionError, match="outside"):
            quantiser.quantise_int8(torch.ones(2, 8), torch.tensor([column]), *rest)
