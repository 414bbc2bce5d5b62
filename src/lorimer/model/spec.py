"""What differs between architectures, as data. The decoder reads nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions: `dimensions` features of each head turn, at base `theta`, scaled by `kind`."""

    theta: float
    dimensions: int
    kind: RopeKind = "default"
    max_positions: int = 2048
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # the scaling's own numbers, as configs name them


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One architecture, sized. Lengths are in features unless the name says otherwise."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_positions: int
    tied_head: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of query and key, before the rotation
    windows: tuple[int | None, ...] = ()  # for each layer: how many positions back it sees; None is all

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Outputs of the query, key and value projections."""
        keys = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, keys, keys

    @property
    def attention_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)
