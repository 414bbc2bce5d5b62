"""Matrix products and loss heads to try, and what they must give, for the tests of the kernels.

Operands of products are small whole numbers: every sum is exact, in whatever order it is taken, so the
result is the one right answer to the last bit, and a term that is missing, doubled or in the wrong place
is seen however long the sum. All tensors lie in wider buffers whose other values are NaN.

Letters: M rows, N columns, K summed over; M positions, H hidden, V vocabulary in heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorimer.kernels.native.matmul import head_loss, matmul

T = TypeVar("T")
FP32, BF16 = torch.float32, torch.bfloat16
# Half the distance between neighbours, relative: one rounding to the nearest.
UNIT = {FP32: 2.0**-24, BF16: 2.0**-8}
# Around the widths of vectors (4, 8, 16), blocks (6, 14, 16, 32) and panels (8, 16, 32).
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, 130, 577]
# Sums are cut at 1,024 floats or pairs.
DEPTHS = [*SIZES, 1023, 1025, 2049, 5000]
MOST_WORK = 3_000_000


def whole(generator: torch.Generator, *shape: int) -> Tensor:
    """Whole numbers from -3 to 3 without 0: none may be left out."""
    size = torch.randint(1, 4, shape, generator=generator)
    return (size * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)).float()


def within(values: Tensor, row_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """The same values as a part of a wider buffer, and the buffer, which holds NaN elsewhere.

    Rows are 3 elements longer than need be, or a multiple of `row_bytes` apart.
    """
    rows, columns = values.shape
    width = columns + 3
    if row_bytes is not None:
        page = row_bytes // values.element_size()
        width = math.ceil((columns + 1) / page) * page
    buffer = torch.full((rows + 2, width), math.nan, dtype=values.dtype)
    view = buffer[1:-1, 1 : 1 + columns]
    return view.copy_(values), buffer


def same(mine: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    bits = {4: torch.int32, 2: torch.int16}[mine.element_size()]
    return torch.equal(mine.contiguous().view(bits), other.contiguous().view(bits))


@dataclass(frozen=True)
class Product:
    """One call of `matmul`."""

    m: int
    n: int
    k: int
    k2: int = 0
    dtype: torch.dtype = FP32
    a_turned: bool = False
    b_turned: bool = False
    b2_turned: bool = False
    bias: bool = False
    onto: str = ""  # "", "apart", or "out"
    out: str = "new"  # "new", "within" a buffer, "floats", or "turned"
    alpha: float = 1.0
    spans: int = 0  # so many, with their own columns and their own part of K
    row_bytes: int | None = None
    threads: int = 1
    seed: int = 0


def drawn(seed: int, dtype: torch.dtype) -> Product:
    """The case of this number: every word has its chance to meet every other."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[T]) -> T:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    while True:
        m, n, k = pick(SIZES), pick(SIZES), pick(DEPTHS)
        if m * n * k <= MOST_WORK:
            break
    out = pick(["new", "within", "floats", "turned"])
    turned = out == "turned"
    return Product(
        *(m, n, k, pick([0, 0, 1, 5, 16, 33, 48])),
        dtype=dtype,
        a_turned=pick([False, False, True]),
        b_turned=pick([False, True]),
        b2_turned=pick([False, True]),
        bias=not turned and pick([False, True]),
        onto="" if turned else pick(["", "apart", "out"]),
        out=out,
        alpha=pick([1.0, 0.5, 3.0, -2.0]),
        spans=pick([0, 0, 1, 2, 3]),
        row_bytes=pick([None, None, 4096]),
        threads=pick([1, 1, 2]),
        seed=seed,
    )


