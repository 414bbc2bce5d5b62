"""Every architecture that llama.cpp has, as a GGUF file: the same model, in llama.cpp's words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, Keys
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.hard_strings import CONFIG, CONTROLS, KINDS, NUMERIC, PLAIN, cut_as
from gguf_families import settings, write_family
from gguf_files import write_model
from lorimer.bases.gguf import GgufFile
from lorimer.bases.open import BaseFiles, open_base
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import BaseError
from lorimer.export.gguf import export_gguf
from lorimer.export.gguf_lora import export_gguf_lora
from lorimer.export.source import Source, open_source
from lorimer.generate.engine import generate_ids
from lorimer.generate.sampling import Sampling
from lorimer.lora.merge import merged_tensors
from lorimer.model.families import read_spec
from lorimer.model.load import load_decoder, read_weight
from lorimer.model.order import is_transposed
from lorimer.quant.gguf_blocks import dequantise
from lorimer.quant.gguf_encode import encode
from small_base import CHATML, write_chat_base
from tiny import FP32, Tiny, difference, hf_logits, our_logits, random_rows

Make = Callable[..., Any]
TIED: dict[str, Any] = {"tie_word_embeddings": True}
GEMMA3 = TIED | {"query_pre_attn_scalar": 10, "layer_types": None, "num_hidden_layers": 7}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 3.0],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", TIED),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "gemma": ("gemma", TIED),
    "gemma2": ("gemma2", TIED | {"query_pre_attn_scalar": 10}),
    "gemma3": ("gemma3_text", GEMMA3),
    "phi3": ("phi3", {}),
    "phi3 longrope": ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
    "smollm3": ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 5}),
    "olmo2": ("olmo2", {}),
    "olmo2, tied": ("olmo2", TIED),
    "granite": ("granite", {"head_dim": 6}),
    "cohere": ("cohere", TIED),
    "cohere, heads normed": ("cohere", TIED | {"use_qk_norm": True, "num_hidden_layers": 64}),
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
    "glm4": ("glm4", {}),
}
BATCH = random_rows([9, 23, 40], seed=4)


def apart(mine: Any, theirs: Any) -> float:
    pairs = zip(our_logits(mine, BATCH), our_logits(theirs, BATCH), strict=True)
    return max(difference(a, b) for a, b in pairs)


def opened(folder: Path) -> Tiny:
    """The folder by both sides."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = open_base(folder)
    return Tiny(folder, hf, base, load_decoder(base, FP32))


def loaded(path: Path) -> Any:
    return load_decoder(open_base(path), FP32)


def numbers(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, by the gguf package."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", CASES)
def test_merged_or_beside_its_base_a_file_is_the_live_model(name: str, tmp_path: Path, make: Make) -> None:
    """The adapter's file as llama.cpp computes it: each tensor and scale times B A, matrix by matrix."""
    family, base = CASES[name]
    source, live = make(family, base=base)
    path = export_gguf(source, tmp_path / "merged.gguf", "f32").path
    assert apart(loaded(path), live) < 1e-5
    merged, wanted = beside(source, tmp_path), numbers(path)
    assert merged.keys() == wanted.keys()
    for tensor, value in merged.items():
        np.testing.assert_allclose(value, wanted[tensor], atol=3e-6, err_msg=tensor)


