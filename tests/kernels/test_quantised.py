"""Quantised weights: their numbers to the last bit, and products that are those of the dense weight."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorimer.errors import UserError
from lorimer.kernels import trace
from lorimer.kernels.codes import BLOCKS
from lorimer.kernels.native import library, quantised
from lorimer.kernels.native import matmul as dense
from lorimer.kernels.tape import Tape
from lorimer.quant import nf4, storage
from lorimer.quant.part import Part

FP32, BF16 = torch.float32, torch.bfloat16
TYPES = [FP32, BF16]
KINDS = ["nf4", "fp4", "nf4 double", "fp4 double", "int8", "int8 outliers", *BLOCKS]


@pytest.fixture(params=library.available(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with library.using(request.param):
        yield request.param
    torch.set_num_threads(before)


def four_bits(kind: str, rows: int, columns: int, block_size: int, double: bool, seed: int) -> Part:
    draw = torch.Generator().manual_seed(seed)
    numbers = rows * columns
    blocks = -(-numbers // block_size)
    part = Part(
        kind,
        (rows, columns),
        torch.randint(256, ((numbers + 1) // 2,), generator=draw, dtype=torch.uint8),
        block_size,
        torch.rand(blocks, generator=draw) + 0.1,
    )
    if not double:
        return part
    return dataclasses.replace(
        part,
        absmax=torch.randint(256, (blocks,), generator=draw, dtype=torch.uint8),
        absmax_table=torch.linspace(-1, 1, 256),
        absmax_scale=torch.rand(-(-blocks // 256), generator=draw) + 0.1,
        absmax_offset=0.3,
    )


def int8(rows: int, columns: int, outliers: torch.dtype | None, seed: int) -> Part:
    draw = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (rows, columns), generator=draw, dtype=torch.uint8)
    part = Part("int8", (rows, columns), data, row_scale=torch.rand(rows, generator=draw) / 127)
    if outliers is None:
        return part
    at = torch.arange(columns)[torch.rand(columns, generator=draw) < 0.1]
    data[:, at] = 0
    numbers = torch.randn((rows, len(at)), generator=draw).to(outliers)
    return dataclasses.replace(part, outlier_columns=at, outliers=numbers)


def gguf(kind: str, rows: int, columns: int, seed: int, halves: tuple[int, ...] | None = None) -> Part:
    """Random blocks; `halves`: where float16 numbers lie, to be made ordinary ones."""
    draw = torch.Generator().manual_seed(seed)
    size, numbers = BLOCKS[kind]
    blocks = rows * columns // numbers
    data = torch.randint(256, (blocks, size), generator=draw, dtype=torch.uint8)
    for at in halves or ():
        scales = torch.randn((blocks, 1), generator=draw).mul_(0.01).to(torch.float16)
        data[:, at : at + 2] = scales.view(torch.uint8)
    return Part(kind, (rows, columns), data.flatten())


HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def drawn(kind: str, rows: int, columns: int, *, seed: int = 0, block_size: int = 64) -> Part:
    if kind in BLOCKS:
        return gguf(kind, rows, max(1, columns // 256) * 256, seed, HALVES[kind])
    if kind.startswith("int8"):
        return int8(rows, columns, BF16 if kind.endswith("outliers") else None, seed)
    return four_bits(kind[:3], rows, columns, block_size, kind.endswith("double"), seed)


def numbers_of(part: Part) -> Tensor:
    """The numbers in float32, in PyTorch's words: [O, I]."""
    return storage.numbers(part, 0, part.shape[0])


