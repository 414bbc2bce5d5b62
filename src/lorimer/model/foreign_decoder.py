"""A model of transformers behind the decoder's methods.

Its linear layers are computed by lorimer's, so adapters, dropout and quantised weights are the same; all
else is transformers' own code. Rows are computed in batches of like length, padded on the right: a token
sees only what stands before it, so no mask is needed, and `foreign_decoder` finds out whether that is so.

Letters: T tokens, H hidden, M picked positions, B rows of a batch, S their longest, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorimer.config import QuantConfig
from lorimer.errors import UserError
from lorimer.kernels import dispatch
from lorimer.kernels.dispatch import Dropout, Linear, Norm
from lorimer.kernels.tables import TableUpdate, UpdatedHead
from lorimer.model.cache import KVCache
from lorimer.model.decoder import Decoder
from lorimer.model.foreign_cache import PAST, RowsCache
from lorimer.model.foreign_spec import ForeignLinear, ForeignSpec, read_shape, steady
from lorimer.model.parts import Dropouts, NormSlot, Projections, Table
from lorimer.model.rope import Ropes
from lorimer.quant.linear import DenseLinear, FrozenLinear, QuantLinear
from lorimer.quant.part import whole
from lorimer.quant.storage import quantise

# How far two ways to compute the same may be apart, as a share of the largest number.
APART = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Most padding of a batch of rows, as a share of their tokens.
PADDING = 0.25
# Far beyond every cap on logits.
LARGE = 1000.0


class NotCausal(ValueError):
    """A token's states depend on what follows it."""


class _Rows(Ropes):
    """transformers turns query and key itself; rows never share a prefix here."""

    def __init__(self, is_steady: bool) -> None:
        self.tables, self._steady = [], is_steady

    def shareable(self, lengths: Sequence[int]) -> bool:
        return False

    @property
    def steady(self) -> bool:
        return self._steady


