"""llama.cpp's names of tensors and Hugging Face's: a row for each architecture, read in both directions.

llama.cpp's converter renames tensors, stacks experts, and changes a few: docs/gguf.md lists how. Here a
tensor of a file becomes one tensor of the model, or several that are stretches of its rows; and the other
way round where a file is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

Names = dict[str, str]

# Lists of what each rotary frequency is divided by; no part of the model's weights.
FREQUENCIES = "rope_freqs.weight"
FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
DIVISORS = (FREQUENCIES, *FACTORS)

LLAMA_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Norms stand before and after attention, and before and after the gated unit.
SANDWICH = LLAMA_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
NEOX_TOP = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "lm_head",
}
NEOX_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
FALCON_TOP = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
FALCON_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
QWEN_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """`layer` are names within a layer; one with `{}` stands for the stretches of a stacked tensor.

    `norm_offset` is what the converter added to every norm's weight. `partial`: `rope.dimension_count` is
    the part of a head that turns, and not its size. What follows is what llama.cpp's own code reads, and
    matters for what is written: the `biases` of projections, those that it must have (`biased`), whether
    the head is a tensor of its `own` or always the embedding (`tied`), the lists of `divisors`, and
    whether it knows a sliding window.
    """

    model_type: str
    top: Names = field(default_factory=lambda: LLAMA_TOP)
    layer: Names = field(default_factory=lambda: LLAMA_LAYER)
    layers: str = "model.layers"
    norm_offset: float = 0.0
    partial: bool = False
    biases: tuple[str, ...] = ()
    biased: bool = False
    head: Literal["either", "own", "tied"] = "either"
    divisors: tuple[str, ...] = ()
    windows: bool = False

    def added(self, name: str) -> float:
        """What the converter added to the numbers of this tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


def _without(names: Names, *keys: str) -> Names:
    return {key: name for key, name in names.items() if key not in keys}


_PHI2 = {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_PHI3 = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_OLMO2 = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Of each head's own norm of query and key, one row; StableLM 2 12B has them.
_STABLELM = {
    "attn_q_norm": "self_attn.q_layernorm.norms.{}",
    "attn_k_norm": "self_attn.k_layernorm.norms.{}",
}
_QKV = ("attn_q", "attn_k", "attn_v")
_FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
_ALL = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_GLM4 = {
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "post_ffw_norm": "post_mlp_layernorm",
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", biases=_ALL, divisors=(FREQUENCIES,)),
    "qwen2": Architecture("qwen2", biases=_QKV, biased=True),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", layer=LLAMA_LAYER | {"ffn_gate_inp": "mlp.gate"} | QWEN_EXPERTS),
    "gemma": Architecture("gemma", norm_offset=1.0, head="tied"),
    "gemma2": Architecture("gemma2", layer=SANDWICH, norm_offset=1.0, head="tied", windows=True),
    "gemma3": Architecture("gemma3_text", layer=SANDWICH, norm_offset=1.0, windows=True),
    "phi2": Architecture(
        "phi",
        LLAMA_TOP | {"output_norm": "model.final_layernorm"},
        _without(LLAMA_LAYER, "ffn_norm", "ffn_gate") | _PHI2,
        partial=True,
        biases=(*_ALL, "output"),
        biased=True,
        head="own",
    ),
    "phi3": Architecture(
        "phi3",
        layer=_without(LLAMA_LAYER, "attn_q", "attn_k", "attn_v", "ffn_gate") | _PHI3,
        partial=True,
        divisors=FACTORS,
        windows=True,
    ),
    "smollm3": Architecture("smollm3"),
    "olmo2": Architecture(
        "olmo2", layer=_without(LLAMA_LAYER, "attn_norm", "ffn_norm") | _OLMO2, head="own"
    ),
    "granite": Architecture("granite", biases=_ALL),
    "command-r": Architecture("cohere", layer=_without(LLAMA_LAYER, "ffn_norm"), head="tied"),
    "cohere2": Architecture("cohere2", layer=_without(LLAMA_LAYER, "ffn_norm"), head="tied", windows=True),
    "stablelm": Architecture(
        "stablelm", layer=LLAMA_LAYER | _STABLELM, partial=True, biases=_QKV, head="own"
    ),
    "starcoder2": Architecture(
        "starcoder2",
        layer=_without(LLAMA_LAYER, "ffn_gate") | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        biases=_ALL,
        biased=True,
    ),
    "gpt2": Architecture("gpt2", GPT2_TOP, GPT2_LAYER, "transformer.h", biases=_FUSED, biased=True),
    "gptneox": Architecture(
        "gpt_neox",
        NEOX_TOP,
        NEOX_LAYER,
        "gpt_neox.layers",
        partial=True,
        biases=_FUSED,
        biased=True,
        head="own",
    ),
    "falcon": Architecture("falcon", FALCON_TOP, FALCON_LAYER, "transformer.h"),
    "glm4": Architecture(
        "glm4", layer=_without(LLAMA_LAYER, "ffn_gate") | _GLM4, partial=True, biases=_QKV
    ),
}


class Variant(NamedTuple):
    """A row for files of an architecture that have the tensor `mark`; one without a mark is only written,
    as llama.cpp does not tell it apart."""

    named: str
    mark: str
    row: Architecture


_LLAMA, _FALCON = ARCHITECTURES["llama"], ARCHITECTURES["falcon"]
_MIXTRAL = LLAMA_LAYER | {"ffn_gate_inp": "block_sparse_moe.gate"} | MIXTRAL_EXPERTS
# Falcon 40B: attention has a norm of its own.
_FALCON_40B = FALCON_LAYER | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
VARIANTS = (
    Variant("llama", "ffn_gate_inp", replace(_LLAMA, model_type="mixtral", layer=_MIXTRAL)),
    Variant("falcon", "attn_norm_2", replace(_FALCON, layer=_FALCON_40B)),
    Variant("llama", "", replace(_LLAMA, model_type="mistral")),
)


def architecture_of(named: str, tensors: Iterable[str]) -> Architecture:
    """The row of llama.cpp's architecture, as the file's tensors tell its variants apart.

    One that is not in the table keeps its name, with Llama's names of tensors.
    """
    inside = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors}
    for variant in VARIANTS:
        if variant.named == named and variant.mark in inside:
            return variant.row
    return ARCHITECTURES.get(named, Architecture(named))