def _spans(case: Product, generator: torch.Generator) -> Tensor | None:
    """Parts of N side by side, each with a part of K (of K2, if there is one), both with gaps."""
    depth = case.k2 or case.k
    count = min(case.spans, case.n // 2, depth // 2)
    if not count:
        return None

    def parts(size: int) -> list[tuple[int, int]]:
        cuts = torch.randperm(size + 1, generator=generator)[: 2 * count].sort().values.tolist()
        return [(cuts[2 * i], cuts[2 * i + 1] - cuts[2 * i]) for i in range(count)]

    places = zip(parts(case.n), parts(depth), strict=True)
    return torch.tensor([[*columns, *ks] for columns, ks in places])


def check_product(case: Product) -> Tensor:
    """Run it, compare with float64 to the last bit, and see that nothing beside it was written."""
    generator = torch.Generator().manual_seed(case.seed)
    a, b = whole(generator, case.m, case.k), whole(generator, case.k, case.n)
    a2, b2 = whole(generator, case.m, case.k2), whole(generator, case.k2, case.n)
    bias, spans = whole(generator, case.n), _spans(case, generator)
    if spans is not None:
        mask = torch.zeros((case.k2 or case.k, case.n))
        for column, columns, k, length in spans.tolist():
            mask[k : k + length, column : column + columns] = 1
        b, b2 = (b, b2 * mask) if case.k2 else (b * mask, b2)
    turned = case.out == "turned"
    shape = (case.n, case.m) if turned else (case.m, case.n)
    onto = whole(generator, *shape)
    out_type = FP32 if case.out in ("floats", "turned") else case.dtype

    def lies(values: Tensor, turn: bool) -> Tensor:
        return within((values.t() if turn else values).to(case.dtype), case.row_bytes)[0]

    start = onto if turned or case.onto == "out" else torch.full(shape, math.nan)
    out, buffer = within(start.to(out_type), case.row_bytes)
    apart = within(onto.to(out_type))[0] if case.onto == "apart" else out
    result = matmul(
        *(lies(a, case.a_turned), lies(b, case.b_turned)),
        a_turned=case.a_turned,
        b_turned=case.b_turned,
        a2=lies(a2, False) if case.k2 else None,
        b2=lies(b2, case.b2_turned) if case.k2 else None,
        b2_turned=case.b2_turned,
        bias_N=bias.to(case.dtype) if case.bias else None,
        onto=apart if case.onto else None,
        out=None if case.out == "new" and case.onto != "out" else out,
        out_turned=turned,
        alpha=case.alpha,
        spans=spans,
    )
    exact = case.alpha * (a.double() @ b.double() + a2.double() @ b2.double())
    if turned:
        exact = exact.t() + onto.double()
    elif case.onto:
        exact = exact + onto.double()
    if case.bias:
        exact = exact + bias.double()
    wrong = (result.double() != exact.to(out_type).double()).nonzero()
    assert result.dtype == out_type, case
    assert not len(wrong), f"{case}: {len(wrong)} wrong, the first at {wrong[0].tolist()}"
    buffer[1:-1, 1 : 1 + shape[1]] = math.nan
    assert bool(buffer.isnan().all()), f"{case}: written beside the result"
    return result


# --- heads --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """One call of `head_loss`."""

    m: int
    h: int
    v: int
    dtype: torch.dtype = FP32
    smoothing: float = 0.0
    seed: int = 0
    scale: float = 1.0  # of the logits, about


def head_inputs(case: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Random states and head; the last position's label is the vocabulary's last token."""
    generator = torch.Generator().manual_seed(case.seed)
    hidden = torch.randn((case.m, case.h), generator=generator) * case.scale
    head = torch.randn((case.v, case.h), generator=generator) / math.sqrt(case.h)
    labels = torch.randint(case.v, (case.m,), generator=generator)
    labels[-1] = case.v - 1
    return hidden.to(case.dtype), head.to(case.dtype), labels


def check_head(
    hidden_MH: Tensor, head_VH: Tensor, labels_M: Tensor, *, smoothing: float = 0.0, softcap: float = 0.0
) -> None:
    """Losses within 5e-6 of float64's, relative where they are large; gradients within the rounding
    of the probabilities and of the result."""
    weight = 0.37
    how: Any = {"weight": weight, "smoothing": smoothing, "softcap": softcap}
    losses, grad = head_loss(within(hidden_MH)[0], head_VH, labels_M, need_grad=True, **how)
    assert grad is not None
    assert (losses.dtype, grad.dtype, grad.shape) == (FP32, hidden_MH.dtype, hidden_MH.shape)
    alone, nothing = head_loss(hidden_MH, head_VH, labels_M, need_grad=False, **how)
    assert nothing is None
    assert same(alone, losses)
    hidden, head = hidden_MH.double(), head_VH.double()
    logits = hidden @ head.t()
    slope = torch.ones_like(logits)
    if softcap:
        bent = (logits / softcap).tanh()
        logits, slope = softcap * bent, 1 - bent.square()
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(1, labels_M.unsqueeze(1)).squeeze(1)
    exact = (1 - smoothing) * nll - smoothing * log_probs.mean(-1)
    # A logit is a float32 sum: its error is of its terms' size, whatever the loss is.
    size = 2.0**-22 * (softcap + (hidden.abs() @ head.abs().t()).amax(-1))
    error = (losses.double() - exact).abs() - size
    assert float(error.max()) <= 5e-6, f"loss off by {float(error.max()):.1e}"
    probs = log_probs.exp()
    target = (
        torch.nn.functional.one_hot(labels_M, head.shape[0]) * (1 - smoothing) + smoothing / head.shape[0]
    )
    exact_grad = weight * ((probs - target) * slope) @ head
    rounded = UNIT[hidden_MH.dtype] + 2.0**-20 + 2 * size.unsqueeze(1)
    slack = weight * rounded * ((probs + target) @ head.abs())
    error = (grad.double() - exact_grad).abs() - UNIT[grad.dtype] * exact_grad.abs() - slack
    assert float(error.max()) <= 0, f"gradient off by {float(error.max()):.1e} too much"
