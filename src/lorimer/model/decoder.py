"""The one decoder: it reads a ModelSpec and computes hidden states for packed rows.

A row of tokens passes, in this order: embedding; in each layer the norm with query, key and value
projections, rotation, attention, output projection onto the residual, the norm with gate and up
projections, the gated unit with the down projection onto the residual; the final norm; the head.

Letters: T tokens, H hidden, N query heads, K key/value heads, D head size, M picked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorimer.kernels import dispatch
from lorimer.kernels.dispatch import Before, Dropout, Gate, Linear, Norm
from lorimer.model.attention import attend, group_rows
from lorimer.model.cache import KVCache
from lorimer.model.rope import RopeTables
from lorimer.model.spec import ModelSpec
from lorimer.quant.linear import FrozenLinear

# For a projection group's number, input size and tokens: the masks for its adapters' input.
Dropouts = Callable[[int, int, int], Dropout]


@dataclass(slots=True)
class Adapted:
    """What training puts in place of a frozen group: the same weight with LoRA, biases trained.

    `factors` are the parameters: the stacked A, then each B. `biases` are the biases of each output,
    trained or not, if at least one is trained.
    """

    linear: Linear
    factors: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class Projections:
    """Linear layers that share one input, stacked into one weight: query, key and value, say.

    `path` and `names` are Hugging Face's, `rows` the outputs of each; `number` is unique in the model.
    """

    path: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    inputs: int
    number: int
    linear: Linear
    adapted: Adapted | None = None

    def __call__(
        self,
        input_TI: Tensor,
        *,
        before: NormSlot | Gate | None,
        residual_TO: Tensor | None,
        adapted: bool,
        dropouts: Dropouts | None,
    ) -> Tensor:
        chosen = self.adapted if adapted and self.adapted else Adapted(self.linear)
        drop = (
            dropouts(self.number, self.inputs, len(input_TI))
            if dropouts and chosen.linear.low_rank
            else None
        )
        norm = before.norm(adapted) if isinstance(before, NormSlot) else None
        rule: Before = norm if norm is not None else before if isinstance(before, Gate) else None
        return dispatch.project(
            input_TI,
            chosen.linear,
            before=rule,
            residual_TO=residual_TO,
            dropout=drop,
            norm_parameter=before.trained if isinstance(before, NormSlot) and adapted else None,
            bias_parameter=torch.cat(chosen.biases) if chosen.biases else None,
            factors=chosen.factors,
        )


@dataclass(slots=True)
class NormSlot:
    """A norm's weight, and the trained copy that replaces it where there is one."""

    path: str
    weight_H: Tensor
    eps: float
    trained: Tensor | None = None

    def norm(self, adapted: bool) -> Norm:
        weight = self.trained.detach() if adapted and self.trained is not None else self.weight_H
        return Norm(weight, self.eps)

    def __call__(self, hidden: Tensor, adapted: bool) -> Tensor:
        return dispatch.rms_norm(hidden, self.norm(adapted), self.trained if adapted else None)


