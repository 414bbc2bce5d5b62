"""The kernels for AMX, on a tile unit in plain C++: what they give where tiles do what the manual says.

The unit ends the process if it is used before it is configured, as the processor would.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest
import torch

from lorimer.kernels.native import library
from lorimer.kernels.native import matmul as native
from lorimer.kernels.native.build import CannotBuild, build
from product_cases import (
    BF16,
    FP32,
    Head,
    Product,
    check_head,
    check_product,
    drawn,
    head_inputs,
    same,
    within,
)


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if "avx512_bf16" not in library.available():
        pytest.skip("what is around the tiles needs AVX-512-BF16")
    # tests/kernels/sanitize.py preloads its runtime; then the unit's own reads are watched, too.
    sanitize = "libasan" in os.environ.get("LD_PRELOAD", "")
    try:
        path = build(tmp_path_factory.mktemp("tiles"), sanitize=sanitize, emulate_tiles=True)
    except CannotBuild as why:
        pytest.skip(str(why))
    kernels = ctypes.CDLL(str(path))
    library._share_threads(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_open", lambda: (kernels, ""))
        patch.setattr(library, "available", lambda: ("amx",))
        for kernel in (native._matmul, native._head_loss):
            patch.setattr(kernel, "_found", {})
        with library.using("amx"):
            yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_products_of_all_kinds(first: int) -> None:
    for seed in range(first, first + 20):
        case = drawn(seed, BF16)
        torch.set_num_threads(case.threads)
        check_product(case)
    check_product(drawn(first, FP32))


@pytest.mark.parametrize("rows", [9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65])
def test_rows_and_units_that_fill_no_tile(rows: int) -> None:
    for depth in (1, 2, 30, 31, 32, 33, 63, 64, 65):
        check_product(Product(rows, 33, depth, k2=depth % 7, dtype=BF16, bias=True, onto="out"))
        check_product(Product(rows, 31, depth, dtype=BF16, a_turned=True, out="turned"))
    check_product(Product(rows, 65, 5000, k2=16, dtype=BF16, spans=2, row_bytes=4096))


def test_each_thread_configures_its_tiles() -> None:
    for threads in (2, 3):
        torch.set_num_threads(threads)
        check_product(Product(33, 577, 65, k2=5, dtype=BF16))
        check_product(Product(577, 9, 130, k2=5, dtype=BF16))
        check_head(*head_inputs(Head(17, 33, 1001, BF16, scale=3.0)), smoothing=0.1)


@pytest.mark.parametrize("rows", [9, 17, 33])
@pytest.mark.parametrize("depth", [64, 65])
def test_a_row_depends_on_no_other(rows: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn((rows, depth), generator=generator).to(BF16)
    b = torch.randn((depth, 35), generator=generator).to(BF16)
    healthy = native.matmul(a, b)
    a[3, depth - 1] = float("nan")
    spoilt = native.matmul(within(a)[0], b)
    others = torch.arange(rows) != 3
    assert bool(spoilt[3].isnan().all())
    assert same(spoilt[others], healthy[others])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("m", [1, 15, 33, 193])
def test_losses_and_gradients(smoothing: float, m: int) -> None:
    for h, v in ((1, 2), (33, 129), (65, 1001)):
        check_head(*head_inputs(Head(m, h, v, BF16, seed=h, scale=3.0)), smoothing=smoothing)
    check_head(*head_inputs(Head(m, 33, 129, FP32)), smoothing=smoothing)


def test_logits_that_grow_along_the_vocabulary() -> None:
    hidden, head, labels = head_inputs(Head(5, 9, 3001, BF16))
    hidden[:, 0] = 1.0
    hidden[:, 1:] *= 0.1
    head[:, 0] = torch.arange(3001) / 3001 * 200
    check_head(hidden, head, labels)
