"""One optimizer step: forward and backward over its packs, then one update.

float16 holds no gradient below 6e-8: there the loss is multiplied by a power of two before the backward,
and the gradient divided by it after (arXiv 1710.03740). A step whose gradient overflows is computed again
with half of it, so none is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lorimer.data.pack import Pack
from lorimer.errors import DivergenceError, LorimerError
from lorimer.kernels import trace
from lorimer.lora.layers import LoraDropout
from lorimer.model.decoder import Decoder
from lorimer.model.loss import pack_loss
from lorimer.train.optimizer import Optimizer

FIRST_SCALE = 65536.0  # of the loss in float16; it can only become smaller, and come back up to here
RETRY_STEPS = 200  # steps after which a smaller scale is doubled again

# Of a step, and of each of its rows.
Losses = tuple[float, tuple[float, ...]]


class StepGivenUp(Exception):
    """A step was left before its update: nothing has changed."""


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float  # mean over the step's trained tokens, nats
    grad_norm: float  # before clipping
    tokens: int
    trained_tokens: int
    row_losses: tuple[float, ...]  # the mean of each row's tokens, in the step's order
    split: int | None = None  # most tokens at once after memory ran out, else None
    loss_scale: float = 1.0  # that the step was computed with


def loss_scale(dtype: torch.dtype, step: int, before: float | None) -> float:
    """What the loss of this step is multiplied by: 1 but in float16. `before` is the last step's."""
    if dtype != torch.float16:
        return 1.0
    if before is None:
        return FIRST_SCALE
    return min(FIRST_SCALE, 2 * before) if step % RETRY_STEPS == 0 else before


def train_step(
    decoder: Decoder,
    optimizer: Optimizer,
    packs: Sequence[Pack],
    *,
    step: int,
    learning_rate: float,
    smoothing: float = 0.0,
    scale: float = 1.0,
    dropout: LoraDropout | None = None,
    places: Callable[[Pack], str] = lambda pack: f"rows {list(pack.rows)}",
    split: Callable[[int], Sequence[Pack]] | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Update the adapter once. The loss is the sum over trained tokens divided by their number in
    the whole step, counted before the first backward.

    When memory runs out before the update, the gradients are cleared and the step is computed again in
    the packs of at most half as many tokens that `split` gives: the same gradient but for rounding. The
    loss is multiplied by `scale`, and by half of it if the gradient overflows, down to 1.
    Raises DivergenceError, with nothing updated, if a loss or the gradient is not finite, StepGivenUp if
    `given_up` says so before a pack, and LorimerError if single rows do not fit.
    """
    most = None
    while True:
        compute = partial(
            _gradients,
            decoder,
            step=step,
            smoothing=smoothing,
            scale=scale,
            dropout=dropout,
            places=places,
            given_up=given_up,
        )
        total, row_losses, packs, smaller = _in_memory(compute, optimizer, packs, step, split)
        most = smaller or most
        with trace.stage("optimizer"):
            norm = optimizer.step(learning_rate, scale)
        if math.isfinite(norm) or scale <= 1.0:
            break
        optimizer.clear()
        scale /= 2
    if not math.isfinite(norm):
        bad = [name for name, tensor in optimizer.adapter.tensors.items() if not _finite_gradient(tensor)]
        rows = "; ".join(places(pack) for pack in packs)
        raise _diverged(f"the gradient's norm is {norm}", step, rows, bad[-1] if bad else None)
    trained = sum(pack.trained_tokens for pack in packs)
    return StepResult(total, norm, sum(pack.tokens for pack in packs), trained, row_losses, most, scale)


def _in_memory(
    compute: Callable[[Sequence[Pack]], Losses],
    optimizer: Optimizer,
    packs: Sequence[Pack],
    step: int,
    split: Callable[[int], Sequence[Pack]] | None,
) -> tuple[float, tuple[float, ...], Sequence[Pack], int | None]:
    """The step's gradients in these packs, or in smaller ones if memory runs out: its losses, the packs
    that it took, and the most tokens of one if they are smaller."""
    most = None
    while True:
        try:
            return (*compute(packs), packs, most)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback holds on to everything that the failed try had made.
        optimizer.clear()
        most = max(pack.computed_tokens for pack in packs) // 2
        if split is None or all(len(pack.rows) == 1 for pack in packs):
            raise _does_not_fit(step, max(pack.tokens for pack in packs))
        packs = split(most)
        if optimizer.adapter.flat.is_cuda:
            torch.cuda.empty_cache()


def _gradients(
    decoder: Decoder,
    packs: Sequence[Pack],
    *,
    step: int,
    smoothing: float,
    scale: float,
    dropout: LoraDropout | None,
    places: Callable[[Pack], str],
    given_up: Callable[[], bool],
) -> Losses:
    """Add up the gradients of all packs; returns the loss of the step, and of each of its rows."""
    trained = sum(pack.trained_tokens for pack in packs)
    total = 0.0
    by_row: dict[int, float] = {}
    for pack in packs:
        if given_up():
            raise StepGivenUp
        with trace.stage("forward"):
            masks = dropout.for_pack(step, pack.rows, pack.lengths) if dropout else None
            loss, each_M = pack_loss(
                decoder, pack, weight=scale / trained, smoothing=smoothing, dropouts=masks
            )
            value = float(loss.detach()) / scale
        if not math.isfinite(value):
            ids_T = pack.ids_T.to(decoder.device)
            module = decoder.first_not_finite(ids_T, pack.lengths, pack.prefix)
            raise _diverged(f"the loss is {value}", step, places(pack), module)
        by_row |= _row_means(pack, each_M.detach())
        with trace.stage("backward"):
            loss.backward()
        # Not while the next pack is computed: its graph still holds what `again` closures compute from.
        del loss, masks
        total += value
    return total, tuple(by_row[row] for row in sorted(by_row))


def _row_means(pack: Pack, each_M: torch.Tensor) -> dict[int, float]:
    """The mean loss of each row's trained tokens."""
    sums = torch.zeros(len(pack.rows)).index_add_(0, pack.owner_M, each_M.float().cpu())
    counts = torch.bincount(pack.owner_M, minlength=len(pack.rows)).clamp_min(1)
    return dict(zip(pack.rows, (sums / counts).tolist(), strict=True))


def _finite_gradient(tensor: torch.Tensor) -> bool:
    return tensor.grad is None or bool(tensor.grad.isfinite().all())


# What PyTorch's allocators say: of a GPU, of the CPU on Linux, on others, and C++'s own.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _does_not_fit(step: int, tokens: int) -> LorimerError:
    return LorimerError(
        f"there is not enough memory at step {step + 1} for one row of {tokens:,} tokens",
        fix="Nothing was updated in this step. Lower `data.max_tokens` or `lora.r`, or free memory.",
    )


def _diverged(what: str, step: int, rows: str, module: str | None = None) -> DivergenceError:
    where = f"; the first that is not finite comes from `{module}`" if module else ""
    return DivergenceError(
        f"{what} at step {step + 1}, in {rows}{where}",
        fix="Nothing was updated in this step. Lower `train.learning_rate`, or look at these rows with "
        "`lorimer data show`; an earlier checkpoint can be resumed with other settings as a new run.",
    )
