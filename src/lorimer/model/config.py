"""config.json's numbers, checked and put into a ModelSpec: what the families have in common."""

from __future__ import annotations

import math
from typing import Any, cast, get_args

from lorimer.model.spec import Activation, ModelSpec, RopeKind, RopeSpec

Config = dict[str, Any]
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)
# What a scaling cannot be computed without.
ROPE_NEEDS: dict[RopeKind, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
# Configs' names of activations.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# The most that a config may say; beyond it is damage, and memory would be asked for by it.
SIZES = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "n_embd": 10**6,
    "intermediate_size": 10**7,
    "moe_intermediate_size": 10**7,
    "ffn_dim": 10**7,
    "ffn_hidden_size": 10**7,
    "n_inner": 10**7,
    "num_hidden_layers": 10**4,
    "n_layer": 10**4,
    "num_attention_heads": 10**5,
    "n_head": 10**5,
    "num_key_value_heads": 10**5,
    "num_kv_heads": 10**5,
    "num_local_experts": 10**5,
    "num_experts": 10**5,
    "head_dim": 10**5,
    "max_position_embeddings": 10**9,
    "n_positions": 10**9,
    "sliding_window": 10**9,
}
NUMBERS = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "rope_theta"),
    *("rope_local_base_freq", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    *("partial_rotary_factor", "rotary_pct", "query_pre_attn_scalar"),
)


def check_sizes(config: Config) -> None:
    """Raise ValueError for a size that is no size."""
    for name, most in SIZES.items():
        value = config.get(name)
        if value is None or (name == "sliding_window" and value is False):
            continue
        fine = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
        if not fine or not 1 <= value <= most:
            raise ValueError(f"`{name}` is {value!r} (wanted: a whole number from 1 to {most:,})")
    for name in NUMBERS:
        value = config.get(name)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"`{name}` is {value!r} (wanted: a number from 0)")


def make_spec(config: Config, *, head_dim: int | None = None, **differs: Any) -> ModelSpec:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or head_dim or hidden // heads)
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads cannot share {kv_heads} key/value heads evenly")
    positions = int(config.get("max_position_embeddings", 2048))
    named = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if named not in ACTIVATIONS:
        raise ValueError(f"the activation `{named}` is not known (known: {', '.join(ACTIVATIONS)})")
    given: dict[str, Any] = {
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope": read_rope(config, size, positions),
        "tied_head": bool(config.get("tie_word_embeddings", False)),
        "activation": ACTIVATIONS[named],
    }
    return ModelSpec(
        family=str(config["model_type"]),
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        max_positions=positions,
        **(given | differs),
    )


def with_defaults(config: Config, **values: Any) -> Config:
    """The config with what this architecture means where it says nothing."""
    return values | {name: value for name, value in config.items() if value is not None}


def read_rope(config: Config, head_dim: int, positions: int) -> RopeSpec:
    """Both spellings: `rope_parameters` of newer configs, `rope_theta` + `rope_scaling` of older ones."""
    settings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(given := config.get(name) or {}, dict):
            raise ValueError(f"`{name}` is {given!r} (wanted: an object)")
        settings |= given
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
    if not 0 < float(theta) < math.inf:
        raise ValueError(f"`rope_theta` is {theta!r} (wanted: a number above 0)")
    for name, value in settings.items():
        if name in ROPE_NEEDS.get(kind, ()) and not _number_or_numbers(value):
            raise ValueError(
                f"`{name}` of the rope scaling `{kind}` is {value!r} (wanted: numbers above 0)"
            )
    if missing := [name for name in ROPE_NEEDS.get(kind, ()) if name not in settings]:
        raise ValueError(f"the rope scaling `{kind}` does not say `{missing[0]}`")
    return RopeSpec(float(theta), int(head_dim * share), kind, positions, settings)


def _number_or_numbers(value: Any) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(v, int | float) and type(v) is not bool and 0 < v < math.inf for v in values)


def all_windows(config: Config, window: int | None) -> tuple[int | None, ...]:
    return (window,) * int(config["num_hidden_layers"]) if window else ()


def windows_by_kind(kinds: list[str], window: int | None) -> tuple[int | None, ...]:
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def qwen_windows(config: Config) -> tuple[int | None, ...]:
    """Layers named `sliding_attention`, else those from `max_window_layers` up, if windows are on."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if not window:
        return ()
    layers = int(config["num_hidden_layers"])
    kinds = cast("list[str] | None", config.get("layer_types"))
    if kinds:
        return windows_by_kind(kinds, window)
    first = int(config.get("max_window_layers", 28))
    return tuple(window if layer >= first else None for layer in range(layers))