class _Logits:
    """In place of a head whose own way from states to logits is not known: the states are the logits."""

    def logits(self, states_MV: Tensor) -> Tensor:
        return states_MV.float()

    def head_loss(
        self,
        hidden_MV: Tensor,
        labels_M: Tensor,
        *,
        weight: float,
        smoothing: float,
        need_grad: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            logits_MV = hidden_MV.detach().requires_grad_(need_grad)
            losses_M = nn.functional.cross_entropy(
                logits_MV.float(), labels_M, reduction="none", label_smoothing=smoothing
            )
            grad = torch.autograd.grad(losses_M.sum() * weight, logits_MV)[0] if need_grad else None
        return losses_M.detach(), grad


class _Embedding:
    """The model's embedding, with what training puts on its rows."""

    def __init__(self, module: Any, update: Callable[[], TableUpdate | None]) -> None:
        self.module, self.own, self.update = module, module.forward, update
        plain = type(module).forward is nn.Embedding.forward
        # transformers' classes that scale their rows call the factor so.
        self.scale = 1.0 if plain else getattr(module, "embed_scale", None)
        self.is_lookup = self.scale is not None and module.max_norm is None
        module.forward = self.forward

    def forward(self, ids: Tensor) -> Tensor:
        update = self.update()
        if update is None:
            return cast(Tensor, self.own(ids))
        rows_TH = nn.functional.embedding(ids.flatten(), self.module.weight)
        return update.rows(rows_TH, ids.flatten()).view(*ids.shape, -1) * (self.scale or 1.0)


class _Head:
    """The model's head: it sees only the positions that are wanted, and keeps what it saw of them."""

    def __init__(self, module: Any, update: Callable[[], TableUpdate | None]) -> None:
        self.module, self.own, self.update = module, module.forward, update
        self.want_M: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.states_MH: Tensor | None = None
        self.left_out = False  # its product is computed elsewhere
        self.boost = 1.0  # of its product, to see what the model does with large ones
        module.forward = self.forward

    def forward(self, states: Tensor) -> Tensor:
        if self.want_M is None or tuple(states.shape[:2]) != self.shape:
            return self._logits(states)
        self.states_MH = states.flatten(0, 1).index_select(0, self.want_M)
        if self.left_out:
            return states.new_zeros((1, 1, self.module.weight.shape[0]))
        logits = self._logits(self.states_MH[None])
        return logits if self.boost == 1.0 else logits * self.boost

    def _logits(self, states: Tensor) -> Tensor:
        logits, update = cast(Tensor, self.own(states)), self.update()
        return logits if update is None else update.onto_logits(logits, states, self.module.bias)


@dataclass(slots=True)
class ForeignDecoder(Decoder):
    """Made by `foreign_decoder`. `hidden` gives states of the head's input or, if the head does more than
    a product, the logits themselves; `finish`, `head_weight` and `logits` go on from there."""

    model: Any = None
    linears: list[Projections] = field(default_factory=list)
    found_norms: list[NormSlot] = field(default_factory=list)
    found_tables: list[Table] = field(default_factory=list)
    pads: bool = False  # whether a row is the same beside longer ones
    caches: bool | None = None  # whether transformers' cache gives what a whole row gives
    plain: bool = False  # whether logits are the head's product, scaled or capped
    says: dict[str, Any] = field(default_factory=dict)  # arguments that its forward takes
    _head: _Head = field(init=False)
    _embedding: _Embedding = field(init=False)
    _masks: Callable[[int, int, int], Dropout] | None = None
    _zeros: list[Tensor] = field(default_factory=list)  # added to each linear layer's result, to be traced

    @property
    def native(self) -> bool:
        return False

    def why_no_update(self, path: str, dropout: float) -> str | None:
        if path == self.embedding.path and not self._embedding.is_lookup:
            return "its embedding does more than look rows up"
        if path == self.head.path and dropout and not self.plain and self.device.type != "meta":
            return "its head does more than a product, and `lora.dropout` is set"
        return None

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
        """As the native decoder's, each row from its own first token. Rows of which nothing is wanted are
        not computed; there is no shared prefix."""
        assert not prefix
        ends = torch.tensor(lengths).cumsum(0)
        wanted_M = torch.arange(len(ids_T)) if only_M is None else only_M.cpu()
        owner_M = torch.searchsorted(ends, wanted_M, right=True)
        counts = torch.tensor(lengths)
        starts = ends - counts
        masks = None if dropouts is None else _Masks(dropouts, len(ids_T), self.linears)
        parts, places = [], []
        for rows in self._batches(lengths, set(owner_M.tolist()), padded=cache is None):
            index = torch.tensor(rows)
            length = int(counts[index].max())
            # Past its end a row repeats its last token, which nothing sees.
            steps = torch.minimum(torch.arange(length), counts[index].unsqueeze(1) - 1)
            index_BS = (starts[index].unsqueeze(1) + steps).to(self.device)
            place_M = torch.isin(owner_M, index).nonzero().squeeze(1)
            row_M = torch.searchsorted(index, owner_M[place_M])
            flat_M = row_M * length + wanted_M[place_M] - starts[owner_M[place_M]]
            given = ids_T[index_BS], flat_M.to(self.device), masks and masks.of(index_BS)
            if cache is None:
                parts.append(self._computed(*given))
            else:
                assert isinstance(cache, RowsCache)
                states, past = self.run(*given, keep=bool(self.caches))
                cache.add([cache_rows[row] for row in rows], given[0], past)
                parts.append(states)
            places.append(place_M)
        order = torch.cat(places).argsort().to(self.device)
        return torch.cat(parts).index_select(0, order)

    def _batches(self, lengths: Sequence[int], wanted: set[int], *, padded: bool) -> list[list[int]]:
        """Rows to be computed side by side, each batch ascending: of one length, or padded a little.

        What is computed again is computed row by row, so that one row's states are held at a time.
        """
        batches: list[list[int]] = []
        tokens = 0
        alone = self.recompute in ("layers", "offload") and torch.is_grad_enabled()
        for row in sorted(wanted, key=lambda row: (lengths[row], row)):
            length = lengths[row]
            room = tokens * (1 + PADDING) if padded and self.pads else tokens
            # Rows come in order of length: this one would be the longest.
            if batches and not alone and length * (len(batches[-1]) + 1) <= room + length:
                batches[-1].append(row)
                tokens += length
            else:
                batches.append([row])
                tokens = length
        return [sorted(batch) for batch in batches]

    def _computed(self, ids_BS: Tensor, want_M: Tensor, masks: Any) -> Tensor:
        if self.recompute not in ("layers", "offload") or not torch.is_grad_enabled():
            return self.run(ids_BS, want_M, masks)[0]
        from torch.utils.checkpoint import checkpoint

        def again(ids_BS: Tensor, want_M: Tensor) -> Tensor:
            return self.run(ids_BS, want_M, masks)[0]

        states: Tensor = checkpoint(
            again, ids_BS, want_M, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )
        return states

    def run(
        self, ids_BS: Tensor, want_M: Tensor, masks: Any = None, *, past: Any = None, keep: bool = False
    ) -> tuple[Tensor, Any]:
        """States of the picked positions, and the cache that goes on after these tokens."""
        given = (
            {"input_ids": ids_BS} | self.says | ({"use_cache": keep} if "use_cache" in self.says else {})
        )
        if past is not None:
            given[past[0]] = past[1]
        head = self._head
        head.want_M, head.shape, head.states_MH = want_M, tuple(ids_BS.shape), None
        self._masks = masks
        try:
            out = torch.func.functional_call(self.model, self._trained(), (), given, strict=False)
        except IndexError as error:
            raise UserError(
                f"a row of {ids_BS.shape[1]:,} tokens is longer than the model's positions",
                fix="Lower `data.max_tokens`, or shorten the prompt.",
            ) from error
        finally:
            head.want_M = self._masks = None
        found = next(((name, out[name]) for name in PAST if out.get(name) is not None), None)
        states_MH, head.states_MH = head.states_MH, None
        if states_MH is not None and self.plain:
            return states_MH, found
        if states_MH is not None:
            return out.logits.flatten(0, -2), found
        return out.logits.flatten(0, 1).index_select(0, want_M), found

    def _trained(self) -> dict[str, Tensor]:
        """What is trained in full, by its names in the model, in the types that the model computes in."""
        found: dict[str, Tensor] = {}
        for slot in self.slots() if self.adapted else ():
            values = {"weight": slot.trained}
            if isinstance(slot, NormSlot):
                values["bias"] = slot.trained_bias
            for kind, value in values.items():
                if value is not None:
                    name = f"{slot.path}.{kind}"
                    found[name] = value.to(self.model.get_parameter(name).dtype)
        return found

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        if self.caches is None:
            self.caches = self.rope.steady and self._cache_is_right()
        return RowsCache(rows)

    def _cache_is_right(self) -> bool:
        """Whether a token after a cache has the states that it has at the end of its whole row."""
        ids_BS = self._probe_ids()
        last = torch.tensor([ids_BS.shape[1] - 1], device=self.device)
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            with torch.no_grad():
                whole_1H, _ = self.run(ids_BS[:1], last)
                _, past = self.run(ids_BS[:1, :-1], first, keep=True)
                if past is None:
                    return False
                after_1H, _ = self.run(ids_BS[:1, -1:], first, past=past, keep=True)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False
        return not self._apart(after_1H, whole_1H)

    def next_hidden(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        assert isinstance(cache, RowsCache)
        out_B: list[Tensor] = [torch.empty(0)] * len(ids_B)
        for group in cache.groups:
            group.ids_BS = torch.cat([group.ids_BS, group.next_ids(ids_B)], 1)
            size, length = group.ids_BS.shape
            if group.past is None:
                given = group.ids_BS, torch.arange(1, size + 1, device=self.device) * length - 1
            else:
                given = group.ids_BS[:, -1:], torch.arange(size, device=self.device)
            states_BH, past = self.run(*given, past=group.past, keep=group.past is not None)
            group.past = past if group.past is not None else None
            for row, states in zip(group.rows, states_BH, strict=True):
                if row is not None:
                    out_B[row] = states
        cache.lengths = [length + 1 for length in cache.lengths]
        return torch.stack(out_B)

    def finish(self, hidden_MH: Tensor) -> Tensor:
        if not self.plain:
            return hidden_MH
        scale, states_MH = self.spec.logit_scale, hidden_MH.to(self.head.weight.dtype)
        return states_MH if scale == 1.0 else dispatch.scaled(states_MH, scale)

    def head_weight(self) -> Tensor | FrozenLinear | UpdatedHead:
        return Decoder.head_weight(self) if self.plain else cast(FrozenLinear, _Logits())

    def first_not_finite(self, ids_T: Tensor, lengths: Sequence[int], prefix: int = 0) -> str | None:
        found: list[str] = []

        def watch(path: str) -> Any:
            def look(module: Any, given: Any, output: Any) -> None:
                if (
                    isinstance(output, Tensor)
                    and output.is_floating_point()
                    and not output.isfinite().all()
                ):
                    found.append(path)

            return look

        leaves = [(path, m) for path, m in self.model.named_modules() if not any(m.children())]
        hooks = [module.register_forward_hook(watch(path)) for path, module in leaves]
        try:
            with torch.no_grad():
                self.hidden(ids_T, lengths)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def tables(self) -> list[Table]:
        return [self.embedding, *self.found_tables, self.head]

    def projections(self) -> list[Projections]:
        return self.linears

    def norms(self) -> list[NormSlot]:
        return self.found_norms

    def linear(self, path: str) -> Projections | None:
        """The linear layer at this path, if lorimer computes it."""
        return next((group for group in self.linears if group.name == path), None)

    def lies_across(self, path: str) -> bool:
        """Whether the model has this layer's weight as [inputs, outputs]."""
        return any(linear.across for linear in self.shape.linears if linear.path == path)

    @property
    def shape(self) -> ForeignSpec:
        assert isinstance(self.spec, ForeignSpec)
        return self.spec

    @property
    def frozen_bytes(self) -> int:
        """Of all weights, as they are stored."""
        held = sum(group.linear.weight.nbytes for group in self.linears)
        inside = {f"{group.path}.{group.names[0]}.weight" for group in self.linears}
        others = [value for name, value in self.model.named_parameters() if name not in inside]
        return held + sum(int(value.nbytes) for value in others)

    @property
    def product_only(self) -> bool:
        """For certain only once tokens were looked at."""
        return getattr(self._head.module, "bias", None) is None

    def _probe_ids(self) -> Tensor:
        """Two rows of 8 tokens that begin with the same 5."""
        ids_BS = (torch.arange(16).view(2, 8) * 7 + 3) % self.spec.vocab_size
        ids_BS[1, :5] = ids_BS[0, :5]
        return ids_BS.to(self.device)

    def _apart(self, one: Tensor, other: Tensor) -> bool:
        """Whether two results differ by more than this type's rounding, or are no numbers."""
        limit = APART[self.dtype] * float(other.float().abs().max())
        return not float((one.float() - other.float()).abs().max()) <= max(limit, 1e-30)

    def look(self, config: dict[str, Any]) -> None:
        """Find out what this model does with rows, gradients and logits, on a few tokens.

        Raises NotCausal.
        """
        ids_BS = self._probe_ids()
        want_M = torch.arange(16, device=self.device)
        with torch.no_grad():
            logits_MV, _ = self.run(ids_BS, want_M)
            alone_MV, _ = self.run(ids_BS[:1, :5], want_M[:5])
        if self._apart(logits_MV[:5], logits_MV[8:13]):
            raise NotCausal
        self.pads = self.rope.steady and not self._apart(logits_MV[:5], alone_MV)
        self._find_gradients(ids_BS, want_M)
        self._find_logits(ids_BS, want_M, config)

    def _find_gradients(self, ids_BS: Tensor, want_M: Tensor) -> None:
        """Which linear layers a gradient reaches: some models have more than they use. An expert may be one
        that these few tokens do not take."""
        self._zeros = [torch.zeros((), device=self.device, requires_grad=True) for _ in self.linears]
        with torch.enable_grad():
            logits_MV, _ = self.run(ids_BS, want_M)
        logits_MV.float().square().sum().backward()
        for group, zero in zip(self.linears, self._zeros, strict=True):
            group.learns = zero.grad is not None or "expert" in group.path
        self._zeros = []

    def _find_logits(self, ids_BS: Tensor, want_M: Tensor, config: dict[str, Any]) -> None:
        """Whether logits are the head's product, times a factor or under a cap that the config names: seen
        on a product so large that a cap shows."""
        head, weight = self._head, self.head.weight
        seen: list[tuple[int, ...]] = []
        hook = head.module.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
        with torch.no_grad():
            self.run(ids_BS, want_M)
            hook.remove()
            if seen != [ids_BS.shape] or not self.product_only:
                return
            self.plain = True
            product_MV = weight.logits(self.run(ids_BS, want_M)[0].to(weight.dtype))
            self.plain = False
            head.boost = LARGE / max(float(product_MV.abs().max()), 1e-30)
            logits_MV, _ = self.run(ids_BS, want_M)
        for scale, cap in _ways(config):
            found_MV = product_MV * head.boost * scale
            if not self._apart((found_MV / cap).tanh() * cap if cap else found_MV, logits_MV):
                self.plain = head.left_out = True
                self.spec = replace(self.spec, logit_scale=scale, logit_cap=cap)
                break
        head.boost = 1.0


def _ways(config: dict[str, Any]) -> Iterator[tuple[float, float]]:
    """Factors and caps that a config may mean for its logits."""
    yield 1.0, 0.0
    numbers = {key: value for key, value in config.items() if isinstance(value, int | float) and value > 0}
    if "logit_scale" in numbers:
        yield float(numbers["logit_scale"]), 0.0
    if "logits_scaling" in numbers:
        yield 1.0 / float(numbers["logits_scaling"]), 0.0
    for key in ("final_logit_softcapping", "logits_soft_cap"):
        if key in numbers:
            yield 1.0, float(numbers[key])


class _Masks:
    """Dropout masks of a pack for the batches that its rows are computed in."""

    def __init__(self, dropouts: Dropouts, tokens: int, linears: Sequence[Projections]) -> None:
        self.dropouts, self.tokens, self.linears = dropouts, tokens, linears
        self.known: dict[int, Dropout] = {}

    def of(self, index_BS: Tensor) -> Callable[[int, int, int], Dropout]:
        def masks(number: int, inputs: int, tokens: int) -> Dropout:
            if number not in self.known:
                self.known[number] = self.dropouts(number, inputs, self.tokens)
            if tokens != index_BS.numel():
                path = self.linears[number].name
                raise UserError(
                    f"`lora.dropout` cannot be used on `{path}`: it sees only some of the tokens",
                    fix="Leave it out of `lora.target_modules`, or set `lora.dropout: 0`.",
                )
            known = self.known[number]
            return Dropout(known.pool_PI, known.picks_T[index_BS.flatten()])

        return masks


def foreign_decoder(
    model: Any,
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    quant: QuantConfig,
    slower: str,
) -> ForeignDecoder:
    """The decoder over a model of transformers, whose linear layers it takes over.

    Raises NotCausal, NotFinite for a weight that cannot be quantised, and what transformers raises.
    """
    spec = read_shape(model, config)
    embedding = Table(spec.names.embedding, DenseLinear(model.get_input_embeddings().weight.data))
    head = DenseLinear(model.get_output_embeddings().weight.data)
    decoder = ForeignDecoder(
        spec=spec,
        embedding=embedding,
        layers=[],
        final_norm=NormSlot("", Norm(torch.ones(0), 0.0)),
        head=Table(spec.names.head, embedding.weight if spec.tied_head else head),
        rope=_Rows(steady(config)),
        dtype=dtype,
        device=device,
        slower=slower,
        model=model,
        found_tables=[
            Table(path, DenseLinear(model.get_submodule(path).weight.data)) for path in spec.more_tables
        ],
        found_norms=[_norm(path, model.get_submodule(path)) for path in spec.norm_paths],
    )
    arguments = inspect.signature(model.forward).parameters
    decoder.says = {"use_cache": False} if "use_cache" in arguments else {}
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    decoder._embedding = _Embedding(
        tables[0], lambda: decoder.embedding.update if decoder.adapted else None
    )
    decoder._head = _Head(tables[1], lambda: decoder.head.update if decoder.adapted else None)
    for number, linear in enumerate(spec.linears):
        _take_over(decoder, number, linear, quant)
    if not decoder.linears:
        raise ValueError("it has no linear layer that can carry an adapter")
    if device.type != "meta":
        decoder.look(config)
    return decoder


def _norm(path: str, module: Any) -> NormSlot:
    bias = getattr(module, "bias", None)
    weight = module.weight.data.float()
    return NormSlot(path, Norm(weight, 0.0, bias_H=None if bias is None else bias.data.float()))


def _take_over(decoder: ForeignDecoder, number: int, linear: ForeignLinear, quant: QuantConfig) -> None:
    """Let lorimer compute one linear layer of the model, its weight quantised if asked."""
    group = linear.group
    module = decoder.model.get_submodule(linear.path)
    weight_OI = module.weight.data
    if linear.across:
        weight_OI = weight_OI.t().contiguous()
    frozen: FrozenLinear = DenseLinear(weight_OI)
    if quant.kind != "none":
        part = quantise(whole(weight_OI.float().cpu()), (weight_OI.shape[0], weight_OI.shape[1]), quant)
        frozen = QuantLinear([part.to(decoder.device)], weight_OI.dtype)
    if linear.across or quant.kind != "none":
        module.weight.data = weight_OI.new_empty(0)
    projections = Projections(
        path=group.path,
        names=group.names,
        rows=group.rows,
        inputs=group.inputs,
        number=number,
        linear=Linear(frozen, None if module.bias is None else module.bias.data),
        layer=linear.layer,
        attention=group.attention,
    )
    decoder.linears.append(projections)

    def forward(states: Tensor) -> Tensor:
        states_TI = states.reshape(-1, group.inputs).contiguous()
        if not len(states_TI):
            return states.new_empty((*states.shape[:-1], *group.rows))
        output_TO = projections(
            states_TI,
            before=None,
            residual_TO=None,
            adapted=decoder.adapted,
            dropouts=decoder._masks,
        )
        if decoder._zeros:
            output_TO = output_TO + decoder._zeros[number]
        return output_TO.view(*states.shape[:-1], -1)

    module.forward = forward