def beside(source: Source, folder: Path) -> dict[str, np.ndarray]:
    plain = export_gguf(open_source(str(source.base.path)), folder / "plain.gguf", "f32").path
    path = export_gguf_lora(source, folder / "lora.gguf").path
    named = "general.architecture"
    assert GgufFile(path).metadata[named] == GgufFile(plain).metadata[named]
    alpha, tensors, factors = GgufFile(path).metadata["adapter.lora.alpha"], numbers(plain), numbers(path)
    assert factors
    for tensor in [name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")]:
        down, up = factors.pop(f"{tensor}.lora_a"), factors.pop(f"{tensor}.lora_b")
        tensors[tensor] = tensors[tensor] + alpha / down.shape[-2] * (up @ down)
    assert not factors
    return tensors


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "gpt_neox", "phi3 longrope"])
def test_a_file_that_was_written_is_a_base_again(name: str, tmp_path: Path, make: Make) -> None:
    family, base = CASES[name]
    path = export_gguf(make(family, base=base)[0], tmp_path / "a.gguf", "f32").path
    source, live = make(base=path)
    second = export_gguf(source, tmp_path / "b.gguf", "f32").path
    assert apart(loaded(second), live) < 1e-5
    assert list(numbers(second)) == list(numbers(path))
    merged, wanted = beside(source, tmp_path), numbers(second)
    for tensor, value in merged.items():
        np.testing.assert_allclose(value, wanted[tensor], atol=3e-6, err_msg=tensor)


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_keys_are_those_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    """Name by name and number by number, in the settings that both write, and as a config."""
    family, base = CASES[name]
    folder = write_chat_base(tmp_path / "base", family, **base)
    path = export_gguf(open_source(str(folder)), tmp_path / "a.gguf", "f32").path
    tiny, mine = opened(folder), numbers(path)
    theirs = numbers(write_family(tmp_path / "theirs.gguf", tiny))
    if name == "olmo2, tied":  # llama.cpp asks for the head
        assert np.array_equal(mine.pop("output.weight"), mine["token_embd.weight"])
    assert mine.keys() == theirs.keys()
    for tensor, wanted in theirs.items():
        assert np.array_equal(mine[tensor], wanted), tensor
    check_words(path, tiny)
    found, spec = read_spec(open_base(path).config, path=""), read_spec(tiny.base.config, path="")
    for field in SAME:
        assert getattr(found, field) == getattr(spec, field), field
    assert open_base(path).eos_token_ids() == tiny.base.eos_token_ids()


SAME = (
    *("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "max_positions"),
    *("windows", "turns", "qk_norm", "activation", "experts", "learned_positions", "parallel"),
)


def check_words(path: Path, tiny: Tiny) -> None:
    """Every tensor and key is one that the gguf package knows, and says what the converter says."""
    fields = gguf.GGUFReader(path).fields
    named = fields["general.architecture"].contents()
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == named)
    allowed = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[kind]}
    for tensor in numbers(path):
        assert gguf_pattern(tensor) in allowed, tensor
    for key in fields:
        assert "GGUF." in key or key.replace(f"{named}.", "{arch}.") in known_keys(), key
    for key, value in settings(tiny.hf.config).items():
        if f"{named}.{key}" in fields and key not in NOT_SAME:
            found = fields[f"{named}.{key}"].contents()
            assert found == (pytest.approx(value) if isinstance(value, float) else value), key


# What the converter has wrong: Falcon's unit, StableLM's branches.
NOT_SAME = {"feed_forward_length", "use_parallel_residual"}


def gguf_pattern(name: str) -> str:
    """`blk.3.attn_q.weight` -> `blk.{bid}.attn_q`, as the gguf package lists it."""
    parts = name.split(".")[:-1]
    return ".".join("{bid}" if part.isdecimal() else part for part in parts)


def known_keys() -> set[str]:
    found = set()
    for group in (Keys.General, Keys.LLM, Keys.Attention, Keys.Rope, Keys.Tokenizer):
        found |= {value for value in vars(group).values() if isinstance(value, str)}
    return found


# Rows of whole blocks: of 32, and of 256 where K types are asked for.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def wide(family: str, base: dict[str, Any]) -> dict[str, Any]:
    """The same model with rows of 256 numbers."""
    head = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "gpt2":
        return base | {"n_embd": 256, "n_inner": 256, "n_head": 4, "n_layer": 2}
    if family == "falcon":
        head = {"num_attention_heads": 4}
    if "experts" in str(base) or "moe" in family:
        base = base | {"moe_intermediate_size": 256}
    if "rope_parameters" in base:
        factors = {f"{kind}_factor": [1.0 + n / 8 for n in range(32)] for kind in ("long", "short")}
        base = base | {"rope_parameters": LONGROPE | factors}
    if "query_pre_attn_scalar" in base:
        base = base | {"query_pre_attn_scalar": 64}
    if base.get("num_hidden_layers") == 64:  # Command R+ is known by its layers
        head["num_hidden_layers"] = 64
    return base | SIZES | head


