"""A base with new tokens: each at its id, whatever the tables' size and storage, and the base unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorimer.bases.open import open_base
from lorimer.config import LoraConfig, QuantConfig
from lorimer.data.added import AddedTokens
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import AdapterError, BaseError, ConfigError
from lorimer.export.gguf import export_gguf
from lorimer.export.gguf_lora import export_gguf_lora
from lorimer.export.source import open_source
from lorimer.generate.model import Model, load
from lorimer.lora.adapter import new_adapter, save_adapter
from lorimer.lora.merge import merge
from lorimer.model.grow import GrownBase, added_json, with_tokens
from lorimer.model.load import load_decoder
from small_base import write_chat_base
from tiny import FP32, PEFT_NOISE, apart, difference, hf_logits, our_logits, shake

pytestmark = PEFT_NOISE
ADDED = AddedTokens(("<tool>", "</tool>"), ("<|x|>",))
IDS = (259, 260, 261)
# Rows of a table beside the tokenizer's 259 ids.
UNPADDED, TIGHT, PADDED = 259, 261, 270
ROW = [70, 259, 80, 261, 260, 90, 12, 259]


def grown(folder: Path, rows: int, **changes: Any) -> GrownBase:
    base = with_tokens(open_base(write_chat_base(folder, vocab_size=rows, **changes)), ADDED)
    assert isinstance(base, GrownBase)
    return base


@pytest.mark.trap(43)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [UNPADDED, TIGHT, PADDED])
def test_new_rows_are_the_mean_and_lie_at_their_ids(rows: int, tied: bool, tmp_path: Path) -> None:
    base = grown(tmp_path / "base", rows, tie_word_embeddings=tied)
    plain, decoder = load_decoder(base.inner, FP32), load_decoder(base, FP32)
    assert base.config["vocab_size"] == max(rows, 262)
    assert base.grows is (rows < 262)
    assert base.fingerprint() == base.inner.fingerprint()
    for table, old in ((decoder.embedding, plain.embedding), (decoder.head, plain.head)):
        now, was = table.weight.dequantise(), old.weight.dequantise()
        assert torch.equal(now[:259], was[:259])
        assert torch.equal(now[262:], was[262:])
        assert difference(now[list(IDS)], was[:259].mean(0).expand(3, -1)) < 1e-6


@pytest.mark.trap(43)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [UNPADDED, TIGHT, PADDED])
@pytest.mark.parametrize("full", [False, True])
def test_an_adapter_brings_its_tokens(rows: int, tied: bool, full: bool, tmp_path: Path) -> None:
    """Saved; read by lorimer and, after resizing, by PEFT; merged: the same logits, new tokens' too."""
    base = grown(tmp_path / "base", rows, tie_word_embeddings=tied)
    decoder = load_decoder(base, FP32)
    saved = ["embed_tokens", "lm_head"] if full else []
    config = LoraConfig(r=2, alpha=4, target_modules="attention", modules_to_save=saved)
    adapter, _ = new_adapter(decoder, config, seed=0, tokens=IDS)
    assert bool(adapter.spec.tokens) is not full
    shake(adapter)
    tokenizer = Tokenizer.from_base(base)
    manifest = {"base": {"fingerprint": base.fingerprint()}, "added_tokens": added_json(base)}
    folder, given = tmp_path / "adapter", {"base": str(base.path), "ours": manifest}
    save_adapter(folder, adapter, decoder, **given, extra_files=tokenizer.files())
    live = our_logits(decoder, [ROW])[0]

    again = load(folder, dtype="fp32")
    assert torch.equal(our_logits(again.decoder, [ROW])[0], live)
    assert again.prompt_ids("a<tool><|x|>", raw=True)[-2:] == [259, 261]

    hf = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    names = AutoTokenizer.from_pretrained(folder)
    assert names.convert_tokens_to_ids(["<tool>", "</tool>", "<|x|>"]) == list(IDS)
    if base.grows:
        assert f"resize_token_embeddings({base.rows})" in (folder / "README.md").read_text(encoding="utf-8")
        hf.resize_token_embeddings(base.rows)
    assert difference(live, hf_logits(PeftModel.from_pretrained(hf, folder).eval(), ROW)) < 2e-6

    merge(base, decoder.spec, adapter, tmp_path / "merged", dtype="fp32", extra_files=tokenizer.files())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert difference(hf_logits(merged, ROW), live) < 1e-5
    assert merged.config.vocab_size == base.rows
    assert merged.config.tie_word_embeddings is tied
    own = load(tmp_path / "merged", dtype="fp32")
    assert own.prompt_ids("<tool>") == again.prompt_ids("<tool>")

    source = open_source(str(folder))
    export_gguf(source, tmp_path / "out.gguf", "f32")
    file = load(tmp_path / "out.gguf", dtype="fp32")
    assert difference(our_logits(file.decoder, [ROW])[0], live) < 1e-5
    assert file.prompt_ids("a<tool><|x|>", raw=True)[-2:] == [259, 261]
    assert file.tokenizer.encode_content("<tool><|x|>") == again.tokenizer.encode_content("<tool><|x|>")
    with pytest.raises(AdapterError, match="Use `--to gguf`"):
        export_gguf_lora(source, tmp_path / "lora.gguf")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_tables_have_new_rows_too(kind: str, tmp_path: Path) -> None:
    base = grown(tmp_path / "base", UNPADDED)
    quant = QuantConfig(kind=kind, embeddings=True)
    decoder = load_decoder(base, FP32, quant)
    adapter, _ = new_adapter(decoder, LoraConfig(r=2, alpha=4, target_modules="mlp"), seed=0, tokens=IDS)
    shake(adapter)
    merge(base, decoder.spec, adapter, tmp_path / "out", dtype="fp32", quant=quant)
    assert apart(load_decoder(open_base(tmp_path / "out"), FP32), decoder) < 2e-6


