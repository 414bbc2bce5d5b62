"""Matrix products, for every instruction set here."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from lorimer.kernels.native import library
from lorimer.kernels.native.matmul import matmul
from product_cases import BF16, DEPTHS, FP32, SIZES, UNIT, Product, check_product, drawn, same, within

TYPES = [FP32, BF16]


@pytest.fixture(params=library.available(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with library.using(request.param):
        yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("first", range(0, 120, 20))
def test_products_of_all_kinds(dtype: torch.dtype, first: int) -> None:
    for seed in range(first, first + 20):
        case = drawn(seed, dtype)
        torch.set_num_threads(case.threads)
        check_product(case)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("b_turned", [False, True])
def test_each_size_of_each_side(dtype: torch.dtype, b_turned: bool) -> None:
    for size in SIZES:
        check_product(Product(size, 33, 17, k2=5, dtype=dtype, b_turned=b_turned, seed=size))
        check_product(Product(9, size, 17, k2=5, dtype=dtype, b_turned=b_turned, seed=size))
    for depth in DEPTHS:
        check_product(Product(15, 17, depth, k2=5, dtype=dtype, b_turned=b_turned, seed=depth))


@pytest.mark.parametrize("dtype", TYPES)
def test_sizes_at_which_the_work_is_divided(dtype: torch.dtype) -> None:
    # More panels than are packed at a time.
    check_product(Product(9, 2085, 3, k2=2, dtype=dtype, bias=True))
    check_product(Product(33, 2085, 3, dtype=dtype, b_turned=True, out="turned", alpha=3.0))
    # More rows than are copied at a time, with a last part of one row.
    check_product(Product(513, 7, 33, k2=3, dtype=dtype, a_turned=True, onto="out"))
    # A sum that is carried on, while spans leave some parts of it empty.
    check_product(Product(31, 130, 5000, dtype=dtype, spans=3, alpha=0.5, onto="apart"))
    check_product(Product(31, 130, 5000, k2=48, dtype=dtype, spans=3, bias=True))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        # By columns, by rows, and dot products of few rows.
        check_product(Product(33, 577, 33, k2=5, dtype=dtype, b_turned=True, threads=threads))
        check_product(Product(577, 9, 130, k2=5, dtype=dtype, threads=threads))
        check_product(Product(577, 9, 130, dtype=dtype, a_turned=True, out="turned", threads=threads))
        check_product(
            Product(7, 577, 130, k2=5, dtype=dtype, b_turned=True, b2_turned=True, threads=threads)
        )


@pytest.mark.parametrize("dtype", TYPES)
def test_an_empty_sum_is_zero(dtype: torch.dtype) -> None:
    for m in (1, 9, 33):
        for turned in (False, True):
            check_product(Product(m, 33, 0, dtype=dtype, b_turned=turned))
            check_product(Product(m, 33, 0, k2=5, dtype=dtype, b_turned=turned, b2_turned=True, bias=True))
            check_product(Product(m, 33, 0, dtype=dtype, a_turned=turned, onto="out", out="floats"))
    assert matmul(torch.empty(0, 5, dtype=dtype), torch.empty(5, 3, dtype=dtype)).shape == (0, 3)
    assert matmul(torch.empty(5, 3, dtype=dtype), torch.empty(3, 0, dtype=dtype)).shape == (5, 0)
    assert torch.equal(matmul(torch.empty(0, 2), torch.empty(0, 3), a_turned=True), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("depth", [7, 65, 577, 4999])
def test_rounding(dtype: torch.dtype, depth: int) -> None:
    """Random numbers: within one rounding and the square root of K steps in float32."""
    generator = torch.Generator().manual_seed(depth)
    for rows in (3, 33):
        a = torch.randn((rows, depth), generator=generator).to(dtype)
        b = torch.randn((33, depth), generator=generator).to(dtype)
        exact, size = a.double() @ b.double().t(), a.double().abs() @ b.double().abs().t()
        bound = (2 + math.sqrt(depth)) * 2.0**-24 * size
        wide = matmul(a, b, b_turned=True, out=torch.empty(rows, 33))
        assert bool(((wide.double() - exact).abs() <= bound + UNIT[FP32] * exact.abs()).all())
        # The same sums, rounded once to their type.
        assert same(matmul(a, b, b_turned=True), wide.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [2, 7, 9, 17, 33, 65])
@pytest.mark.parametrize("depth", [64, 65, 2049])
def test_a_row_depends_on_no_other(dtype: torch.dtype, rows: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn((rows, depth), generator=generator).to(dtype)
    b = torch.randn((35, depth), generator=generator).to(dtype)
    ill = torch.randint(rows, (), generator=generator)
    for turned in (False, True):
        b_lies = b if turned else b.t().contiguous()
        healthy = matmul(a, b_lies, b_turned=turned)
        spoilt = a.clone()
        spoilt[ill, depth - 1] = math.nan
        result = matmul(within(spoilt)[0], b_lies, b_turned=turned)
        assert bool(result[ill].isnan().all())
        others = torch.arange(rows) != ill
        assert same(result[others], healthy[others])
        # Nor a column on other columns.
        sick = b.clone()
        sick[13, 0] = math.nan
        sick = sick if turned else sick.t().contiguous()
        result = matmul(a, within(sick)[0], b_turned=turned)
        assert bool(result[:, 13].isnan().all())
        others = torch.arange(35) != 13
        assert same(result[:, others], healthy[:, others])


def test_infinity_and_nan_come_through() -> None:
    a = torch.tensor([[1.0, math.inf], [math.nan, 1.0], [1.0, 2.0]] * 4)
    b = torch.eye(2)[:, [0, 1, 1]]
    expected = a @ b
    for dtype in TYPES:
        mine = matmul(a.to(dtype), b.to(dtype)).float()
        torch.testing.assert_close(mine, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_bf16_results_are_rounded_to_even(dtype: torch.dtype) -> None:
    """1 + 2^-8 lies between two bf16 numbers, and so does 1 + 3 * 2^-8: both go to the even one."""
    for rows in (1, 9):
        a = torch.ones(rows, 2, dtype=BF16)
        b = torch.tensor([[1.0, 1.0], [2.0**-8, 3 * 2.0**-8]], dtype=BF16)
        for b_lies, turned in ((b, False), (b.t().contiguous(), True)):
            mine = matmul(a.to(dtype), b_lies.to(dtype), b_turned=turned).to(BF16)
            assert mine.tolist() == [[1.0, 1.015625]] * rows


@pytest.mark.parametrize("dtype", TYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((5, 1000, 300), (70, 1000, 300), (700, 9, 300)):
        a = torch.randn((m, k), generator=generator).to(dtype)
        b = torch.randn((n, k), generator=generator).to(dtype)
        one = matmul(a, b, b_turned=True)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert same(matmul(a, b, b_turned=True), one)
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"b": torch.zeros(4, 5)},
        {"b": torch.zeros(3, 5, dtype=BF16)},
        {"out": torch.zeros(2, 5, dtype=BF16)},
        {"out": torch.zeros(5, 2)},
        {"out": torch.zeros(5, 2).t()},
        {"onto": torch.zeros(2, 5, dtype=BF16)},
        {"onto": torch.zeros(1, 5)},
        {"bias_N": torch.zeros(5, dtype=BF16)},
        {"bias_N": torch.zeros(10)[::2]},
        {"a2": torch.zeros(2, 3)},
        {"a2": torch.zeros(3, 4), "b2": torch.zeros(4, 5)},
        {"a2": torch.zeros(2, 4), "b2": torch.zeros(3, 5)},
        {"out": torch.zeros(5, 2), "out_turned": True, "bias_N": torch.zeros(5)},
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_touched(wrong: dict[str, torch.Tensor]) -> None:
    given = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 5)} | wrong
    with pytest.raises(AssertionError):
        matmul(**given)
