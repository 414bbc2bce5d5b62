"""Bases that transformers computes: the same logits, losses, gradients, adapters and merged models."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from foreign_bases import FOREIGN, make_foreign, write_foreign
from lorimer.bases.open import open_base
from lorimer.config import LoraConfig, QuantConfig, config_from
from lorimer.data.pack import make_pack, split_into_packs
from lorimer.errors import BaseError, UserError
from lorimer.generate.engine import generate_ids
from lorimer.generate.sampling import Sampling
from lorimer.lora.adapter import attach_adapter, new_adapter, read_adapter
from lorimer.lora.layers import LoraDropout, remove
from lorimer.lora.merge_foreign import merge_foreign
from lorimer.model.about import computed
from lorimer.model.foreign import load_foreign
from lorimer.model.load import Place, load_decoder
from lorimer.model.loss import pack_loss, pack_losses
from lorimer.train.plan import make_plan, stated_load, target_of
from tiny import (
    FP32,
    PEFT_NOISE,
    Tiny,
    apart,
    difference,
    example,
    hf_logits,
    make_tiny,
    our_logits,
    peft_name,
    random_rows,
    save,
    shake,
)

pytestmark = PEFT_NOISE
ROWS = random_rows((6, 11, 11, 3, 24, 12))
NATIVE = ("llama", "qwen3", "gemma2", "cohere", "gpt_neox", "gpt2")


def packed(rows: list[list[int]] = ROWS) -> Any:
    return make_pack([example(row) for row in rows], range(len(rows)))


@pytest.mark.parametrize("family", FOREIGN)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path, family)
    assert apart(tiny.decoder, tiny.hf) < 1e-6
    for mine, row in zip(our_logits(tiny.decoder, ROWS), ROWS, strict=True):  # packed
        assert difference(mine, hf_logits(tiny.hf, row)) < 5e-6
    assert tiny.decoder.slower is not None
    assert f"`{family}` runs through transformers, slower" in tiny.decoder.slower


@pytest.mark.parametrize("family", FOREIGN)
def test_loss_and_gradients_equal_peft(family: str, tmp_path: Path) -> None:
    check_against_peft(make_foreign(tmp_path / "base", family), LoraConfig(r=3, alpha=5), (), tmp_path)


def check_against_peft(tiny: Tiny, settings: LoraConfig, tokens: tuple[int, ...], folder: Path) -> None:
    """Loss and gradients of an adapter, and the merged model, are those of PEFT with the saved adapter."""
    adapter, _ = new_adapter(tiny.decoder, settings, seed=3, tokens=tokens)
    shake(adapter)
    save(folder / "adapter", tiny, adapter)
    pack = packed()
    loss, _ = pack_loss(tiny.decoder, pack, weight=1 / pack.trained_tokens, smoothing=0.1)
    loss.backward()
    peft = PeftModel.from_pretrained(tiny.hf, folder / "adapter", is_trainable=True).eval()
    total = torch.zeros(())
    for row in ROWS:
        logits = peft(torch.tensor([row]), use_cache=False).logits[0]
        part = F.cross_entropy(logits[1:-1], torch.tensor(row[2:]), reduction="sum", label_smoothing=0.1)
        total = total + part / pack.trained_tokens
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    theirs = {peft_name(n): p.grad for n, p in peft.named_parameters() if p.requires_grad}
    assert set(theirs) == set(adapter.tensors)
    for name, tensor in adapter.tensors.items():
        assert difference(tensor.grad, theirs[name]) < 1e-4, name


# Tied or not; a bias at the head; rows that are scaled; a cap on logits; logits that are divided.
TABLES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt_neo": ({}, ["wte", "lm_head", "q_proj"]),
    "bloom": ({"tie_word_embeddings": False}, ["word_embeddings", "lm_head"]),
    "codegen": ({}, ["wte", "lm_head", "fc_in"]),
    "xglm": ({}, ["embed_tokens", "fc1"]),
    "nanochat": ({}, ["embed_tokens", "lm_head"]),
    "granitemoe": ({}, ["embed_tokens", "lm_head", "q_proj"]),
}


@pytest.mark.trap(43)
@pytest.mark.parametrize("family", TABLES)
def test_lora_on_embedding_and_head_equals_peft(family: str, tmp_path: Path) -> None:
    changes, names = TABLES[family]
    tiny = make_foreign(tmp_path / "base", family, **changes)
    check_against_peft(tiny, LoraConfig(r=3, alpha=5, target_modules=names), (), tmp_path)
    check_merged(tiny, tmp_path)


@pytest.mark.trap(43)
@pytest.mark.parametrize("family", TABLES)
def test_rows_of_their_own_equal_peft(family: str, tmp_path: Path) -> None:
    changes, names = TABLES[family]
    tiny = make_foreign(tmp_path / "base", family, **changes)
    linear = [name for name in names if name not in ("lm_head", "wte", "embed_tokens", "word_embeddings")]
    settings = LoraConfig(r=2, alpha=4, target_modules=linear or "all-linear")
    if family == "codegen":  # PEFT leaves out the head's bias where rows of it are trained
        tiny.hf.lm_head.bias.data.zero_()
        tiny.decoder._head.module.bias.data.zero_()
    check_against_peft(tiny, settings, (5, 70, 9), tmp_path)
    if family == "codegen":
        tiny.decoder._head.module.bias.data.normal_()
    check_merged(tiny, tmp_path)


def check_merged(tiny: Tiny, folder: Path) -> None:
    """The adapter that was saved there, read again and merged, is the live model in transformers."""
    remove(tiny.decoder)
    adapter = attach_adapter(tiny.decoder, read_adapter(folder / "adapter"))
    report = merge_foreign(tiny.base, tiny.decoder, adapter, folder / "m", dtype="fp32", extra_files={})
    merged = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32).eval()
    assert report.adapted > 0
    assert apart(tiny.decoder, merged) < 1e-5


@pytest.mark.parametrize("family", FOREIGN)
def test_an_adapter_of_peft_goes_in_and_out_unchanged(family: str, tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path / "base", family)
    chosen: Any = ["in_proj", "x_proj"] if family == "mamba" else "all-linear"  # PEFT refuses the others
    across = tiny.decoder.spec.transposed
    config = PeftConfig(
        r=3, lora_alpha=6, target_modules=chosen, task_type="CAUSAL_LM", fan_in_fan_out=across
    )
    peft = get_peft_model(tiny.hf, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    peft.save_pretrained(tmp_path / "theirs")
    adapter = attach_adapter(tiny.decoder, read_adapter(tmp_path / "theirs"))
    for row in ROWS[:3]:
        with torch.no_grad():
            theirs = peft(torch.tensor([row]), use_cache=False).logits[0]
        assert difference(our_logits(tiny.decoder, [row])[0], theirs) < 5e-6
    save(tmp_path / "ours", tiny, adapter)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = PeftModel.from_pretrained(peft.unload(), tmp_path / "ours").eval()
    with torch.no_grad():
        back = again(torch.tensor([ROWS[1]]), use_cache=False).logits[0]
    assert difference(our_logits(tiny.decoder, [ROWS[1]])[0], back) < 5e-6


EVERYTHING: dict[str, list[str]] = {
    "gpt_neo": ["wte", "wpe", "lm_head", "ln_1", "ln_f"],
    "openai-gpt": ["tokens_embed", "positions_embed", "ln_1"],
    "olmo": ["embed_tokens", "lm_head"],
    "codegen": ["wte", "ln_f"],
}


@pytest.mark.parametrize("family", EVERYTHING)
def test_what_is_trained_in_full_equals_peft(family: str, tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path / "base", family)
    settings = LoraConfig(r=2, alpha=4, modules_to_save=EVERYTHING[family])
    adapter, _ = new_adapter(tiny.decoder, settings, seed=3)
    shake(adapter, size=0.05)
    save(tmp_path / "adapter", tiny, adapter)
    peft = PeftModel.from_pretrained(tiny.hf, tmp_path / "adapter").eval()
    for row in ROWS[:3]:
        with torch.no_grad():
            theirs = peft(torch.tensor([row]), use_cache=False).logits[0]
        assert difference(our_logits(tiny.decoder, [row])[0], theirs) < 1e-5
    pack = packed()
    pack_loss(tiny.decoder, pack, weight=1.0)[0].backward()
    assert all(tensor.grad.any() for tensor in adapter.tensors.values())
    merge_foreign(tiny.base, tiny.decoder, adapter, tmp_path / "merged", dtype="fp32", extra_files={})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert difference(our_logits(tiny.decoder, [ROWS[4]])[0], hf_logits(merged, ROWS[4])) < 1e-5


@pytest.mark.parametrize("family", FOREIGN)
def test_packs_and_splits_and_computing_again_change_nothing(family: str, tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path, family)
    adapter, _ = new_adapter(tiny.decoder, LoraConfig(r=3, alpha=5, dropout=0.3), seed=3)
    shake(adapter)
    examples = [example(row) for row in ROWS]
    found = []
    for rung, tokens in (("none", 1000), ("none", 30), ("layers", 1000)):
        tiny.decoder.recompute = rung
        adapter.flat.grad.zero_()
        dropout = LoraDropout(0.3, 5, torch.float32, torch.device("cpu"))
        packs = split_into_packs(examples, tokens)
        losses: dict[int, float] = {}
        for pack in packs:
            masks = dropout.for_pack(2, pack.rows, pack.lengths)
            loss, each_M = pack_loss(tiny.decoder, pack, weight=0.01, dropouts=masks)
            loss.backward()
            losses |= {r: float(each_M[pack.owner_M == i].sum()) for i, r in enumerate(pack.rows)}
        found.append((losses, adapter.flat.grad.clone()))
    for losses, gradient in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert difference(gradient, found[0][1]) < 1e-5


@pytest.mark.parametrize("family", FOREIGN)
def test_a_merged_folder_loads_in_transformers(family: str, tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path / "base", family)
    adapter, _ = new_adapter(tiny.decoder, LoraConfig(r=3, alpha=5), seed=3)
    shake(adapter)
    before = our_logits(tiny.decoder, ROWS)
    report = merge_foreign(
        tiny.base, tiny.decoder, adapter, tmp_path / "merged", dtype="fp32", extra_files={}
    )
    assert report.adapted == len(adapter.spec.ranks)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    again = load_decoder(open_base(tmp_path / "merged"), FP32)
    after = our_logits(tiny.decoder, ROWS)
    for i, row in enumerate(ROWS):
        assert difference(before[i], hf_logits(merged, row)) < 1e-5
        assert difference(before[i], our_logits(again, [row])[0]) < 1e-5
        assert torch.equal(before[i], after[i])  # the decoder is as it was


@pytest.mark.parametrize("family", FOREIGN)
def test_greedy_answers_equal_transformers(family: str, tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path, family)
    answers = generate_ids(
        tiny.decoder, ROWS, max_new_tokens=8, sampling=Sampling(), eos_ids=[2], batch_size=4
    )
    for answer, row in zip(answers, ROWS, strict=True):
        prompt = torch.tensor([row])
        whole = tiny.hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )[0].tolist()
        theirs = whole[len(row) :]
        assert answer.tokens == (theirs[: theirs.index(2)] if 2 in theirs else theirs)


def test_a_model_whose_positions_change_with_length_is_computed_without_a_cache(tmp_path: Path) -> None:
    """Dynamic scaling turns a row by its length: each token's row is computed anew, as training does."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    tiny = make_foreign(tmp_path, "olmo", max_position_embeddings=16, rope_parameters=scaling)
    (answer,) = generate_ids(tiny.decoder, [ROWS[1]], max_new_tokens=4, sampling=Sampling(), eos_ids=[])
    assert tiny.decoder.caches is False
    row = list(ROWS[1])
    for token in answer.tokens:
        assert int(our_logits(tiny.decoder, [row])[0][-1].argmax()) == token
        row.append(token)


