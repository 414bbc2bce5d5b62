"""Weights streamed from a base into a decoder, one tensor at a time, quantised as they arrive if asked.

Linear layers that share an input are stacked as they arrive, so no second copy of a layer exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lorimer.bases.open import BaseFiles
from lorimer.config import QuantConfig
from lorimer.errors import BaseError, UserError
from lorimer.kernels.allocator import give_back_freed_memory, keep_freed_memory
from lorimer.kernels.dispatch import Linear
from lorimer.machine import native_bf16
from lorimer.model.decoder import Decoder, Layer, NormSlot, Projections, Table
from lorimer.model.families import read_spec
from lorimer.model.rope import RopeTables
from lorimer.model.spec import ModelSpec
from lorimer.quant import bnb
from lorimer.quant.gguf_blocks import BLOCKS, dequantise
from lorimer.quant.linear import DenseLinear, FrozenLinear, QuantLinear
from lorimer.quant.part import Part, whole
from lorimer.quant.storage import is_finite, keep, numbers, quantise

NOT_QUANTISED = QuantConfig()
STRETCH = 1 << 21  # numbers of a weight that are float32 at once while it is read


class Place(NamedTuple):
    """Where a model is computed and in which type."""

    device: torch.device
    dtype: torch.dtype


def choose_place(device: str = "auto", dtype: str = "auto") -> Place:
    """The device and type asked for; `auto` is the first GPU if any, and bf16 where it is native."""
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"the device `{device}` cannot be used on this machine",
            fix="Use `cpu`, or see what `lorimer doctor` finds.",
        ) from error
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if chosen.type == "cuda" else native_bf16()
        dtype = "bf16" if native else "fp32"
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in types:
        raise UserError(f"the type `{dtype}` is not known (wanted: auto, bf16 or fp32)")
    return Place(chosen, types[dtype])


def read_weight(base: BaseFiles, spec: ModelSpec, name: str) -> Tensor:
    """One tensor of a base by its Hugging Face name, float32, rows in Hugging Face's order."""
    entry = base.tensors[name]
    if bnb.stored_kind(base, name):
        part = bnb.read_part(base, name)
        return numbers(part, 0, part.shape[0])
    value = dequantise(base.raw(name), entry.dtype, entry.shape)
    heads = _paired_heads(base, spec, name)
    if heads is None:
        return value
    pairs: Tensor = value.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(value.shape)


def trained_weight(base: BaseFiles, spec: ModelSpec, name: str, quant: QuantConfig) -> Tensor:
    """The numbers that a weight stands for once it is stored so: what an adapter was trained on."""
    value = read_weight(base, spec, name)
    table = name in ("model.embed_tokens.weight", "lm_head.weight")
    if quant.kind in ("none", "keep") or value.dim() != 2 or (table and not quant.embeddings):
        return value
    part = quantise(whole(value), (value.shape[0], value.shape[1]), quant)
    return numbers(part, 0, part.shape[0])


def _paired_heads(base: BaseFiles, spec: ModelSpec, name: str) -> int | None:
    """GGUF files keep the query and key rows of Llama shapes in pairs, for llama.cpp's rotation: in how
    many heads."""
    if base.kind != "gguf" or spec.family not in ("llama", "mistral"):
        return None
    return {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.rpartition(".")[0].rpartition(".")[2])


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

    @abstractmethod
    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor, float32."""

    @abstractmethod
    def rows(self, name: str, shape: tuple[int, int], *, finite: bool = False) -> Iterator[Tensor]:
        """A weight's rows, float32, in stretches where they can be read so: a vocabulary's table is larger
        than several layers. With `finite`, raises BaseError for NaN and infinity."""

    def release(self) -> None:  # noqa: B027
        """Give back what reading took; most have nothing to."""

    def part(self, name: str, shape: tuple[int, int]) -> Part:
        """The weight in quantised storage."""
        part = quantise(partial(self.rows, name, shape, finite=True), shape, self.quant)
        return part.to(self.place.device)

    def quantises(self, names: list[str]) -> bool:
        """Whether these weights, stacked, are stored quantised."""
        return self.quant.kind != "none"

    def norm(self, path: str, size: int) -> NormSlot:
        weight = self.tensor(f"{path}.weight", (size,)).to(self.place.device, torch.float32)
        return NormSlot(path, weight.clone(), self.spec.norm_eps)

    def stacked(
        self, path: str, names: tuple[str, ...], rows: tuple[int, ...], inputs: int, number: int, bias: bool
    ) -> Projections:
        paths = [f"{path}.{name}" for name in names]
        bias_O = None
        if bias:
            found = [self.tensor(f"{p}.bias", (count,)) for p, count in zip(paths, rows, strict=True)]
            bias_O = torch.cat(found).to(self.place.device, self.place.dtype)
        weight = self.weight([f"{p}.weight" for p in paths], rows, inputs)
        self.release()
        return Projections(path, names, rows, inputs, number, Linear(weight, bias_O))

    def weight(self, names: list[str], rows: tuple[int, ...], inputs: int) -> FrozenLinear:
        """Weights that share an input, stacked by rows."""
        if self.quantises(names):
            parts = [self.part(name, (count, inputs)) for name, count in zip(names, rows, strict=True)]
            return QuantLinear(parts, self.place.dtype)
        weight_OI = torch.empty((sum(rows), inputs), dtype=self.place.dtype, device=self.place.device)
        for name, part in zip(names, weight_OI.split(list(rows)), strict=True):
            self.dense(name, part)
        return DenseLinear(weight_OI)

    def table(self, path: str) -> Table:
        name, shape = f"{path}.weight", (self.spec.vocab_size, self.spec.hidden_size)
        if self.quant.embeddings:
            weight = self.weight([name], shape[:1], shape[1])
        else:
            value = torch.empty(shape, dtype=self.place.dtype, device=self.place.device)
            self.dense(name, value)
            weight = DenseLinear(value)
        self.release()
        return Table(path, weight)

    def dense(self, name: str, out: Tensor) -> None:
        """The weight's numbers into `out`, a stretch at a time."""
        start = 0
        for stretch in self.rows(name, (out.shape[0], out.shape[1])):
            out[start : start + len(stretch)] = stretch
            start += len(stretch)


