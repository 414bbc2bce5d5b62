"""How far a model is from another on the same rows: what merging is judged by.

Letters: M trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorimer.data.pack import split_into_packs
from lorimer.data.template import Example
from lorimer.model.decoder import Decoder

# Positions whose logits of both models are alive at once.
CHUNK = 128
PACK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over the trained positions: the mean KL divergence in nats from the first model to the other, and
    the share of positions where both find the same token the likeliest."""

    kl: float
    same: float
    tokens: int


def agreement(model: Decoder, other: Decoder, examples: Sequence[Example]) -> Agreement:
    """Compare two decoders on these rows' trained tokens."""
    kl, same, tokens = 0.0, 0, 0
    for pack in split_into_packs(list(examples), PACK_TOKENS, share=False):
        with torch.no_grad():
            states = [
                decoder.hidden(pack.ids_T, pack.lengths, only_M=pack.predict_M)
                for decoder in (model, other)
            ]
            for start in range(0, pack.trained_tokens, CHUNK):
                mine_MV, theirs_MV = (
                    decoder.logits(hidden[start : start + CHUNK]).log_softmax(-1)
                    for decoder, hidden in zip((model, other), states, strict=True)
                )
                kl += float((mine_MV.exp() * (mine_MV - theirs_MV)).sum(dtype=torch.float64))
                same += int((mine_MV.argmax(-1) == theirs_MV.argmax(-1)).sum())
        tokens += pack.trained_tokens
    return Agreement(max(0.0, kl / tokens), same / tokens, tokens)
