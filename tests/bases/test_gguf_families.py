"""A GGUF file of each architecture: the tensors, the config and the logits of the model it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, PhiConfig, PhiForCausalLM

from gguf_families import name_map, settings, write_family
from gguf_files import write_model
from lorimer.bases.gguf_names import (
    ARCHITECTURES,
    architecture_of,
    hugging_face_name,
    llama_cpp_name,
    pieces,
)
from lorimer.bases.open import open_base
from lorimer.errors import BaseError
from lorimer.model.families import read_spec
from lorimer.model.load import load_decoder, read_weight
from lorimer.model.order import PAIRED_IN_GGUF
from tiny import FP32, difference, hf_logits, make_tiny, our_logits, random_rows

PHI_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 3.0],
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
# What a file cannot say is as llama.cpp has it: which layers see all, what the query is divided by.
GEMMA3 = TIED | {"query_pre_attn_scalar": 10, "layer_types": None, "num_hidden_layers": 7}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": ("llama", TIED | {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", TIED),
    "gemma2": ("gemma2", TIED | {"query_pre_attn_scalar": 10}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3 linear": ("gemma3_text", GEMMA3 | {"rope_parameters": LINEAR}),
    "phi3": ("phi3", {}),
    "phi3 without a window": ("phi3", {"sliding_window": None}),
    "phi3 longrope": (
        "phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": PHI_LONGROPE},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 5}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"head_dim": 6}),
    "cohere": ("cohere", TIED),
    "cohere, heads normed": ("cohere", TIED | {"use_qk_norm": True}),
    "cohere2": ("cohere2", TIED | {"layer_types": None, "num_hidden_layers": 5, "head_dim": 6}),
    "stablelm": ("stablelm", {}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True}),
    "stablelm, heads normed": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", TIED | {"sliding_window": None}),
    "gpt2": ("gpt2", TIED),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in turn": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon wide": ("falcon", TIED | {"bias": False}),
    "falcon one norm": ("falcon", TIED | {"bias": False, "num_ln_in_parallel_attn": 1}),
    "falcon multi-query": (
        "falcon",
        TIED | {"bias": False, "new_decoder_architecture": False, "num_kv_heads": 1},
    ),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "glm4": ("glm4", {"tie_word_embeddings": False}),
}
# Settings that say nothing about what is computed, or that GPT-2's and StableLM's configs do not know.
BESIDE = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"),
}
NOT_THEIRS = {
    "gpt2": {"rms_norm_eps", "intermediate_size"},
    "stablelm": {"rms_norm_eps"},
    "gpt_neox": {"rms_norm_eps"},
    "falcon": {"rms_norm_eps", "intermediate_size", "max_position_embeddings", "num_key_value_heads"},
    "cohere": {"rms_norm_eps"},
    "cohere2": {"rms_norm_eps"},
    "starcoder2": {"rms_norm_eps"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_file_gives_back_the_model_it_came_from(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    tiny = make_tiny(tmp_path / "hf", family, **changes)
    base = open_base(write_family(tmp_path / "model.gguf", tiny))
    spec, wanted = read_spec(base.config, path=""), read_spec(tiny.base.config, path="")
    for tensor in tiny.base.tensors:
        if tensor == "lm_head.weight" and spec.tied_head:
            continue
        mine = read_weight(base, spec, tensor)
        theirs = read_weight(tiny.base, wanted, tensor)
        if family.startswith("gemma") and tensor.endswith("norm.weight"):
            # What is computed with is the weight and 1, and that is what the file has.
            mine, theirs = mine + 1, theirs + 1
        assert torch.equal(mine, theirs), tensor
    decoder = load_decoder(base, FP32)
    for row in random_rows([23, 40]):
        assert difference(our_logits(decoder, [row])[0], hf_logits(tiny.hf, row)) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_files_config_means_what_the_models_does(name: str, tmp_path: Path) -> None:
    """Both through the config class of transformers."""
    family, changes = CASES[name]
    tiny = make_tiny(tmp_path / "hf", family, **changes)
    config = open_base(write_family(tmp_path / "model.gguf", tiny)).config
    theirs = tiny.hf.config.to_dict()
    mine = CONFIG_MAPPING[config["model_type"]](**config).to_dict()
    for key in theirs.keys() - BESIDE - NOT_THEIRS.get(family, set()):
        wanted = theirs[key]
        if key == "rope_parameters":
            assert_same_ropes(mine[key], wanted, config.get("head_dim") or 6)
        else:
            assert mine[key] == (pytest.approx(wanted, rel=1e-6) if type(wanted) is float else wanted), key


def assert_same_ropes(mine: dict[str, Any], wanted: dict[str, Any], size: int) -> None:
    assert mine.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert_same_ropes(mine[key], value, size)
        elif key == "partial_rotary_factor":  # known by the features that turn
            assert int(mine[key] * size) == int(value * size)
        else:
            assert mine[key] == (pytest.approx(value) if isinstance(value, float | list) else value), key


@pytest.mark.parametrize("named", ARCHITECTURES)
def test_the_names_are_those_of_the_gguf_package(named: str) -> None:
    row = ARCHITECTURES[named]
    names = name_map(row.model_type, 4)
    known = set()
    for short, long in {**row.top, **row.layer}.items():
        top = short in row.top
        ours = f"{long}.weight" if top else f"{row.layers}.3.{long}.weight"
        theirs = names.get_name(ours, (".weight",))
        if "{}" in long or theirs is None:  # Llama's names that this architecture has not
            continue
        assert theirs == (f"{short}.weight" if top else f"blk.3.{short}.weight"), long
        assert hugging_face_name(theirs, row) == ours
        assert llama_cpp_name(ours, row) == theirs
        known.add(short)
    assert known >= {"token_embd", "output_norm", "attn_output"}
    assert known >= REQUIRED[named]


REQUIRED: dict[str, set[str]] = {
    name: {"attn_norm", "attn_q", "attn_k", "attn_v", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}
    for name in ("llama", "qwen2", "qwen3", "gemma", "smollm3", "granite", "stablelm")
} | {
    "qwen3moe": {"attn_q_norm", "attn_k_norm", "ffn_gate_inp", "ffn_norm"},
    "gemma2": {"post_attention_norm", "ffn_norm", "post_ffw_norm"},
    "gemma3": {"post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"},
    "phi2": {"attn_norm", "attn_q", "ffn_up", "ffn_down", "output"},
    "phi3": {"attn_norm", "attn_qkv", "ffn_norm", "ffn_up", "ffn_down"},
    "olmo2": {"attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm", "ffn_gate"},
    "command-r": {"attn_norm", "attn_q", "ffn_gate", "ffn_up", "ffn_down"},
    "cohere2": {"attn_norm", "attn_q", "ffn_gate", "ffn_up", "ffn_down"},
    "starcoder2": {"attn_norm", "attn_q", "ffn_norm", "ffn_up", "ffn_down"},
    "gpt2": {"position_embd", "attn_norm", "attn_qkv", "ffn_norm", "ffn_up", "ffn_down"},
    "gptneox": {"attn_norm", "attn_qkv", "ffn_norm", "ffn_up", "ffn_down", "output"},
    "falcon": {"attn_norm", "attn_qkv", "ffn_up", "ffn_down"},
    "glm4": {"post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q", "ffn_up", "ffn_down"},
}


def test_phi_2s_names_and_config(tmp_path: Path) -> None:
    """Read, though the decoder does not compute it."""
    config = PhiConfig(
        vocab_size=101, hidden_size=36, intermediate_size=144, num_hidden_layers=2, num_attention_heads=6
    )
    model = PhiForCausalLM(config)
    names = name_map("phi", 2)
    extra = {
        str(names.get_name(name, (".weight", ".bias"))): value.detach().numpy()
        for name, value in model.state_dict().items()
    }
    metadata = {f"phi2.{key}": value for key, value in settings(config).items()}
    for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        metadata[f"phi2.{key}"] = None
    path = write_model(tmp_path / "m.gguf", "phi2", extra=extra, bare=True, metadata=metadata)
    base = open_base(path)
    assert set(base.tensors) == set(model.state_dict())
    found = PhiConfig(**base.config).to_dict()
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers", "hidden_act", "qk_layernorm")
    assert {key: found[key] for key in keys} == {key: config.to_dict()[key] for key in keys}
    assert_same_ropes(found["rope_parameters"], config.rope_parameters, 6)


def test_fused_weights_are_cut_into_the_models_own() -> None:
    """Those of the converter's --fuse-qkv, and experts."""
    row = architecture_of("qwen3moe", [])
    shapes = {
        "blk.2.attn_qkv.weight": (14, 5),
        "blk.2.attn_qkv.bias": (14,),
        "blk.2.ffn_up_exps.weight": (2, 6, 5),
    }
    found = pieces(row, shapes, (8, 3, 3))
    layer, experts = "model.layers.2.self_attn", "model.layers.2.mlp.experts"
    assert found == {
        f"{layer}.q_proj.weight": ("blk.2.attn_qkv.weight", 0, (8, 5)),
        f"{layer}.k_proj.weight": ("blk.2.attn_qkv.weight", 8, (3, 5)),
        f"{layer}.v_proj.weight": ("blk.2.attn_qkv.weight", 11, (3, 5)),
        f"{layer}.q_proj.bias": ("blk.2.attn_qkv.bias", 0, (8,)),
        f"{layer}.k_proj.bias": ("blk.2.attn_qkv.bias", 8, (3,)),
        f"{layer}.v_proj.bias": ("blk.2.attn_qkv.bias", 11, (3,)),
        f"{experts}.0.up_proj.weight": ("blk.2.ffn_up_exps.weight", 0, (6, 5)),
        f"{experts}.1.up_proj.weight": ("blk.2.ffn_up_exps.weight", 6, (6, 5)),
    }


