"""The merged folder: what transformers computes from it is what the live adapter computes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorimer.bases.open import open_base
from lorimer.config import LoraConfig, QuantConfig
from lorimer.errors import AdapterError, StorageError, UserError
from lorimer.lora import merge as merging
from lorimer.lora.adapter import attach_adapter, new_adapter, read_adapter
from lorimer.lora.layers import Adapter
from lorimer.lora.merge import (
    MergedBase,
    ShardWriter,
    check_target,
    merge,
    merged_tensors,
    untied,
    updated,
)
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


def adapted(tiny: Tiny, *, size: float = 0.15, tokens: Sequence[int] = (), **settings: Any) -> Adapter:
    adapter, _ = new_adapter(tiny.decoder, LoraConfig(**({"alpha": 4} | settings)), seed=3, tokens=tokens)
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
    "LoRA on both tables": ("llama", {}, {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "LoRA on a scaled embedding": ("gemma", {}, {"r": 2, "target_modules": ["embed_tokens", "v_proj"]}),
    "rows of both tables": ("llama", {}, {"r": 2, "tokens": [7, 100]}),
    "rows of a tied pair": ("qwen2", TIED, {"r": 2, "tokens": [7, 100]}),
    "tied, embedding and head as one": ("qwen2", TIED, {"r": 2, "modules_to_save": ["lm_head"]}),
    "cohere, heads normed": ("cohere", {"use_qk_norm": True}, {"r": 2}),
    "stablelm, heads normed": ("stablelm", {"qk_layernorm": True}, {"r": 2}),
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
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head", "v_proj"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("copied", [False, True])
def test_a_tied_pair_with_lora_on_it_is_no_longer_tied(
    names: list[str], copied: bool, tmp_path: Path
) -> None:
    """Also where the base's files hold the tied head a second time."""
    tiny = make_tiny(tmp_path / "base", **TIED)
    if copied:
        file = tiny.folder / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
        tiny = dataclasses.replace(tiny, base=open_base(tiny.folder))
    adapter = adapted(tiny, r=2, target_modules=names)
    model = merged(tiny, adapter, tmp_path / "out")
    assert apart(model, tiny.decoder) < 2e-6
    assert model.config.tie_word_embeddings is False
    seen = MergedBase(tiny.base, tiny.decoder.spec, adapter, "fp32", QuantConfig())
    assert apart(load_decoder(seen, FP32), tiny.decoder) < 2e-6


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