def test_a_gguf_base_takes_tokens_and_its_export_keeps_what_it_said(tmp_path: Path) -> None:
    folder = write_chat_base(tmp_path / "base", vocab_size=UNPADDED)
    source = open_source(str(folder))
    export_gguf(source, tmp_path / "base.gguf", "f32")
    base = with_tokens(open_base(tmp_path / "base.gguf"), ADDED)
    decoder = load_decoder(base, FP32)
    adapter, _ = new_adapter(decoder, LoraConfig(r=2, alpha=4), seed=0, tokens=IDS)
    shake(adapter)
    manifest = {"base": {"fingerprint": base.fingerprint()}, "added_tokens": added_json(base)}
    save_adapter(tmp_path / "adapter", adapter, decoder, base=str(tmp_path / "base.gguf"), ours=manifest)
    export_gguf(open_source(str(tmp_path / "adapter")), tmp_path / "out.gguf", "f32")
    file = load(tmp_path / "out.gguf", dtype="fp32")
    assert difference(our_logits(file.decoder, [ROW])[0], our_logits(decoder, [ROW])[0]) < 1e-5
    assert [file.tokenizer.id(token) for token in ADDED.all] == list(IDS)
    before, after = open_base(tmp_path / "base.gguf").gguf_metadata, file.base.gguf_metadata
    assert before is not None
    assert after is not None
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"llama.vocab_size", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}


def test_an_adapter_with_tokens_needs_a_model_with_them(tmp_path: Path) -> None:
    base = grown(tmp_path / "base", UNPADDED)
    decoder = load_decoder(base, FP32)
    adapter, _ = new_adapter(decoder, LoraConfig(r=2, alpha=4), seed=0, tokens=IDS)
    manifest = {"added_tokens": added_json(base)}
    save_adapter(tmp_path / "adapter", adapter, decoder, base=str(base.path), ours=manifest)
    without = Model(base.inner, load_decoder(base.inner, FP32), Tokenizer.from_base(base.inner), "base")
    with pytest.raises(AdapterError, match=r"tokens of its own .*<tool>"):
        without.set_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "lorimer.json").unlink()
    with pytest.raises(AdapterError, match="a row for the token 261, and this model 259"):
        without.set_adapter(tmp_path / "adapter")
    other = write_chat_base(tmp_path / "other", vocab_size=PADDED)
    held = with_tokens(open_base(other), AddedTokens(("<tool>",)))
    for name, content in Tokenizer.from_base(held).files().items():
        (other / name).write_bytes(content)
    save_adapter(tmp_path / "second", adapter, decoder, base=str(other), ours=manifest)
    with pytest.raises(AdapterError, match=r"do not fit this base: .*already"):
        load(tmp_path / "second", dtype="fp32")


@pytest.mark.parametrize("names", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_lora_on_a_table_with_new_rows_is_refused(names: list[str], tmp_path: Path) -> None:
    decoder = load_decoder(grown(tmp_path / "base", UNPADDED), FP32)
    with pytest.raises(ConfigError, match=r"PEFT has no form for both(?s:.)*embed_tokens, lm_head"):
        new_adapter(decoder, LoraConfig(r=2, target_modules=names), seed=0, tokens=IDS)


def test_a_table_in_storage_that_cannot_grow_is_named(tmp_path: Path) -> None:
    """A bitsandbytes checkpoint whose head is in 8 bits."""
    base = open_base(write_chat_base(tmp_path / "base"))
    base.tensors = base.tensors | {"lm_head.SCB": base.tensors["model.norm.weight"]}
    with pytest.raises(BaseError, match=r"`lm_head\.weight` is quantised"):
        with_tokens(base, ADDED)
