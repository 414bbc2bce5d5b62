"""The one decoder: it reads a ModelSpec and computes hidden states for packed rows.

A row of tokens passes, in this order: embedding; in each layer the norm with query, key and value
projections, rotation, attention, output projection onto the residual, the norm with gate and up
projections, the gated unit with the down projection onto the residual; the final norm; the head.
What an architecture does not have is left out, and what it adds stands in the same order.

Letters: T tokens, H hidden, N query heads, K key/value heads, D head size, M picked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lorimer.kernels import dispatch, products
from lorimer.kernels.dispatch import Gate, HeadNorms, Heads, Scores, Turn
from lorimer.kernels.native.library import computes
from lorimer.kernels.tables import UpdatedHead
from lorimer.model.attention import PackRows, attend, attend_cache
from lorimer.model.cache import KVCache
from lorimer.model.experts import mixture
from lorimer.model.parts import Dropouts, Experts, Layer, NormSlot, Projections, Table
from lorimer.model.recompute import kept_elsewhere, layer_again
from lorimer.model.rope import Ropes
from lorimer.model.spec import ModelSpec
from lorimer.quant.linear import FrozenLinear


class _Found(Exception):
    """The first module whose states are not finite."""


@dataclass(slots=True)
class Decoder:
    """A whole model. `adapted` false computes the base, with the same weights in memory."""

    spec: ModelSpec
    embedding: Table
    layers: list[Layer]
    final_norm: NormSlot
    head: Table
    rope: Ropes
    dtype: torch.dtype
    device: torch.device
    positions: Table | None = None
    adapted: bool = True
    recompute: str = "none"  # a rung of recompute.py
    slower: str | None = None  # why transformers computes it, in words; None for this decoder
    _gate: Gate = field(init=False)
    _heads: Heads = field(init=False)
    _watch: Callable[[str, Tensor], None] | None = None

    def __post_init__(self) -> None:
        self._gate = Gate(self.spec.activation, self.spec.gated)
        self._heads = Heads(self.spec.heads, self.spec.kv_heads, self.spec.head_dim)

    def why_no_update(self, path: str, dropout: float) -> str | None:
        """Why LoRA with this dropout, or rows of their own, cannot be computed on the embedding or head."""
        return None

    @property
    def product_only(self) -> bool:
        """Whether the head can be no more than a product."""
        return True

    @property
    def native(self) -> bool:
        """Whether the native kernels compute it all, to which every size of a pack is alike."""
        return computes(self.device, self.dtype)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Room for the keys and values of rows that are answered side by side."""
        return KVCache(self.spec, rows, capacity, self.dtype, self.device)

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
        turns = self.rope.for_rows(lengths, prefix)
        rows = PackRows(lengths, prefix, self.device)
        hidden_TH = self.embed(ids_T, rows)
        last = len(self.layers) - 1
        prunes = only_M is not None and dropouts is None and cache is None

        def run(number: int, hidden_TH: Tensor) -> Tensor:
            layer = self.layers[number]
            stacked = self._query_key_value(layer, hidden_TH, dropouts)
            mixed, stacked = self._attend(layer, stacked, turns, rows)
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
        turns = self.rope.at(cache.lengths)
        hidden_BH = self._embedded(ids_B, torch.tensor(cache.lengths, device=self.device))
        cache.lengths = [length + 1 for length in cache.lengths]
        lengths_B = torch.tensor(cache.lengths, device=self.device)

        def step(hidden_BH: Tensor, lengths_B: Tensor, *turning: Tensor) -> Tensor:
            turns = [Turn(*pair) for pair in zip(turning[::2], turning[1::2], strict=True)]
            for number, layer in enumerate(self.layers):
                stacked = self._query_key_value(layer, hidden_BH, None)
                turn = None if layer.turn is None else turns[layer.turn]
                query, key, value = dispatch.turned(stacked, self._heads, turn)
                cache.append(number, lengths_B, key, value)
                keys, values = cache.keys[number], cache.values[number]
                mixed = attend_cache(query, keys, values, lengths_B, self._scores(layer))
                hidden_BH = self._finish_layer(layer, hidden_BH, mixed, None)
            return hidden_BH

        return cache.tape(self.adapted)(step, hidden_BH, lengths_B, *(t for turn in turns for t in turn))

    def first_not_finite(self, ids_T: Tensor, lengths: Sequence[int], prefix: int = 0) -> str | None:
        """The path of the first module that gives NaN or infinity for these rows, computed again."""

        def watch(path: str, states: Tensor) -> None:
            if not states.isfinite().all():
                raise _Found(path)

        self._watch = watch
        try:
            with torch.no_grad():
                self.finish(self.hidden(ids_T, lengths, prefix=prefix))
        except _Found as found:
            return str(found)
        finally:
            self._watch = None
        return None

    def _seen(self, path: str, states: Tensor) -> Tensor:
        if self._watch is not None:
            self._watch(path, states)
        return states

    def embed(self, ids_T: Tensor, rows: PackRows) -> Tensor:
        """What the first layer sees of these packed rows: [T, H]."""
        return self._embedded(ids_T, rows.positions_T if self.positions else None)

    def _embedded(self, ids_T: Tensor, positions_T: Tensor | None) -> Tensor:
        spec = self.spec
        hidden_TH = self.embedding.rows(ids_T, self.dtype, adapted=self.adapted)
        if spec.embedding_scale != 1.0:
            # Rounded as the weights are: the original models keep it in their type.
            scale = torch.tensor(spec.embedding_scale, dtype=self.dtype)
            hidden_TH = dispatch.scaled(hidden_TH, float(scale))
        if self.positions is not None and positions_T is not None:
            places_T = positions_T + spec.first_position
            places_TH = self.positions.rows(places_T, self.dtype, adapted=self.adapted)
            hidden_TH = dispatch.add_scaled(hidden_TH, places_TH)
        return self._seen(self.embedding.path, hidden_TH)

    def finish(self, hidden_MH: Tensor) -> Tensor:
        """The final norm: what the head sees. The factor on logits, where there is one, is in it."""
        states_MH = self._seen(self.final_norm.path, self.final_norm(hidden_MH, self.adapted))
        scale = self.spec.logit_scale
        return states_MH if scale == 1.0 else dispatch.scaled(states_MH, scale)

    def head_weight(self) -> Tensor | FrozenLinear | UpdatedHead:
        """The head [V, H]: its trained copy (float32), or the frozen weight, perhaps with an update."""
        if self.adapted and self.head.trained is not None:
            return self.head.trained
        if self.adapted and self.head.update is not None:
            return UpdatedHead(self.head.weight, self.head.update)
        return self.head.weight

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Float32 logits [M, V] of hidden states that come from `hidden` or `next_hidden`."""
        head, states_MH = self.head_weight(), self.finish(hidden_MH)
        if isinstance(head, Tensor):
            logits_MV = products.logits(states_MH, head.to(self.dtype))
        else:
            logits_MV = head.logits(states_MH)
        cap = self.spec.logit_cap
        return logits_MV.div_(cap).tanh_().mul_(cap) if cap else logits_MV

    @property
    def frozen_bytes(self) -> int:
        """Of the frozen weights of layers, embedding and head, as they are stored."""
        tables = {id(table.weight): table.weight.nbytes for table in self.tables()}
        return sum(group.linear.weight.nbytes for group in self.projections()) + sum(tables.values())

    def tables(self) -> list[Table]:
        return [self.embedding, *([self.positions] if self.positions else []), self.head]

    def projections(self) -> list[Projections]:
        return [group for layer in self.layers for group in layer.projections()]

    def norms(self) -> list[NormSlot]:
        return [slot for layer in self.layers for slot in layer.norms()] + [self.final_norm]

    def slots(self) -> list[NormSlot | Table]:
        """Everything that can be trained in full: embedding, positions, head, norms."""
        return [*self.tables(), *self.norms()]

    def _query_key_value(self, layer: Layer, hidden_TH: Tensor, dropouts: Dropouts | None) -> Tensor:
        """Query, key and value of every head, stacked, not yet turned."""
        stacked = layer.qkv(
            hidden_TH,
            before=layer.attention_norm,
            residual_TO=None,
            adapted=self.adapted,
            dropouts=dropouts,
        )
        self._seen(layer.qkv.name, stacked)
        if layer.query_norm is None or layer.key_norm is None:
            return stacked
        query, key = layer.query_norm, layer.key_norm
        whole, own = self.spec.qk_norm == "all", self.spec.qk_norm == "own"
        norms = HeadNorms(query.norm(self.adapted), key.norm(self.adapted), whole, own)
        weights = query.parameters(self.adapted)[0], key.parameters(self.adapted)[0]
        return dispatch.norm_heads(stacked, self._heads, norms, weights)

    def _scores(self, layer: Layer) -> Scores:
        return Scores(self.spec.attention_scale, layer.window, self.spec.score_cap)

    def _attend(
        self, layer: Layer, stacked: Tensor, turns: Sequence[Turn], rows: PackRows
    ) -> tuple[Tensor, Tensor]:
        """What the heads mix [T, N * D], and the stacked query, key and value, turned."""
        heads, turn = self._heads, None if layer.turn is None else turns[layer.turn]
        if dispatch.attends(stacked, heads):
            mixed = dispatch.turn_and_attend(stacked, heads, turn, rows, self._scores(layer))
        else:
            query, key, value = heads.parts(stacked)
            if turn is not None:
                query, key = dispatch.rotate(query, *turn), dispatch.rotate(key, *turn)
            mixed = attend(query, key, value, rows.groups, self._scores(layer))
            stacked = torch.cat([part.flatten(1) for part in (query, key, value)], 1)
        return self._seen(layer.qkv.path, mixed), stacked

    def _finish_layer(
        self, layer: Layer, hidden_TH: Tensor, mixed_TA: Tensor, dropouts: Dropouts | None
    ) -> Tensor:
        output = partial(layer.output, mixed_TA, before=None, adapted=self.adapted, dropouts=dropouts)
        after_TH = self._added(hidden_TH, output, layer.attention_post_norm)
        self._seen(layer.output.name, after_TH)
        source_TH = hidden_TH if self.spec.parallel else after_TH
        if isinstance(layer.mlp, Experts):
            unit = self._experts(layer, layer.mlp, source_TH, dropouts)
            return self._seen(layer.mlp.path, self._added(after_TH, unit, layer.mlp_post_norm))
        up, down = layer.mlp

        def go_up(source_TH: Tensor) -> Tensor:
            return up(
                source_TH, before=layer.mlp_norm, residual_TO=None, adapted=self.adapted, dropouts=dropouts
            )

        again = None
        if self.recompute == "mlp" and torch.is_grad_enabled():
            again = partial(go_up, source_TH.detach())
        inner_TI = self._seen(up.name, go_up(source_TH))

        def go_down(residual_TO: Tensor | None) -> Tensor:
            return down(
                inner_TI,
                before=self._gate,
                residual_TO=residual_TO,
                adapted=self.adapted,
                dropouts=dropouts,
                again=again,
            )

        return self._seen(down.name, self._added(after_TH, go_down, layer.mlp_post_norm))

    def _added(self, residual_TH: Tensor, part: Callable[..., Tensor], norm: NormSlot | None) -> Tensor:
        """The residual with this part's result, normed or scaled where the architecture does so."""
        scale = self.spec.residual_scale
        if norm is None and scale == 1.0:
            return part(residual_TO=residual_TH)
        result = part(residual_TO=None)
        if norm is None:
            return dispatch.add_scaled(residual_TH, result, scale)
        if scale != 1.0:
            return dispatch.add_scaled(residual_TH, norm(result, self.adapted), scale)
        return norm.added(residual_TH, result, self.adapted)

    def _experts(
        self, layer: Layer, experts: Experts, source_TH: Tensor, dropouts: Dropouts | None
    ) -> Callable[..., Tensor]:
        """The mixture's result as a part that can be added."""

        def part(residual_TO: Tensor | None) -> Tensor:
            states_TH = source_TH if layer.mlp_norm is None else layer.mlp_norm(source_TH, self.adapted)
            mixed_TH = mixture(experts, states_TH, self._gate, adapted=self.adapted, dropouts=dropouts)
            return mixed_TH if residual_TO is None else residual_TO + mixed_TH

        return part
