"""The one decoder: it reads a ModelSpec and computes hidden states for packed rows.

A row of tokens passes, in this order: embedding; in each layer the norm with query, key and value
projections, rotation, attention, output projection onto the residual, the norm with gate and up
projections, the gated unit with the down projection onto the residual; the final norm; the head.

Letters: T tokens, H hidden, N query heads, K key/value heads, D head size, M picked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorimer.kernels import dispatch, products
from lorimer.kernels.dispatch import Before, Dropout, Gate, Heads, Linear, Norm, Turn
from lorimer.model.attention import PackRows, attend, attend_cache
from lorimer.model.cache import KVCache
from lorimer.model.recompute import kept_elsewhere, layer_again
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

    @property
    def name(self) -> str:
        """The path with all names, `model.layers.0.mlp.gate_proj/up_proj`."""
        return f"{self.path}.{'/'.join(self.names)}"

    def __call__(
        self,
        input_TI: Tensor,
        *,
        before: NormSlot | Gate | None,
        residual_TO: Tensor | None,
        adapted: bool,
        dropouts: Dropouts | None,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`again` makes the input once more in the backward, which then keeps nothing of it."""
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
            again=again,
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
    recompute: str = "none"  # a rung of recompute.py
    _gate: Gate = field(default_factory=Gate)
    _heads: Heads = field(init=False)

    def __post_init__(self) -> None:
        self._heads = Heads(self.spec.heads, self.spec.kv_heads, self.spec.head_dim)

    def hidden(
        self,
        ids_T: Tensor,
        lengths: Sequence[int],
        *,
        prefix: int = 0,
        dropouts: Dropouts | None = None,
        cache: KVCache | None = None,
        cache_rows: Sequence[int] = (),
        only_M: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, H] of packed rows, each from its own position 0, before the final norm.

        `only_M` names the positions that are wanted: [M, H]. The last layer then computes for others no
        more than the keys and values that these attend to.

        The first `prefix` tokens are shared by all rows and computed once; `lengths` then count the
        tokens that follow it in each row. With a cache, which goes with no prefix, the keys and
        values of row i go to `cache_rows[i]`.
        """
        turn = Turn(*self.rope.for_rows(lengths, prefix))
        rows = PackRows(lengths, prefix, self.device)
        hidden_TH = self.embed(ids_T)
        last = len(self.layers) - 1
        prunes = only_M is not None and dropouts is None

        def run(number: int, hidden_TH: Tensor) -> Tensor:
            layer = self.layers[number]
            stacked = self._query_key_value(layer, hidden_TH, dropouts)
            mixed, stacked = self._attend(layer, stacked, turn, rows)
            if cache is not None:
                _, key, value = self._heads.parts(stacked)
                start = 0
                for row, length in zip(cache_rows, lengths, strict=True):
                    cache.store_row(number, row, key[start : start + length], value[start : start + length])
                    start += length
            if number == last and only_M is not None and prunes:
                hidden_TH, mixed = hidden_TH.index_select(0, only_M), mixed.index_select(0, only_M)
            return self._finish_layer(layer, hidden_TH, mixed, dropouts)

        again = self.recompute in ("layers", "offload") and torch.is_grad_enabled()
        with kept_elsewhere(self.recompute, self.device):
            for number in range(last):
                hidden_TH = layer_again(run, number, hidden_TH) if again else run(number, hidden_TH)
            # What the last layer keeps is used at once.
            hidden_TH = run(last, hidden_TH)
        if cache is not None:
            for row, length in zip(cache_rows, lengths, strict=True):
                cache.lengths[row] = length
        return hidden_TH if only_M is None or prunes else hidden_TH.index_select(0, only_M)

    def next_hidden(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, H] of one more token for each row of the cache; they last until the next.

        Raises ValueError if the cache has no room for it.
        """
        if max(cache.lengths) >= cache.capacity:
            raise ValueError(f"the cache is full: {cache.capacity} positions")
        turn = self.rope.at(cache.lengths)
        cache.lengths = [length + 1 for length in cache.lengths]
        lengths_B = torch.tensor(cache.lengths, device=self.device)

        def step(hidden_BH: Tensor, cos_BF: Tensor, sin_BF: Tensor, lengths_B: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                stacked = self._query_key_value(layer, hidden_BH, None)
                query, key, value = dispatch.turned(stacked, self._heads, Turn(cos_BF, sin_BF))
                cache.append(number, lengths_B, key, value)
                mixed = attend_cache(
                    query,
                    cache.keys[number],
                    cache.values[number],
                    lengths_B,
                    scale=self.spec.attention_scale,
                    window=layer.window,
                )
                hidden_BH = self._finish_layer(layer, hidden_BH, mixed, None)
            return hidden_BH

        return cache.tape(self.adapted)(step, self.embed(ids_B), *turn, lengths_B)

    def first_not_finite(self, ids_T: Tensor, lengths: Sequence[int], prefix: int = 0) -> str | None:
        """The path of the first module that gives NaN or infinity for these rows, computed again."""
        with torch.no_grad():
            outputs = self._outputs(ids_T, lengths, prefix)
            return next((name for name, states in outputs if not states.isfinite().all()), None)

    def _outputs(self, ids_T: Tensor, lengths: Sequence[int], prefix: int) -> Iterator[tuple[str, Tensor]]:
        """What each module gives, in the order in which they are computed."""
        turn = Turn(*self.rope.for_rows(lengths, prefix))
        rows = PackRows(lengths, prefix, self.device)
        plain: dict[str, Any] = {"adapted": self.adapted, "dropouts": None}
        hidden_TH = self.embed(ids_T)
        yield self.embedding.path, hidden_TH
        for layer in self.layers:
            stacked = self._query_key_value(layer, hidden_TH, None)
            yield layer.qkv.name, stacked
            mixed, _ = self._attend(layer, stacked, turn, rows)
            yield layer.qkv.path, mixed
            hidden_TH = layer.output(mixed, before=None, residual_TO=hidden_TH, **plain)
            yield layer.output.name, hidden_TH
            gated = layer.gate_up(hidden_TH, before=layer.mlp_norm, residual_TO=None, **plain)
            yield layer.gate_up.name, gated
            hidden_TH = layer.down(gated, before=self._gate, residual_TO=hidden_TH, **plain)
            yield layer.down.name, hidden_TH
        yield self.final_norm.path, self.finish(hidden_TH)

    def embed(self, ids_T: Tensor) -> Tensor:
        if self.adapted and self.embedding.trained is not None:
            return torch.nn.functional.embedding(ids_T, self.embedding.trained).to(self.dtype)
        return self.embedding.weight.rows(ids_T)

    def finish(self, hidden_MH: Tensor) -> Tensor:
        """The final norm: what the head sees."""
        return self.final_norm(hidden_MH, self.adapted)

    def head_weight(self) -> Tensor | FrozenLinear:
        """The head [V, H]: its trained copy (float32) or the frozen weight."""
        if self.adapted and self.head.trained is not None:
            return self.head.trained
        return self.head.weight

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Float32 logits [M, V] of hidden states that come from `hidden` or `next_hidden`."""
        head, states_MH = self.head_weight(), self.finish(hidden_MH)
        if isinstance(head, Tensor):
            return products.logits(states_MH, head.to(self.dtype))
        return head.logits(states_MH)

    @property
    def frozen_bytes(self) -> int:
        """Of the frozen weights of layers, embedding and head, as they are stored."""
        tables = {id(table.weight): table.weight.nbytes for table in (self.embedding, self.head)}
        return sum(group.linear.weight.nbytes for group in self.projections()) + sum(tables.values())

    def projections(self) -> list[Projections]:
        return [group for layer in self.layers for group in layer.projections()]

    def norms(self) -> list[NormSlot]:
        return [slot for layer in self.layers for slot in layer.norms()] + [self.final_norm]

    def slots(self) -> list[NormSlot | Table]:
        """Everything that can be trained in full: embedding, head, norms."""
        return [self.embedding, self.head, *self.norms()]

    def _query_key_value(self, layer: Layer, hidden_TH: Tensor, dropouts: Dropouts | None) -> Tensor:
        """Query, key and value of every head, stacked, not yet turned."""
        stacked = layer.qkv(
            hidden_TH,
            before=layer.attention_norm,
            residual_TO=None,
            adapted=self.adapted,
            dropouts=dropouts,
        )
        if layer.query_norm is None or layer.key_norm is None:
            return stacked
        query, key, value = self._heads.parts(stacked)
        norms = layer.query_norm.norm(self.adapted), layer.key_norm.norm(self.adapted)
        if dispatch.norm_in_place(query, norms[0]) and dispatch.norm_in_place(key, norms[1]):
            return stacked
        normed = layer.query_norm(query, self.adapted), layer.key_norm(key, self.adapted), value
        return torch.cat([part.flatten(1) for part in normed], 1)

    def _attend(self, layer: Layer, stacked: Tensor, turn: Turn, rows: PackRows) -> tuple[Tensor, Tensor]:
        """What the heads mix [T, N * D], and the stacked query, key and value, turned."""
        heads, scale = self._heads, self.spec.attention_scale
        if dispatch.attends(stacked, heads):
            mixed = dispatch.turn_and_attend(stacked, heads, turn, rows, scale=scale, window=layer.window)
            return mixed, stacked
        query, key, value = heads.parts(stacked)
        query, key = dispatch.rotate(query, *turn), dispatch.rotate(key, *turn)
        mixed = attend(query, key, value, rows.groups, scale=scale, window=layer.window)
        return mixed, torch.cat([part.flatten(1) for part in (query, key, value)], 1)

    def _finish_layer(
        self, layer: Layer, hidden_TH: Tensor, mixed_TA: Tensor, dropouts: Dropouts | None
    ) -> Tensor:
        hidden_TH = layer.output(
            mixed_TA, before=None, residual_TO=hidden_TH, adapted=self.adapted, dropouts=dropouts
        )

        def gate_up(hidden_TH: Tensor) -> Tensor:
            return layer.gate_up(
                hidden_TH, before=layer.mlp_norm, residual_TO=None, adapted=self.adapted, dropouts=dropouts
            )

        again = None
        if self.recompute == "mlp" and torch.is_grad_enabled():
            again = partial(gate_up, hidden_TH.detach())
        return layer.down(
            gate_up(hidden_TH),
            before=self._gate,
            residual_TO=hidden_TH,
            adapted=self.adapted,
            dropouts=dropouts,
            again=again,
        )
