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
    "qwen3 window, biases": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "attention_bias": True},
    ),
}