@dataclass(slots=True)
class FileReader(Reader):
    """Tensors of one base by their Hugging Face names, checked against the shape wanted."""

    base: BaseFiles

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.base.tensors:
            raise BaseError(f"the weight `{name}` is missing", path=self.base.path)
        found = bnb.stored_shape(self.base, name)
        if found != shape:
            raise BaseError(
                f"the weight `{name}` has the shape {list(found)} (wanted: {list(shape)})",
                fix="The config and the weights do not belong together.",
                path=self.base.path,
            )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.check(name, shape)
        return read_weight(self.base, self.spec, name)

    def rows(self, name: str, shape: tuple[int, int], *, finite: bool = False) -> Iterator[Tensor]:
        self.check(name, shape)
        for stretch in self._stretches(name):
            if finite and not torch.isfinite(stretch).all():
                raise self._not_finite(name)
            yield stretch

    def _stretches(self, name: str) -> Iterator[Tensor]:
        entry = self.base.tensors[name]
        if bnb.stored_kind(self.base, name) or _paired_heads(self.base, self.spec, name) is not None:
            yield read_weight(self.base, self.spec, name)
            return
        count, width = entry.shape
        raw = self.base.raw(name).reshape(count, -1)
        step = max(1, STRETCH // width)
        for first in range(0, count, step):
            here = raw[first : first + step]
            yield dequantise(here.reshape(-1), entry.dtype, (len(here), width))

    def part(self, name: str, shape: tuple[int, int]) -> Part:
        """As the base has it, or made so."""
        if self.quant.kind != "keep":
            return Reader.part(self, name, shape)
        self.check(name, shape)
        kind = kept_kind(self.base, name)
        assert kind is not None
        if self.base.kind == "gguf":
            part = keep(self.base.raw(name), kind, shape, _paired_heads(self.base, self.spec, name))
        else:
            part = bnb.read_part(self.base, name)
        if not is_finite(part):
            raise self._not_finite(name)
        return part.to(self.place.device)

    def _not_finite(self, name: str) -> BaseError:
        return BaseError(
            f"the weight `{name}` holds NaN or infinity, which cannot be quantised", path=self.base.path
        )

    def quantises(self, names: list[str]) -> bool:
        """What is kept must be quantised in the base."""
        if self.quant.kind == "keep":
            return all(kept_kind(self.base, name) for name in names)
        return self.quant.kind != "none"

    def release(self) -> None:
        self.base.release()


class _Shapes(Reader):
    """Shapes alone: tensors without storage."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device="meta")

    def rows(self, name: str, shape: tuple[int, int], *, finite: bool = False) -> Iterator[Tensor]:
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
    spec = read_spec(base.config, path=str(base.path))
    if quant.kind == "keep" and not any(kept_kind(base, name) for name in base.tensors):
        raise UserError(
            "`quant: keep` keeps a base as it is quantised, and this one is not",
            fix="Write `quant: nf4` to quantise it as it is loaded, or leave `quant` out.",
            path=base.path,
        )
    decoder = assemble(FileReader(spec, place, quant, base))
    give_back_freed_memory()
    return decoder


def assemble(reader: Reader) -> Decoder:
    """A decoder of the reader's parts."""
    spec, place = reader.spec, reader.place
    embedding = reader.table("model.embed_tokens")
    layers = [_layer(reader, number) for number in range(spec.layers)]
    head = Table("lm_head", embedding.weight) if spec.tied_head else reader.table("lm_head")
    final_norm = reader.norm("model.norm", spec.hidden_size)
    reader.release()
    return Decoder(
        spec=spec,
        embedding=embedding,
        layers=layers,
        final_norm=final_norm,
        head=head,
        rope=RopeTables(spec.rope, place.dtype, place.device),
        dtype=place.dtype,
        device=place.device,
    )


def _layer(reader: Reader, number: int) -> Layer:
    spec = reader.spec
    path = f"model.layers.{number}"
    attention, mlp = f"{path}.self_attn", f"{path}.mlp"
    hidden, inner = spec.hidden_size, spec.intermediate_size
    first = 4 * number
    return Layer(
        attention_norm=reader.norm(f"{path}.input_layernorm", hidden),
        qkv=reader.stacked(
            attention, ("q_proj", "k_proj", "v_proj"), spec.qkv_rows, hidden, first, spec.qkv_bias
        ),
        query_norm=reader.norm(f"{attention}.q_norm", spec.head_dim) if spec.qk_norm else None,
        key_norm=reader.norm(f"{attention}.k_norm", spec.head_dim) if spec.qk_norm else None,
        output=reader.stacked(
            attention, ("o_proj",), (hidden,), spec.qkv_rows[0], first + 1, spec.output_bias
        ),
        mlp_norm=reader.norm(f"{path}.post_attention_layernorm", hidden),
        gate_up=reader.stacked(
            mlp, ("gate_proj", "up_proj"), (inner, inner), hidden, first + 2, spec.mlp_bias
        ),
        down=reader.stacked(mlp, ("down_proj",), (hidden,), inner, first + 3, spec.mlp_bias),
        window=spec.window(number),
    )
