"""config.json -> ModelSpec: one short function for each architecture.

Adding one that differs only in data is a function here and a row in FAMILIES. Weight names are
those of Hugging Face, the same for all of these; decoder.py lists them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from lorimer.errors import BaseError
from lorimer.model.spec import ModelSpec, RopeKind, RopeSpec

Config = dict[str, Any]
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)


def llama(config: Config) -> ModelSpec:
    """Llama 1 to 3 and all that share its shape (SmolLM2, TinyLlama, Yi, DeepSeek-LLM)."""
    bias = bool(config.get("attention_bias", False))
    return _spec(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def mistral(config: Config) -> ModelSpec:
    """Llama with a sliding window on every layer."""
    return _spec(config, windows=_all_windows(config, config.get("sliding_window")))


def qwen2(config: Config) -> ModelSpec:
    """Llama with biases on query, key and value; the upper layers may have a window."""
    return _spec(config, qkv_bias=True, windows=_qwen_windows(config))


def qwen3(config: Config) -> ModelSpec:
    """Query and key are normed for each head; no biases unless the config says so."""
    bias = bool(config.get("attention_bias", False))
    return _spec(
        config, qkv_bias=bias, output_bias=bias, qk_norm=True, head_dim=128, windows=_qwen_windows(config)
    )


FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def read_spec(config: Config, *, path: str) -> ModelSpec:
    """The ModelSpec of a base's config; BaseError for an architecture that is not known."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise BaseError(
            f"the architecture `{config.get('model_type')}` is not supported",
            fix=f"Supported: {', '.join(FAMILIES)}.",
            path=path,
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BaseError(f"the activation `{activation}` is not supported (wanted: silu)", path=path)
    try:
        _check_sizes(config)
        return family(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        name = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise BaseError(
            f"the model's config cannot be used: {name}",
            fix="Check config.json against the model's original.",
            path=path,
        ) from error


# The most that a config may say; beyond it is damage, and memory would be asked for by it.
SIZES = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "max_position_embeddings": 10**9,
    "sliding_window": 10**9,
}


def _check_sizes(config: Config) -> None:
    """Raise ValueError for a size that is no size."""
    for name, most in SIZES.items():
        value = config.get(name)
        if value is None or (name == "sliding_window" and value is False):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= most:
            raise ValueError(f"`{name}` is {value!r} (wanted: a whole number from 1 to {most:,})")
    for name in ("rms_norm_eps", "rope_theta"):
        value = config.get(name)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"`{name}` is {value!r} (wanted: a number from 0)")


def _spec(config: Config, *, head_dim: int | None = None, **differs: Any) -> ModelSpec:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or head_dim or hidden // heads)
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads cannot share {kv_heads} key/value heads evenly")
    positions = int(config.get("max_position_embeddings", 2048))
    return ModelSpec(
        family=str(config["model_type"]),
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, size, positions),
        max_positions=positions,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        **differs,
    )


def _rope(config: Config, head_dim: int, positions: int) -> RopeSpec:
    """Both spellings: `rope_parameters` of newer configs, `rope_theta` + `rope_scaling` of older ones."""
    settings = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    named = settings.pop("rope_type", None) or settings.pop("type", None) or "default"
    settings.pop("type", None)
    kind = next((kind for kind in ROPE_KINDS if kind == named), None)
    if kind is None:
        raise ValueError(f"the rope scaling `{named}` is not known (known: {', '.join(ROPE_KINDS)})")
    theta = settings.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    share = settings.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    original = config.get("original_max_position_embeddings")
    if original is not None:
        settings["original_max_position_embeddings"] = original
    elif kind in ("llama3", "yarn", "longrope"):
        settings.setdefault("original_max_position_embeddings", positions)
    return RopeSpec(float(theta), int(head_dim * share), kind, positions, settings)


def _all_windows(config: Config, window: int | None) -> tuple[int | None, ...]:
    return (window,) * int(config["num_hidden_layers"]) if window else ()


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    """Layers named `sliding_attention`, else those from `max_window_layers` up, if windows are on."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if not window:
        return ()
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = int(config.get("max_window_layers", 28))
    return tuple(window if layer >= first else None for layer in range(layers))
