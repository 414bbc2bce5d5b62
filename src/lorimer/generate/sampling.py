"""Logits -> the next token. A draw depends on (seed, prompt, position) alone, so a batch changes nothing.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorimer.errors import UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 changes nothing"),
        }
        for name, (fine, wanted) in bounds.items():
            if not fine:
                fix = "Leave it out for the usual choice."
                raise UserError(f"{name} is {getattr(self, name)} (wanted: {wanted})", fix=fix)


def row_key(seed: int, prompt: Sequence[int], occurrence: int) -> bytes:
    """What a row's draws are made from; `occurrence` sets equal prompts of one call apart."""
    digest = hashlib.sha256(f"{seed}/{occurrence}".encode())
    digest.update(b"".join(token.to_bytes(4, "little") for token in prompt))
    return digest.digest()


def choose(
    logits_BV: Tensor,
    sampling: Sampling,
    seen: Sequence[Sequence[int]],
    keys: Sequence[bytes],
    positions: Sequence[int],
) -> list[int]:
    """The next token of each row. `seen` are the tokens so far, prompt included."""
    if sampling.repetition_penalty != 1.0:
        logits_BV = _penalise(logits_BV, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    probs_BV = _filter(logits_BV / sampling.temperature, sampling).softmax(-1).double().cumsum(-1)
    draws = [_uniform(key, position) for key, position in zip(keys, positions, strict=True)]
    points_B1 = torch.tensor(draws, dtype=torch.float64, device=probs_BV.device).unsqueeze(1)
    picked = torch.searchsorted(probs_BV, points_B1 * probs_BV[:, -1:], right=True)
    return [int(token) for token in picked.clamp_max_(logits_BV.shape[-1] - 1).squeeze(1)]


def _penalise(logits_BV: Tensor, penalty: float, seen: Sequence[Sequence[int]]) -> Tensor:
    """Tokens that occurred: positive logits divided, negative multiplied (arXiv 1909.05858)."""
    logits_BV = logits_BV.clone()
    for row, tokens in enumerate(seen):
        index = torch.tensor(sorted(set(tokens)), device=logits_BV.device)
        values = logits_BV[row, index]
        logits_BV[row, index] = torch.where(values > 0, values / penalty, values * penalty)
    return logits_BV


def _filter(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """top_k, then top_p (arXiv 1904.09751), then min_p (arXiv 2407.01082)."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits_BV.sort(descending=True)
        probs = ordered.softmax(-1)
        # A token stays if what comes before it has not yet reached top_p; the first always stays.
        drop = probs.cumsum(-1) - probs >= sampling.top_p
        logits_BV = logits_BV.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    if sampling.min_p > 0:
        probs = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(
            probs < sampling.min_p * probs.max(-1, keepdim=True).values, float("-inf")
        )
    return logits_BV


def _uniform(key: bytes, position: int) -> float:
    """A number in [0, 1) for this row and position."""
    digest = hashlib.sha256(key + position.to_bytes(8, "little")).digest()
    return float((int.from_bytes(digest[:8], "little") >> 11) / (1 << 53))