def architecture_for(model_type: str, tensors: Iterable[str]) -> tuple[str, Architecture] | None:
    """The inverse, for a model with these tensors by Hugging Face's names; None if llama.cpp has none."""
    names = list(tensors)
    for variant in (*VARIANTS, *(Variant(named, "", row) for named, row in ARCHITECTURES.items())):
        mark = f".{variant.row.layer[variant.mark]}." if variant.mark else ""
        if variant.row.model_type == model_type and any(mark in name for name in names):
            return variant.named, variant.row
    return None


class Piece(NamedTuple):
    """Some rows of a tensor of the file, whose dimensions before the last are one."""

    name: str
    first: int
    shape: tuple[int, ...]


def pieces(
    row: Architecture, tensors: Mapping[str, tuple[int, ...]], qkv: tuple[int, int, int] | None
) -> dict[str, Piece]:
    """Hugging Face's name of every tensor of the model, and where it is in the file.

    `tensors` are names and shapes of the file; `qkv` the rows of query, key and value, for files that
    have them as one where the model has three.
    """
    found: dict[str, Piece] = {}
    for name, shape in tensors.items():
        for theirs, first, part in _stretches(row, name, shape, qkv):
            found[theirs] = Piece(name, first, part)
    return found


def _stretches(
    row: Architecture, name: str, shape: tuple[int, ...], qkv: tuple[int, int, int] | None
) -> list[tuple[str, int, tuple[int, ...]]]:
    whole = [(hugging_face_name(name, row), 0, shape)]
    block, _, rest = name.partition(".")
    number, _, inside = rest.partition(".")
    module, _, kind = inside.rpartition(".")
    if block != "blk" or not module:
        return whole
    prefix = f"{row.layers}.{number}."
    if module == "attn_qkv" and "attn_q" in row.layer and qkv is not None and sum(qkv) == shape[0]:
        starts = (0, qkv[0], qkv[0] + qkv[1])
        return [
            (f"{prefix}{row.layer[key]}.{kind}", start, (rows, *shape[1:]))
            for key, start, rows in zip(("attn_q", "attn_k", "attn_v"), starts, qkv, strict=True)
        ]
    if "{}" in row.layer.get(module, "") and len(shape) > 1:
        inner = shape[1] if len(shape) == 3 else 1
        return [
            (f"{prefix}{row.layer[module].format(each)}.{kind}", each * inner, shape[1:])
            for each in range(shape[0])
        ]
    return whole


def hugging_face_name(name: str, row: Architecture = ARCHITECTURES["llama"]) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    parts = name.split(".")
    if parts[0] in row.top and len(parts) == 2:
        return f"{row.top[parts[0]]}.{parts[1]}"
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in row.layer:
        return f"{row.layers}.{parts[1]}.{row.layer[parts[2]]}.{parts[3]}"
    return name


def llama_cpp_name(name: str, row: Architecture = ARCHITECTURES["llama"]) -> str | None:
    """The inverse: `model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; None if unknown.

    Each expert has the name of the tensor that they are stacked in.
    """
    place = _place(name, row)
    return None if place is None else place[0]


def stacks(row: Architecture, names: Iterable[str]) -> dict[str, list[str]]:
    """The inverse of `pieces`: the tensors of a file, and the model's tensors that each holds, in order.

    Names without a place are left out.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        place = _place(name, row)
        if place is not None:
            found.setdefault(place[0], {})[place[1]] = name
    return {name: [parts[number] for number in sorted(parts)] for name, parts in found.items()}


def _place(name: str, row: Architecture) -> tuple[str, int] | None:
    """The tensor of the file, and which of its stretches."""
    module, _, kind = name.rpartition(".")
    for short, long in row.top.items():
        if module == long:
            return f"{short}.{kind}", 0
    number, _, inside = module.removeprefix(f"{row.layers}.").partition(".")
    if module.startswith(f"{row.layers}.") and number.isdecimal():
        for short, long in row.layer.items():
            found = re.fullmatch(re.escape(long).replace(r"\{\}", r"(\d+)"), inside)
            if found is not None:
                return f"blk.{number}.{short}.{kind}", int(found[1]) if found.groups() else 0
    return None
