"""Architectures and their variants that tests run through: name -> (family, config changes)."""

from __future__ import annotations

from typing import Any

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0],
}
PHI_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 3.0],
}
FALCON_MANY = {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 6}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def scaled(kind: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "factor": 2.0, "rope_theta": 10_000.0}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama linear": ("llama", scaled("linear")),
    "llama dynamic": ("llama", scaled("dynamic")),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama longrope": ("llama", {"rope_parameters": LONGROPE}),
    "mistral window": ("mistral", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {}),
    "gemma3 linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "phi3": ("phi3", {}),
    "phi3 longrope": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_parameters": PHI_LONGROPE,
        },
    ),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "cohere, heads normed": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {}),
    "stablelm": ("stablelm", {}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True, "tie_word_embeddings": True}),
    "stablelm, heads normed": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False, "sliding_window": None}),
    "gpt2": ("gpt2", {}),
    "gpt2, not scaled": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in turn": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt": ("opt", {}),
    "opt, no biases": ("opt", {"enable_bias": False, "tie_word_embeddings": True}),
    "falcon wide": ("falcon", {}),
    "falcon one norm": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "falcon multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon many heads": (
        "falcon",
        FALCON_MANY,
    ),
    "glm4": ("glm4", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, not renormalised": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
    "qwen3 window, biases": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "attention_bias": True},
    ),
}
