"""Presets: a word for a set of ordinary settings, under whatever else is given.

Several may be named; a later one goes over an earlier one, and the file and the command line over all.
The values are those that the guides of the field agree on: rank and rate by how much is to be learned,
length by the task; QLoRA (arXiv 2305.14314) where memory is short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # how much of the machine
    "low-memory": {
        "quant": {"kind": "nf4", "double": True, "embeddings": True},
        "lora": {"r": 8, "alpha": 16.0},
        "train": {"recompute": "layers", "optimizer": "adamw_8bit", "micro_batch_tokens": 512},
    },
    "balanced": {
        "lora": {"r": 16, "alpha": 32.0, "target_modules": "all-linear"},
        "train": {"learning_rate": 2e-4, "epochs": 2.0, "batch_size": 16},
    },
    "max-quality": {
        "lora": {"r": 64, "alpha": 128.0, "target_modules": "all-linear"},
        "train": {
            "learning_rate": 1e-4,
            "epochs": 3.0,
            "batch_size": 16,
            "warmup_ratio": 0.05,
            "early_stopping_patience": 3,
        },
    },
    # what is learned
    "classification": {
        "data": {"max_tokens": 512, "train_on": "last_assistant"},
        "lora": {"r": 8, "alpha": 16.0, "dropout": 0.05},
        "train": {"learning_rate": 2e-4, "epochs": 3.0, "batch_size": 32},
        "evaluate": {"max_new_tokens": 16},
    },
    "summarisation": {
        "data": {"max_tokens": 2048, "train_on": "last_assistant"},
        "lora": {"r": 16, "alpha": 32.0},
        "train": {"learning_rate": 1e-4, "epochs": 2.0, "batch_size": 16},
        "evaluate": {"max_new_tokens": 512},
    },
    "instruction": {
        "data": {"max_tokens": 2048, "train_on": "assistant"},
        "lora": {"r": 16, "alpha": 32.0},
        "train": {"learning_rate": 2e-4, "epochs": 3.0, "batch_size": 16},
    },
    "code": {
        "data": {"max_tokens": 4096, "train_on": "assistant"},
        "lora": {"r": 32, "alpha": 64.0},
        "train": {"learning_rate": 1e-4, "epochs": 2.0, "batch_size": 16},
        "evaluate": {"max_new_tokens": 1024},
    },
}


def with_presets(value: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The settings that these presets give, and `value` over them. The names must be known."""
    merged: dict[str, Any] = {}
    for given in (*(PRESETS[name] for name in names), value):
        for key, inner in given.items():
            both = isinstance(inner, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **inner} if both else inner
    return merged
