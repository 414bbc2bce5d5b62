"""Random tiny models in Hugging Face layout, of shapes that catch what round numbers hide.

The heads together are wider than the hidden states, the vocabulary is odd, key/value heads are few,
and norms and biases are random, so nothing that is left out or put in the wrong order can pass.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorimer.bases.open import BaseFiles, open_base
from lorimer.data.template import Example
from lorimer.lora.adapter import save_adapter
from lorimer.lora.layers import Adapter
from lorimer.model.decoder import Decoder
from lorimer.model.load import Place, load_decoder

torch.set_num_threads(1)

# PEFT speaks of tied weights, of patterns that match nothing, and calls what transformers has renamed.
PEFT_SAYS = (
    "tie_word_embeddings",
    "is_gradient_checkpointing",
    "embedding layers",
    "did not match any targeted",
    "save_embedding_layers",
    "fan_in_fan_out is set to True",
)
PEFT_NOISE = [pytest.mark.filterwarnings(f"ignore:(?s).*{words}") for words in PEFT_SAYS]

FP32 = Place(torch.device("cpu"), torch.float32)
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# What sets each architecture apart, switched on.
DIFFERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 3},
    "gemma": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "sliding_window": 5, "query_pre_attn_scalar": 7}
    | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    "gemma3_text": {"num_key_value_heads": 2, "sliding_window": 5, "query_pre_attn_scalar": 7}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 9, "head_dim": 6},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]},
    "olmo2": {"num_key_value_heads": 2, "head_dim": 6},
    "granite": {"num_key_value_heads": 2, "embedding_multiplier": 3.0, "logits_scaling": 4.0}
    | {"residual_multiplier": 0.3, "attention_multiplier": 0.2},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.3, "head_dim": 6, "layer_norm_eps": 1e-4},
    "cohere2": {"num_key_value_heads": 2, "logit_scale": 0.3, "sliding_window": 5}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "stablelm": {"num_key_value_heads": 2, "use_qkv_bias": True, "head_dim": 6}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7}},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": 7, "head_dim": 6},
    "gpt2": {"n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 64, "n_inner": 52},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7}
    },
    "opt": {"ffn_dim": 52, "word_embed_proj_dim": 36},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 52, "bias": True},
    "glm4": {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_key_value_heads": 3, "num_experts": 5, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 20, "mlp_only_layers": [1], "norm_topk_prob": True},
}
FAMILIES = tuple(DIFFERS)
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")  # of Llama's shape
CLASSIC = ("gpt2", "gpt_neox", "opt", "falcon")


@dataclass
class Tiny:
    """One model twice: in transformers and in lorimer, from the same files."""

    folder: Path
    hf: Any
    base: BaseFiles
    decoder: Decoder


def make_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Tiny:
    """A random model of this family, saved to `folder` and opened by both sides in float32."""
    shape = SHAPE | DIFFERS[family] | changes
    # Architectures before Llama know one size of head.
    unknown = ("head_dim", "num_key_value_heads") if family in CLASSIC else ()
    config = CONFIG_MAPPING[family](**{k: v for k, v in shape.items() if k not in unknown})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() > 1 and "norm" not in name:
                value.copy_(noise * value.shape[-1] ** -0.5 * (5 if "embed" in name else 1))
            else:
                value.copy_(0.3 * noise + (1 if "norm" in name else 0))
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    base = open_base(folder)
    return Tiny(folder, model, base, load_decoder(base, FP32))


def random_rows(lengths: Sequence[int], *, seed: int = 0, vocab: int = 101) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def example(ids: Sequence[int], trained: Sequence[bool] | None = None) -> Example:
    """Trained from the third token on, if not said otherwise."""
    marks = [i > 1 for i in range(len(ids))] if trained is None else list(trained)
    return Example(np.array(ids, np.int32), np.array(marks, bool), "made:1")


def our_logits(decoder: Decoder, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of rows computed as one pack."""
    lengths = [len(row) for row in rows]
    ids = torch.tensor([token for row in rows for token in row])
    with torch.no_grad():
        return list(decoder.logits(decoder.hidden(ids, lengths)).split(lengths))


def hf_logits(model: Any, row: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(row)]), use_cache=False).logits[0].float()
    return logits


def difference(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference against the largest value."""
    return float(
        (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30)
    )


def apart(mine: Any, theirs: Any, *, rows: int = 15) -> float:
    """How far apart the logits of two models are: the difference of the median row.

    Each is a decoder or a model of transformers. What remains is float32's own rounding, and in a
    single row that is chance: 1 row in 15 is beyond 1e-6, and PEFT alone is up to 1.5e-6 away from
    what it computes in float64. No row may be beyond 5e-6.
    """
    each = [difference(_logits(mine, row), _logits(theirs, row)) for row in random_rows([23] * rows)]
    assert max(each) < 5e-6, each
    return statistics.median(each)


def _logits(model: Any, row: Sequence[int]) -> Tensor:
    return our_logits(model, [row])[0] if isinstance(model, Decoder) else hf_logits(model, row)


def shake(adapter: Adapter, *, seed: int = 1, size: float = 0.15) -> None:
    """Move every trained number, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.flat.add_(torch.randn(adapter.flat.shape, generator=generator) * size)
    adapter.refresh()


def save(folder: Path, tiny: Tiny, adapter: Adapter, ours: Mapping[str, Any] | None = None) -> Path:
    manifest = {"base": {"fingerprint": tiny.base.fingerprint()}} if ours is None else ours
    save_adapter(folder, adapter, tiny.decoder, base=str(tiny.folder), ours=manifest)
    return folder


def peft_name(name: str) -> str:
    """PEFT's parameter name in a live model -> ours."""
    for part in ("base_model.model.", ".default", ".modules_to_save", ".base_layer"):
        name = name.replace(part, "")
    return name


LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, tiny: Tiny) -> Path:
    """The same model as llama.cpp's converter writes it, in F32."""
    config = tiny.hf.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tied = config.tie_word_embeddings
    for name, value in tiny.hf.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        module, _, kind = name.rpartition(".")
        array = value.numpy()
        if config.model_type == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if module in TOP:
            writer.add_tensor(f"{TOP[module]}.{kind}", np.ascontiguousarray(array))
        else:
            _, _, number, rest = module.split(".", 3)
            writer.add_tensor(f"blk.{number}.{LAYER[rest]}.{kind}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