@pytest.mark.parametrize("family", NATIVE)
def test_a_native_family_computed_by_transformers_has_the_same_losses(family: str, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, family)
    foreign = load_foreign(tiny.base, FP32, QuantConfig(), "a test")
    for decoder in (tiny.decoder, foreign):
        adapter, _ = new_adapter(decoder, LoraConfig(r=3, alpha=5), seed=3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in sorted(adapter.tensors):
                adapter.take(name, torch.randn(adapter.tensors[name].shape, generator=generator) * 0.1)
        adapter.refresh()
    pack = packed()
    mine, theirs = (pack_losses(decoder, pack) for decoder in (tiny.decoder, foreign))
    assert difference(mine, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_linear_layers_are_quantised(kind: Any, tmp_path: Path) -> None:
    """What a quantised layer computes is what its numbers stand for; merging goes into these."""
    write_foreign(tmp_path / "base", "bloom")
    base = open_base(tmp_path / "base")
    decoder = load_foreign(base, FP32, QuantConfig(kind=kind), "a test")
    assert decoder.frozen_bytes < load_decoder(base, FP32).frozen_bytes
    adapter, _ = new_adapter(decoder, LoraConfig(r=2, alpha=4), seed=0)
    shake(adapter)
    merge_foreign(base, decoder, adapter, tmp_path / "merged", dtype="fp32", extra_files={})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert difference(our_logits(decoder, [ROWS[0]])[0], hf_logits(merged, ROWS[0])) < 1e-5
    again = load_decoder(open_base(tmp_path / "merged"), FP32)
    assert difference(our_logits(decoder, [ROWS[0]])[0], our_logits(again, [ROWS[0]])[0]) < 1e-5


@pytest.mark.parametrize("family", ["gpt_neo", "codegen", "mamba"])
def test_in_bf16_factors_and_gradients_stay_float32(family: str, tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path, family)
    decoder = load_decoder(tiny.base, Place(torch.device("cpu"), torch.bfloat16))
    adapter, _ = new_adapter(decoder, LoraConfig(r=3, alpha=5), seed=3)
    shake(adapter, size=0.05)
    pack = packed()
    with torch.no_grad():
        assert decoder.hidden(pack.ids_T, pack.lengths).dtype == torch.bfloat16
    loss, each_M = pack_loss(decoder, pack, weight=1 / pack.trained_tokens)
    loss.backward()
    assert each_M.dtype == adapter.flat.grad.dtype == torch.float32
    assert all(tensor.grad.any() for tensor in adapter.tensors.values())
    base = float(pack_losses(tiny.decoder, pack).mean())
    decoder.adapted = False
    assert float(pack_losses(decoder, pack).mean()) == pytest.approx(base, abs=0.03)


def test_the_plan_knows_what_saves_memory(tmp_path: Path) -> None:
    write_foreign(tmp_path, "gpt_neo", hidden_size=192, intermediate_size=768)
    base = open_base(tmp_path)

    def peak(**settings: Any) -> Any:
        given = {"base": str(tmp_path), "data": {"train": "x.jsonl", "max_tokens": 256}} | settings
        config = config_from(given, need_files=False)
        where = {"program": 0, "dtype": torch.float32}
        return make_plan(config, base, stated_load(config), target_of("cpu:8GB"), **where).memory

    plain = peak()
    assert peak(train={"recompute": "layers"}).activations < plain.activations / 4
    assert peak(quant={"kind": "nf4"}).weights < plain.weights
    assert peak(lora={"r": 32}).optimizer == 2 * plain.optimizer
    assert plain.weights == 4 * sum(math.prod(entry.shape) for entry in base.tensors.values())


def rewrite(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def drop(folder: Path, *names: str, **new: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors | new, folder / "model.safetensors", {"format": "pt"})
    return folder


QKV = "transformer.h.1.self_attention.query_key_value.weight"
BAD: dict[str, tuple[Any, str]] = {
    "a weight is missing": (lambda f: drop(f, QKV), f"(?s){QKV}.* is missing"),
    "more layers than tensors": (lambda f: rewrite(f, n_layer=3), "are missing"),
    "fewer layers than tensors": (lambda f: rewrite(f, n_layer=1), "has no place for 12 weights"),
    "another width": (lambda f: rewrite(f, hidden_size=48), r"has the shape \[.*\] \(wanted"),
    "no size": (lambda f: rewrite(f, n_head="six"), "config cannot be used|cannot build"),
    "heads that do not divide": (lambda f: rewrite(f, n_head=7), "cannot build it from this config"),
    "a vast size": (lambda f: rewrite(f, vocab_size=10**12), "`vocab_size` is"),
    "nobody knows it": (lambda f: rewrite(f, model_type="blooom"), "(?s)neither to lorimer.*`bloom`"),
    "no architecture": (lambda f: rewrite(f, model_type=None), "does not say `model_type`"),
    "code of its own": (
        lambda f: rewrite(f, model_type="nobodys", auto_map={"AutoConfig": "evil.Config"}),
        "(?s)never run",
    ),
    "it sees what follows": (
        lambda f: write_bert(f),
        "`bert` lets a token see what follows it",
    ),
    "quantised already": (
        lambda f: rewrite(f, quantization_config={"quant_method": "gptq"}),
        "the base is quantised",
    ),
}


def write_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertLMHeadModel

    for file in folder.iterdir():
        file.unlink()
    shape = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 40}
    BertLMHeadModel(BertConfig(vocab_size=101, **shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_base_that_does_not_fit_is_refused_in_one_message(name: str, tmp_path: Path) -> None:
    write_foreign(tmp_path, "bloom")
    change, said = BAD[name]
    with pytest.raises(BaseError, match=said):
        load_decoder(open_base(change(tmp_path)), FP32)


def test_code_in_a_models_folder_is_never_run(tmp_path: Path) -> None:
    """`auto_map` of an architecture that the library has is passed over; so are other implementations."""
    tiny = make_foreign(tmp_path, "bloom")
    (tmp_path / "evil.py").write_text("raise SystemExit('run')", encoding="utf-8")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    rewrite(tmp_path, auto_map=names, trust_remote_code=True, _attn_implementation="owner/kernel")
    decoder = load_decoder(open_base(tmp_path), FP32)
    assert difference(our_logits(decoder, [ROWS[0]])[0], hf_logits(tiny.hf, ROWS[0])) < 1e-5


def test_pickles_are_not_read(tmp_path: Path) -> None:
    write_foreign(tmp_path, "bloom")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BaseError, match="a pickle"):
        open_base(tmp_path)


@pytest.mark.parametrize(
    ("quant", "said"),
    [({"kind": "keep"}, "quant: keep"), ({"kind": "nf4", "embeddings": True}, "embeddings")],
)
def test_settings_of_the_own_decoder_are_refused(quant: Any, said: str, tmp_path: Path) -> None:
    write_foreign(tmp_path, "bloom")
    with pytest.raises(UserError, match=f"`.*{said}.*` is for lorimer's own decoder"):
        load_decoder(open_base(tmp_path), FP32, QuantConfig(**quant))


def test_without_the_extra_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_foreign(tmp_path, "gpt_neo")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else real(name, *a)
    )
    said = r"(?s)`gpt_neo` needs transformers.*pip install 'lorimer\[transformers\]'.*`gpt_neox`"
    with pytest.raises(BaseError, match=said):
        load_decoder(open_base(tmp_path), FP32)
    facts = computed({"model_type": "gpt_neo"}, "x")
    assert (facts["native"], facts["slower"]) == (False, None)
    assert "needs transformers" in facts["why"]


def test_a_config_may_write_no_window_as_zero_and_infinity_as_a_table(tmp_path: Path) -> None:
    write_foreign(tmp_path, "olmo")
    rewrite(tmp_path, sliding_window=0, clip_qkv={"__float__": "Infinity"})
    assert load_decoder(open_base(tmp_path), FP32).spec.family == "olmo"


def test_a_row_longer_than_learned_positions_is_an_error(tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path, "gpt_neo", max_position_embeddings=16)
    with pytest.raises(UserError, match="24 tokens is longer than the model's positions"):
        pack_losses(tiny.decoder, packed())


def test_dropout_on_a_layer_that_sees_some_tokens_is_refused(tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path, "bloom")
    dropout = LoraDropout(0.3, 5, torch.float32, torch.device("cpu"))
    adapter, _ = new_adapter(tiny.decoder, LoraConfig(r=2, alpha=4, dropout=0.3), seed=0)
    module = tiny.decoder.model.get_submodule("transformer.h.0.mlp.dense_h_to_4h")
    whole = module.forward
    module.forward = lambda states: whole(states[:, :-1])
    pack = packed()
    with pytest.raises(UserError, match="dense_h_to_4h`: it sees only some of the tokens"):
        pack_loss(tiny.decoder, pack, weight=1.0, dropouts=dropout.for_pack(0, pack.rows, pack.lengths))
    assert adapter.parameters


def test_the_module_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tiny = make_foreign(tmp_path, "bloom")
    tiny.decoder.linear("transformer.h.1.mlp.dense_h_to_4h").linear.weight.weight_OI[0, 0] = float("nan")
    found = tiny.decoder.first_not_finite(torch.tensor(ROWS[0]), [len(ROWS[0])])
    assert found == "transformer.h.1.mlp.dense_h_to_4h"
