"""Weights streamed from a base into a decoder, one tensor at a time, quantised as they arrive if asked.

Linear layers that share an input are stacked as they arrive, so no second copy of a layer exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorimer.bases.open import BaseFiles
from lorimer.config import QuantConfig
from lorimer.errors import BaseError, UserError
from lorimer.kernels.allocator import give_back_freed_memory, keep_freed_memory
from lorimer.kernels.dispatch import Linear, Norm
from lorimer.machine import native_bf16
from lorimer.model.decoder import Decoder
from lorimer.model.families import read_spec, why_not_native
from lorimer.model.order import file_order, lies_across, pairs_apart, stack_order, weight_order
from lorimer.model.parts import Experts, Layer, NormSlot, Projections, Table
from lorimer.model.rope import Ropes
from lorimer.model.spec import Group, ModelSpec
from lorimer.model.tensors import check_tensors
from lorimer.quant import bnb
from lorimer.quant.gguf_blocks import BLOCKS, dequantise, stored
from lorimer.quant.linear import DenseLinear, FrozenLinear, QuantLinear
from lorimer.quant.part import NotFinite, Part, whole
from lorimer.quant.storage import is_finite, keep, numbers, quantise

NOT_QUANTISED = QuantConfig()
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NOT_NUMBERS = ("I64", "I32", "I16", "BOOL")
STRETCH = 1 << 21  # numbers of a weight that are float32 at once while it is read


class Place(NamedTuple):
    """Where a model is computed and in which type."""

    device: torch.device
    dtype: torch.dtype


def check_ids(base: BaseFiles, ids: Sequence[int] | np.ndarray[Any, Any], place: str) -> None:
    """Raise BaseError, naming the text at `place`, for a token that the embedding has no row for."""
    rows, last = base.config.get("vocab_size"), int(np.asarray(ids).max(initial=0))
    if isinstance(rows, int) and last >= rows:
        raise BaseError(
            f"{place}: the tokenizer gives the id {last:,}, and the embedding has {rows:,} rows",
            fix="The tokenizer is another model's, or had tokens added that the model was never given.",
            path=base.path,
        )


def choose_place(device: str = "auto", dtype: str = "auto") -> Place:
    """The device and type asked for; `auto` is the first GPU if any, and bf16 where it is native, else fp16
    on a GPU and fp32 on a CPU."""
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"the device `{device}` cannot be used on this machine (`train.device`)",
            fix="Wanted: auto, cpu, cuda, cuda:1 or mps; `lorimer doctor` says what is here.",
        ) from error
    if dtype == "auto":
        if chosen.type == "cuda":
            dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            dtype = "bf16" if native_bf16() else "fp32"
    if dtype not in TYPES:
        raise UserError(f"the type `{dtype}` is not known (wanted: auto, bf16, fp16 or fp32)")
    return Place(chosen, TYPES[dtype])


def read_weight(base: BaseFiles, spec: ModelSpec, name: str) -> Tensor:
    """One tensor of a base by its Hugging Face name, float32: rows in Hugging Face's order, a linear weight
    as [outputs, inputs]."""
    entry = base.tensors[name]
    if bnb.stored_kind(base, name):
        part = bnb.read_part(base, name)
        return numbers(part, 0, part.shape[0])
    value = dequantise(base.raw(name), entry.dtype, entry.shape)
    if lies_across(base, spec, name):
        value = value.t()
    return picked(value, file_order(base, spec, name))


def trained_weight(base: BaseFiles, spec: ModelSpec, name: str, quant: QuantConfig) -> Tensor:
    """The numbers that a weight stands for once it is stored so: what an adapter was trained on."""
    value = read_weight(base, spec, name)
    table = name.removesuffix(".weight") in (spec.names.embedding, spec.names.head)
    plain = spec.names.positions and name == f"{spec.names.positions}.weight"
    if quant.kind in ("none", "keep") or value.dim() != 2 or plain or not is_projected(spec, name):
        return value
    if table and not quant.embeddings:
        return value
    order = weight_order(spec, name)
    value = picked(value, order)
    part = quantise(whole(value), (value.shape[0], value.shape[1]), quant)
    found = numbers(part, 0, part.shape[0])
    return found if order is None else found.index_select(0, order.argsort())


def is_router(spec: ModelSpec, name: str) -> bool:
    """Whether this is the weight of a router, which is never quantised."""
    return spec.experts is not None and name.endswith(f".{spec.names.router}.weight")


def is_projected(spec: ModelSpec, name: str) -> bool:
    """Whether a matrix of the files is a projection's or a table's: no router, no norms of heads."""
    inside = name.removesuffix(".weight")
    return not is_router(spec, name) and not any(
        inside.endswith(f".{norm}") for norm, _ in spec.head_norms()
    )


def picked(value: Tensor, order: Tensor | None) -> Tensor:
    return value if order is None else value.index_select(0, order)


def stored_shape(base: BaseFiles, spec: ModelSpec, name: str) -> tuple[int, ...]:
    """The shape of a tensor of the base as `read_weight` gives it."""
    shape = bnb.stored_shape(base, name)
    return shape[::-1] if lies_across(base, spec, name) else shape


def kept_kind(base: BaseFiles, name: str) -> str | None:
    """The quantised storage that the base has for a weight, if it has one."""
    entry = base.tensors.get(name)
    if entry is not None and base.kind == "gguf":
        return entry.dtype if entry.dtype in BLOCKS else None
    return bnb.stored_kind(base, name)


@dataclass(slots=True)
class Reader(ABC):
    """Where a decoder's parts come from, and how they are stored."""

    spec: ModelSpec
    place: Place
    quant: QuantConfig
    _groups: int = field(default=0, init=False)

    @abstractmethod
    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor, float32."""

    @abstractmethod
    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        """A weight's rows in the type that they lie in, in stretches where they can be read so: a
        vocabulary's table is larger than several layers."""

    def release(self) -> None:  # noqa: B027
        """Give back what reading took; most have nothing to."""

    def part(self, name: str, shape: tuple[int, int], order: Tensor | None = None) -> Part:
        """The weight in quantised storage, its rows in this order of the file's. Raises NotFinite."""
        rows = partial(self._ordered, name, shape, order)
        return quantise(rows, shape, self.quant).to(self.place.device)

    def _ordered(self, name: str, shape: tuple[int, int], order: Tensor | None) -> Iterator[Tensor]:
        """The rows in this order; one that is not the file's needs the whole weight at once."""
        if order is None:
            yield from self.rows(name, shape)
            return
        parts = list(self.rows(name, shape))
        if parts:
            yield torch.cat(parts).index_select(0, order)

    def quantises(self, names: list[str]) -> bool:
        """Whether these weights, stacked, are stored quantised."""
        return self.quant.kind != "none"

    def norm(self, path: str, size: int) -> NormSlot:
        spec = self.spec
        kinds = ("weight", "bias") if spec.norm_bias else ("weight",)
        read = [self.tensor(f"{path}.{kind}", (size,)) for kind in kinds]
        weight, *bias = (value.to(self.place.device, torch.float32).clone() for value in read)
        norm = Norm(
            *(weight, spec.norm_eps, spec.norm_offset, spec.norm == "layer"), bias[0] if bias else None
        )
        return NormSlot(path, norm)

    def head_norms(self, path: str, heads: int) -> NormSlot:
        """A weight for each head, [heads, D]; features that turn together lie as in the stack."""
        spec, size = self.spec, self.spec.head_dim
        if "{}" in path:
            weight_ND = torch.stack(
                [self.tensor(f"{path.format(n)}.weight", (size,)) for n in range(heads)]
            )
        else:
            weight_ND = self.tensor(f"{path}.weight", (heads, size))
        if spec.rope_pairs:
            weight_ND = weight_ND.index_select(1, pairs_apart(size, spec.rope.dimensions))
        weight_ND = weight_ND.to(self.place.device, torch.float32).clone()
        return NormSlot(path, Norm(weight_ND, spec.norm_eps, layer=True))

    def stacked(self, layer: int, group: Group, order: Tensor | None = None) -> Projections:
        """The linear layers of a group as one weight."""
        path = f"{self.spec.names.layers}.{layer}.{group.path}".removesuffix(".")
        paths = [f"{path}.{name}" for name in group.names]
        self._groups += 1
        projections = Projections(
            path=path,
            names=group.names,
            rows=group.rows,
            inputs=group.inputs,
            number=self._groups - 1,
            linear=Linear(None),  # type: ignore[arg-type]
            layer=layer,
            attention=group.attention,
            order_O=order,
        )
        orders = [projections.order(position) for position in range(len(group.names))]
        files, rows = [f"{p}.weight" for p in paths], group.rows
        if group.files:
            files = [f"{self.spec.names.layers}.{layer}.{file}.weight" for file in group.files]
            rows, orders = group.parts, [None] * len(files)
        projections.linear.weight = self.weight(files, rows, group.inputs, orders)
        if group.bias:
            found = [
                picked(self.tensor(f"{p}.bias", (count,)), here)
                for p, count, here in zip(paths, group.rows, orders, strict=True)
            ]
            projections.linear.bias_O = torch.cat(found).to(self.place.device, self.place.dtype)
        self.release()
        return projections

    def weight(
        self,
        names: list[str],
        rows: tuple[int, ...],
        inputs: int,
        orders: Sequence[Tensor | None] | None = None,
    ) -> FrozenLinear:
        """Weights that share an input, stacked by rows, each in its order of the file's rows."""
        orders = orders or [None] * len(names)
        given = list(zip(names, rows, orders, strict=True))
        if self.quantises(names):
            parts = [self.part(name, (count, inputs), order) for name, count, order in given]
            return QuantLinear(parts, self.place.dtype)
        weight_OI = torch.empty((sum(rows), inputs), dtype=self.place.dtype, device=self.place.device)
        for (name, _, order), part in zip(given, weight_OI.split(list(rows)), strict=True):
            self.dense(name, part, order)
        return DenseLinear(weight_OI)

    def table(self, path: str, rows: int) -> Table:
        name, shape = f"{path}.weight", (rows, self.spec.hidden_size)
        # Positions are few, and read by row alone.
        if self.quant.embeddings and path != self.spec.names.positions:
            weight = self.weight([name], shape[:1], shape[1])
        else:
            value = torch.empty(shape, dtype=self.place.dtype, device=self.place.device)
            self.dense(name, value)
            weight = DenseLinear(value)
        self.release()
        return Table(path, weight)

    def dense(self, name: str, out: Tensor, order: Tensor | None = None) -> None:
        """The weight's numbers into `out`, a stretch at a time."""
        start = 0
        for stretch in self._ordered(name, (out.shape[0], out.shape[1]), order):
            out[start : start + len(stretch)] = stretch
            start += len(stretch)


