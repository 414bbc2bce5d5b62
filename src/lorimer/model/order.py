"""Which row of a file is which row of a weight.

Three orders meet. A model's own, Hugging Face's, which adapters and merged folders keep. That of the
stack which the decoder computes with: all query heads, all key heads, all value heads, and in each head
features i and i + D/2 turning together. And that of a GGUF file, where llama.cpp wants another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.bases.open import BaseFiles
from lorimer.model.spec import ModelSpec

# Architectures whose query and key llama.cpp turns in pairs, and keeps so.
PAIRED_IN_GGUF = ("llama", "mistral", "mixtral", "granite", "smollm3")


def stack_order(spec: ModelSpec) -> Tensor | None:
    """Which row of Hugging Face's each row of the stacked query, key and value is; None if all stay.

    Scores do not change when query and key are put in another order alike.
    """
    query, key, value = spec.qkv_rows
    order = torch.arange(query + key + value)
    if spec.grouped_rows:
        order = _ungrouped(spec)
    if spec.rope_pairs:
        turning = order[: query + key].view(-1, spec.head_dim)
        turning = turning[:, pairs_apart(spec.head_dim, spec.rope.dimensions)]
        order = torch.cat([turning.flatten(), order[query + key :]])
    return None if torch.equal(order, torch.arange(len(order))) else order


def pairs_apart(size: int, turning: int) -> Tensor:
    """The features of a head of which 2i and 2i + 1 turn together, as i and i + D/2."""
    features = torch.arange(size)
    return torch.cat([features[:turning:2], features[1:turning:2], features[turning:]])


def _ungrouped(spec: ModelSpec) -> Tensor:
    """From the heads of each key/value head together to all queries, all keys, all values."""
    per = spec.heads // spec.kv_heads
    grouped = torch.arange(sum(spec.qkv_rows)).view(spec.kv_heads, per + 2, spec.head_dim)
    return torch.cat([part.flatten() for part in grouped.split([per, 1, 1], 1)])


def weight_order(spec: ModelSpec, name: str) -> Tensor | None:
    """The stack's order of one weight or bias by its name: row i of the stack is row order[i] of it."""
    whole = stack_order(spec)
    module = _module(spec, name)
    if whole is None or module not in spec.names.qkv:
        return None
    if len(spec.names.qkv) == 1:
        return whole
    position = spec.names.qkv.index(module)
    first = sum(spec.qkv_rows[:position])
    order = whole[first : first + spec.qkv_rows[position]] - first
    return None if torch.equal(order, torch.arange(len(order))) else order


def file_order(base: BaseFiles, spec: ModelSpec, name: str) -> Tensor | None:
    """Row i of a weight or bias in Hugging Face's order is row order[i] of this base's file."""
    return gguf_order(spec, name) if base.kind == "gguf" else None


def gguf_order(spec: ModelSpec, name: str) -> Tensor | None:
    """The same of any GGUF file of this model."""
    module = _module(spec, name)
    if module not in spec.names.qkv:
        return None
    if spec.grouped_rows:
        return _ungrouped(spec).argsort()
    if spec.family in PAIRED_IN_GGUF and module.endswith(("q_proj", "k_proj")):
        heads = spec.heads if module.endswith("q_proj") else spec.kv_heads
        return torch.arange(heads * spec.head_dim).view(heads, -1, 2).transpose(1, 2).flatten()
    return None


def adapted_module(spec: ModelSpec, name: str) -> tuple[str, int, int]:
    """Whose adapter changes a weight of the files: a module's path, and which of how many equal parts of
    its outputs the weight is."""
    module, mixture = name.rpartition(".")[0], spec.experts
    inside = f".{spec.names.expert_files}."
    if mixture is None or inside not in module:
        return module, 0, 1
    before, _, rest = module.partition(inside)
    number, _, part = rest.partition(".")
    path = f"{before}.{spec.names.experts}.{number}"
    ups = spec.names.expert_up
    if part in ups:
        return f"{path}.gate_up_proj", ups.index(part), len(ups)
    return f"{path}.down_proj", 0, 1


def lies_across(base: BaseFiles, spec: ModelSpec, name: str) -> bool:
    """Whether this base has a linear weight as [inputs, outputs]; GGUF files never do."""
    return base.kind != "gguf" and is_transposed(spec, name)


def is_transposed(spec: ModelSpec, name: str) -> bool:
    """Whether Hugging Face's files have this weight as [inputs, outputs]."""
    if not spec.transposed or not name.endswith(".weight"):
        return False
    return any(f".{path}.weight" in name for path in (*spec.names.qkv, *_outputs(spec)))


def _outputs(spec: ModelSpec) -> tuple[str, ...]:
    return (spec.names.output, *spec.names.up, spec.names.down)


def _module(spec: ModelSpec, name: str) -> str:
    """`transformer.h.3.attn.c_attn.weight` -> `attn.c_attn`: a module's name within its layer."""
    inside = name.removeprefix(spec.names.layers + ".").rpartition(".")[0]
    return inside.partition(".")[2]
