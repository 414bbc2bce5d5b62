"""A merged GGUF file computes what the live model computes, and says what the base said."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.hard_strings import HARD
from lorimer.bases.gguf_names import hugging_face_name, llama_cpp_name
from lorimer.bases.open import open_base
from lorimer.data.template import ChatTemplate
from lorimer.data.tokenizer import Tokenizer
from lorimer.errors import AdapterError, BaseError, StorageError, UserError
from lorimer.export import gguf as exporting
from lorimer.export.gguf import export_gguf
from lorimer.export.mix import FILE_TYPES
from lorimer.export.source import open_source
from lorimer.lora.merge import merged_tensors
from lorimer.model.load import load_decoder, read_weight
from lorimer.quant.gguf_blocks import dequantise
from lorimer.quant.gguf_encode import encode
from small_base import CHATML, write_chat_base
from tiny import FP32, LLAMAS, difference, our_logits, random_rows

Make = Callable[..., Any]
# The 64 numbers of a row hold blocks of 32, 256 those of the K types; 40 (the heads) hold neither.
WIDE = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
ROW = random_rows([23])[0]
BATCH = random_rows([9, 23, 17, 5], seed=4)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def apart(mine: Any, theirs: Any, rows: list[list[int]] = BATCH) -> float:
    pairs = zip(our_logits(mine, rows), our_logits(theirs, rows), strict=True)
    return max(difference(a, b) for a, b in pairs)


def loaded(path: Path) -> Any:
    return load_decoder(open_base(path), FP32)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama, few keys, rsLoRA": ("llama", {"num_key_value_heads": 2}, {"rslora": True}),
    "llama, biases trained": ("llama", {"attention_bias": True}, {"bias": "all"}),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {}),
    "llama, llama 3 rope": ("llama", {"rope_scaling": LLAMA3}, {}),
    "llama, yarn": ("llama", {"rope_scaling": YARN}, {}),
    "mistral, no window": ("mistral", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", {}, {"bias": "all"}),
    "qwen2, yarn": ("qwen2", {"rope_scaling": YARN}, {}),
    "qwen3, norms trained": ("qwen3", {}, {"modules_to_save": ["norm", "k_norm"]}),
    "embedding and head trained": ("llama", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, trained as one": ("qwen2", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_exact_file_computes_what_the_live_model_computes(name: str, tmp_path: Path, make: Make) -> None:
    family, base, lora = CASES[name]
    source, live = make(family, base=base, **lora)
    report = export_gguf(source, tmp_path / "out" / "a.gguf", "f32")
    # Divisors of Llama 3's rope go through float32 once more.
    assert apart(loaded(report.path), live) < (3e-5 if "rope" in name or "yarn" in name else 3e-6)
    assert report.bytes == report.path.stat().st_size
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.gguf"]


def test_a_window_becomes_the_context_within_which_it_makes_no_difference(
    tmp_path: Path, make: Make
) -> None:
    source, live = make("mistral")
    path = export_gguf(source, tmp_path / "a.gguf", "f32").path
    base = open_base(path)
    assert (base.config["model_type"], base.config["max_position_embeddings"]) == ("llama", 9)
    assert apart(load_decoder(base, FP32), live, random_rows([9, 8, 3])) < 3e-6


@pytest.mark.parametrize("kind", FILE_TYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_type_holds_the_merged_weights_rounded_once(
    family: str, kind: str, tmp_path: Path, make: Make
) -> None:
    """Tensor by tensor the numbers are those of the update merged in memory, encoded and decoded."""
    source, live = make(family, base=WIDE)
    report = export_gguf(source, tmp_path / "a.gguf", kind)
    base = open_base(report.path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(report.path).tensors}
    assert report.tensors == len(theirs) == len(base.tensors)
    counts = {"adapted": 0, "same": 0, "numbers": 0}
    for name, value in merged_tensors(source.base, source.spec, source.update, torch.float32, counts):
        entry = base.tensors[name]
        wanted = dequantise(encode(value, entry.dtype), entry.dtype, tuple(value.shape))
        assert read_weight(base, source.spec, name).equal(wanted), name
        own = theirs[str(llama_cpp_name(name))]
        assert own.tensor_type.name == entry.dtype
        decoded = gguf.dequantize(own.data, own.tensor_type).reshape(value.shape)
        assert np.array_equal(decoded, dequantise(base.raw(name), entry.dtype, entry.shape).numpy()), name
    assert counts["adapted"] == report.adapted == 21
    bounds = {"f32": 1e-5, "f16": 1e-2, "bf16": 0.05, "q8_0": 0.1}
    if kind in bounds:
        assert apart(loaded(report.path), live) < bounds[kind]


@pytest.mark.parametrize("family", LLAMAS)
def test_a_base_alone_and_its_names_metadata_and_template(family: str, tmp_path: Path) -> None:
    folder = write_chat_base(tmp_path / "base", family, tie_word_embeddings=True)
    source = open_source(str(folder))
    report = export_gguf(source, tmp_path / "a.gguf", "f32")
    assert report.adapted == 0
    fields = gguf.GGUFReader(report.path).fields
    name = "llama" if family == "mistral" else family
    config = source.base.config
    wanted = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": "base",
        "general.file_type": 0,
        f"{name}.block_count": 3,
        f"{name}.embedding_length": 36,
        f"{name}.feed_forward_length": 52,
        f"{name}.attention.head_count": 6,
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.key_length": 10,
        f"{name}.rope.dimension_count": 10,
        f"{name}.vocab_size": 259,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert "general.quantization_version" not in fields
    assert "output.weight" not in open_base(report.path).tensors
    if family != "mistral":
        assert apart(loaded(report.path), load_decoder(source.base, FP32)) < 3e-6


def test_ids_and_prompts_are_those_of_the_folder(tmp_path: Path) -> None:
    source = open_source(str(write_chat_base(tmp_path / "base")))
    base = open_base(export_gguf(source, tmp_path / "a.gguf", "bf16").path)
    tokenizer = Tokenizer.from_base(base)
    template = ChatTemplate(base.chat_template, tokenizer)
    for text in HARD:
        assert tokenizer.encode(text) == source.tokenizer.encode(text), text
        assert tokenizer.encode_content(text) == source.tokenizer.encode_content(text), text
    assert template.source == source.template.source
    assert template.end_ids == source.template.end_ids
    assert tokenizer.eos_ids == source.tokenizer.eos_ids


def test_a_gguf_base_keeps_its_metadata_byte_for_byte(tmp_path: Path, make: Make) -> None:
    folder = write_chat_base(tmp_path / "base", **WIDE)
    first = export_gguf(open_source(str(folder)), tmp_path / "base.gguf", "q4_0").path
    source, live = make(base=first)
    report = export_gguf(source, tmp_path / "merged.gguf", "f32")
    before, after = source.base, open_base(report.path)
    assert before.gguf_metadata is not None
    assert after.gguf_metadata is not None
    other = {"general.file_type", "general.quantization_version"}
    assert after.gguf_metadata.keys() == before.gguf_metadata.keys() - {"general.quantization_version"}
    for key in after.gguf_metadata.keys() - other:
        assert after.entry(key) == before.entry(key), key  # type: ignore[attr-defined]
    assert after.gguf_metadata["general.file_type"] == 0
    # What is merged is what the quantised file says.
    assert apart(load_decoder(after, FP32), live) < 3e-6
    assert list(after.tensors) == list(before.tensors)


def test_the_template_that_an_adapter_was_trained_with_goes_along(tmp_path: Path, make: Make) -> None:
    for base in (
        {},
        export_gguf(open_source(str(write_chat_base(tmp_path / "b"))), tmp_path / "b.gguf", "f32").path,
    ):
        source, _ = make(base=base)
        assert source.adapter is not None
        (source.adapter.path / "chat_template.jinja").write_text(CHATML + "{# mine #}", encoding="utf-8")
        source = open_source(str(source.adapter.path))
        name = "folder" if isinstance(base, dict) else "file"
        out = open_base(export_gguf(source, tmp_path / f"{name}.gguf", "bf16").path)
        assert out.chat_template == CHATML + "{# mine #}"


def test_a_tied_pair_that_was_trained_apart_has_a_head_of_its_own(tmp_path: Path, make: Make) -> None:
    source, _ = make(base={"tie_word_embeddings": True})
    assert source.adapter is not None
    path = source.adapter.path / "adapter_model.safetensors"
    head = torch.randn((259, 36), generator=torch.Generator().manual_seed(1))
    save_file(load_file(path) | {"base_model.model.lm_head.weight": head}, path)
    source = open_source(str(source.adapter.path))
    out = open_base(export_gguf(source, tmp_path / "a.gguf", "f32").path)
    assert read_weight(out, source.spec, "lm_head.weight").equal(head)
    embedding = "model.embed_tokens.weight"
    assert read_weight(out, source.spec, embedding).equal(read_weight(source.base, source.spec, embedding))


def test_a_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    folder = write_chat_base(tmp_path / "base", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros((259, 36))}, file, {"format": "pt"})
    out = export_gguf(open_source(str(folder)), tmp_path / "a.gguf", "f32").path
    assert "lm_head.weight" not in open_base(out).tensors


def test_one_tensor_at_a_time_is_in_memory(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = make()
    seen: list[weakref.ref[Any]] = []
    most = 0

    def counting(value: Tensor, dtype: str) -> Any:
        nonlocal most
        raw = encode(value, dtype)
        seen.extend([weakref.ref(value), weakref.ref(raw)])
        most = max(most, sum(ref() is not None for ref in seen))
        return raw

    monkeypatch.setattr(exporting, "encode", counting)
    export_gguf(source, tmp_path / "a.gguf", "bf16")
    assert len(seen) > 50
    assert most <= 4


def broken(folder: Path, name: str, value: float) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 0] = value
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "is nan"), (1e30, "which F16 cannot hold")])
def test_a_number_that_the_type_cannot_hold_is_named(tmp_path: Path, value: float, words: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = open_source(str(broken(write_chat_base(tmp_path / "base"), name, value)))
    with pytest.raises(BaseError, match=words) as caught:
        export_gguf(source, tmp_path / "a.gguf", "f16")
    assert name in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_weight_without_a_name_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    folder = write_chat_base(tmp_path / "base")
    file = folder / "model.safetensors"
    odd = {"model.layers.0.mlp.router.weight": torch.zeros(3, 3)}
    save_file(load_file(file) | odd, file, {"format": "pt"})
    with pytest.raises(BaseError, match=r"no name for the weight `model\.layers\.0\.mlp\.router\.weight`"):
        export_gguf(open_source(str(folder)), tmp_path / "a.gguf", "f32")


@pytest.mark.parametrize("scaling", [{"rope_type": "dynamic", "factor": 2.0}])
def test_a_rope_that_llama_cpp_cannot_compute_is_refused(tmp_path: Path, scaling: dict[str, Any]) -> None:
    source = open_source(str(write_chat_base(tmp_path / "base", rope_scaling=scaling)))
    with pytest.raises(BaseError, match="rope scaling `dynamic`"):
        export_gguf(source, tmp_path / "a.gguf", "f32")


def test_wrong_types_and_targets_are_refused(tmp_path: Path, make: Make) -> None:
    source, _ = make()
    with pytest.raises(UserError, match="`q3_k` is not known"):
        export_gguf(source, tmp_path / "a.gguf", "q3_k")
    with pytest.raises(UserError, match=r"should end in \.gguf"):
        export_gguf(source, tmp_path / "a.bin", "f16")
    (tmp_path / "a.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="something there already"):
        export_gguf(source, tmp_path / "a.gguf", "f16")
    assert (tmp_path / "a.gguf").read_text(encoding="utf-8") == "mine"


def test_too_little_space_is_said_beforehand(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = make()
    needed = export_gguf(source, tmp_path / "a.gguf", "q8_0").bytes
    monkeypatch.setattr("lorimer.storage.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=f"{needed:,} bytes needed, 1,000 bytes free"):
        export_gguf(source, tmp_path / "b.gguf", "q8_0")


def test_a_failure_leaves_nothing(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = make()
    before = sorted(tmp_path.iterdir())
    calls = 0

    def full(value: Tensor, dtype: str) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(value, dtype)

    monkeypatch.setattr(exporting, "encode", full)
    with pytest.raises(StorageError, match="bytes needed"):
        export_gguf(source, tmp_path / "a.gguf", "f16")
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_for_another_base_is_refused_unless_forced(tmp_path: Path, make: Make) -> None:
    source, _ = make()
    assert source.adapter is not None
    other = write_chat_base(tmp_path / "other", seed=5)
    with pytest.raises(AdapterError, match="trained on another base"):
        open_source(str(source.adapter.path), base=str(other))
    assert open_source(str(source.adapter.path), base=str(other), force=True).base.path == other
    narrow = write_chat_base(tmp_path / "narrow", intermediate_size=40)
    with pytest.raises(
        AdapterError, match=r"does not fit the base: what it has for `model\.layers\.0\.mlp"
    ):
        open_source(str(source.adapter.path), base=str(narrow), force=True)


def test_names_go_both_ways() -> None:
    names = [f"{t}.weight" for t in ("model.embed_tokens", "model.norm", "lm_head")]
    parts = ("self_attn.q_proj", "self_attn.k_norm", "input_layernorm", "mlp.down_proj")
    names += [
        f"model.layers.{n}.{part}.{kind}" for n in (0, 31) for part in parts for kind in ("weight", "bias")
    ]
    for name in names:
        assert hugging_face_name(str(llama_cpp_name(name))) == name
    assert llama_cpp_name("model.layers.0.mlp.router.weight") is None
    assert llama_cpp_name("rope_freqs.weight") is None


def test_an_adapters_config_may_lack_nothing(tmp_path: Path, make: Make) -> None:
    source, _ = make()
    assert source.adapter is not None
    path = source.adapter.path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"lora_alpha": None}), encoding="utf-8")
    with pytest.raises(AdapterError, match="lora_alpha"):
        open_source(str(source.adapter.path))
