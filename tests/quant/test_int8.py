"""Int8 rows: the error is bounded, wild columns are kept, the rest is not coarsened by them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorimer.kernels.native import library
from lorimer.quant import int8


@pytest.fixture(params=[library.REFERENCE, *library.available()[-1:]], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.using(request.param):
        yield


def weight(rows: int = 40, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def test_each_number_is_within_half_a_step_of_its_row() -> None:
    given = weight()
    part = int8.quantise(given)
    error = (int8.numbers(part, 0, 40) - given).abs()
    assert part.outliers is None
    assert bool((error <= given.abs().amax(1, keepdim=True) / 127 * 0.501).all())
    assert float(error.max()) > 0


def test_a_wild_column_is_kept_and_does_not_coarsen_the_others() -> None:
    given = weight()
    plain = (int8.numbers(int8.quantise(given), 0, 40) - given).abs().mean()
    given[:, 17] *= 100
    part = int8.quantise(given)
    assert part.outlier_columns is not None
    assert part.outlier_columns.tolist() == [17]
    rows = int8.numbers(part, 0, 40)
    assert torch.equal(rows[:, 17], given[:, 17].bfloat16().float())
    others = (rows - given).abs()[:, [i for i in range(256) if i != 17]]
    assert float(others.mean()) < 1.1 * float(plain)


def test_at_most_one_column_in_64_is_kept() -> None:
    given = weight()
    given[0, :20] = torch.arange(100.0, 120.0)
    part = int8.quantise(given)
    assert part.outlier_columns is not None
    assert part.outlier_columns.tolist() == [16, 17, 18, 19]


def test_a_row_of_zeros_and_a_strip() -> None:
    given = weight()
    given[3] = 0
    part = int8.quantise(given)
    whole = int8.numbers(part, 0, 40)
    assert torch.equal(whole[3], torch.zeros(256))
    assert torch.equal(int8.numbers(part, 2, 5), whole[2:5])


def test_a_row_whose_scale_has_no_inverse_is_zeros() -> None:
    given = weight()
    given[3] *= 1e-38
    part = int8.quantise(given)
    rows = int8.numbers(part, 0, 40)
    assert torch.equal(rows[3], torch.zeros(256))
    assert float((rows - given).abs().max()) < 0.01


def test_a_weight_in_stretches_gives_the_same_bytes() -> None:
    given = weight()
    given[:, 17] *= 100
    wanted = int8.quantise(given)
    found = int8.quantise_rows(lambda: iter(given.split(7)), (40, 256))
    for name in ("data", "row_scale", "outlier_columns", "outliers"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
