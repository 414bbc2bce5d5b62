"""The trained parameters, and how they sit in the decoder.

All of them are views of one flat float32 buffer, and their gradients of another: the optimizer and
the gradient norm are one pass over each. The matrix products use copies in the activations' type,
refreshed after each change. BA is never added to W for training: early updates are smaller than
one unit in the last place of a bf16 weight and would vanish.

Letters: R stacked ranks, I input features, O stacked outputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorimer.errors import ConfigError
from lorimer.kernels.dispatch import Dropout, Linear
from lorimer.kernels.native.elementwise import ScaledCopies
from lorimer.kernels.native.library import usable
from lorimer.kernels.products import LowRank
from lorimer.kernels.tables import LowRankTable, OwnRows, TableUpdate
from lorimer.lora.targets import Target
from lorimer.model.decoder import Decoder
from lorimer.model.parts import Adapted, NormSlot, Projections, Table
from lorimer.model.spec import ModelSpec

# Distinct dropout masks per step; each token's mask is drawn from them. See LoraDropout.
MASKS = 4096
# PEFT's names of what it trains of an embedding, and of a table's rows.
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
OWN_ROWS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The shape of an adapter: rank and alpha for each module path, and what else is trained."""

    ranks: dict[str, int]
    alphas: dict[str, float]
    rslora: bool = False
    dropout: float = 0.0
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()  # whole paths
    tie: bool = False  # a tied embedding and head stay one tensor while trained
    # Ids whose rows are trained, for the paths of embedding and head; one that is tied to the embedding and
    # is not here has the embedding's.
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def scale(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA."""
        rank = self.ranks[path]
        return self.alphas[path] / (math.sqrt(rank) if self.rslora else rank)


@dataclass(slots=True)
class _Piece:
    """A trained tensor to be: its names are PEFT's without the `base_model.model.` in front."""

    name: str
    shape: tuple[int, ...]
    initial: Callable[[Tensor], object]


@dataclass(slots=True)
class Adapter:
    """The trained tensors by name, over one flat buffer; made by `inject`."""

    spec: LoraSpec
    flat: torch.nn.Parameter
    tensors: dict[str, Tensor]
    # Where rows lie in another order than in files: by name, which row of a file each row is.
    orders: dict[str, Tensor] = field(default_factory=dict)
    _groups: list[tuple[Projections, list[Target]]] = field(default_factory=list)
    _scaled: ScaledCopies | None = None

    @property
    def parameters(self) -> int:
        return self.flat.numel()

    def for_files(self, name: str) -> Tensor:
        """A trained tensor as files have it: rows in Hugging Face's order."""
        tensor, order = self.tensors[name].detach(), self.orders.get(name)
        return tensor if order is None else tensor.index_select(0, order.argsort())

    def take(self, name: str, value: Tensor) -> None:
        """Put a file's numbers in place of a trained tensor's; `refresh` must follow."""
        order = self.orders.get(name)
        with torch.no_grad():
            self.tensors[name].copy_(value if order is None else value.index_select(0, order))

    def refresh(self) -> None:
        """Bring the copies that matrix products use up to date with the parameters."""
        with torch.no_grad():
            one = next((target for _, target, _ in self._copies()), None)
            if usable(self.flat.data, one):
                self._native_copies().refresh()
            else:
                for source, target, scale in self._copies():
                    target.copy_(source if scale == 1.0 else source * scale)
            for group, _ in self._groups:
                adapted = group.adapted
                if adapted is not None and adapted.biases:
                    adapted.linear.bias_O = torch.cat(adapted.biases).to(group.linear.weight.dtype)

    def _copies(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Each factor, its place in a stacked copy, and its scale there."""
        for group, _ in self._groups:
            adapted = group.adapted
            low_rank = adapted.linear.low_rank if adapted is not None else None
            if adapted is None or low_rank is None:
                continue
            yield adapted.factors[0].detach(), low_rank.down_RI, 1.0
            for (row, rows, rank, ranks, scale), up in zip(
                low_rank.spans, adapted.factors[1:], strict=True
            ):
                yield up.detach(), low_rank.up_OR[row : row + rows, rank : rank + ranks], scale

    def _native_copies(self) -> ScaledCopies:
        if self._scaled is None:
            self._scaled = ScaledCopies(list(self._copies()))
        return self._scaled

    @property
    def decaying(self) -> int:
        """How many first numbers of the buffer decay: matrices; biases and norms follow."""
        return sum({t.data_ptr(): t.numel() for t in self.tensors.values() if t.dim() > 1}.values())

    @property
    def ups(self) -> slice:
        """Where the B factors lie in the buffer."""
        sizes = [
            sum(tensor.numel() for name, tensor in self.tensors.items() if kind in name)
            for kind in (".lora_A.", ".lora_B.")
        ]
        return slice(sizes[0], sum(sizes))


def inject(decoder: Decoder, targets: Sequence[Target], spec: LoraSpec, *, seed: int = 0) -> Adapter:
    """Put adapters on these layers of the decoder. At once they change nothing: B begins as zeros.

    A begins uniform in +-1/sqrt(inputs), as PEFT draws it, from a generator seeded by (seed, name).
    Raises ConfigError for a module to save that cannot be trained in full, and for LoRA on an embedding or
    head where the decoder cannot compute it.
    """
    groups = _by_group(decoder, targets, spec)
    pieces: list[_Piece] = []
    for group, members in groups:
        pieces += [_down_piece(target, group, spec, seed) for target in members]
        pieces += [
            _Piece(f"{t.path}.lora_B.weight", (t.outputs, spec.ranks[t.path]), torch.Tensor.zero_)
            for t in members
        ]
        pieces += _bias_pieces(group, members, spec)
    tables = {table.path: table for table in (decoder.embedding, decoder.head)}
    for path in tables:
        dropout = spec.dropout if path in spec.ranks else 0.0
        changed = path in spec.ranks or rows_owner(path, decoder.spec, spec)
        if changed and (why := decoder.why_no_update(path, dropout)):
            raise ConfigError(
                f"LoRA on `{path}`, or rows of it, cannot be trained here: {why}",
                fix="Name it in `lora.modules_to_save`, which trains it in full"
                + (", or set `lora.dropout: 0`." if dropout else "."),
            )
    for path, table in tables.items():
        if path in spec.ranks:
            pieces += _table_pieces(table, spec, seed, embedding=table is decoder.embedding)
        if ids := spec.tokens.get(path):
            pieces.append(_rows_piece(table, ids, decoder.device))
    slots = [slot for path in spec.modules_to_save for slot in find_slots(decoder, path)]
    head = decoder.head if spec.tie and any(slot is decoder.head for slot in slots) else None
    for slot in slots:
        if slot is not head:
            value = _slot_value(slot)
            pieces.append(_Piece(f"{slot.path}.weight", tuple(value.shape), _copy_from(value)))
    for norm in decoder.norms():
        if norm.frozen.bias_H is not None and (any(norm is slot for slot in slots) or spec.bias == "all"):
            bias = norm.frozen.bias_H
            pieces.append(_Piece(f"{norm.path}.bias", tuple(bias.shape), _copy_from(bias)))
    adapter = _allocate(pieces, spec, decoder.device)
    adapter._groups = groups
    adapter.orders = {
        f"{group.path}.{name}.{kind}": order
        for group, _ in groups
        for position, name in enumerate(group.names)
        for kind in ("lora_B.weight", "bias")
        if (order := group.order(position)) is not None
    }
    for group, members in groups:
        _attach(group, members, adapter)
    if head is not None:
        adapter.tensors[f"{head.path}.weight"] = adapter.tensors[f"{decoder.embedding.path}.weight"]
    for table in tables.values():
        table.update = _table_update(table, decoder, adapter)
    for slot in slots:
        slot.trained = adapter.tensors[f"{slot.path}.weight"]
    for norm in decoder.norms():
        norm.trained_bias = adapter.tensors.get(f"{norm.path}.bias")
    adapter.refresh()
    return adapter


def remove(decoder: Decoder) -> None:
    """Take every adapter off the decoder; its frozen weights were never changed."""
    for group in decoder.projections():
        group.adapted = None
    for slot in decoder.slots():
        slot.trained = None
        if isinstance(slot, NormSlot):
            slot.trained_bias = None
        else:
            slot.update = None


def _by_group(
    decoder: Decoder, targets: Sequence[Target], spec: LoraSpec
) -> list[tuple[Projections, list[Target]]]:
    chosen = {target.path for target in targets}
    groups = []
    for group in decoder.projections():
        members = [Target(group, i) for i in range(len(group.names))]
        members = [target for target in members if target.path in chosen]
        if members or (spec.bias == "all" and group.linear.bias_O is not None):
            groups.append((group, members))
    return groups


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _down_piece(target: Target, group: Projections, spec: LoraSpec, seed: int) -> _Piece:
    bound = 1.0 / math.sqrt(group.inputs)
    generator = _generator(seed, target.path)
    return _Piece(
        f"{target.path}.lora_A.weight",
        (spec.ranks[target.path], group.inputs),
        lambda tensor: tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)),
    )


def _table_pieces(table: Table, spec: LoraSpec, seed: int, *, embedding: bool) -> list[_Piece]:
    """LoRA on the embedding or the head. Of an embedding A is what begins as zeros, as in PEFT: a token
    that no row holds then keeps what it had, whatever becomes of B."""
    path, rank, (rows, columns) = table.path, spec.ranks[table.path], table.weight.shape
    generator = _generator(seed, path)
    if embedding:
        return [
            _Piece(f"{path}.{EMBEDDING_A}", (rank, rows), torch.Tensor.zero_),
            _Piece(
                f"{path}.{EMBEDDING_B}",
                (columns, rank),
                lambda tensor: tensor.copy_(torch.randn(tensor.shape, generator=generator)),
            ),
        ]
    bound = 1.0 / math.sqrt(columns)
    return [
        _Piece(
            f"{path}.lora_A.weight",
            (rank, columns),
            lambda t: t.copy_(torch.empty(t.shape).uniform_(-bound, bound, generator=generator)),
        ),
        _Piece(f"{path}.lora_B.weight", (rows, rank), torch.Tensor.zero_),
    ]


def _rows_piece(table: Table, ids: tuple[int, ...], device: torch.device) -> _Piece:
    rows_KH = table.weight.rows(torch.tensor(ids, device=device)).float()
    return _Piece(f"{table.path}.{OWN_ROWS}", tuple(rows_KH.shape), _copy_from(rows_KH))


def _table_update(table: Table, decoder: Decoder, adapter: Adapter) -> TableUpdate | None:
    """What is trained of the embedding or the head, unless that is all of it or nothing."""
    spec, tensors, path = adapter.spec, adapter.tensors, table.path
    embedding = table is decoder.embedding
    if path in spec.ranks:
        names = (EMBEDDING_A, EMBEDDING_B) if embedding else ("lora_A.weight", "lora_B.weight")
        a, b = (tensors[f"{path}.{name}"] for name in names)
        return TableUpdate(low_rank=LowRankTable(a, b, spec.scale(path), embedding))
    owner = rows_owner(path, decoder.spec, spec)
    if owner is None:
        return None
    ids_K = torch.tensor(spec.tokens[owner], device=decoder.device)
    places_V = torch.full((table.weight.shape[0],), -1, device=decoder.device)
    places_V[ids_K] = torch.arange(len(ids_K), device=decoder.device)
    return TableUpdate(own=OwnRows(ids_K, tensors[f"{owner}.{OWN_ROWS}"], places_V))


def rows_owner(path: str, model: ModelSpec, spec: LoraSpec) -> str | None:
    """Whose trained rows the embedding or the head has: its own, or a tied head the embedding's."""
    if path in spec.tokens:
        return path
    names = model.names
    shared = model.tied_head and path == names.head and path not in spec.modules_to_save
    return names.embedding if shared and names.embedding in spec.tokens and path not in spec.ranks else None


def _bias_pieces(group: Projections, members: Sequence[Target], spec: LoraSpec) -> list[_Piece]:
    if spec.bias == "none" or group.linear.bias_O is None:
        return []
    adapted = {target.name for target in members}
    parts = zip(group.names, group.linear.bias_O.split(group.rows), strict=True)
    return [
        _Piece(f"{group.path}.{name}.bias", tuple(part.shape), _copy_from(part))
        for name, part in parts
        if spec.bias == "all" or name in adapted
    ]


def _copy_from(source: Tensor) -> Callable[[Tensor], object]:
    return lambda tensor: tensor.copy_(source)


def find_slots(decoder: Decoder, name: str) -> list[NormSlot | Table]:
    """The norms, embedding or head meant by one entry of `modules_to_save`.

    Raises ConfigError if there is none.
    """
    slots = decoder.slots()
    found = [slot for slot in slots if slot.path == name or slot.path.endswith("." + name)]
    if not found:
        kinds = dict.fromkeys(slot.path.split(".")[-1] for slot in slots)
        raise ConfigError(
            f"`lora.modules_to_save` names `{name}`, which cannot be trained in full",
            fix=f"It can hold: {', '.join(kinds)}, or the whole path of one of them.",
        )
    return found


def saved_paths(decoder: Decoder, names: Sequence[str]) -> tuple[str, ...]:
    """Whole paths for `modules_to_save`. A tied embedding and head are trained as one, so one
    of them brings the other."""
    paths = list(dict.fromkeys(slot.path for name in names for slot in find_slots(decoder, name)))
    pair = [decoder.embedding.path, decoder.head.path]
    if decoder.spec.tied_head and any(path in paths for path in pair):
        paths += [path for path in pair if path not in paths]
    return tuple(paths)


def _slot_value(slot: NormSlot | Table) -> Tensor:
    return slot.weight_H if isinstance(slot, NormSlot) else slot.weight.dequantise(torch.float32)


def _allocate(pieces: list[_Piece], spec: LoraSpec, device: torch.device) -> Adapter:
    """One flat buffer, and for each piece a leaf tensor that is a view of it, gradient included."""
    pieces = sorted(pieces, key=_order)
    total = sum(math.prod(piece.shape) for piece in pieces)
    flat = torch.nn.Parameter(torch.empty(total, dtype=torch.float32, device=device))
    flat.grad = torch.zeros_like(flat)
    tensors = {}
    start = 0
    for piece in pieces:
        size = math.prod(piece.shape)
        tensors[piece.name] = _leaf(flat, start, piece.shape)
        with torch.no_grad():
            piece.initial(tensors[piece.name])
        start += size
    return Adapter(spec, flat, tensors)


def _order(piece: _Piece) -> int:
    """A, then B, then matrices trained in full, then biases and norms."""
    if len(piece.shape) < 2:
        return 3
    return next((n for n, kind in enumerate((".lora_A.", ".lora_B.")) if kind in piece.name), 2)


def _leaf(flat: torch.nn.Parameter, start: int, shape: tuple[int, ...]) -> Tensor:
    assert flat.grad is not None
    part = slice(start, start + math.prod(shape))
    leaf = flat.data[part].view(shape).requires_grad_()
    leaf.grad = flat.grad[part].view(shape)
    return leaf


def _attach(group: Projections, members: list[Target], adapter: Adapter) -> None:
    linear = Linear(group.linear.weight, group.linear.bias_O)
    group.adapted = Adapted(linear)
    if members:
        _attach_factors(group, members, adapter, group.adapted)
    names = [f"{group.path}.{name}.bias" for name in group.names]
    if group.linear.bias_O is not None and any(name in adapter.tensors for name in names):
        parts = group.linear.bias_O.float().split(group.rows)
        pairs = zip(names, parts, strict=True)
        group.adapted.biases = tuple(adapter.tensors.get(name, part) for name, part in pairs)


def _attach_factors(group: Projections, members: list[Target], adapter: Adapter, adapted: Adapted) -> None:
    spec = adapter.spec
    starts = [sum(group.rows[: target.position]) for target in members]
    ranks = [spec.ranks[target.path] for target in members]
    firsts = [sum(ranks[:i]) for i in range(len(ranks))]
    downs = [adapter.tensors[f"{target.path}.lora_A.weight"] for target in members]
    ups = [adapter.tensors[f"{target.path}.lora_B.weight"] for target in members]
    adapted.factors = (_neighbours(downs, adapter), *ups)
    dtype, device = group.linear.weight.dtype, adapter.flat.device
    adapted.linear.low_rank = LowRank(
        down_RI=torch.empty((sum(ranks), group.inputs), dtype=dtype, device=device),
        up_OR=torch.zeros((sum(group.rows), sum(ranks)), dtype=dtype, device=device),
        spans=tuple(
            (start, target.outputs, first, rank, spec.scale(target.path))
            for start, target, first, rank in zip(starts, members, firsts, ranks, strict=True)
        ),
    )


def _neighbours(parts: Sequence[Tensor], adapter: Adapter) -> Tensor:
    """One leaf over tensors that lie next to each other in the flat buffer, stacked by rows."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    return _leaf(adapter.flat, int(parts[0].storage_offset()), (rows, *parts[0].shape[1:]))


class LoraDropout:
    """Dropout masks as a function of (seed, step, row, position, module), never of hidden state.

    Each step draws a pool of MASKS masks for each input size; a token takes the one that a hash of
    its row, position and module points to. So masks are the same however a step is split or packed,
    and resuming needs nothing restored. Two tokens share a mask once in 4096 times. Projections that
    share an input share its mask.
    """

    def __init__(self, probability: float, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keep = 1.0 - probability
        self.seed, self.dtype, self.device = seed, dtype, device
        self._step = -1
        self._pools: dict[int, Tensor] = {}

    def for_pack(
        self, step: int, rows: Sequence[int], lengths: Sequence[int]
    ) -> Callable[[int, int, int], Dropout]:
        """The masks of one pack: call with a projection group's number, input size and tokens."""
        if step != self._step:
            self._step, self._pools = step, {}
        row_T = torch.repeat_interleave(torch.tensor(rows), torch.tensor(lengths))
        position_T = torch.cat([torch.arange(length) for length in lengths])

        def masks(number: int, inputs: int, tokens: int) -> Dropout:
            picks_T = _mix(row_T * 1_000_003 + position_T * 8191 + number * 131 + self.seed) % MASKS
            # A filler row may follow the pack's own: any mask will do for it.
            picks_T = torch.nn.functional.pad(picks_T, (0, tokens - len(picks_T)))
            return Dropout(self._pool(step, inputs), picks_T.to(self.device))

        return masks

    def _pool(self, step: int, inputs: int) -> Tensor:
        if inputs not in self._pools:
            generator = _generator(self.seed, f"dropout/{step}/{inputs}")
            kept = torch.rand((MASKS, inputs), generator=generator) < self.keep
            self._pools[inputs] = (kept / self.keep).to(self.device, self.dtype)
        return self._pools[inputs]


def _mix(value: Tensor) -> Tensor:
    """An integer hash (splitmix64's steps, wrapped to int64): neighbours land far apart."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ (value >> shift)) * factor
    return (value ^ (value >> 31)) & 0x7FFFFFFFFFFFFFFF
