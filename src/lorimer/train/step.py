"""One optimizer step: forward and backward over its packs, then one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorimer.data.pack import Pack
from lorimer.errors import DivergenceError
from lorimer.kernels import trace
from lorimer.lora.layers import LoraDropout
from lorimer.model.decoder import Decoder
from lorimer.model.loss import pack_loss
from lorimer.train.optimizer import AdamW


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float  # mean over the step's trained tokens, nats
    grad_norm: float  # before clipping
    tokens: int
    trained_tokens: int


def train_step(
    decoder: Decoder,
    optimizer: AdamW,
    packs: Sequence[Pack],
    *,
    step: int,
    learning_rate: float,
    smoothing: float = 0.0,
    dropout: LoraDropout | None = None,
    places: Callable[[Pack], str] = lambda pack: f"rows {list(pack.rows)}",
) -> StepResult:
    """Update the adapter once. The loss is the sum over trained tokens divided by their number in
    the whole step, counted before the first backward.

    Raises DivergenceError, with nothing updated, if a loss or the gradient is not finite.
    """
    trained = sum(pack.trained_tokens for pack in packs)
    total = 0.0
    for pack in packs:
        with trace.stage("forward"):
            masks = dropout.for_pack(step, pack.rows, pack.lengths) if dropout else None
            loss, _ = pack_loss(decoder, pack, weight=1.0 / trained, smoothing=smoothing, dropouts=masks)
            value = float(loss.detach())
        if not math.isfinite(value):
            raise _diverged(f"the loss is {value}", step, places(pack))
        with trace.stage("backward"):
            loss.backward()
        total += value
    with trace.stage("optimizer"):
        norm = optimizer.step(learning_rate)
    if not math.isfinite(norm):
        raise _diverged(f"the gradient's norm is {norm}", step, "; ".join(places(pack) for pack in packs))
    return StepResult(total, norm, sum(pack.tokens for pack in packs), trained)


def _diverged(what: str, step: int, rows: str) -> DivergenceError:
    return DivergenceError(
        f"{what} at step {step + 1}, in {rows}",
        fix="Nothing was updated in this step. Lower `train.learning_rate`, or look at these rows with "
        "`lorimer data show`; an earlier checkpoint can be resumed with other settings as a new run.",
    )
