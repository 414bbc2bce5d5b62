"""Rotary position frequencies (arXiv 2104.09864) and every scaling that bases use.

`RopeTables.get` gives cos and sin for the tokens of a pack. Two scalings depend on the length of
a row (dynamic NTK and LongRoPE): each row is given the frequencies of its own length, so that
packing it beside a longer row changes nothing.

Letters: T tokens, F frequencies (half of the turning features).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorimer.kernels.dispatch import Turn
from lorimer.model.spec import RopeSpec


def plain_frequencies(spec: RopeSpec, theta: float | None = None) -> Tensor:
    """theta^(-2i/d): for d = 4 and theta = 10000, [1, 0.01]."""
    steps_F = torch.arange(0, spec.dimensions, 2, dtype=torch.int64).float() / spec.dimensions
    return 1.0 / ((spec.theta if theta is None else theta) ** steps_F)


def frequencies(spec: RopeSpec, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies [F] for a row of `length` tokens, and the factor on cos and sin."""
    if spec.kind == "linear":
        return plain_frequencies(spec) / float(spec.settings["factor"]), 1.0
    if spec.kind == "dynamic":
        return _dynamic(spec, length), 1.0
    if spec.kind == "llama3":
        return _llama3(spec), 1.0
    if spec.kind == "yarn":
        return _yarn(spec)
    if spec.kind == "longrope":
        return _longrope(spec, length)
    return plain_frequencies(spec), 1.0


def _dynamic(spec: RopeSpec, length: int) -> Tensor:
    """NTK-aware scaling: the base grows with the row once it is longer than the model's context."""
    factor = float(spec.settings["factor"])
    stretch = factor * max(length, spec.max_positions) / spec.max_positions - (factor - 1)
    return plain_frequencies(spec, spec.theta * stretch ** (spec.dimensions / (spec.dimensions - 2)))


def _llama3(spec: RopeSpec) -> Tensor:
    """Llama 3.1: slow turns are divided by `factor`, fast ones stay, those between are blended."""
    settings = spec.settings
    factor = float(settings["factor"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    context = float(settings["original_max_position_embeddings"])
    plain_F = plain_frequencies(spec)
    turns_F = context * plain_F / (2 * math.pi)
    share_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return (1 - share_F) * plain_F / factor + share_F * plain_F


def _yarn(spec: RopeSpec) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): a ramp over the features between interpolating and extrapolating."""
    settings = spec.settings
    context = float(settings["original_max_position_embeddings"])
    factor = float(settings.get("factor") or spec.max_positions / context)
    plain_F = plain_frequencies(spec)

    def feature(turns: float) -> float:
        return spec.dimensions * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low = feature(float(settings.get("beta_fast") or 32))
    high = feature(float(settings.get("beta_slow") or 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dimensions - 1)
    if low == high:
        high += 0.001
    ramp_F = ((torch.arange(spec.dimensions // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain_F / factor * ramp_F + plain_F * (1 - ramp_F), _yarn_attention(factor, spec)


def _yarn_attention(factor: float, spec: RopeSpec) -> float:
    settings = spec.settings
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return temperature(float(settings["mscale"])) / temperature(float(settings["mscale_all_dim"]))
    return temperature(1.0)


def _longrope(spec: RopeSpec, length: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): one divisor for each feature, one list for short rows, one for long."""
    settings = spec.settings
    context = int(settings["original_max_position_embeddings"])
    divisors = settings["long_factor"] if length > context else settings["short_factor"]
    factor = settings.get("factor") or spec.max_positions / context
    attention = settings.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return plain_frequencies(spec) / torch.tensor(divisors, dtype=torch.float32), float(attention)


class RopeTables:
    """cos and sin for positions, computed once for each frequency set and kept."""

    def __init__(self, spec: RopeSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def _key(self, length: int) -> int:
        """Rows with the same key turn at the same frequencies."""
        if self.spec.kind == "dynamic":
            return max(length, self.spec.max_positions)
        if self.spec.kind == "longrope":
            return int(length > int(self.spec.settings["original_max_position_embeddings"]))
        return 0

    def _table(self, length: int) -> tuple[Tensor, Tensor]:
        key = self._key(length)
        kept = self._tables.get(key)
        if kept is None or kept[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            inverse_F, factor = frequencies(self.spec, length)
            angles = torch.outer(torch.arange(size, dtype=torch.float32), inverse_F)
            cos, sin = (turn * factor for turn in (angles.cos(), angles.sin()))
            kept = cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)
            self._tables = {key: kept} if self.spec.kind == "dynamic" else self._tables | {key: kept}
        return kept

    def for_rows(self, lengths: Sequence[int], prefix: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin [T, F] for rows packed one after the other, each from position 0.

        With a `prefix`, its positions come first, and each row goes on where it ends.
        """
        parts = [tuple(t[:prefix] for t in self._table(prefix))] if prefix else []
        parts += [tuple(t[prefix : prefix + n] for t in self._table(prefix + n)) for n in lengths]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def shareable(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths turn alike, so that a common prefix is the same in all."""
        return len({self._key(length) for length in lengths}) == 1

    @property
    def steady(self) -> bool:
        """Whether a token turns alike however long its row is."""
        return self.spec.kind not in ("dynamic", "longrope")

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """cos and sin [T, F] for single tokens at these positions, each the newest of its row."""
        if not self.steady:
            pairs = [tuple(t[p] for t in self._table(p + 1)) for p in positions]
            return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        cos, sin = self._table(max(positions) + 1)
        index = torch.tensor(positions, device=self.device)
        return cos[index], sin[index]


class Ropes:
    """The tables of a model whose layers turn in one or more ways; each call gives one Turn for each."""

    def __init__(self, specs: Sequence[RopeSpec], dtype: torch.dtype, device: torch.device) -> None:
        self.tables = [RopeTables(spec, dtype, device) for spec in specs]

    def for_rows(self, lengths: Sequence[int], prefix: int = 0) -> list[Turn]:
        return [Turn(*table.for_rows(lengths, prefix)) for table in self.tables]

    def at(self, positions: Sequence[int]) -> list[Turn]:
        return [Turn(*table.at(positions)) for table in self.tables]

    def shareable(self, lengths: Sequence[int]) -> bool:
        return all(table.shareable(lengths) for table in self.tables)

    def turns_anew(self, length: int) -> bool:
        """Whether a row that has just grown to this length turns otherwise than it did before. Dynamic
        scaling changes with every token and is left as it was for those before."""
        longs = [table.spec for table in self.tables if table.spec.kind == "longrope"]
        return any(length == int(s.settings["original_max_position_embeddings"]) + 1 for s in longs)

    @property
    def steady(self) -> bool:
        return all(table.steady for table in self.tables)
