"""config.json -> ModelSpec: one short function for each architecture.

Adding one that differs only in data is a function here, a row in FAMILIES and a row of tests
(docs/adding-a-family.md). A size or setting that the decoder cannot compute raises NotNative, which
sends the base to the slower path through transformers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lorimer.errors import BaseError
from lorimer.model.config import (
    ACTIVATIONS,
    Config,
    all_windows,
    check_sizes,
    make_spec,
    qwen_windows,
    read_rope,
    windows_by_kind,
    with_defaults,
)
from lorimer.model.spec import ExpertSpec, ModelSpec, Names


class NotNative(ValueError):
    """A setting of a known architecture that the decoder does not compute."""


def llama(config: Config) -> ModelSpec:
    """Llama 1 to 3 and all that share its shape (SmolLM2, TinyLlama, Yi, DeepSeek-LLM)."""
    bias = bool(config.get("attention_bias", False))
    return make_spec(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def mistral(config: Config) -> ModelSpec:
    """Llama with a sliding window on every layer."""
    return make_spec(config, windows=all_windows(config, config.get("sliding_window")))


def qwen2(config: Config) -> ModelSpec:
    """Llama with biases on query, key and value; the upper layers may have a window."""
    return make_spec(config, qkv_bias=True, windows=qwen_windows(config))


def qwen3(config: Config) -> ModelSpec:
    """Query and key are normed for each head; no biases unless the config says so."""
    bias = bool(config.get("attention_bias", False))
    windows = qwen_windows(config)
    return make_spec(config, qkv_bias=bias, output_bias=bias, qk_norm="head", head_dim=128, windows=windows)


def qwen3_moe(config: Config) -> ModelSpec:
    """Qwen3 with a mixture of experts in most layers."""
    step, alone = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or ())
    layers = range(int(config["num_hidden_layers"]))
    count = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    experts = ExpertSpec(
        count=count,
        chosen=_chosen(config, count),
        inner=int(config["moe_intermediate_size"]),
        renormalise=bool(config.get("norm_topk_prob", False)),
        layers=frozenset(n for n in layers if count and n not in alone and (n + 1) % step == 0),
    )
    return replace(qwen3(config), experts=experts)


def mixtral(config: Config) -> ModelSpec:
    """Mistral with a mixture of experts in every layer."""
    count, layers = int(config["num_local_experts"]), int(config["num_hidden_layers"])
    experts = ExpertSpec(
        count, _chosen(config, count), int(config["intermediate_size"]), True, frozenset(range(layers))
    )
    names = Names(
        router="block_sparse_moe.gate",
        expert_files="block_sparse_moe.experts",
        expert_up=("w1", "w3"),
        expert_down="w2",
    )
    return replace(mistral(config), experts=experts, names=names)


def gemma(config: Config) -> ModelSpec:
    """Norms add one to their weights, embeddings are scaled, the gate is a GELU."""
    return make_spec(config, **_gemma(config))


def gemma2(config: Config) -> ModelSpec:
    """Gemma with norms before and after each part, caps on scores and logits, and every other layer with
    a window."""
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer % 2 == 0 else "full_attention"
        for layer in range(int(config["num_hidden_layers"]))
    ]
    return make_spec(
        config,
        **_gemma(config),
        **_query_scale(config),
        windows=windows_by_kind(kinds, config.get("sliding_window", 4096)),
        score_cap=float(config.get("attn_logit_softcapping") or 0.0),
        logit_cap=float(config.get("final_logit_softcapping") or 0.0),
        names=SANDWICH,
    )


def gemma3(config: Config) -> ModelSpec:
    """Gemma 2 without caps, with query and key normed; layers with a window turn at a base of their own."""
    config = with_defaults(config, **GEMMA3)
    step = int(config.get("sliding_window_pattern", 6))
    kinds = config.get("layer_types") or [
        "full_attention" if (layer + 1) % step == 0 else "sliding_attention"
        for layer in range(int(config["num_hidden_layers"]))
    ]
    ropes = dict(config.get("rope_parameters") or {})
    whole, local = ropes.get("full_attention"), ropes.get("sliding_attention")
    shared = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling", "rope_theta")}
    whole = whole or {"rope_theta": config.get("rope_theta", 1e6)} | (config.get("rope_scaling") or {})
    local = local or {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    spec = make_spec(
        shared | {"rope_parameters": whole},
        **_gemma(config),
        **_query_scale(config),
        windows=windows_by_kind(kinds, config.get("sliding_window", 4096)),
        turns=tuple(1 if kind == "sliding_attention" else 0 for kind in kinds),
        score_cap=float(config.get("attn_logit_softcapping") or 0.0),
        logit_cap=float(config.get("final_logit_softcapping") or 0.0),
        qk_norm="head",
        names=SANDWICH,
    )
    second = read_rope(shared | {"rope_parameters": local}, spec.head_dim, spec.max_positions)
    return replace(spec, more_ropes=(second,))


def phi3(config: Config) -> ModelSpec:
    """Phi-3 and Phi-4: Llama with query, key and value in one weight, and gate and up in another."""
    names = Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
    return make_spec(config, windows=all_windows(config, config.get("sliding_window")), names=names)


def smollm3(config: Config) -> ModelSpec:
    """Llama whose every fourth layer does not turn."""
    layers, step = int(config["num_hidden_layers"]), int(config.get("no_rope_layer_interval") or 4)
    turns = config.get("no_rope_layers") or [int((layer + 1) % step != 0) for layer in range(layers)]
    return replace(
        llama(config),
        windows=qwen_windows(config),
        turns=tuple(0 if turns_here else None for turns_here in turns[:layers]),
    )


def olmo2(config: Config) -> ModelSpec:
    """Norms stand after attention and after the gated unit, and over all heads of query and key."""
    names = Names(
        attention_norm="",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="",
        mlp_post_norm="post_feedforward_layernorm",
    )
    return replace(llama(config), qk_norm="all", names=names)


def granite(config: Config) -> ModelSpec:
    """Llama with four factors: on embeddings, scores, residual additions and logits."""
    return replace(
        llama(config),
        embedding_scale=float(config.get("embedding_multiplier", 1.0)),
        score_scale=float(config.get("attention_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(config.get("logits_scaling", 1.0)),
    )


def cohere(config: Config) -> ModelSpec:
    """Command R: attention and gated unit side by side behind one LayerNorm without bias; Command R+ also
    norms each head of query and key."""
    bias = bool(config.get("attention_bias", False))
    return make_spec(
        with_defaults(config, tie_word_embeddings=True, rope_theta=500_000.0),
        norm="layer",
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        qkv_bias=bias,
        output_bias=bias,
        parallel=True,
        rope_pairs=True,
        qk_norm="own" if config.get("use_qk_norm") else "",
        logit_scale=float(config.get("logit_scale", 0.0625)),
        names=ONE_NORM,
    )


def cohere2(config: Config) -> ModelSpec:
    """Command R7B: Cohere whose layers without a window do not turn."""
    step = int(config.get("sliding_window_pattern", 4))
    kinds = config.get("layer_types") or [
        "full_attention" if (layer + 1) % step == 0 else "sliding_attention"
        for layer in range(int(config["num_hidden_layers"]))
    ]
    return replace(
        cohere(with_defaults(config, rope_theta=10_000.0)),
        windows=windows_by_kind(kinds, config.get("sliding_window", 4096)),
        turns=tuple(0 if kind == "sliding_attention" else None for kind in kinds),
    )


def stablelm(config: Config) -> ModelSpec:
    """Llama with LayerNorms, of whose heads a part turns; some have no second norm, and 12B has one for
    each head of query and key."""
    parallel = bool(config.get("use_parallel_residual", False))
    names = Names(query_norm="self_attn.q_layernorm.norms.{}", key_norm="self_attn.k_layernorm.norms.{}")
    return make_spec(
        with_defaults(config, partial_rotary_factor=0.25),
        norm="layer",
        norm_bias=True,
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        parallel=parallel,
        qk_norm="own" if config.get("qk_layernorm") else "",
        names=replace(names, mlp_norm="input_layernorm") if parallel else names,
    )


def starcoder2(config: Config) -> ModelSpec:
    """LayerNorms, biases everywhere, and a plain GELU between two projections."""
    bias = bool(config.get("use_bias", True))
    return make_spec(
        with_defaults(config, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
        norm="layer",
        norm_bias=True,
        norm_eps=float(config.get("norm_epsilon", 1e-5)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        gated=False,
        windows=all_windows(config, config.get("sliding_window")),
        names=Names(up=("mlp.c_fc",), down="mlp.c_proj"),
    )


def gpt2(config: Config) -> ModelSpec:
    """Learned positions, LayerNorms, and weights that lie the other way round."""
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if config.get(name):
            raise NotNative(f"`{name}` is on")
    hidden, positions = int(config["n_embd"]), int(config.get("n_positions", 1024))
    plain = ONE_HEAD_SIZE | {
        "hidden_size": hidden,
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "intermediate_size": config.get("n_inner") or 4 * hidden,
        "max_position_embeddings": positions,
        "hidden_act": config.get("activation_function", "gelu_new"),
    }
    spec = make_spec(
        with_defaults(config, tie_word_embeddings=True) | plain,
        **_classic(config.get("layer_norm_epsilon", 1e-5)),
        transposed=True,
        learned_positions=positions,
        turns=(None,) * int(config["n_layer"]),
        names=Names(
            embedding="transformer.wte",
            positions="transformer.wpe",
            layers="transformer.h",
            final_norm="transformer.ln_f",
            attention_norm="ln_1",
            qkv=("attn.c_attn",),
            output="attn.c_proj",
            mlp_norm="ln_2",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
        ),
    )
    return spec if config.get("scale_attn_weights", True) else replace(spec, score_scale=1.0)


def gpt_neox(config: Config) -> ModelSpec:
    """GPT-NeoX and Pythia: attention and unit side by side, each behind a norm."""
    share = config.get("rotary_pct", 0.25)
    bias = bool(config.get("attention_bias", True))
    spec = make_spec(
        with_defaults(config, hidden_act="gelu", partial_rotary_factor=share)
        | {"rope_theta": config.get("rotary_emb_base", config.get("rope_theta"))}
        | ONE_HEAD_SIZE,
        **_classic(config.get("layer_norm_eps", 1e-5)),
        parallel=bool(config.get("use_parallel_residual", True)),
        grouped_rows=True,
        names=Names(
            embedding="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            qkv=("attention.query_key_value",),
            output="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
        ),
    )
    return replace(spec, qkv_bias=bias, output_bias=bias)


def opt(config: Config) -> ModelSpec:
    """Learned positions from row 2 on, LayerNorms, ReLU."""
    hidden, positions = int(config["hidden_size"]), int(config.get("max_position_embeddings", 2048))
    if not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
        raise NotNative("`do_layer_norm_before` is off")
    if (config.get("word_embed_proj_dim") or hidden) != hidden:
        raise NotNative("`word_embed_proj_dim` differs from `hidden_size`")
    if not config.get("layer_norm_elementwise_affine", True):
        raise NotNative("`layer_norm_elementwise_affine` is off")
    bias = bool(config.get("enable_bias", True))
    spec = make_spec(
        with_defaults(config, tie_word_embeddings=True)
        | ONE_HEAD_SIZE
        | {
            "intermediate_size": config["ffn_dim"],
            "hidden_act": config.get("activation_function", "relu"),
        },
        **_classic(1e-5),
        learned_positions=positions + 2,
        first_position=2,
        turns=(None,) * int(config["num_hidden_layers"]),
        names=Names(
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            layers="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            attention_norm="self_attn_layer_norm",
            output="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            up=("fc1",),
            down="fc2",
        ),
    )
    return replace(spec, qkv_bias=bias, output_bias=bias, mlp_bias=bias)


def glm4(config: Config) -> ModelSpec:
    """GLM-4: norms before and after each part, gate and up in one weight, pairs of half a head turn."""
    names = Names(
        attention_post_norm="post_self_attn_layernorm",
        mlp_norm="post_attention_layernorm",
        up=("mlp.gate_up_proj",),
        mlp_post_norm="post_mlp_layernorm",
    )
    return make_spec(
        with_defaults(config, partial_rotary_factor=0.5, head_dim=128),
        qkv_bias=bool(config.get("attention_bias", True)),
        rope_pairs=True,
        names=names,
    )


def falcon(config: Config) -> ModelSpec:
    """Falcon 7B, 40B and 11B: attention and unit side by side, few key/value heads, one fused weight."""
    if config.get("alibi"):
        raise NotNative("`alibi` is on")
    wide, multi = bool(config.get("new_decoder_architecture")), bool(config.get("multi_query", True))
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    if not wide and not config.get("parallel_attn", True):
        raise NotNative("`parallel_attn` is off")
    two = wide and config.get("num_ln_in_parallel_attn") in (None, 2)
    names = Names(
        embedding="transformer.word_embeddings",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        attention_norm="ln_attn" if two else "input_layernorm",
        qkv=("self_attention.query_key_value",),
        output="self_attention.dense",
        mlp_norm="ln_mlp" if two else "input_layernorm",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    )
    kv_heads = int(config.get("num_kv_heads") or heads) if wide else 1 if multi else heads
    bias = bool(config.get("bias", False))
    spec = make_spec(
        with_defaults(config, tie_word_embeddings=True)
        | {
            "head_dim": None,
            "num_key_value_heads": kv_heads,
            "intermediate_size": config.get("ffn_hidden_size") or 4 * hidden,
            "hidden_act": config.get("activation", "gelu"),
        },
        **_classic(config.get("layer_norm_epsilon", 1e-5)),
        parallel=True,
        grouped_rows=True,
        names=names,
    )
    return replace(spec, qkv_bias=bias, output_bias=bias, mlp_bias=bias)


FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "smollm3": smollm3,
    "olmo2": olmo2,
    "granite": granite,
    "cohere": cohere,
    "cohere2": cohere2,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "opt": opt,
    "falcon": falcon,
    "glm4": glm4,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}

# Norms before and after attention, and before and after the gated unit.
SANDWICH = Names(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
# What published configs of Gemma 3 with pictures leave out.
GEMMA3: Config = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}
# One norm, whose result attention and the gated unit both read.
ONE_NORM = Names(mlp_norm="input_layernorm")
# Architectures whose configs have no such settings.
ONE_HEAD_SIZE: Config = {"head_dim": None, "num_key_value_heads": None}


def why_not_native(config: Config) -> str | None:
    """What sends a base to the slower path through transformers; None for one that the decoder computes, or
    whose config `read_spec` refuses."""
    named = config.get("model_type")
    family = FAMILIES.get(str(named))
    if named is None:
        return None
    if family is None:
        return "lorimer's own decoder does not know it"
    try:
        check_sizes(config)
        family(config)
    except NotNative as error:
        return f"lorimer's own decoder does not compute its settings ({error})"
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return None


def read_spec(config: Config, *, path: str) -> ModelSpec:
    """The ModelSpec of a base's config; BaseError for an architecture that is not known."""
    if config.get("model_type") is None:
        raise BaseError(
            "the model's config does not say `model_type`",
            fix="Check config.json against the model's original.",
            path=path,
        )
    named = str(config["model_type"])
    family = FAMILIES.get(named)
    if family is None:
        near = difflib.get_close_matches(named, FAMILIES, 1)
        raise BaseError(
            f"the architecture `{named}` is not supported",
            fix=(f"Did you mean `{near[0]}`? " if near else "") + f"Supported: {', '.join(FAMILIES)}.",
            path=path,
        )
    try:
        check_sizes(config)
        return family(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        name = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise BaseError(
            f"the model's config cannot be used: {name}",
            fix="Check config.json against the model's original.",
            path=path,
        ) from error


def _gemma(config: Config) -> dict[str, Any]:
    """What all Gemmas share."""
    return {
        "head_dim": 256,
        "norm_offset": 1.0,
        "embedding_scale": math.sqrt(int(config["hidden_size"])),
        "activation": ACTIVATIONS[config.get("hidden_activation") or "gelu_pytorch_tanh"],
        "tied_head": bool(config.get("tie_word_embeddings", True)),
        **dict.fromkeys(("qkv_bias", "output_bias"), bool(config.get("attention_bias", False))),
    }


def _classic(eps: float) -> dict[str, Any]:
    """What the models before Llama share: LayerNorms, biases, no gate."""
    shared = dict.fromkeys(("norm_bias", "qkv_bias", "output_bias", "mlp_bias"), True)
    return {"norm": "layer", "norm_eps": float(eps), "gated": False} | shared


def _query_scale(config: Config) -> dict[str, Any]:
    return {"score_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5}


def _chosen(config: Config, count: int) -> int:
    chosen = int(config.get("num_experts_per_tok", 2))
    if not 1 <= chosen <= max(1, count):
        raise ValueError(f"`num_experts_per_tok` is {chosen} (wanted: 1 to the {count} experts)")
    return chosen
