"""The loss of a pack: next-token cross entropy on its trained positions, and nowhere else.

Letters: T tokens, H hidden, M trained positions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorimer.data.pack import Pack
from lorimer.kernels import dispatch
from lorimer.kernels.dispatch import Dropout
from lorimer.kernels.tables import UpdatedHead
from lorimer.model.decoder import Decoder
from lorimer.model.parts import Dropouts

# Packs differ by a few tokens, and the CPU's matrix library builds and keeps code for every size it
# meets: 35 MB a step, measured. A filler row brings each pack to a multiple of this many tokens.
SIZE_STEP = 64


def _filled(pack: Pack, native: bool) -> tuple[Tensor, tuple[int, ...]]:
    """The pack's ids and lengths with a filler row at the end, which nothing sees and nothing scores.

    The native kernels do not need it: they keep nothing for a size.
    """
    missing = -pack.computed_tokens % SIZE_STEP
    if not missing or native:
        return pack.ids_T, pack.lengths
    return torch.cat([pack.ids_T, pack.ids_T.new_zeros(missing)]), (*pack.lengths, missing)


def pack_loss(
    decoder: Decoder, pack: Pack, *, weight: float, smoothing: float = 0.0, dropouts: Dropouts | None = None
) -> tuple[Tensor, Tensor]:
    """weight * sum of the pack's losses (differentiable), and each position's loss in nats [M].

    `weight` is 1 / the trained tokens of the whole optimizer step, so the sum over its packs is
    their mean however the step was split.
    """
    device = decoder.device
    ids_T, lengths = _filled(pack, native=decoder.native)
    hidden_MH = decoder.hidden(
        ids_T.to(device),
        lengths,
        prefix=pack.prefix,
        dropouts=dropouts,
        only_M=pack.predict_M.to(device),
    )
    head = decoder.head_weight()
    if isinstance(head, UpdatedHead):
        head_loss = replace(head, dropout=_head_masks(decoder, pack, head, dropouts)).loss
    else:
        head_loss = partial(dispatch.head_loss, head=head)
    return head_loss(
        decoder.finish(hidden_MH),
        labels_M=pack.labels_M.to(device),
        weight=weight,
        smoothing=smoothing,
        softcap=decoder.spec.logit_cap,
    )


def _head_masks(
    decoder: Decoder, pack: Pack, head: UpdatedHead, dropouts: Dropouts | None
) -> Dropout | None:
    """Those of the trained positions. Dropout counts the head's input after all projections'."""
    if dropouts is None or head.update.low_rank is None:
        return None
    masks = dropouts(len(decoder.projections()), decoder.spec.hidden_size, pack.computed_tokens)
    return replace(masks, picks_T=masks.picks_T[pack.predict_M.to(decoder.device)])


def pack_losses(decoder: Decoder, pack: Pack) -> Tensor:
    """Each trained position's loss in nats [M], without gradients or dropout."""
    with torch.no_grad():
        return pack_loss(decoder, pack, weight=1.0)[1]
