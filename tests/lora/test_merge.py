"""The merged folder: what transformers computes from it is what the live adapter computes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorimer.bases.open import open_base
from lorimer.config import LoraConfig, QuantConfig
from lorimer.errors import AdapterError, StorageError, UserError
from lorimer.lora import merge as merging
from lorimer.lora.adapter import attach_adapter, new_adapter, read_adapter
from lorimer.lora.layers import Adapter
from lorimer.lora.merge import merge
from lorimer.model.load import load_decoder
from tiny import (
    FAMILIES,
    FP32,
    PEFT_NOISE,
    Tiny,
    apart,
    make_tiny,
    our_logits,
    random_rows,
    shake,
    write_gguf,
)

pytestmark = PEFT_NOISE
ROW = random_rows([23])[0]
TIED = {"tie_word_embeddings": True}


def adapted(tiny: Tiny, *, size: float = 0.15, **settings: Any) -> Adapter:
    adapter, _ = new_adapter(tiny.decoder, LoraConfig(**({"alpha": 4} | settings)), seed=3)
    shake(adapter, size=size)
    return adapter


def merged(tiny: Tiny, adapter: Adapter, out: Path, dtype: str = "fp32") -> Any:
    report = merge(tiny.base, tiny.decoder.spec, adapter, out, dtype=dtype)
    tensors = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert report.tensors == len(tensors)
    assert report.bytes == sum(value.nbytes for value in tensors.values())
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"r": 3, "alpha": 5}),
    "llama, tied": ("llama", TIED, {"r": 3, "alpha": 5}),
    "mistral, rsLoRA": ("mistral", {}, {"r": 4, "alpha": 3, "rslora": True}),
    "qwen2, biases": ("qwen2", {}, {"r": 2, "bias": "all"}),
    "qwen3, norms": ("qwen3", {}, {"r": 2, "modules_to_save": ["norm", "k_norm"], "layers": "last:1"}),
    "embedding and head": ("llama", {}, {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, embedding and head as one": ("qwen2", TIED, {"r": 2, "modules_to_save": ["lm_head"]}),
} | {family: (family, {}, {"r": 3, "alpha": 5}) for family in FAMILIES[4:]}


@pytest.mark.trap(37)
@pytest.mark.trap(38)
@pytest.mark.trap(39)
@pytest.mark.trap(53)
@pytest.mark.parametrize("name", CASES)
def test_merged_equals_live(name: str, tmp_path: Path) -> None:
    family, changes, settings = CASES[name]
    tiny = make_tiny(tmp_path / "base", family, **changes)
    adapter = adapted(tiny, **settings)
    model = merged(tiny, adapter, tmp_path / "out")
    assert apart(model, tiny.decoder) < 2e-6
    assert apart(load_decoder(open_base(tmp_path / "out"), FP32), tiny.decoder) < 2e-6
    assert model.config.tie_word_embeddings is tiny.hf.config.tie_word_embeddings


@pytest.mark.trap(51)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_into_the_quantised_numbers_equals_live(family: str, kind: str, tmp_path: Path) -> None:
    """Every family's weights in quantised storage are the numbers that merging says they are."""
    tiny = make_tiny(tmp_path / "base", family)
    quant = QuantConfig(kind=kind, block_size=64, embeddings=True)
    live = Tiny(tiny.folder, tiny.hf, tiny.base, load_decoder(tiny.base, FP32, quant))
    adapter = adapted(live, r=2)
    merge(live.base, live.decoder.spec, adapter, tmp_path / "out", dtype="fp32", quant=quant)
    assert apart(load_decoder(open_base(tmp_path / "out"), FP32), live.decoder) < 2e-6