@dataclass(slots=True)
class Layer:
    attention_norm: NormSlot
    qkv: Projections
    query_norm: NormSlot | None
    key_norm: NormSlot | None
    output: Projections
    mlp_norm: NormSlot
    gate_up: Projections
    down: Projections
    window: int | None

    def projections(self) -> tuple[Projections, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    def norms(self) -> tuple[NormSlot, ...]:
        slots = (self.attention_norm, self.query_norm, self.key_norm, self.mlp_norm)
        return tuple(slot for slot in slots if slot is not None)


@dataclass(slots=True)
class Table:
    """The embedding or the head: a frozen weight, and the trained copy that replaces it."""

    path: str
    weight: FrozenLinear
    trained: Tensor | None = None


@dataclass(slots=True)
class Decoder:
    """A whole model. `adapted` false computes the base, with the same weights in memory."""

    spec: ModelSpec
    embedding: Table
    layers: list[Layer]
    final_norm: NormSlot
    head: Table
    rope: RopeTables
    dtype: torch.dtype
    device: torch.device
    adapted: bool = True
    _gate: Gate = field(default_factory=Gate)

    def hidden(
        self,
        ids_T: Tensor,
        lengths: Sequence[int],
        *,
        prefix: int = 0,
        dropouts: Dropouts | None = None,
        cache: KVCache | None = None,
        cache_rows: Sequence[int] = (),
    ) -> Tensor:
        """Hidden states [T, H] of packed rows, each from its own position 0, before the final norm.

        The first `prefix` tokens are shared by all rows and computed once; `lengths` then count the
        tokens that follow it in each row. With a cache, which goes with no prefix, the keys and
        values of row i go to `cache_rows[i]`.
        """
        cos, sin = self.rope.for_rows(lengths, prefix)
        groups = group_rows(lengths, self.device, prefix)
        hidden_TH = self.embed(ids_T)
        for number, layer in enumerate(self.layers):
            query, key, value = self._query_key_value(layer, hidden_TH, cos, sin, dropouts)
            if cache is not None:
                start = 0
                for row, length in zip(cache_rows, lengths, strict=True):
                    cache.store_row(number, row, key[start : start + length], value[start : start + length])
                    start += length
            mixed = attend(query, key, value, groups, scale=self.spec.attention_scale, window=layer.window)
            hidden_TH = self._finish_layer(layer, hidden_TH, mixed, dropouts)
        if cache is not None:
            for row, length in zip(cache_rows, lengths, strict=True):
                cache.lengths[row] = length
        return hidden_TH

    def next_hidden(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, H] of one more token for each row of the cache."""
        cos, sin = self.rope.at(cache.lengths)
        positions_B = torch.tensor(cache.lengths, device=self.device)
        seen = max(cache.lengths) + 1
        age = positions_B.unsqueeze(1) - torch.arange(seen, device=self.device)
        hidden_BH = self.embed(ids_B)
        for number, layer in enumerate(self.layers):
            query, key, value = self._query_key_value(layer, hidden_BH, cos, sin, None)
            cache.append(number, positions_B, key, value)
            visible = age >= 0 if layer.window is None else (age >= 0) & (age < layer.window)
            mixed = torch.nn.functional.scaled_dot_product_attention(
                query.unsqueeze(2),
                cache.keys[number][:, :, :seen],
                cache.values[number][:, :, :seen],
                visible[:, None, None],
                scale=self.spec.attention_scale,
                enable_gqa=True,
            )
            hidden_BH = self._finish_layer(layer, hidden_BH, mixed.flatten(1), None)
        cache.lengths = [length + 1 for length in cache.lengths]
        return hidden_BH

    def embed(self, ids_T: Tensor) -> Tensor:
        if self.adapted and self.embedding.trained is not None:
            return torch.nn.functional.embedding(ids_T, self.embedding.trained).to(self.dtype)
        return self.embedding.weight.rows(ids_T)

    def finish(self, hidden_MH: Tensor) -> Tensor:
        """The final norm: what the head sees."""
        return self.final_norm(hidden_MH, self.adapted)

    def head_weight(self) -> Tensor:
        """The head as [V, H]: its trained copy (float32) or the frozen weight."""
        if self.adapted and self.head.trained is not None:
            return self.head.trained
        return self.head.weight.dequantise(self.dtype)

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Float32 logits [M, V] of hidden states that come from `hidden` or `next_hidden`."""
        return (self.finish(hidden_MH) @ self.head_weight().to(self.dtype).t()).float()

    def projections(self) -> list[Projections]:
        return [group for layer in self.layers for group in layer.projections()]

    def norms(self) -> list[NormSlot]:
        return [slot for layer in self.layers for slot in layer.norms()] + [self.final_norm]

    def slots(self) -> list[NormSlot | Table]:
        """Everything that can be trained in full: embedding, head, norms."""
        return [self.embedding, self.head, *self.norms()]

    def _query_key_value(
        self, layer: Layer, hidden_TH: Tensor, cos: Tensor, sin: Tensor, dropouts: Dropouts | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        stacked = layer.qkv(
            hidden_TH,
            before=layer.attention_norm,
            residual_TO=None,
            adapted=self.adapted,
            dropouts=dropouts,
        )
        heads = (self.spec.heads, self.spec.kv_heads, self.spec.kv_heads)
        parts = stacked.split(self.spec.qkv_rows, -1)
        query, key, value = (
            part.unflatten(-1, (count, self.spec.head_dim))
            for part, count in zip(parts, heads, strict=True)
        )
        if layer.query_norm is not None and layer.key_norm is not None:
            query = layer.query_norm(query, self.adapted)
            key = layer.key_norm(key, self.adapted)
        return dispatch.rotate(query, cos, sin), dispatch.rotate(key, cos, sin), value

    def _finish_layer(
        self, layer: Layer, hidden_TH: Tensor, mixed_TA: Tensor, dropouts: Dropouts | None
    ) -> Tensor:
        hidden_TH = layer.output(
            mixed_TA, before=None, residual_TO=hidden_TH, adapted=self.adapted, dropouts=dropouts
        )
        stacked = layer.gate_up(
            hidden_TH, before=layer.mlp_norm, residual_TO=None, adapted=self.adapted, dropouts=dropouts
        )
        return layer.down(
            stacked, before=self._gate, residual_TO=hidden_TH, adapted=self.adapted, dropouts=dropouts
        )