# How each family's models cut text: a name of llama.cpp's, or a kind of SentencePiece.
VOCABULARY = {
    "llama": "llama 3",
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "stablelm"), "qwen2"),
    **dict.fromkeys(("smollm3", "olmo2", "glm4"), "dbrx"),
    **dict.fromkeys(("granite", "starcoder2"), "smollm"),
    **dict.fromkeys(("cohere", "cohere2"), "command-r"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gemma"),
    "gpt2": "gpt-2",
    "gpt_neox": "olmo",
    "falcon": "falcon",
    "mistral": "prepend",
    "mixtral": "metaspace always",
    "phi3": "prepend",
}
OTHERS = {"phi3 longrope": "gpt-4o"}  # Phi-4 mini


def vocabulary(name: str) -> str:
    kind = OTHERS.get(name, VOCABULARY[CASES[name][0]])
    return KINDS[kind]() if kind in KINDS else cut_as(kind)


# A tied OLMo 2 gets a head of its own in the file, and is then the untied one.
@pytest.mark.parametrize("name", [name for name in CASES if name != "olmo2, tied"])
def test_a_quantised_file_with_the_familys_vocabulary_says_what_transformers_says(
    name: str, tmp_path: Path
) -> None:
    """Every type holds the weights rounded once; ids, logits and greedy text are those of a folder that
    has the file's own numbers, by transformers."""
    family, base = CASES[name]
    text = vocabulary(name)
    before = Tokenizer(text, CONFIG)
    folder = write_chat_base(tmp_path / "base", family, **wide(family, base), vocab_size=before.vocab_size)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    source, stored = open_source(str(folder)), load_file(folder / "model.safetensors")
    kinds = {"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q4_K"}
    for kind, dtype in list(kinds.items())[2 if source.spec.layers == 64 else 0 :]:
        mine = open_base(export_gguf(source, tmp_path / f"{kind}.gguf", kind).path)
        assert dtype in {entry.dtype for entry in mine.tensors.values()}
        rounded = dict(checked(source, mine))
    check_vocabulary(before, mine, is_gemma=family.startswith("gemma"))
    state = {name: rounded[name if name in rounded else "lm_head.weight"] for name in stored}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    hf, decoder = opened(folder).hf, load_decoder(mine, FP32)
    for row in BATCH:
        assert difference(our_logits(decoder, [row])[0], hf_logits(hf, row)) < 1e-5
    check_greedy(decoder, hf, Tokenizer.from_base(mine), tokenizers.Tokenizer.from_str(text))


def check_vocabulary(before: Tokenizer, file: BaseFiles, *, is_gemma: bool) -> None:
    after = Tokenizer.from_base(file)
    for line in PLAIN + NUMERIC:
        if not line.startswith((" ", "▁")) and not (is_gemma and "▁" in line):
            assert after.encode_content(line) == before.encode_content(line), line
    assert [after.id(token) for token in CONTROLS] == [before.id(token) for token in CONTROLS]
    assert file.chat_template == CHATML


def check_greedy(decoder: Any, hf: Any, mine: Tokenizer, theirs: tokenizers.Tokenizer) -> None:
    """20 prompts: each token is the likeliest after all before it, and the text is the same."""
    asked = [line for line in PLAIN if line.strip() and not line.startswith(" ")][:20]
    prompts = [mine.encode_content(line)[:16] for line in asked]
    answers = generate_ids(decoder, prompts, max_new_tokens=8, sampling=Sampling(), eos_ids=[])
    assert len(answers) == 20
    for line, prompt, answer in zip(asked, prompts, answers, strict=True):
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.tokens, line
        assert mine.decode(answer.tokens) == theirs.decode(answer.tokens), line


