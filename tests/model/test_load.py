"""Weights from files into the decoder: folders, GGUF, and what is wrong with either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorimer.bases.open import open_base
from lorimer.errors import BaseError, UserError
from lorimer.model.load import Place, choose_place, load_decoder
from tiny import FP32, apart, make_tiny, our_logits, random_rows, write_gguf


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True)]
)
def test_gguf_gives_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    """llama.cpp interleaves query and key rows of Llama shapes; they must come back in order."""
    tiny = make_tiny(tmp_path / "hf", family, tie_word_embeddings=tied, num_key_value_heads=2)
    decoder = load_decoder(open_base(write_gguf(tmp_path / "m.gguf", tiny)), FP32)
    assert decoder.spec.tied_head is tied
    assert apart(decoder, tiny.hf) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "a")
    tiny.hf.to(dtype).save_pretrained(tmp_path / "b")
    decoder = load_decoder(open_base(tmp_path / "b"), FP32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert apart(decoder, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_may_change_after_loading(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    decoder = load_decoder(tiny.base, Place(torch.device("cpu"), dtype))
    rows = random_rows([9])
    before = our_logits(decoder, rows)[0]
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:
        size = file.stat().st_size
        handle.seek(size // 8)
        handle.write(b"\xff" * (size - size // 8))
    assert torch.equal(our_logits(decoder, rows)[0], before)


def test_tied_head_is_one_tensor_in_memory(tmp_path: Path) -> None:
    decoder = make_tiny(tmp_path, tie_word_embeddings=True).decoder
    assert decoder.head.weight is decoder.embedding.weight


def test_shards(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "a")
    tiny.hf.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    rows = random_rows([9])
    shards = load_decoder(open_base(tmp_path / "b"), FP32)
    assert torch.equal(our_logits(shards, rows)[0], our_logits(tiny.decoder, rows)[0])


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.2.mlp.down_proj.weight",
    ],
)
def test_a_missing_or_misshapen_weight_is_named(name: str, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    value = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(BaseError, match="is missing") as caught:
        load_decoder(open_base(tmp_path), FP32)
    assert f"`{name}`" in str(caught.value)
    save_file(tensors | {name: value[:-1].contiguous()}, file)
    with pytest.raises(BaseError, match="has the shape") as caught:
        load_decoder(open_base(tmp_path), FP32)
    assert f"`{name}`" in str(caught.value)
    assert str(list(tiny.base.tensors[name].shape)) in str(caught.value)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"intermediate_size": 48}
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseError, match="do not belong together"):
        load_decoder(open_base(tmp_path), FP32)


def test_choose_place() -> None:
    assert choose_place("cpu", "fp32") == FP32
    assert choose_place("cpu", "bf16").dtype == torch.bfloat16
    assert choose_place("cpu", "fp16").dtype == torch.float16
    assert choose_place("cpu").dtype in (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match="`fp8` is not known"):
        choose_place("cpu", "fp8")
    with pytest.raises(UserError, match="`abacus` cannot be used"):
        choose_place("abacus")


def test_the_text_part_of_a_model_with_pictures(tmp_path: Path) -> None:
    """Gemma 3 from 4B on: names as published, and as newer files have them; pictures are left out."""
    tiny = make_tiny(tmp_path / "text", "gemma3_text", tie_word_embeddings=True)
    config = json.loads((tmp_path / "text/config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "text/model.safetensors")
    for prefix in ("language_model.model.", "model.language_model."):
        folder = tmp_path / prefix
        folder.mkdir()
        named = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
        named["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(2, 2)
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        outer = {"model_type": "gemma3", "text_config": config, "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(outer), encoding="utf-8")
        base = open_base(folder)
        assert set(base.tensors) == set(tiny.base.tensors)
        assert base.config["model_type"] == "gemma3_text"
        row = random_rows([20])[0]
        ours = our_logits(load_decoder(base, FP32), [row])[0]
        assert torch.equal(ours, our_logits(tiny.decoder, [row])[0])