def test_rows_that_no_token_of_the_adapter_has_are_not_counted_as_rounded_away(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    adapter = adapted(tiny, tokens=[7, 100], r=2)
    report = merge(tiny.base, tiny.decoder.spec, adapter, tmp_path / "merged", dtype="fp32")
    assert report.unchanged < 0.01


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


@pytest.mark.parametrize(
    ("family", "changes", "settings", "dtype"),
    [
        ("llama", {}, {"r": 3, "bias": "all"}, "bf16"),
        ("llama", {}, {"r": 3, "modules_to_save": ["embed_tokens"]}, "fp16"),
        ("llama", TIED, {"r": 2, "modules_to_save": ["lm_head"]}, "fp32"),
        ("gpt2", {}, {"r": 3}, "fp32"),  # whose files have weights the other way round
    ],
)
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_what_is_looked_at_before_writing_is_what_is_written(
    family: str, changes: dict[str, Any], settings: dict[str, Any], dtype: str, kind: str, tmp_path: Path
) -> None:
    """Name by name: shape, type, bytes; and the settings around them."""
    tiny = make_tiny(tmp_path / "base", family, **changes)
    quant = QuantConfig(kind=kind)  # type: ignore[arg-type]
    spec, adapter = tiny.decoder.spec, adapted(tiny, **settings)
    seen = MergedBase(tiny.base, spec, adapter, dtype, quant)
    merge(tiny.base, spec, adapter, tmp_path / "out", dtype=dtype, quant=quant)
    written = open_base(tmp_path / "out")
    assert seen.tensors.keys() == written.tensors.keys()
    for name, entry in written.tensors.items():
        mine = seen.tensors[name]
        assert (mine.name, mine.dtype, mine.shape) == (name, entry.dtype, entry.shape)
        assert (mine.nbytes, type(mine.nbytes)) == (entry.nbytes, int)
        assert bytes(seen.raw(name)) == bytes(written.raw(name))
    assert seen.config == written.config
    assert seen.path == tiny.base.path
    assert (seen.tokenizer_config, seen.generation_config) == (
        tiny.base.tokenizer_config,
        tiny.base.generation_config,
    )
    if kind == "nf4":
        plain = MergedBase(tiny.base, spec, adapter, dtype, QuantConfig())
        name = next(name for name in seen.tensors if name.endswith(("mlp.up_proj.weight", "c_fc.weight")))
        assert bytes(plain.raw(name)) != bytes(seen.raw(name))


@pytest.mark.parametrize("trained", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_head_of_its_own_is_seen_before_it_is_written(trained: str, tmp_path: Path) -> None:
    """Tied in the base, one side trained apart: the other keeps the base's numbers."""
    tiny = make_tiny(tmp_path / "base", **TIED)
    spec, adapter = tiny.decoder.spec, adapted(tiny, r=2)
    value = torch.randn(tiny.hf.get_input_embeddings().weight.shape)
    update = Given(dataclasses.replace(adapter.spec, tie=False), adapter.tensors | {trained: value})
    seen = MergedBase(tiny.base, spec, update, "fp32", QuantConfig())
    # The update is of another type than what is written: the head is cast as all are.
    half = Given(update.spec, update.tensors | {trained: value.to(torch.float16)})
    merge(tiny.base, spec, half, tmp_path / "half", dtype="fp32")
    assert {t.dtype for t in load_file(tmp_path / "half/model.safetensors").values()} == {torch.float32}
    merge(tiny.base, spec, update, tmp_path / "out", dtype="fp32")
    written = open_base(tmp_path / "out")
    assert seen.tensors.keys() == written.tensors.keys()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert bytes(seen.raw(name)) == bytes(written.raw(name))
        assert seen.tensors[name].shape == written.tensors[name].shape
    other = ({"lm_head.weight", "model.embed_tokens.weight"} - {trained}).pop()
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(tensors[trained], value)
    assert torch.equal(tensors[other], tiny.hf.get_input_embeddings().weight.detach())


@dataclasses.dataclass
class Given:
    """What merging needs of an adapter."""

    spec: Any
    tensors: Any

    def for_files(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach()


def test_looking_lets_go_of_the_bases_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny(tmp_path / "base")
    released: list[int] = []
    monkeypatch.setattr(type(tiny.base), "release", lambda self: released.append(1))
    MergedBase(tiny.base, tiny.decoder.spec, adapted(tiny, r=1), "fp32", QuantConfig()).release()
    assert released == [1]


def test_the_files_of_a_merged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No manifest, several end tokens, shards of exact size, an index with the sum, PyTorch's mark."""
    tiny = make_tiny(tmp_path / "base")
    base = tiny.base
    base.config |= {"quantization_config": {"a": 1}, "license": "mine", "architectures": None}
    monkeypatch.setattr(type(base), "eos_token_ids", lambda self: [2, 5])
    adapter = adapted(tiny, r=1)
    report = merge(base, tiny.decoder.spec, adapter, tmp_path / "whole", dtype="fp32")
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    generation = json.loads((tmp_path / "whole/generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"eos_token_id": [2, 5]}
    written = json.loads((tmp_path / "whole/config.json").read_text(encoding="utf-8"))
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")
    assert not {"quantization_config", "license"} & set(written)
    with safe_open(tmp_path / "whole/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    sizes = [value.nbytes for value in load_file(tmp_path / "whole/model.safetensors").values()]
    assert sum(sizes) == report.bytes
    monkeypatch.setattr(merging, "SHARD_BYTES", max(sizes))
    merge(base, tiny.decoder.spec, adapter, tmp_path / "shards", dtype="fp32")
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": report.bytes}
    for shard in set(index["weight_map"].values()):
        assert sum(t.nbytes for t in load_file(tmp_path / "shards" / shard).values()) <= max(sizes)


def test_shards_are_filled_to_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SHARD_BYTES", 80)
    writer = ShardWriter(tmp_path)
    for name in "abcde":
        writer.add(name, torch.ones(10))
    writer.close()
    members = [sorted(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert members == [["a", "b"], ["c", "d"], ["e"]]


def test_the_share_of_unchanged_weights_is_exact(tmp_path: Path) -> None:
    """One saved norm of 36 numbers, 9 of them moved; nothing adapted at all has no share."""
    tiny = make_tiny(tmp_path / "base")
    spec = adapted(tiny, r=1).spec
    norm = tiny.hf.model.norm.weight.detach().clone()
    norm[:9] += 1
    report = merge(
        tiny.base, tiny.decoder.spec, Given(spec, {"model.norm.weight": norm}), tmp_path / "a", dtype="fp32"
    )
    assert (report.adapted, report.unchanged) == (1, 27 / 36)
    norm[:9] -= 1
    one = Given(spec, {"model.norm.weight": tiny.hf.model.norm.weight.detach()})
    assert merge(tiny.base, tiny.decoder.spec, one, tmp_path / "b", dtype="fp32").unchanged == 1
    none = merge(tiny.base, tiny.decoder.spec, Given(spec, {}), tmp_path / "c", dtype="fp32")
    assert (none.adapted, none.unchanged) == (0, 0)


def test_the_architecture_is_written_where_the_base_does_not_name_it(tmp_path: Path) -> None:
    for family, name in (("gpt2", "GPT2LMHeadModel"), ("qwen3_moe", "Qwen3MoeForCausalLM")):
        tiny = make_tiny(tmp_path / family, family)
        tiny.base.config["architectures"] = None
        seen = MergedBase(tiny.base, tiny.decoder.spec, adapted(tiny, r=1), "fp32", QuantConfig())
        assert seen.config["architectures"] == [name]


def test_weights_are_given_in_the_order_asked_for(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    spec, adapter = tiny.decoder.spec, adapted(tiny, r=1)
    names = sorted(tiny.base.tensors, reverse=True)
    counts = {"adapted": 0, "same": 0, "numbers": 0}
    given = merged_tensors(tiny.base, spec, adapter, torch.float32, counts, names=names)
    assert [name for name, _ in given] == names


def test_a_head_that_stands_for_the_pair_without_its_embedding_is_refused(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base", **TIED)
    spec = dataclasses.replace(adapted(tiny, r=1).spec, tie=True)
    head = tiny.hf.get_input_embeddings().weight.detach() + 1
    with pytest.raises(AdapterError, match=r"the first `lm_head\.weight`"):
        merge(
            tiny.base,
            tiny.decoder.spec,
            Given(spec, {"lm_head.weight": head}),
            tmp_path / "a",
            dtype="fp32",
        )


def test_one_modules_weight_with_its_update(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    assert not untied(tiny.decoder.spec, adapted(tiny, r=2, target_modules=["lm_head"]))
    tiny = make_tiny(tmp_path / "other")
    adapter = adapted(tiny, r=2, alpha=6)
    module = "model.layers.0.mlp.up_proj"
    weight = tiny.hf.get_submodule(module).weight.detach()
    a, b = (adapter.tensors[f"{module}.lora_{side}.weight"].detach() for side in "AB")
    found = updated(tiny.decoder.spec, module, weight, adapter)
    assert found is not None
    torch.testing.assert_close(found, weight + 3.0 * (b @ a))


def test_half_an_update_is_refused_and_other_tensors_of_the_base_are_left(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    adapter = adapted(tiny, r=1)
    name = "model.layers.0.mlp.up_proj"
    for side in "AB":
        half = Given(
            adapter.spec, {f"{name}.lora_{side}.weight": adapter.tensors[f"{name}.lora_{side}.weight"]}
        )
        with pytest.raises(AdapterError, match="1 tensors of the adapter change no weight") as caught:
            merge(tiny.base, tiny.decoder.spec, half, tmp_path / side, dtype="fp32")
        assert caught.value.path == str(tiny.base.path)
    tiny.base.tensors["model.rotary.inv_freq"] = tiny.base.tensors["model.norm.weight"]
    merge(tiny.base, tiny.decoder.spec, adapter, tmp_path / "out", dtype="fp32")
    assert "model.rotary.inv_freq" not in load_file(tmp_path / "out/model.safetensors")


def test_a_target_may_be_an_empty_folder_and_no_file(tmp_path: Path) -> None:
    check_target(tmp_path / "new", "bf16")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", "bf16")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="something there already") as caught:
        check_target(tmp_path / "file", "bf16")
    assert caught.value.path == str(tmp_path / "file")
