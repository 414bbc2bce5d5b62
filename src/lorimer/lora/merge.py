"""The update added into the base's weights: a Hugging Face folder that any tool loads.

Each weight is computed as W + scale * B A in float32 and cast once. Layers are merged one at a time
from the base's own files, so a base that was trained in bf16 or from a GGUF is merged into what
those files say. A base that was quantised as it was loaded has two such weights: those of its files, and
the numbers that the quantised ones stand for, which the adapter was trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.gguf_names import DIVISORS
from lorimer.bases.mapped import Bytes
from lorimer.bases.open import BaseFiles
from lorimer.config import QuantConfig
from lorimer.errors import AdapterError, UserError
from lorimer.lora.layers import EMBEDDING_A, EMBEDDING_B, OWN_ROWS, LoraSpec, rows_owner
from lorimer.model.load import NOT_QUANTISED, TYPES, stored_shape, trained_weight
from lorimer.model.order import adapted_module, is_transposed
from lorimer.model.spec import ModelSpec
from lorimer.storage import check_space, write_folder, write_tensors

STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
SHARD_BYTES = 4_000_000_000
ARCHITECTURES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "granite": "Granite",
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
    "gpt_neox": "GPTNeoX",
    "opt": "OPT",
    "falcon": "Falcon",
    "glm4": "Glm4",
}


class Update(Protocol):
    """What merging needs of an adapter: its shape, and its tensors by PEFT's names."""

    @property
    def spec(self) -> LoraSpec: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def for_files(self, name: str) -> Tensor:
        """One of them, rows in the order of files."""
        ...


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written. `unchanged` is the share of adapted weights that the cast rounded back to
    what they were: near 1 means that the update is smaller than the type can hold."""

    path: Path
    dtype: str
    tensors: int
    adapted: int
    bytes: int
    unchanged: float


def merge(
    base: BaseFiles,
    spec: ModelSpec,
    adapter: Update,
    out: Path,
    *,
    dtype: str = "bf16",
    quant: QuantConfig = NOT_QUANTISED,
    extra_files: Mapping[str, bytes] | None = None,
) -> MergeReport:
    """Write the merged model to the folder `out`, whole or not at all.

    With `quant`, into the numbers that the weights stand for when they are quantised so.

    Raises UserError for a type that is not known or a folder that is there already, StorageError if
    it cannot be written.
    """
    check_target(out, dtype)
    size = torch.finfo(TYPES[dtype]).bits // 8
    check_space(out, base.parameters * size)
    counts = {"tensors": 0, "adapted": 0, "bytes": 0, "same": 0, "numbers": 0}

    def fill(folder: Path) -> None:
        writer = ShardWriter(folder)
        for name, tensor in merged_tensors(base, spec, adapter, TYPES[dtype], counts, quant):
            counts["tensors"] += 1
            counts["bytes"] += tensor.nbytes
            writer.add(name, tensor.t().contiguous() if is_transposed(spec, name) else tensor)
        writer.close()
        text = json.dumps(merged_config(base, spec, adapter, dtype), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        if eos := base.eos_token_ids():
            generation = json.dumps({"eos_token_id": eos if len(eos) > 1 else eos[0]}, indent=2)
            (folder / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
        for name, content in (extra_files or {}).items():
            (folder / name).write_bytes(content)

    write_folder(out, fill, manifest=False)
    unchanged = counts["same"] / counts["numbers"] if counts["numbers"] else 0.0
    return MergeReport(out, dtype, counts["tensors"], counts["adapted"], counts["bytes"], unchanged)


def check_target(out: Path, dtype: str) -> None:
    """Raise UserError for a type that is not known or a folder that is there already."""
    if dtype not in TYPES:
        raise UserError(f"the type `{dtype}` is not known", fix=f"Known: {', '.join(TYPES)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("there is something there already", fix="Choose a new folder.", path=out)


def merged_tensors(
    base: BaseFiles,
    spec: ModelSpec,
    adapter: Update,
    dtype: torch.dtype,
    counts: dict[str, int],
    quant: QuantConfig = NOT_QUANTISED,
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the merged model by name, with the update where there is one, one at a time; in the
    order of `names`, if they are given.

    `counts` gains how many weights were `adapted`, and how many of their `numbers` stayed the `same`.
    """
    used: set[str] = set()
    for name in merged_names(base, spec, adapter) if names is None else names:
        stored = stored_name(base, spec, name)
        value = trained_weight(base, spec, stored, quant).float()
        merged = _update(spec, name, value, adapter)
        if merged is not None:
            used |= _tensors_of(spec, name)
            counts["adapted"] += 1
            own = adapter.spec.tokens.get(name.removesuffix(".weight"))
            changed, before = (part[list(own)] if own else part for part in (merged, value))
            counts["same"] += int((changed.to(dtype) == before.to(dtype)).sum())
            counts["numbers"] += before.numel()
        yield name, (value if merged is None else merged).to(dtype).contiguous()
    tied = {head_name(spec)} if spec.tied_head and embedding_name(spec) in adapter.tensors else set()
    lost = sorted(set(adapter.tensors) - used - tied)
    if lost:
        raise AdapterError(
            f"{len(lost)} tensors of the adapter change no weight of this base, the first `{lost[0]}`",
            fix="Merge into the base that it was trained on.",
            path=base.path,
        )


def merged_names(base: BaseFiles, spec: ModelSpec, adapter: Update) -> list[str]:
    """The weights of the merged model: the base's, and a head that is no longer its embedding."""
    names, head = _weights(base), head_name(spec)
    return [*names, head] if head not in names and untied(spec, adapter) else names


def stored_name(base: BaseFiles, spec: ModelSpec, name: str) -> str:
    """Where the base has a weight of the merged model: a head that it has not is its embedding."""
    return name if name in base.tensors else embedding_name(spec)