@pytest.mark.trap(39)
def test_a_tensor_that_finds_no_weight_is_an_error(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base", "mixtral")
    adapter = adapted(tiny, r=2)
    adapter.tensors["model.layers.9.mlp.experts.0.down_proj.lora_A.weight"] = torch.ones(2, 52)
    with pytest.raises(AdapterError, match=r"1 tensors of the adapter change no weight.*layers\.9"):
        merged(tiny, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.trap(41)
@pytest.mark.parametrize(
    ("saved", "tied_after"),
    [
        (["lm_head"], False),
        (["embed_tokens"], False),
        (["embed_tokens", "lm_head"], False),
        (["model.norm"], True),
    ],
)
def test_a_tied_pair_that_was_trained_apart_is_no_longer_tied(
    saved: list[str], tied_after: bool, tmp_path: Path
) -> None:
    """PEFT trains one or both sides of a tied pair apart; the merged model must keep both."""
    tiny = make_tiny(tmp_path / "base", **TIED)
    config = PeftConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    peft = get_peft_model(tiny.hf, config).eval()
    with torch.no_grad():
        for number, value in enumerate(peft.parameters()):
            if value.requires_grad:
                value += 0.15 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    peft.save_pretrained(tmp_path / "adapter")
    adapter = attach_adapter(tiny.decoder, read_adapter(tmp_path / "adapter"))
    assert apart(tiny.decoder, peft) < 2e-6
    model = merged(tiny, adapter, tmp_path / "out")
    assert apart(model, tiny.decoder) < 2e-6
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["tie_word_embeddings"] is tied_after
    assert apart(load_decoder(open_base(tmp_path / "out"), FP32), tiny.decoder) < 2e-6


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_a_gguf_base_is_merged_into_what_its_file_says(family: str, tied: bool, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "hf", family, tie_word_embeddings=tied, num_key_value_heads=2)
    base = open_base(write_gguf(tmp_path / "m.gguf", tiny))
    gguf = Tiny(tmp_path, None, base, load_decoder(base, FP32))
    adapter = adapted(gguf, r=3, bias="all")
    model = merged(gguf, adapter, tmp_path / "out")
    assert model.config.model_type == family
    assert apart(model, gguf.decoder) < 2e-6


@pytest.mark.trap(53)
@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_update_is_added_in_float32_and_cast_once(
    dtype: str, kind: torch.dtype, tmp_path: Path
) -> None:
    """An update of about 2^-9 of the weights: cast before the sum it comes out another way."""
    tiny = make_tiny(tmp_path / "base")
    adapter = adapted(tiny, r=3, alpha=3, size=0.02)
    merged(tiny, adapter, tmp_path / "out", dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.dtype == kind for tensor in tensors.values())
    otherwise = 0
    for path in adapter.spec.ranks:
        down, up = (adapter.tensors[f"{path}.lora_{side}.weight"].detach() for side in "AB")
        weight = tiny.hf.get_submodule(path).weight.detach()
        exact = (weight.double() + up.double() @ down.double()).to(kind)
        # A sum that lies on the border of two bf16 numbers may fall to either side of it in float32.
        assert int((tensors[f"{path}.weight"] != exact).sum()) <= 2
        otherwise += int((weight.to(kind) + (up @ down).to(kind) != exact).sum())
    assert otherwise > 100
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]


@pytest.mark.trap(53)
def test_the_report_says_how_much_was_rounded_away(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    shares = []
    for number, size in enumerate((1e-7, 0.1)):
        adapter, _ = new_adapter(tiny.decoder, LoraConfig(r=2, alpha=2), seed=3)
        with torch.no_grad():
            for name, tensor in adapter.tensors.items():
                if "lora_B" in name:
                    tensor.fill_(size)
        report = merge(tiny.base, tiny.decoder.spec, adapter, tmp_path / str(number), dtype="bf16")
        assert report.adapted == 21
        shares.append(report.unchanged)
    assert shares[0] > 0.99
    assert shares[1] < 0.3


@pytest.mark.trap(54)
def test_merging_changes_neither_the_base_nor_the_live_model(tmp_path: Path) -> None:
    """And a second merge gives the same bytes: nothing was added to what is in memory."""
    tiny = make_tiny(tmp_path / "base")
    adapter = adapted(tiny, r=3)
    files = {file: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    before, start = our_logits(tiny.decoder, [ROW])[0], adapter.flat.detach().clone()
    digests = set()
    for name in ("one", "two"):
        merge(tiny.base, tiny.decoder.spec, adapter, tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert {file: file.read_bytes() for file in (tmp_path / "base").iterdir()} == files
    assert torch.equal(our_logits(tiny.decoder, [ROW])[0], before)
    assert torch.equal(adapter.flat, start)


def test_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SHARD_BYTES", 30_000)
    tiny = make_tiny(tmp_path / "base")
    model = merged(tiny, adapted(tiny, r=3), tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert apart(model, tiny.decoder) < 2e-6


def test_extra_files_and_end_tokens(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    merge(
        tiny.base,
        tiny.decoder.spec,
        adapted(tiny, r=1),
        tmp_path / "out",
        extra_files={"tokenizer.json": b"{}"},
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"eos_token_id": 2}


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    adapter = adapted(tiny, r=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(UserError, match="something there already"):
        merge(tiny.base, tiny.decoder.spec, adapter, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="`int3` is not known"):
        merge(tiny.base, tiny.decoder.spec, adapter, tmp_path / "other", dtype="int3")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny(tmp_path / "base")
    adapter = adapted(tiny, r=1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        merge(tiny.base, tiny.decoder.spec, adapter, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_too_little_space_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny(tmp_path / "base")
    monkeypatch.setattr("lorimer.storage.free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=f"{tiny.base.parameters * 2:,} bytes needed, 1,000 bytes free"):
        merge(tiny.base, tiny.decoder.spec, adapted(tiny, r=1), tmp_path / "out")