def test_stablelms_norms_of_each_head_are_rows() -> None:
    found = pieces(architecture_of("stablelm", []), {"blk.0.attn_q_norm.weight": (2, 4)}, None)
    name = "model.layers.0.self_attn.q_layernorm.norms"
    assert {key: piece[1:] for key, piece in found.items()} == {
        f"{name}.0.weight": (0, (4,)),
        f"{name}.1.weight": (1, (4,)),
    }


def test_pieces_of_quantised_rows_are_their_bytes(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.gguf", metadata={"llama.expert_count": 1, "llama.expert_used_count": 1}
    )
    whole = open_base(path).raw("model.layers.0.self_attn.q_proj.weight")
    base = open_base(write_model(tmp_path / "f.gguf", fused=True))
    parts = [base.raw(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    assert np.array_equal(parts[0], whole)
    assert [part.nbytes for part in parts] == [256 * 272, 128 * 272, 128 * 272]


def test_biases_show_where_query_key_and_value_are_one(tmp_path: Path) -> None:
    bias = {"blk.0.attn_qkv.bias": np.ones(512, np.float32)}
    assert open_base(write_model(tmp_path / "m.gguf", fused=True, extra=bias)).config["attention_bias"]


def test_what_llama_cpp_turns_in_pairs_is_known_where_rows_are_put_in_order() -> None:
    assert set(PAIRED_IN_GGUF) == {"llama", "mistral", "mixtral", "granite", "smollm3"}


def test_a_norm_that_is_not_float32_is_refused_where_it_has_to_change(tmp_path: Path) -> None:
    half = {"blk.0.attn_q_norm.weight": np.ones(64, np.float16)}
    base = open_base(write_model(tmp_path / "m.gguf", "gemma3", extra=half))
    with pytest.raises(BaseError, match=r"attn_q_norm.weight` is F16 \(wanted: F32\)"):
        base.raw("model.layers.0.self_attn.q_norm.weight")


TURN = ["</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"]


@pytest.mark.parametrize(
    ("kinds", "named", "wanted"),
    [
        ([3, 3, 1, 3], {}, [0, 1, 3]),
        ([3, 3, 1, 3], {"eot": 1}, [0, 1]),
        ([3, 4, 1, 1], {}, [0]),
    ],
)
def test_the_ends_of_a_turn_are_found_by_their_text(
    kinds: list[int], named: dict[str, int], wanted: list[int], tmp_path: Path
) -> None:
    metadata = {f"tokenizer.ggml.{role}_token_id": number for role, number in named.items()}
    metadata |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": 0}
    base = open_base(write_model(tmp_path / "m.gguf", metadata=metadata, tokens=TURN))
    assert base.eos_token_ids() == wanted


@pytest.mark.parametrize(
    ("pattern", "wanted"), [(2, "SFSF"), (0, "SSSS"), (1, "FFFF"), ([True, False, False, True], "SFFS")]
)
def test_which_layers_have_a_window(pattern: Any, wanted: str, tmp_path: Path) -> None:
    metadata = {"gemma2.attention.sliding_window_pattern": pattern, "gemma2.block_count": 4}
    config = open_base(write_model(tmp_path / "m.gguf", "gemma2", metadata=metadata)).config
    assert "".join(kind[0].upper() for kind in config["layer_types"]) == wanted
