"""One optimizer step: forward and backward over its packs, then one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorimer.data.pack import Pack
from lorimer.errors import DivergenceError, LorimerError
from lorimer.kernels import trace
from lorimer.lora.layers import LoraDropout
from lorimer.model.decoder import Decoder
from lorimer.model.loss import pack_loss
from lorimer.train.optimizer import Optimizer


class StepGivenUp(Exception):
    """A step was left before its update: nothing has changed."""


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float  # mean over the step's trained tokens, nats
    grad_norm: float  # before clipping
    tokens: int
    trained_tokens: int
    split: int | None = None  # most tokens at once after memory ran out, else None


def train_step(
    decoder: Decoder,
    optimizer: Optimizer,
    packs: Sequence[Pack],
    *,
    step: int,
    learning_rate: float,
    smoothing: float = 0.0,
    dropout: LoraDropout | None = None,
    places: Callable[[Pack], str] = lambda pack: f"rows {list(pack.rows)}",
    split: Callable[[int], Sequence[Pack]] | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Update the adapter once. The loss is the sum over trained tokens divided by their number in
    the whole step, counted before the first backward.

    When memory runs out before the update, the gradients are cleared and the step is computed again in
    the packs of at most half as many tokens that `split` gives: the same gradient but for rounding.
    Raises DivergenceError, with nothing updated, if a loss or the gradient is not finite, StepGivenUp if
    `given_up` says so before a pack, and LorimerError if single rows do not fit.
    """
    most = None
    while True:
        try:
            total = _gradients(decoder, packs, step, smoothing, dropout, places, given_up)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback holds on to everything that the failed try had made.
        optimizer.clear()
        most = max(pack.computed_tokens for pack in packs) // 2
        if split is None or all(len(pack.rows) == 1 for pack in packs):
            raise _does_not_fit(step, max(pack.tokens for pack in packs))
        packs = split(most)
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()
    with trace.stage("optimizer"):
        norm = optimizer.step(learning_rate)
    if not math.isfinite(norm):
        raise _diverged(f"the gradient's norm is {norm}", step, "; ".join(places(pack) for pack in packs))
    trained = sum(pack.trained_tokens for pack in packs)
    return StepResult(total, norm, sum(pack.tokens for pack in packs), trained, most)


def _gradients(
    decoder: Decoder,
    packs: Sequence[Pack],
    step: int,
    smoothing: float,
    dropout: LoraDropout | None,
    places: Callable[[Pack], str],
    given_up: Callable[[], bool],
) -> float:
    """Add up the gradients of all packs; returns the loss of the step."""
    trained = sum(pack.trained_tokens for pack in packs)
    total = 0.0
    for pack in packs:
        if given_up():
            raise StepGivenUp
        with trace.stage("forward"):
            masks = dropout.for_pack(step, pack.rows, pack.lengths) if dropout else None
            loss, _ = pack_loss(decoder, pack, weight=1.0 / trained, smoothing=smoothing, dropouts=masks)
            value = float(loss.detach())
        if not math.isfinite(value):
            raise _diverged(f"the loss is {value}", step, places(pack))
        with trace.stage("backward"):
            loss.backward()
        total += value
    return total


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


def _diverged(what: str, step: int, rows: str) -> DivergenceError:
    return DivergenceError(
        f"{what} at step {step + 1}, in {rows}",
        fix="Nothing was updated in this step. Lower `train.learning_rate`, or look at these rows with "
        "`lorimer data show`; an earlier checkpoint can be resumed with other settings as a new run.",
    )
