"""Weights streamed from a base into a decoder, one tensor at a time.

Linear layers that share an input are stacked as they arrive, so no second copy of a layer exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorimer.bases.open import BaseFiles
from lorimer.errors import BaseError, UserError
from lorimer.kernels.allocator import keep_freed_memory
from lorimer.kernels.dispatch import Linear
from lorimer.machine import native_bf16
from lorimer.model.decoder import Decoder, Layer, NormSlot, Projections, Table
from lorimer.model.families import read_spec
from lorimer.model.rope import RopeTables
from lorimer.model.spec import ModelSpec
from lorimer.quant.gguf_blocks import dequantise
from lorimer.quant.linear import DenseLinear


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
    """One tensor of a base by its Hugging Face name, float32, rows in Hugging Face's order.

    GGUF files keep the query and key rows of Llama shapes interleaved for llama.cpp's rotation.
    """
    entry = base.tensors[name]
    value = dequantise(base.raw(name), entry.dtype, entry.shape)
    heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.rpartition(".")[0].rpartition(".")[2])
    if heads is None or base.kind != "gguf" or spec.family not in ("llama", "mistral"):
        return value
    pairs: Tensor = value.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(value.shape)


@dataclass(slots=True)
class _Reader:
    """Reads tensors of one base by their Hugging Face names, checked against the shape wanted."""

    base: BaseFiles
    spec: ModelSpec
    place: Place

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        entry = self.base.tensors.get(name)
        if entry is None:
            raise BaseError(f"the weight `{name}` is missing", path=self.base.path)
        if tuple(entry.shape) != shape:
            raise BaseError(
                f"the weight `{name}` has the shape {list(entry.shape)} (wanted: {list(shape)})",
                fix="The config and the weights do not belong together.",
                path=self.base.path,
            )
        return read_weight(self.base, self.spec, name)

    def norm(self, path: str, size: int) -> NormSlot:
        weight = self.tensor(f"{path}.weight", (size,)).to(self.place.device, torch.float32)
        return NormSlot(path, weight.clone(), self.spec.norm_eps)

    def stacked(
        self, path: str, names: tuple[str, ...], rows: tuple[int, ...], inputs: int, number: int, bias: bool
    ) -> Projections:
        weight = torch.empty((sum(rows), inputs), dtype=self.place.dtype, device=self.place.device)
        biases = torch.empty(sum(rows), dtype=self.place.dtype, device=self.place.device) if bias else None
        start = 0
        for name, count in zip(names, rows, strict=True):
            part = slice(start, start + count)
            weight[part] = self.tensor(f"{path}.{name}.weight", (count, inputs))
            if biases is not None:
                biases[part] = self.tensor(f"{path}.{name}.bias", (count,))
            start += count
        return Projections(path, names, rows, inputs, number, Linear(DenseLinear(weight), biases))

    def table(self, path: str) -> Table:
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        value = self.tensor(f"{path}.weight", shape).to(self.place.device, self.place.dtype)
        # Memory-mapped bytes must not stay behind: the file may change or go away under us.
        return Table(path, DenseLinear(value.clone() if value.dtype == torch.float32 else value))


def load_decoder(base: BaseFiles, place: Place) -> Decoder:
    """The base's weights as a decoder on this device, in this type.

    Raises BaseError for an architecture that is not supported, or weights that are missing or of
    the wrong shape.
    """
    keep_freed_memory()
    spec = read_spec(base.config, path=str(base.path))
    reader = _Reader(base, spec, place)
    embedding = reader.table("model.embed_tokens")
    layers = [_layer(reader, number) for number in range(spec.layers)]
    head = Table("lm_head", embedding.weight) if spec.tied_head else reader.table("lm_head")
    final_norm = reader.norm("model.norm", spec.hidden_size)
    base.release()
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


def _layer(reader: _Reader, number: int) -> Layer:
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