def same(mine: Tensor, wanted: Tensor) -> bool:
    """To the last bit; a NaN is a NaN."""
    assert mine.dtype == wanted.dtype
    whole = torch.int32 if mine.dtype == FP32 else torch.int16
    equal = mine.view(whole) == wanted.view(whole)
    return bool((equal | (mine.isnan() & wanted.isnan())).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_pytorch(kind: str, dtype: torch.dtype) -> None:
    for rows, columns, block_size in (
        (1, 1, 64),
        (5, 67, 64),
        (3, 1300, 256),
        (7, 33, 4096),
        (70, 600, 64),
    ):
        part = drawn(kind, rows, columns, seed=rows, block_size=block_size)
        wanted = numbers_of(part).to(dtype)
        assert same(quantised.dequantise(part, 0, rows, dtype), wanted)
        assert same(quantised.dequantise(part, rows // 2, rows, dtype), wanted[rows // 2 :])
        ids = torch.tensor([rows - 1, 0, rows // 2, rows - 1])
        assert same(quantised.rows([part], ids, dtype), wanted[ids])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
def test_blocks_of_four_bits_may_cross_rows(kind: str, double: bool, block_size: int) -> None:
    weight = torch.randn((13, 1003), generator=torch.Generator().manual_seed(block_size))
    part = nf4.quantise(weight, kind, block_size, double=double)
    for dtype in TYPES:
        wanted = numbers_of(part).to(dtype)
        assert same(quantised.dequantise(part, 0, 13, dtype), wanted)
        assert same(quantised.rows([part], torch.tensor([12, 5, 0]), dtype), wanted[[12, 5, 0]])
        grad = torch.randn((40, 13)).to(dtype)
        mine = quantised.matmul(grad, [part], turned=False)
        assert same(mine, dense.matmul(grad, wanted))


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_blocks_of_any_bytes(kind: str) -> None:
    """Infinite, denormal and NaN scales too."""
    part = gguf(kind, 40, 512, seed=1)
    assert same(quantised.dequantise(part, 0, 40, FP32), numbers_of(part))


def test_every_half_is_the_float_it_stands_for() -> None:
    blocks = torch.zeros((65536, 34), dtype=torch.uint8)
    blocks[:, :2] = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2)
    blocks[:, 2] = 1
    part = Part("Q8_0", (65536, 32), blocks.flatten())
    assert same(quantised.dequantise(part, 0, 65536, FP32), numbers_of(part))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_weight(kind: str, turned: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(7)
    for tokens, rows, columns in ((1, 9, 67), (3, 70, 600), (9, 33, 65), (37, 131, 1300)):
        part = drawn(kind, rows, columns, seed=tokens)
        weight = numbers_of(part).to(dtype)
        outputs, inputs = weight.shape
        k, n = (inputs, outputs) if turned else (outputs, inputs)
        a = torch.randn((tokens, k), generator=draw).to(dtype)
        mine = quantised.matmul(a, [part], turned=turned, out=torch.empty(tokens, n))
        wide = weight.t() if turned else weight
        exact, size = a.double() @ wide.double(), a.double().abs() @ wide.double().abs()
        assert bool(((mine - exact).abs() <= k * 2.0**-23 * size + 1e-30).all())
        assert same(mine, dense.matmul(a, weight, b_turned=turned, out=torch.empty(tokens, n)))


def mixed(columns: int) -> list[Part]:
    return [
        drawn("nf4 double", 67, columns, seed=1),
        drawn("Q6_K", 40, columns, seed=2),
        int8(33, columns, FP32, seed=3),
        drawn("Q4_K", 129, columns, seed=4),
    ]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 21, 31, 32, 33, 300])
def test_parts_of_several_kinds_with_all_that_a_layer_adds(dtype: torch.dtype, tokens: int) -> None:
    """And any number of threads gives the same bits."""
    parts = mixed(768)
    weight = torch.cat([numbers_of(part) for part in parts]).to(dtype)
    draw = torch.Generator().manual_seed(tokens)
    outputs, inputs = weight.shape
    up, down = torch.zeros(outputs, 24), torch.randn((24, inputs), generator=draw).to(dtype)
    spans = torch.tensor([[0, 67, 0, 8], [107, 33, 8, 16]])
    for row, count, rank, ranks in spans.tolist():
        up[row : row + count, rank : rank + ranks] = torch.randn((count, ranks), generator=draw)
    up = up.to(dtype)
    a = torch.randn((tokens, inputs), generator=draw).to(dtype)
    a2 = torch.randn((tokens, 24), generator=draw).to(dtype)
    bias = torch.randn(outputs, generator=draw).to(dtype)
    onto = torch.randn((tokens, outputs), generator=draw).to(dtype)
    grad = torch.randn((tokens, outputs), generator=draw).to(dtype)
    forward = {"a2": a2, "b2": up, "b2_turned": True, "bias_N": bias, "onto": onto, "spans": spans}
    backward = {"a2": a2, "b2": down}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mine = quantised.matmul(a, parts, turned=True, **forward)
        assert same(mine, dense.matmul(a, weight, b_turned=True, **forward))
        mine = quantised.matmul(grad, quantised.Weight(parts), turned=False, **backward)
        assert same(mine, dense.matmul(grad, weight, **backward))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("depth", [2500, 4999])
def test_sums_that_are_carried_on(dtype: torch.dtype, depth: int) -> None:
    for turned in (False, True):
        shape = (40, depth) if turned else (depth, 40)
        part = four_bits("nf4", *shape, 64, True, seed=depth)
        a = torch.randn((17, depth), generator=torch.Generator().manual_seed(0)).to(dtype)
        mine = quantised.matmul(a, [part], turned=turned)
        assert same(mine, dense.matmul(a, numbers_of(part).to(dtype), b_turned=turned))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_loss_head(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    parts = mixed(256)
    head = torch.cat([numbers_of(part) for part in parts]).to(dtype)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn((31, 256), generator=draw).to(dtype)
    labels = torch.randint(head.shape[0], (31,), generator=draw)
    for smoothing in (0.0, 0.1):
        losses, grad = quantised.head_loss(hidden, parts, labels, weight=0.5, smoothing=smoothing)
        wanted, wanted_grad = dense.head_loss(hidden, head, labels, weight=0.5, smoothing=smoothing)
        assert same(losses, wanted)
        assert same(grad, wanted_grad)
    with pytest.raises(UserError, match="the head knows"):
        quantised.head_loss(hidden, parts, labels + head.shape[0], weight=1.0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_nan_scale_is_seen_in_its_outputs_alone(dtype: torch.dtype, tokens: int) -> None:
    part = four_bits("nf4", 40, 128, 64, False, seed=0)
    part.absmax[2 * 13] = math.nan
    output = quantised.matmul(torch.ones(tokens, 128, dtype=dtype), [part], turned=True)
    assert output.isnan().any(0).nonzero().flatten().tolist() == [13]
    assert bool(output[:, 13].isnan().all())


def test_a_tape_keeps_what_it_reads() -> None:
    """The weight's description and its bytes are alive after everyone else has let them go."""
    weight = quantised.Weight([nf4.quantise(torch.randn(70, 64), "nf4", 64, double=True)])
    wanted_weight, bytes_at = numbers_of(weight.parts[0]).to(BF16), weight.parts[0].data.data_ptr()
    holder = [weight]
    del weight
    tape, states = Tape(), torch.randn((2, 3, 64)).to(BF16)

    def step(states: Tensor) -> Tensor:
        return quantised.matmul(states, holder[0], turned=True)

    tape(step, states[0].clone())
    holder.clear()
    gc.collect()
    others = [torch.full((70 * 32,), 255, dtype=torch.uint8) for _ in range(50)]
    assert bytes_at not in [other.data_ptr() for other in others]
    assert same(tape(step, states[1]), dense.matmul(states[1], wanted_weight, b_turned=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": torch.zeros(31, dtype=torch.uint8)},
        {"data": torch.zeros(32, dtype=torch.int8)},
        {"data": torch.zeros(64, dtype=torch.uint8)[::2]},
        {"absmax": None},
        {"absmax": torch.ones(2)},
        {"absmax": torch.ones(1, dtype=torch.float64)},
        {"block_size": 0},
        {"absmax_table": torch.ones(256)},
        {"kind": "Q8_0"},
        {"kind": "int8"},
    ],
)
def test_parts_that_do_not_fit_are_refused_before_memory_is_touched(wrong: dict[str, object]) -> None:
    part = Part("nf4", (2, 32), torch.zeros(32, dtype=torch.uint8), 64, torch.ones(1))
    assert quantised.dequantise(part, 0, 2, FP32).shape == (2, 32)
    with pytest.raises(AssertionError):
        quantised.Weight([dataclasses.replace(part, **wrong)])


def test_rows_outside_the_weight_are_refused() -> None:
    part = drawn("nf4", 4, 64)
    for ids in ([-1], [0, 4]):
        with pytest.raises(IndexError, match="outside the 4"):
            quantised.rows([part], torch.tensor(ids), FP32)


def test_what_the_kernels_do_not_take() -> None:
    part = drawn("nf4", 4, 64)
    assert quantised.able([part], BF16)
    assert not quantised.able([part], torch.float16)
    assert not quantised.able([dataclasses.replace(part, kind="Q2_K")], BF16)
    with library.using(library.REFERENCE):
        assert not quantised.able([part], BF16)


def test_a_profile_knows_their_work() -> None:
    parts = [drawn("nf4", 64, 128), drawn("int8", 32, 128)]
    recorder = trace.start()
    try:
        quantised.matmul(torch.ones(10, 128), parts, turned=True)
        quantised.head_loss(torch.ones(10, 128), parts, torch.zeros(10, dtype=torch.int64), weight=1.0)
        quantised.dequantise(parts[0], 0, 64, FP32)
    finally:
        trace.stop()
    product, head, rows = (call.work for call in recorder.calls)
    assert product == trace.Work(
        "10 x 96 x 128", 2 * 10 * 96 * 128, 4 * 10 * (128 + 96) + 64 * 64 + 32 * 128
    )
    assert head.flops == 2 * product.flops
    assert rows.bytes == 64 * 128 * 4