def _tensors_of(spec: ModelSpec, name: str) -> set[str]:
    """What of an adapter may change a weight."""
    module = adapted_module(spec, name)[0]
    ends = ("lora_A.weight", "lora_B.weight", EMBEDDING_A, EMBEDDING_B, OWN_ROWS)
    return {name, *(f"{module}.{end}" for end in ends)}


def embedding_name(spec: ModelSpec) -> str:
    return f"{spec.names.embedding}.weight"


def head_name(spec: ModelSpec) -> str:
    return f"{spec.names.head}.weight"


def _weights(base: BaseFiles) -> list[str]:
    return [name for name in base.tensors if name.endswith((".weight", ".bias")) and name not in DIVISORS]


class MergedBase(BaseFiles):
    """Base and adapter merged, as a base whose weights are computed when they are read: what `merge` would
    write, to be looked at before it is written."""

    kind = "safetensors"

    def __init__(
        self, base: BaseFiles, spec: ModelSpec, adapter: Update, dtype: str, quant: QuantConfig
    ) -> None:
        self.path, self.config = base.path, merged_config(base, spec, adapter, dtype)
        self.tokenizer_config, self.generation_config = base.tokenizer_config, base.generation_config
        self._given = base, spec, adapter, dtype, quant
        names = merged_names(base, spec, adapter)
        shapes = {name: stored_shape(base, spec, stored_name(base, spec, name)) for name in names}
        shapes = {n: shape[::-1] if is_transposed(spec, n) else shape for n, shape in shapes.items()}
        size = torch.finfo(TYPES[dtype]).bits // 8
        self.tensors = {
            name: TensorEntry(name, STORED[dtype], shape, math.prod(shape) * size)
            for name, shape in shapes.items()
        }

    def raw(self, name: str) -> Bytes:
        base, spec, adapter, dtype, quant = self._given
        value = trained_weight(base, spec, stored_name(base, spec, name), quant).float()
        merged = _update(spec, name, value, adapter)
        found = (value if merged is None else merged).to(TYPES[dtype])
        found = (found.t() if is_transposed(spec, name) else found).contiguous()
        return found.view(torch.uint8).flatten().numpy()

    def release(self) -> None:
        self._given[0].release()


def untied(spec: ModelSpec, adapter: Update) -> bool:
    """Whether the base's head is its embedding, and only one of them was trained, or each apart."""
    if not spec.tied_head:
        return False
    names, tokens = spec.names, adapter.spec.tokens
    if tokens:  # a head that has the embedding's rows is one with it
        return rows_owner(names.head, spec, adapter.spec) != names.embedding
    full = not adapter.spec.tie and {head_name(spec), embedding_name(spec)} & set(adapter.tensors)
    return bool(full or {names.head, names.embedding} & set(adapter.spec.ranks))


def _update(spec: ModelSpec, name: str, value: Tensor, adapter: Update) -> Tensor | None:
    """The weight with its update, or the copy trained in its place; None if neither exists."""
    module, part, parts = adapted_module(spec, name)
    if name in adapter.tensors:
        return adapter.for_files(name).float()
    return updated(spec, module, value, adapter, part, parts) if name.endswith(".weight") else None


def updated(
    spec: ModelSpec, module: str, value: Tensor, adapter: Update, part: int = 0, parts: int = 1
) -> Tensor | None:
    """A module's weight with its update, in float32; None if there is none. Where the weight is
    one of several that an adapter has as one, it is this part of so many."""
    owner = rows_owner(module, spec, adapter.spec)
    if owner is not None:
        ids_K = torch.tensor(adapter.spec.tokens[owner], device=value.device)
        return value.index_copy(0, ids_K, adapter.for_files(f"{owner}.{OWN_ROWS}").float())
    if f"{module}.{EMBEDDING_A}" in adapter.tensors:
        a, b = (adapter.for_files(f"{module}.{name}") for name in (EMBEDDING_A, EMBEDDING_B))
        return value + adapter.spec.scale(module) * (b @ a).t()
    down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    if down not in adapter.tensors or up not in adapter.tensors:
        return None
    up_OR = adapter.for_files(up).chunk(parts)[part]
    return value + adapter.spec.scale(module) * (up_OR @ adapter.for_files(down))


def merged_config(base: BaseFiles, spec: ModelSpec, adapter: Update, dtype: str) -> dict[str, Any]:
    """The base's config with the type of the weights; a head trained apart is no longer tied."""
    config = {key: value for key, value in base.config.items() if value is not None}
    config.pop("quantization_config", None)
    config.pop("license", None)
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    named = {"gpt2": "GPT2LMHeadModel"} | {k: f"{v}ForCausalLM" for k, v in ARCHITECTURES.items()}
    config.setdefault("architectures", [named[str(config["model_type"])]])
    config |= {"dtype": names[dtype], "torch_dtype": names[dtype]}
    if untied(spec, adapter):
        config["tie_word_embeddings"] = False
    return config


class ShardWriter:
    """Tensors into model.safetensors, or into numbered shards with an index where they are many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[list[str]] = []
        self.pending: dict[str, Tensor] = {}
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and sum(t.nbytes for t in self.pending.values()) + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor
        self.total += tensor.nbytes

    def _flush(self) -> None:
        write_tensors(self.folder / f"part-{len(self.shards)}", self.pending, {"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def close(self) -> None:
        self._flush()
        if len(self.shards) == 1:
            (self.folder / "part-0").rename(self.folder / "model.safetensors")
            return
        names: dict[str, str] = {}
        for number, members in enumerate(self.shards):
            name = f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / name)
            names |= dict.fromkeys(members, name)
        index = {"metadata": {"total_size": self.total}, "weight_map": names}
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
