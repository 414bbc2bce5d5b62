"""A GGUF file's metadata in the words of the config.json that its model had.

What llama.cpp does not write is what the architecture means by default, or is read off the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorimer.bases.gguf_names import Architecture

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Reading:
    """One file: its metadata, the shapes of its tensors by llama.cpp's names, and numbers of small ones."""

    row: Architecture
    metadata: Mapping[str, Any]
    shapes: Shapes
    numbers: Callable[[str], list[float]]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")
        return default if value is None else value

    def count(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int:
            raise ValueError(f"`{key}` {'' if value is None else repr(value)}".rstrip())
        return value

    def has(self, name: str) -> bool:
        """Whether the first layer has this."""
        return f"blk.0.{name}" in self.shapes

    @property
    def qkv_bias(self) -> bool:
        return self.has("attn_q.bias") or self.has("attn_qkv.bias")

    @property
    def hidden(self) -> int:
        return self.embedding[1]

    @property
    def embedding(self) -> tuple[int, ...]:
        if "token_embd.weight" not in self.shapes:
            raise KeyError(f"{self.row.top['token_embd']}.weight")
        return self.shapes["token_embd.weight"]

    @property
    def heads(self) -> int:
        return self.count("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return int(self.get("attention.head_count_kv", self.heads))

    @property
    def head_size(self) -> int:
        named = self.get("attention.key_length")
        turning = None if self.row.partial else self.get("rope.dimension_count")
        return int(named or turning or self.hidden // self.heads)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        keys = self.kv_heads * self.head_size
        return self.heads * self.head_size, keys, keys

    @property
    def layers(self) -> int:
        return self.count("block_count")

    @property
    def inner(self) -> int:
        """Outputs of the first projection of the unit: the file's word is wrong for some Falcons."""
        shape = self.shapes.get("blk.0.ffn_up.weight")
        if self.row.model_type != "falcon" or shape is None:
            return self.count("feed_forward_length")
        return shape[0]

    @property
    def rotary_share(self) -> float:
        """The part of a head that turns, such that its product with the size is whole again."""
        size, turning = self.head_size, int(self.get("rope.dimension_count", self.head_size))
        share = turning / size
        return share if int(share * size) == turning else math.nextafter(share, 2.0)

    def eps(self, kind: str, default: float) -> float:
        return float(self.get(f"attention.layer_norm_{kind}", default))

    def kinds(self, step: int) -> list[str]:
        """What each layer sees: of every `step` layers the last sees all, if the file does not say."""
        given = self.get("attention.sliding_window_pattern", step)
        near = (
            [bool(given[layer]) for layer in range(self.layers)]
            if isinstance(given, list)
            else [not given or layer % int(given) < int(given) - 1 for layer in range(self.layers)]
        )
        return ["sliding_attention" if each else "full_attention" for each in near]


def read_config(reading: Reading) -> Config:
    """The config. Raises KeyError, TypeError, ValueError or ArithmeticError for metadata without sense."""
    r = reading
    if not 1 <= r.layers <= len(r.shapes):
        raise ValueError(f"`block_count` {r.layers:,}")
    _check_rows(r)
    config: Config = {
        "model_type": r.row.model_type,
        "vocab_size": r.embedding[0],
        "hidden_size": r.hidden,
        "intermediate_size": r.inner,
        "num_hidden_layers": r.layers,
        "num_attention_heads": r.heads,
        "num_key_value_heads": r.kv_heads,
        "head_dim": r.head_size,
        "rms_norm_eps": r.eps("rms_epsilon", 1e-6),
        "max_position_embeddings": int(r.get("context_length", 2048)),
        "rope_theta": float(r.get("rope.freq_base", 10_000.0)),
        "rope_scaling": rope_scaling(r),
        "tie_word_embeddings": "output.weight" not in r.shapes,
        "attention_bias": r.qkv_bias,
        "sliding_window": r.get("attention.sliding_window"),
        "bos_token_id": r.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": r.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": r.metadata.get("tokenizer.ggml.padding_token_id"),
        "license": r.metadata.get("general.license"),
    }
    for key in ABSENT.get(r.row.model_type, ()):
        del config[key]
    own = OWN_SETTINGS.get(r.row.model_type)
    return config if own is None else {**config, **own(r)}


def _check_rows(r: Reading) -> None:
    """Sizes in the metadata are believed only if the first layer has them: memory is taken by them."""
    query, keys, _ = r.qkv_rows
    units = 2 if r.row.layer["ffn_up"].endswith("gate_up_proj") else 1
    wanted = {"attn_q": query, "attn_k": keys, "attn_qkv": query + 2 * keys, "ffn_up": units * r.inner}
    for name, rows in wanted.items():
        shape = r.shapes.get(f"blk.0.{name}.weight")
        if shape is not None and shape[0] != rows:
            raise ValueError(
                "`attention.head_count`, `attention.key_length` or `feed_forward_length`, by which "
                f"{name} has {rows:,} rows (there are {shape[0]:,}),"
            )


def rope_scaling(r: Reading) -> Config | None:
    """llama.cpp's scaling keys; a tensor of divisors (Llama 3.1) is LongRoPE with one list."""
    context = int(r.get("context_length", 2048))
    if "rope_freqs.weight" in r.shapes:
        divisors = r.numbers("rope_freqs.weight")
        return {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    original = r.get("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in r.shapes:
        return _longrope(r, context, int(original or context))
    kind, factor = r.get("rope.scaling.type"), r.get("rope.scaling.factor")
    if kind in (None, "none"):
        return None
    scaling: Config = {"rope_type": kind, "factor": factor}
    if original:
        scaling["original_max_position_embeddings"] = int(original)
    attention = r.get("rope.scaling.attn_factor") or r.get("rope.scaling.yarn_attn_factor")
    if attention:
        scaling["attention_factor"] = float(attention)
    for name in ("beta_fast", "beta_slow"):
        if r.get(f"rope.scaling.yarn_{name}") is not None:
            scaling[name] = float(r.get(f"rope.scaling.yarn_{name}"))
    return scaling


def _longrope(r: Reading, context: int, original: int) -> Config:
    scaling: Config = {
        "rope_type": "longrope",
        "short_factor": r.numbers("rope_factors_short.weight"),
        "long_factor": r.numbers("rope_factors_long.weight"),
        "original_max_position_embeddings": original,
    }
    stretch = context / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    given = float(r.get("rope.scaling.attn_factor") or usual)
    # The file has it rounded; where it is the usual one, whoever reads this computes it.
    return scaling if math.isclose(given, usual, rel_tol=1e-6) else scaling | {"attention_factor": given}


def _gemma2(r: Reading) -> Config:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": int(r.get("attention.sliding_window", 4096)),
        "layer_types": r.kinds(2),
        "query_pre_attn_scalar": _query_scalar(r, 46),
        "attn_logit_softcapping": float(r.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(r.get("final_logit_softcapping", 30.0)),
    }


def _gemma3(r: Reading) -> Config:
    window = r.get("attention.sliding_window")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window or None,
        "layer_types": r.kinds(6 if window else 1),
        "query_pre_attn_scalar": _query_scalar(r, 62),
        "rope_local_base_freq": float(r.get("rope.freq_base_swa", 10_000.0)),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": r.get("final_logit_softcapping") or None,
    }


def _query_scalar(r: Reading, layers: int) -> int:
    """No key says it: the 27B models, known by their layers, divide by another size than a head's."""
    return r.hidden // r.heads if r.layers == layers else r.head_size


def _phi(r: Reading) -> Config:
    norm = {"layer_norm_eps": r.eps("epsilon", 1e-5), "hidden_act": "gelu_new"}
    return norm | {"partial_rotary_factor": r.rotary_share, "qk_layernorm": False}


def _phi3(r: Reading) -> Config:
    original = r.get("rope.scaling.original_context_length") or r.get("context_length", 4096)
    return {
        "partial_rotary_factor": r.rotary_share,
        "original_max_position_embeddings": int(original),
        "sliding_window": r.get("attention.sliding_window") or None,  # 0 stands for none
    }


def _glm4(r: Reading) -> Config:
    return {"partial_rotary_factor": r.rotary_share}


def _experts(r: Reading) -> Config:
    return {"num_experts_per_tok": r.count("expert_used_count")}


def _mixtral(r: Reading) -> Config:
    return _experts(r) | {"num_local_experts": r.count("expert_count")}


def _qwen3_moe(r: Reading) -> Config:
    shape = r.shapes.get("blk.0.ffn_down_exps.weight", ())
    inner = r.get("expert_feed_forward_length") or (shape[2] if len(shape) == 3 else None)
    # llama.cpp has no others: every layer is a mixture, and the weights of the chosen add up to 1.
    every = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    sizes = {"num_experts": r.count("expert_count"), "moe_intermediate_size": int(inner or 0)}
    return _experts(r) | every | sizes


def _smollm3(r: Reading) -> Config:
    # llama.cpp has the step built in.
    turns = [int((layer + 1) % 4 != 0) for layer in range(r.layers)]
    return {"no_rope_layer_interval": 4, "no_rope_layers": turns, "use_sliding_window": False}


def _olmo2(r: Reading) -> Config:
    if not r.get("attention.sliding_window"):
        return {}
    return {"model_type": "olmo3", "layer_types": r.kinds(4)}


def _granite(r: Reading) -> Config:
    return {
        "embedding_multiplier": float(r.get("embedding_scale") or 1.0),
        "residual_multiplier": float(r.get("residual_scale") or 1.0),
        "attention_multiplier": float(r.get("attention.scale") or r.head_size**-0.5),
        "logits_scaling": float(r.get("logit_scale") or 1.0),
        "mlp_bias": r.has("ffn_up.bias"),
    }


def _cohere(r: Reading) -> Config:
    scale = float(r.get("logit_scale", 0.0625))
    norm = {"layer_norm_eps": r.eps("epsilon", 1e-5), "logit_scale": scale}
    return norm | {"use_qk_norm": r.has("attn_q_norm.weight"), "tie_word_embeddings": True}


def _cohere2(r: Reading) -> Config:
    window = int(r.get("attention.sliding_window", 4096))
    shared = {key: value for key, value in _cohere(r).items() if key != "use_qk_norm"}
    return shared | {"sliding_window": window, "layer_types": r.kinds(4)}


def _stablelm(r: Reading) -> Config:
    return {
        "layer_norm_eps": r.eps("epsilon", 1e-5),
        "partial_rotary_factor": r.rotary_share,
        "use_qkv_bias": r.qkv_bias,
        "qk_layernorm": r.has("attn_q_norm.weight"),
        # The key in the file is not to be trusted; a model with a second norm is not parallel.
        "use_parallel_residual": not r.has("ffn_norm.weight"),
    }


def _starcoder2(r: Reading) -> Config:
    names = {"norm_epsilon": r.eps("epsilon", 1e-5), "hidden_act": "gelu_pytorch_tanh"}
    return names | {"use_bias": r.has("ffn_up.bias")}


def _gpt2(r: Reading) -> Config:
    positions = r.shapes.get("position_embd.weight")
    return {
        "n_embd": r.hidden,
        "n_layer": r.layers,
        "n_head": r.heads,
        "n_inner": r.inner,
        "n_positions": positions[0] if positions else r.count("context_length"),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": r.eps("epsilon", 1e-5),
    }


def _gpt_neox(r: Reading) -> Config:
    return {
        "layer_norm_eps": r.eps("epsilon", 1e-5),
        "hidden_act": "gelu",
        "rotary_pct": r.rotary_share,
        "rotary_emb_base": float(r.get("rope.freq_base", 10_000.0)),
        "use_parallel_residual": bool(r.get("use_parallel_residual", True)),
        "attention_bias": r.qkv_bias,
    }


def _falcon(r: Reading) -> Config:
    """7B has one key/value head; those that share several are of the newer shape."""
    wide = r.kv_heads > 1 or r.has("attn_norm_2.weight")
    return {
        "layer_norm_epsilon": r.eps("epsilon", 1e-5),
        "activation": "gelu",
        "new_decoder_architecture": wide,
        "num_ln_in_parallel_attn": (2 if r.has("attn_norm_2.weight") else 1) if wide else None,
        "num_kv_heads": r.kv_heads,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "ffn_hidden_size": r.inner,
    }


# Llama's settings that a config has not.
ABSENT = {
    "gpt2": ("head_dim", "rope_theta", "rope_scaling"),
    "gpt_neox": ("head_dim",),
    "falcon": ("head_dim",),
}
# Of each model type, what its config has beside or in place of Llama's settings.
OWN_SETTINGS: dict[str, Callable[[Reading], Config]] = {
    "gemma": lambda _: {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "granite": _granite,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "glm4": _glm4,
}
