"""The loss of a pack: next-token cross entropy on its trained positions, and nowhere else.

Letters: T tokens, H hidden, M trained positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.data.pack import Pack
from lorimer.kernels import dispatch
from lorimer.model.decoder import Decoder, Dropouts


def pack_loss(
    decoder: Decoder, pack: Pack, *, weight: float, smoothing: float = 0.0, dropouts: Dropouts | None = None
) -> tuple[Tensor, Tensor]:
    """weight * sum of the pack's losses (differentiable), and each position's loss in nats [M].

    `weight` is 1 / the trained tokens of the whole optimizer step, so the sum over its packs is
    their mean however the step was split.
    """
    device = decoder.device
    hidden_TH = decoder.hidden(pack.ids_T.to(device), pack.lengths, dropouts=dropouts)
    picked_MH = decoder.finish(hidden_TH.index_select(0, pack.predict_M.to(device)))
    return dispatch.head_loss(
        picked_MH, decoder.head_weight(), pack.labels_M.to(device), weight=weight, smoothing=smoothing
    )


def pack_losses(decoder: Decoder, pack: Pack) -> Tensor:
    """Each trained position's loss in nats [M], without gradients or dropout."""
    with torch.no_grad():
        return pack_loss(decoder, pack, weight=1.0)[1]