def checked(source: Source, mine: BaseFiles) -> Iterator[tuple[str, Tensor]]:
    """The weights as a folder has them, each of which is what its type makes of it."""
    counts = {"adapted": 0, "same": 0, "numbers": 0}
    given = source.base, source.spec, source.update, torch.float32, counts
    for weight, value in merged_tensors(*given):
        found, entry = read_weight(mine, source.spec, weight), mine.tensors[weight]
        if entry.dtype != "F32":
            assert found.equal(dequantise(encode(value, entry.dtype), entry.dtype, tuple(value.shape)))
        yield weight, (found.t() if is_transposed(source.spec, weight) else found).contiguous()


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no architecture": ("opt", {}, "llama.cpp has no architecture for `opt`"),
    "a query scale": ("gemma2", TIED, "its `attention_scale` is 0.37"),
    "a head of its own": ("cohere", {}, "takes the embedding for the head"),
    "experts that do not add up": (
        "qwen3_moe",
        {"mlp_only_layers": [], "norm_topk_prob": False},
        "its `experts` is",
    ),
    "layers without a mixture": ("qwen3_moe", {}, "its `experts` is"),
    "other layers that do not turn": ("smollm3", {}, "its `turns` is"),
    "other layers with a window": ("cohere2", TIED | {"head_dim": 6}, "its `turns` is"),
    "no place for a bias": ("qwen3", {"attention_bias": True}, r"no place for the bias `.*_proj\.bias`"),
    "biases that are wanted": ("gpt_neox", {"attention_bias": False}, "its `qkv_bias` is False"),
    "heads normed, few layers": ("cohere", TIED | {"use_qk_norm": True}, "its `qk_norm` is own"),
    "a rope": ("qwen2", {"rope_scaling": LLAMA3}, "rope scaling `llama3`"),
    "scores that are not scaled": ("gpt2", {"scale_attn_weights": False}, "its `attention_scale` is 1.0"),
    "an activation": ("llama", {"hidden_act": "gelu"}, "its `activation` is gelu"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_cannot_say_is_refused(what: str, tmp_path: Path) -> None:
    family, base, words = REFUSED[what]
    source = open_source(str(write_chat_base(tmp_path / "base", family, **base)))
    with pytest.raises(BaseError, match=words) as caught:
        export_gguf(source, tmp_path / "a.gguf", "f32")
    assert "--to merged" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_file_that_has_query_key_and_value_as_one_gets_factors_of_the_one(
    tmp_path: Path, make: Make
) -> None:
    """Rows of the three side by side, and nothing where a module has no adapter."""
    path = write_model(tmp_path / "base.gguf", fused=True)
    source, _ = make(base=path, target_modules=["q_proj", "v_proj", "up_proj"])
    factors = numbers(export_gguf_lora(source, tmp_path / "lora.gguf").path)
    assert {name.removesuffix(".lora_a") for name in factors if name.endswith("a")} == {
        "blk.0.attn_qkv.weight",
        "blk.0.ffn_up.weight",
    }
    down, up = factors["blk.0.attn_qkv.weight.lora_a"], factors["blk.0.attn_qkv.weight.lora_b"]
    assert (down.shape, up.shape) == ((6, 256), (512, 6))
    assert not up[256:384].any()
    merged = export_gguf(source, tmp_path / "merged.gguf", "f32").path
    alpha = GgufFile(tmp_path / "lora.gguf").metadata["adapter.lora.alpha"]
    whole = numbers(path)["blk.0.attn_qkv.weight"] + alpha / 6 * (up @ down)
    np.testing.assert_allclose(whole, numbers(merged)["blk.0.attn_qkv.weight"], atol=1e-5)