@dataclass(slots=True)
class FileReader(Reader):
    """Tensors of one base by their Hugging Face names, checked against the shape wanted."""

    base: BaseFiles

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.base.tensors:
            fix = "A file of the base was not copied, or its config is another model's."
            raise BaseError(f"the weight `{name}` is missing", fix=fix, path=self.base.path)
        if self.base.tensors[name].dtype in NOT_NUMBERS:
            raise BaseError(
                f"the weight `{name}` is {self.base.tensors[name].dtype} (wanted: floating-point numbers)",
                fix="Get the model as safetensors from where it was published.",
                path=self.base.path,
            )
        found = stored_shape(self.base, self.spec, name)
        if found != shape:
            raise BaseError(
                f"the weight `{name}` has the shape {list(found)} (wanted: {list(shape)})",
                fix="The config and the weights do not belong together.",
                path=self.base.path,
            )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.check(name, shape)
        return read_weight(self.base, self.spec, name)

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        self.check(name, shape)
        entry = self.base.tensors[name]
        given = self.base, self.spec, name
        if bnb.stored_kind(self.base, name) or lies_across(*given) or file_order(*given) is not None:
            yield read_weight(self.base, self.spec, name)
            return
        count, width = entry.shape
        raw = self.base.raw(name).reshape(count, -1)
        step = max(1, STRETCH // width)
        for first in range(0, count, step):
            here = raw[first : first + step]
            yield stored(here.reshape(-1), entry.dtype, (len(here), width))

    def part(self, name: str, shape: tuple[int, int], order: Tensor | None = None) -> Part:
        """As the base has it, or made so."""
        if self.quant.kind != "keep":
            try:
                return Reader.part(self, name, shape, order)
            except NotFinite as error:
                raise self._not_finite(name) from error
        self.check(name, shape)
        kind = kept_kind(self.base, name)
        assert kind is not None
        if self.base.kind == "gguf":
            inside = file_order(self.base, self.spec, name)
            part = keep(
                self.base.raw(name), kind, shape, order if inside is None else picked(inside, order)
            )
        else:
            part = bnb.read_part(self.base, name)
        if not is_finite(part):
            raise self._not_finite(name)
        return part.to(self.place.device)

    def _not_finite(self, name: str) -> BaseError:
        return BaseError(
            f"the weight `{name}` holds NaN or infinity, which cannot be quantised",
            fix="Copy or download the base again.",
            path=self.base.path,
        )

    def quantises(self, names: list[str]) -> bool:
        """What is kept must be quantised in the base, in an order of rows that can be kept."""
        if self.quant.kind == "keep":
            orders = self.base.kind != "gguf" and any(weight_order(self.spec, n) is not None for n in names)
            return not orders and all(kept_kind(self.base, name) for name in names)
        return self.quant.kind != "none"

    def release(self) -> None:
        self.base.release()


class _Shapes(Reader):
    """Shapes alone: tensors without storage."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device="meta")

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        return iter(())


def skeleton(spec: ModelSpec, dtype: torch.dtype) -> Decoder:
    """The decoder of this spec with all its shapes and no numbers."""
    return assemble(_Shapes(spec, Place(torch.device("meta"), dtype), NOT_QUANTISED))


def load_decoder(base: BaseFiles, place: Place, quant: QuantConfig = NOT_QUANTISED) -> Decoder:
    """The base's weights as a decoder on this device, in this type, quantised as they are read if asked.

    Raises BaseError for an architecture that is not supported, weights that are missing, of the wrong
    shape, or not finite where they are quantised, and UserError if there is nothing to keep.
    """
    keep_freed_memory()
    if base.kind != "gguf" and (why := why_not_native(base.config)):
        from lorimer.model.foreign import load_foreign

        return load_foreign(base, place, quant, why)
    spec = read_spec(base.config, path=str(base.path))
    if quant.kind == "keep" and not any(kept_kind(base, name) for name in base.tensors):
        raise UserError(
            "`quant: keep` keeps a base as it is quantised, and this one is not",
            fix="Write `quant: nf4` to quantise it as it is loaded, or leave `quant` out.",
            path=base.path,
        )
    check_tensors(base, spec)
    decoder = assemble(FileReader(spec, place, quant, base))
    give_back_freed_memory()
    return decoder


def assemble(reader: Reader) -> Decoder:
    """A decoder of the reader's parts."""
    spec, place, names = reader.spec, reader.place, reader.spec.names
    embedding = reader.table(names.embedding, spec.vocab_size)
    positions = reader.table(names.positions, spec.learned_positions) if names.positions else None
    layers = [_layer(reader, number) for number in range(spec.layers)]
    head = (
        Table(names.head, embedding.weight) if spec.tied_head else reader.table(names.head, spec.vocab_size)
    )
    final_norm = reader.norm(names.final_norm, spec.hidden_size)
    reader.release()
    ropes = spec.ropes if any(layer.turn is not None for layer in layers) else ()
    return Decoder(
        spec=spec,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=head,
        rope=Ropes(ropes, place.dtype, place.device),
        dtype=place.dtype,
        device=place.device,
        positions=positions,
    )


def _layer(reader: Reader, number: int) -> Layer:
    spec, names = reader.spec, reader.spec.names
    path = f"{names.layers}.{number}"
    sizes = dict(spec.norms())
    norms = {name: reader.norm(f"{path}.{name}", size) for name, size in sizes.items()}
    norms |= {name: reader.head_norms(f"{path}.{name}", heads) for name, heads in spec.head_norms()}
    qkv, output = spec.attention_groups()
    return Layer(
        attention_norm=norms.get(names.attention_norm),
        qkv=reader.stacked(number, qkv, stack_order(spec)),
        query_norm=norms[names.query_norm] if spec.qk_norm else None,
        key_norm=norms[names.key_norm] if spec.qk_norm else None,
        output=reader.stacked(number, output),
        attention_post_norm=norms.get(names.attention_post_norm),
        mlp_norm=norms.get(names.mlp_norm),
        mlp=_mlp(reader, number),
        mlp_post_norm=norms.get(names.mlp_post_norm),
        window=spec.window(number),
        turn=spec.turn(number),
    )


def _mlp(reader: Reader, number: int) -> tuple[Projections, Projections] | Experts:
    spec, mixture = reader.spec, reader.spec.experts
    pairs = [
        (reader.stacked(number, up), reader.stacked(number, down)) for up, down in spec.mlp_groups(number)
    ]
    if mixture is None or number not in mixture.layers:
        return pairs[0]
    path = f"{spec.names.layers}.{number}"
    router = reader.tensor(f"{path}.{spec.names.router}.weight", (mixture.count, spec.hidden_size))
    router = router.to(reader.place.device, torch.float32).clone()
    return Experts(f"{path}.{spec.names.experts}", router, pairs, mixture.chosen, mixture.renormalise)
