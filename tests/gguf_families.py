"""A tiny model of any architecture as llama.cpp's converter writes it, in F32: names from the gguf package,
and each change of rows, numbers and settings that convert_hf_to_gguf.py makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from gguf_files import add_entry
from lorimer.model.families import read_spec
from lorimer.model.load import read_weight
from tiny import Tiny

# Hugging Face's name -> llama.cpp's, where they differ.
ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "cohere": "command-r",
    "gpt_neox": "gptneox",
}
# Query and key are turned in neighbouring pairs by llama.cpp, and by Hugging Face in halves.
PAIRED = ("llama", "mistral", "mixtral", "granite", "smollm3")
GROUPED = ("gpt_neox", "falcon")
NO_FREQUENCY = ("gemma", "gemma2", "phi", "stablelm", "gpt_neox", "falcon", "gpt2")
NO_KV_HEADS = ("gpt2", "gpt_neox")
EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def name_map(model_type: str, layers: int) -> gguf.TensorNameMap:
    wanted = ARCHITECTURES.get(model_type, model_type)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    return gguf.get_tensor_name_map(kind, layers)


def write_family(path: Path, tiny: Tiny) -> Path:
    config, kind = tiny.hf.config, tiny.hf.config.model_type
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(kind, kind))
    for key, value in settings(config).items():
        add_entry(writer, f"{writer.arch}.{key}", value)
    for name, value in tensors(tiny):
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(tiny: Tiny) -> Iterator[tuple[str, Tensor]]:
    config, kind = tiny.hf.config, tiny.hf.config.model_type
    names = name_map(kind, config.num_hidden_layers)
    spec = read_spec(tiny.base.config, path="")
    stacks: dict[str, list[Tensor]] = {}
    for name in tiny.base.tensors:
        value = read_weight(tiny.base, spec, name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            stacks.setdefault(stack_name(name), []).append(value)
            continue
        if ".norms." in name:
            stacks.setdefault(name.partition(".norms.")[0] + ".weight", []).append(value)
            continue
        if kind in PAIRED and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)
        if kind in GROUPED and "query_key_value" in name:
            per = spec.heads // spec.kv_heads
            groups = value.unflatten(0, (spec.kv_heads, per + 2, spec.head_dim))
            value = torch.cat([part.flatten(0, 2) for part in groups.split([per, 1, 1], 1)])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        yield names.get_name(name, (".weight", ".bias")), value
    for name, parts in stacks.items():
        yield names.get_name(name, (".weight",)), torch.stack(parts)
    ropes = config.rope_parameters if hasattr(config, "rope_parameters") else None
    for length in ("long", "short"):
        if ropes and f"{length}_factor" in ropes:
            yield f"rope_factors_{length}.weight", torch.tensor(ropes[f"{length}_factor"])


def stack_name(name: str) -> str:
    """The name that the converter gives to the experts of a layer as one tensor."""
    path, _, rest = name.partition(".experts.")
    word = rest.split(".")[1]
    return f"{path.rpartition('.')[0]}.mlp.experts.{EXPERTS.get(word, word)}.weight"


def settings(config: Any) -> dict[str, Any]:
    kind = config.model_type
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": 4 * config.hidden_size if kind == "falcon" else inner(config),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_kv_heads", None)
        or getattr(config, "num_key_value_heads", None),
        "attention.key_length": config.to_dict().get("head_dim"),
    }
    eps = {
        "layer_norm_rms_epsilon": ("rms_norm_eps",),
        "layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    }
    values = config.to_dict()
    for key, keys in eps.items():
        found |= {f"attention.{key}": values[name] for name in keys if name in values}
    ropes = values.get("rope_parameters") or {}
    whole = ropes.get("full_attention", ropes)
    if kind not in NO_FREQUENCY:
        found["rope.freq_base"] = float(whole["rope_theta"])
    if kind in NO_KV_HEADS:
        del found["attention.head_count_kv"]
    if kind in ("phi3", "stablelm", "gpt_neox", "phi", "glm4"):
        share = whole.get("partial_rotary_factor", 1.0)
        size = values.get("head_dim") or config.hidden_size // config.num_attention_heads
        found["rope.dimension_count"] = int(share * size)
    if whole.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(whole["factor"])}
    found |= OWN.get(kind, lambda _: {})(config)
    return {key: value for key, value in found.items() if value is not None}


def inner(config: Any) -> int:
    return int(getattr(config, "n_inner", None) or config.intermediate_size)


def _phi3(config: Any) -> dict[str, Any]:
    original = config.original_max_position_embeddings
    found = {
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if config.rope_parameters["rope_type"] == "longrope":
        stretch = config.max_position_embeddings / original
        found["rope.scaling.type"] = "longrope"
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    return found


def _experts(config: Any) -> dict[str, Any]:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return {
        "expert_count": count,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
    }


OWN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gemma2": lambda c: {
        "attn_logit_softcapping": c.attn_logit_softcapping,
        "final_logit_softcapping": c.final_logit_softcapping,
        "attention.sliding_window": c.sliding_window,
    },
    "gemma3_text": lambda c: {
        "attention.sliding_window": c.sliding_window,
        "rope.freq_base_swa": float(c.rope_parameters["sliding_attention"]["rope_theta"]),
    },
    "phi3": _phi3,
    "granite": lambda c: {
        "attention.scale": c.attention_multiplier,
        "embedding_scale": c.embedding_multiplier,
        "residual_scale": c.residual_multiplier,
        "logit_scale": c.logits_scaling,
    },
    "cohere": lambda c: {"logit_scale": c.logit_scale},
    "cohere2": lambda c: {"logit_scale": c.logit_scale, "attention.sliding_window": c.sliding_window},
    # The converter's default where the config does not say is True, whatever the model is.
    "stablelm": lambda _: {"use_parallel_residual": True},
    "gpt_neox": lambda c: {"use_parallel_residual": c.use_parallel_residual},
    "mixtral": _experts,
    "qwen3_moe": _experts,
}
