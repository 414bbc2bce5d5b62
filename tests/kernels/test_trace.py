"""The work of a kernel's call against counts by hand, and what a recorder notes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorimer
from lorimer.kernels import trace
from lorimer.kernels.native import attention, elementwise, library, quantised, quantiser
from lorimer.kernels.native.matmul import head_loss, matmul
from lorimer.kernels.trace import WORK, Recorder, visible_pairs
from lorimer.quant.part import Part

FP32, BF16 = torch.float32, torch.bfloat16
SOURCE = Path(lorimer.__file__).parent


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute nothing: what they are called with is all that counts here."""
    monkeypatch.setattr(library, "active", lambda: "nothing")
    monkeypatch.setattr(library.Kernel, "_find", lambda self, isa: lambda *values: None)


def noted(call: Callable[[], Any]) -> list[trace.Call]:
    recorder = trace.start()
    try:
        call()
    finally:
        trace.stop()
    return recorder.calls


def of(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def spans(*rows: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def pack(dtype: torch.dtype = FP32) -> tuple[Tensor, ...]:
    """Query, key, value of 6 tokens, 4 heads, 2 key/value heads of 16."""
    return of(6, 4, 16, dtype=dtype), of(6, 2, 16, dtype=dtype), of(6, 2, 16, dtype=dtype)


# A prefix of 2 that rows of 3 and 1 share: 1 + 2, then 3 + 4 + 5, then 3 keys.
OFFSETS = torch.tensor([2, 5, 6])
# Query and output of 6 x 4 x 16, key and value of 6 x 2 x 16, and a float for each token and head.
PACK_BYTES = 4 * (2 * 384 + 2 * 192) + 4 * 24


def stored(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


NF4 = Part("nf4", (3, 4), stored(6), 64, of(1))
INT8 = Part("int8", (2, 32), stored(2, 32), row_scale=of(2))
Q8_0 = Part("Q8_0", (3, 32), stored(3 * 34))

CASES: dict[str, tuple[Callable[[], Any], float, float]] = {
    "matmul": (lambda: matmul(of(3, 5), of(5, 7)), 2 * 3 * 5 * 7, 4 * (15 + 35 + 21)),
    "matmul of turned, with bias": (
        lambda: matmul(of(5, 3), of(7, 5), a_turned=True, b_turned=True, bias_N=of(7)),
        2 * 3 * 5 * 7,
        4 * (15 + 35 + 21 + 7),
    ),
    "matmul of bf16 onto floats": (
        lambda: matmul(of(3, 5, dtype=BF16), of(5, 7, dtype=BF16), onto=of(3, 7), out=of(3, 7)),
        2 * 3 * 5 * 7,
        2 * (15 + 35) + 4 * (21 + 21),
    ),
    "matmul with a second": (
        lambda: matmul(of(3, 5), of(5, 7), a2=of(3, 4), b2=of(4, 7)),
        2 * 3 * 7 * (5 + 4),
        4 * (15 + 35 + 12 + 28 + 21),
    ),
    # 3 columns of 2, then 4 of 2: 14 of the 28 numbers of b2.
    "matmul with a second in part": (
        lambda: matmul(
            *(of(3, 5), of(5, 7)), a2=of(3, 4), b2=of(4, 7), spans=spans((0, 3, 0, 2), (3, 4, 2, 2))
        ),
        2 * 3 * (35 + 14),
        4 * (15 + 35 + 12 + 14 + 21),
    ),
    # 3 columns of 2, then 4 of 3: 18 of the 35 numbers of b.
    "matmul in part": (
        lambda: matmul(of(3, 5), of(5, 7), spans=spans((0, 3, 0, 2), (3, 4, 2, 3))),
        2 * 3 * 18,
        4 * (15 + 18 + 21),
    ),
    "matmul added to a turned out": (
        lambda: matmul(of(5, 3), of(5, 7), a_turned=True, out=of(7, 3), out_turned=True),
        2 * 3 * 5 * 7,
        4 * (15 + 35 + 2 * 21),
    ),
    # Labels of 8 bytes and losses of 4, for each of 3 positions.
    "head_loss with a gradient": (
        lambda: head_loss(of(3, 5, dtype=BF16), of(11, 5, dtype=BF16), torch.zeros(3).long(), weight=1.0),
        4 * 3 * 5 * 11,
        2 * (15 + 55 + 15) + 3 * 12,
    ),
    "head_loss without": (
        lambda: head_loss(of(3, 5), of(11, 5), torch.zeros(3).long(), weight=1.0, need_grad=False),
        2 * 3 * 5 * 11,
        4 * (15 + 55) + 3 * 12,
    ),
    "attention_forward": (
        lambda: attention.forward(*pack(), OFFSETS, 2, scale=1.0),
        2 * 2 * 4 * 16 * 18,
        PACK_BYTES,
    ),
    # 1 + 2, then 2 + 2 + 2, then 2.
    "attention_forward in a window": (
        lambda: attention.forward(*pack(), OFFSETS, 2, scale=1.0, window=2),
        2 * 2 * 4 * 16 * 11,
        PACK_BYTES,
    ),
    "attention_backward": (
        lambda: attention.backward(of(6, 4, 16), *pack(), of(6, 4, 16), of(6, 4), OFFSETS, 2, scale=1.0),
        5 * 2 * 4 * 16 * 18,
        4 * (4 * 384 + 4 * 192) + 4 * 24,
    ),
    "attention_backward in a window": (
        lambda: attention.backward(
            *(of(6, 4, 16), *pack(), of(6, 4, 16), of(6, 4), OFFSETS, 2), scale=1.0, window=2
        ),
        5 * 2 * 4 * 16 * 11,
        4 * (4 * 384 + 4 * 192) + 4 * 24,
    ),
    # Of caches of 9 places, 3 and 1 are seen, each with a key and a value of 2 x 16.
    "attention_decode": (
        lambda: attention.decode(
            of(2, 4, 16), of(2, 2, 9, 16), of(2, 2, 9, 16), torch.tensor([3, 1]), scale=1.0
        ),
        2 * 2 * 4 * 16 * 4,
        4 * (2 * 128 + 2 * 32 * 4),
    ),
    "attention_decode in a window": (
        lambda: attention.decode(
            *(of(2, 4, 16), of(2, 2, 9, 16), of(2, 2, 9, 16), torch.tensor([3, 1])), scale=1.0, window=2
        ),
        2 * 2 * 4 * 16 * 3,
        4 * (2 * 128 + 2 * 32 * 3),
    ),
    # Two rows' keys and values of 2 x 16 move from one place to another.
    "cache_append": (
        lambda: attention.append(
            *(of(2, 2, 16), of(2, 2, 16), of(2, 2, 9, 16), of(2, 2, 9, 16), torch.tensor([3, 1]))
        ),
        0,
        2 * 4 * 2 * 64,
    ),
    "rms_norm": (lambda: elementwise.rms_norm(of(3, 5, dtype=BF16), of(5), 1e-5), 0, 2 * 30 + 4 * (3 + 5)),
    "rms_norm of heads": (
        lambda: elementwise.rms_norm(of(3, 2, 5), of(5), 1e-5),
        0,
        4 * (30 + 30) + 4 * (6 + 5),
    ),
    "rms_norm_apply": (
        lambda: elementwise.rms_norm_apply(of(3, 5), of(3, 1), of(5)),
        0,
        4 * (15 + 15) + 4 * (3 + 5),
    ),
    "rms_norm_backward": (
        lambda: elementwise.rms_norm_backward(of(3, 5), of(3, 5), of(3, 1), of(5), weight_grad=False),
        0,
        4 * (3 * 15 + 3 + 5),
    ),
    "rms_norm_backward with everything": (
        lambda: elementwise.rms_norm_backward(
            of(3, 5), of(3, 5, dtype=BF16), of(3, 1), of(5), weight_grad=True, onto_TH=of(3, 5, dtype=BF16)
        ),
        0,
        4 * (15 + 3 + 5 + 5) + 2 * (3 * 15),
    ),
    "rms_norm onto": (
        lambda: elementwise.rms_norm(of(3, 5), of(5), 1e-5, onto_TH=of(3, 5)),
        0,
        4 * (3 * 15 + 3 + 5),
    ),
    # 2 query rows and 1 key row of 4, then 4 features that are copied.
    "query_key_norm": (
        lambda: elementwise.query_key_norm(of(3, 16), (2, 4), (1, 4), (of(4), of(4)), 1e-5),
        0,
        4 * (2 * 48 + 3 * 3 + 8),
    ),
    "query_key_norm_backward": (
        lambda: elementwise.query_key_norm_backward(
            *(of(3, 16), of(3, 16), of(9), (2, 4), (1, 4), (of(4), of(4))), weight_grads=(True, False)
        ),
        0,
        4 * (3 * 48 + 9 + 8 + 4),
    ),
    "layer_norm": (
        lambda: elementwise.layer_norm(of(3, 5, dtype=BF16), of(5), of(5), 1e-5),
        0,
        2 * 30 + 4 * (6 + 10),
    ),
    "layer_norm_apply": (
        lambda: elementwise.layer_norm_apply(of(3, 5), of(3, 2), of(5), None),
        0,
        4 * (30 + 6 + 5),
    ),
    "layer_norm_backward": (
        lambda: elementwise.layer_norm_backward(of(3, 5), of(3, 5), of(3, 2), of(5), weight_grad=True),
        0,
        4 * (3 * 15 + 6 + 5 + 10),
    ),
    "rotate": (
        lambda: elementwise.rotate(of(3, 2, 8), of(3, 2), of(3, 2)),
        0,
        4 * (48 + 48 + 6 + 6),
    ),
    # 4 of 8 features turn.
    "rotate in place": (
        lambda: elementwise.rotate_in_place(of(3, 2, 8), of(3, 2), of(3, 2)),
        0,
        4 * (24 + 24 + 6 + 6),
    ),
    "gated": (lambda: elementwise.gated(of(3, 10, dtype=BF16), "silu"), 0, 2 * (30 + 15)),
    "gated_backward": (
        lambda: elementwise.gated_backward(of(3, 5), of(3, 10), "silu"),
        0,
        4 * (15 + 30 + 30),
    ),
    "gated_backward again": (
        lambda: elementwise.gated_backward(of(3, 5), of(3, 10), "silu", again=True),
        0,
        4 * (15 + 30 + 30 + 15),
    ),
    "activate": (lambda: elementwise.activate(of(3, 10, dtype=BF16), "relu"), 0, 2 * (30 + 30)),
    "activate_backward": (
        lambda: elementwise.activate_backward(of(3, 5), of(3, 5), "gelu"),
        0,
        4 * (15 + 15 + 15),
    ),
    "activate_backward again": (
        lambda: elementwise.activate_backward(of(3, 5), of(3, 5), "gelu", again=True),
        0,
        4 * 4 * 15,
    ),
    "add_scaled": (lambda: elementwise.add_scaled(of(3, 5), of(3, 5), 0.5), 0, 4 * 3 * 15),
    "add_scaled to nothing": (lambda: elementwise.add_scaled(None, of(3, 5), 0.5), 0, 4 * 2 * 15),
    "adamw": (
        lambda: elementwise.adamw(
            *(of(7), of(7), of(7), of(7)), step=1, decay_until=7, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8,
            weight_decay=0.0,
        ),
        0,
        4 * 7 * (4 + 4),
    ),
    "squared_norm": (lambda: elementwise.squared_norm(of(7)), 0, 4 * 7 + 8),
    "scaled_copies": (
        lambda: elementwise.ScaledCopies(
            [(of(2, 3), of(2, 3, dtype=BF16), 1.0), (of(4, 5), of(4, 5, dtype=BF16), 2.0)]
        ).refresh(),
        0,
        (6 + 20) * (4 + 2),
    ),
    # 3 rows of 4 numbers take 6 bytes of codes; with a second product of 2 ranks for all 3 outputs.
    "quantised_matmul": (
        lambda: quantised.matmul(of(5, 4), [NF4], turned=True, a2=of(5, 2), b2=of(3, 2), b2_turned=True),
        2 * 5 * 3 * (4 + 2),
        4 * (5 * (4 + 2) + 3 * 2 + 5 * 3) + 6,
    ),
    "quantised_matmul of int8 and blocks": (
        lambda: quantised.matmul(of(5, 5, dtype=BF16), [INT8, Q8_0], turned=False),
        2 * 5 * 5 * 32,
        2 * (5 * 5 + 5 * 32) + 2 * 32 + 3 * 34,
    ),
    "quantised_head_loss": (
        lambda: quantised.head_loss(of(2, 4), [NF4], torch.tensor([0, 2]), weight=0.5),
        2 * 2 * 2 * 4 * 3,
        4 * 4 * 2 * 2 + 6 + 12 * 2,
    ),
    "quantised_rows": (lambda: quantised.rows([NF4], torch.tensor([2, 0]), FP32), 0, 4 * 2 * 4),
    # 5 numbers of 2 bytes are 3 bytes of codes and one scale.
    "quantise_blocks": (
        lambda: quantiser.quantise_blocks(
            *(of(5, dtype=BF16), of(15), of(16, dtype=torch.uint8), 64, of(3, dtype=torch.uint8), of(1))
        ),
        0,
        2 * 5 + 3 + 4,
    ),
    "quantise_scales": (
        lambda: quantiser.quantise_scales(of(300), 0.0, of(1 << 16, dtype=torch.uint8), 256),
        0,
        4 * 300 + 300 + 4 * 2,
    ),
    "column_maxima": (lambda: quantiser.column_maxima(of(3, 5), of(5)), 0, 4 * 15),
    "quantise_int8": (
        lambda: quantiser.quantise_int8(
            *(of(3, 5), torch.tensor([1, 2]), of(3, 2, dtype=BF16), of(3), of(3, 5, dtype=torch.int8))
        ),
        0,
        4 * 15 + 2 * 3 * 2 + 4 * 3 + 15,
    ),
    "column_sums": (lambda: elementwise.column_sums(of(3, 5, dtype=BF16)), 0, 2 * 15 + 4 * 5),
}  # fmt: skip


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("case", CASES)
def test_work_is_what_a_hand_counts(case: str) -> None:
    call, flops, moved = CASES[case]
    (found,) = noted(call)
    assert found.name == case.split()[0]
    assert (found.work.flops, found.work.bytes) == (flops, moved)
    assert found.work.size


def test_every_kernel_has_its_work_and_is_counted_by_hand() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    kernels = set(re.findall(r"= Kernel\(\s*\"(\w+)\"", text))
    assert len(kernels) > 10
    assert kernels == set(WORK) == {case.split()[0] for case in CASES}


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("window", [-1, 1, 3, 6, 100])
def test_visible_pairs_are_those_of_a_mask(prefix: int, window: int) -> None:
    lengths = [4, 1, 0, 7]
    offsets = [prefix + sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def count(queries: range) -> int:
        far = window if window > 0 else 10**9
        return sum(0 <= q - k < far for q in queries for k in range(queries.stop))

    expected = count(range(prefix)) + sum(count(range(prefix, prefix + length)) for length in lengths)
    assert visible_pairs(offsets, prefix, window) == expected


def test_a_recorder_notes_only_between_start_and_stop() -> None:
    recorder = trace.start()
    with trace.stage("seen"):
        pass
    trace.stop()
    with trace.stage("unseen"):
        pass
    assert [stage.name for stage in recorder.stages] == ["seen"]
    assert trace.recorder is None


@pytest.mark.usefixtures("no_library")
def test_nothing_is_counted_without_a_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*arguments: Any) -> trace.Work:
        raise AssertionError("counted")

    monkeypatch.setitem(WORK, "matmul", counted)
    matmul(of(3, 5), of(5, 7))
    with pytest.raises(AssertionError, match="counted"):
        noted(lambda: matmul(of(3, 5), of(5, 7)))


@pytest.mark.skipif(not library.available(), reason="no kernels are compiled here")
def test_a_noted_call_computes_the_same() -> None:
    a, b = torch.randn(9, 33), torch.randn(33, 17)
    with library.using(library.available()[-1]):
        plain = matmul(a, b)
        results: list[Tensor] = []
        (found,) = noted(lambda: results.append(matmul(a, b)))
    assert torch.equal(results[0], plain)
    assert 0 < found.end - found.begin < 10**9


def test_stages_lie_in_one_another_and_end_with_an_error() -> None:
    recorder = Recorder()

    def fails() -> None:
        with recorder.stage("outer"):
            with recorder.stage("first"):
                time.sleep(0.01)
            with recorder.stage("second"):
                raise KeyError

    with pytest.raises(KeyError):
        fails()
    first, second, outer = recorder.stages
    assert [first.name, second.name, outer.name] == ["first", "second", "outer"]
    assert outer.begin <= first.begin < first.end <= second.begin <= second.end <= outer.end
    assert outer.inner == first.end - first.begin + second.end - second.begin
    assert first.inner == 0
    # Asleep is on no processor.
    assert first.waiting > 5_000_000
    assert outer.waiting >= first.waiting


def test_a_kernel_that_sleeps_was_waiting() -> None:
    recorder = Recorder()
    recorder.call("unknown", lambda: time.sleep(0.02), (), ())
    (call,) = recorder.calls
    assert call.waiting > 10_000_000
    assert call.end - call.begin >= 20_000_000
    assert call.own > 0
    assert call.work == trace.Work()


def test_a_stage_as_a_decorator_notes_each_call() -> None:
    @trace.stage("twice")
    def double(number: int) -> int:
        return 2 * number

    assert double(1) == 2
    recorder = trace.start()
    assert [double(2), double(3)] == [4, 6]
    trace.stop()
    assert [stage.name for stage in recorder.stages] == ["twice", "twice"]
