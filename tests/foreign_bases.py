"""Random tiny models of architectures that lorimer's own decoder does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorimer.bases.open import open_base
from lorimer.model.load import load_decoder
from small_base import CHATML, CONFIG, small_tokenizer_json
from tiny import FP32, Tiny

TOKENS = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 6}
# Learned positions with windows; ALiBi and one fused weight; biases at the head and weights in pairs of
# heads; sinusoids; states in place of attention; experts in one parameter; a cap on logits; scaled turns.
FOREIGN: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "hidden_size": 36,
        "num_layers": 2,
        "num_heads": 6,
        "window_size": 8,
        "intermediate_size": 52,
    }
    | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512},
    "bloom": {"hidden_size": 36, "n_layer": 2, "n_head": 6},
    "mpt": {"d_model": 36, "n_layers": 2, "n_heads": 6, "expansion_ratio": 2, "max_seq_len": 512},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    "xglm": {"d_model": 36, "num_layers": 2, "attention_heads": 6, "ffn_dim": 52},
    "olmo": LLAMA | {"num_key_value_heads": 2, "max_position_embeddings": 512},
    "openai-gpt": {"n_embd": 36, "n_layer": 2, "n_head": 6, "n_positions": 512},
    "nanochat": LLAMA
    | {"num_key_value_heads": 2, "max_position_embeddings": 512}
    | {"final_logit_softcapping": 1.5},
    "mamba": {"hidden_size": 36, "num_hidden_layers": 2, "state_size": 6, "time_step_rank": 4},
    "granitemoe": LLAMA
    | {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2, "logits_scaling": 2.0}
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "max_position_embeddings": 512},
}


def write_foreign(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Save a random model of this family to `folder`, and return it."""
    shape = TOKENS | FOREIGN[family] | changes
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                value.copy_(1 + 0.3 * noise)
            elif value.dim() > 1 and "A_log" not in name:
                value.copy_(noise * value.shape[-1] ** -0.5)
            elif name.endswith("bias") and "dt_proj" not in name:
                value.copy_(0.3 * noise)
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def make_foreign(folder: Path, family: str, **changes: Any) -> Tiny:
    """The same, opened by both sides in float32."""
    model = write_foreign(folder, family, **changes)
    base = open_base(folder)
    return Tiny(folder, model, base, load_decoder(base, FP32))


def write_foreign_chat(folder: Path, family: str, **changes: Any) -> Path:
    """A base that can be trained: a random tiny model, and a tokenizer with one token for each byte."""
    write_foreign(folder, family, **({"vocab_size": 259, "eos_token_id": 258} | changes))
    (folder / "tokenizer.json").write_text(small_tokenizer_json(), encoding="utf-8")
    import json

    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder
