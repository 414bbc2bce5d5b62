"""Adapter folders: to PEFT and back, number for number, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lorimer.bases.open import open_base
from lorimer.config import LoraConfig
from lorimer.errors import AdapterError, UserError
from lorimer.lora.adapter import (
    NOT_SUPPORTED,
    attach_adapter,
    new_adapter,
    read_adapter,
    save_adapter,
    trainable_line,
)
from lorimer.lora.layers import Adapter
from lorimer.model.load import load_decoder
from tiny import (
    FAMILIES,
    FP32,
    PEFT_NOISE,
    Tiny,
    apart,
    difference,
    hf_logits,
    make_tiny,
    our_logits,
    random_rows,
    save,
    shake,
)

pytestmark = PEFT_NOISE
ROW = random_rows([23])[0]
# PEFT takes the gated units of layers without experts for experts of an older format.
ALL_SPARSE: dict[str, Any] = {"mlp_only_layers": []}
TIED = {"tie_word_embeddings": True}


def reopened(tiny: Tiny) -> Tiny:
    """The same files without any adapter."""
    base = open_base(tiny.folder)
    hf = type(tiny.hf).from_pretrained(tiny.folder, dtype=torch.float32).eval()
    return Tiny(tiny.folder, hf, base, load_decoder(base, FP32))


def trained(tiny: Tiny, *, tokens: Sequence[int] = (), **settings: Any) -> Adapter:
    adapter, _ = new_adapter(tiny.decoder, LoraConfig(**({"alpha": 4} | settings)), seed=3, tokens=tokens)
    shake(adapter)
    return adapter


def peft_of(tiny: Tiny, folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny.hf, folder).eval()


OURS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all linear": ("llama", {}, {"r": 3, "alpha": 5}),
    "alpha with a fraction": ("llama", {}, {"r": 3, "alpha": 4.5}),
    "rsLoRA": ("mistral", {}, {"r": 4, "alpha": 3, "rslora": True}),
    "attention in two layers": ("qwen3", {}, {"r": 2, "target_modules": "attention", "layers": [0, 2]}),
    "paths": ("llama", {}, {"r": 2, "target_modules": r".*(0\.mlp\.up_proj|2\.self_attn\.q_proj)"}),
    "all biases": ("qwen2", {}, {"r": 2, "bias": "all", "target_modules": ["k_proj", "down_proj"]}),
    "biases of adapted": (
        "qwen2",
        {},
        {"r": 2, "bias": "lora_only", "target_modules": ["k_proj", "v_proj"]},
    ),
    "last norm": ("llama", {}, {"r": 2, "modules_to_save": ["norm"]}),
    "all norms": ("qwen3", {}, {"r": 2, "modules_to_save": ["input_layernorm", "q_norm", "model.norm"]}),
    "embedding and head": ("llama", {}, {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding alone": ("llama", {}, {"r": 2, "modules_to_save": ["embed_tokens"]}),
    "head alone": ("llama", {}, {"r": 2, "modules_to_save": ["lm_head"]}),
    "tied embedding": ("qwen2", TIED, {"r": 2, "modules_to_save": ["embed_tokens"]}),
    "tied head": ("llama", TIED, {"r": 2, "modules_to_save": ["lm_head", "norm"]}),
    "biases of a fused weight": ("falcon", {}, {"r": 2, "bias": "all"}),
    "LayerNorms": ("gpt_neox", {}, {"r": 2, "modules_to_save": ["input_layernorm", "final_layer_norm"]}),
    "positions": ("gpt2", {}, {"r": 2, "modules_to_save": ["wpe", "ln_f"]}),
    "experts of one layer": (
        "mixtral",
        {},
        {"r": 2, "target_modules": ["down_proj"], "layers": [1]},
    ),
    "LoRA on both tables in two layers": (
        "llama",
        {},
        {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "layers": [0, 2]},
    ),
    "LoRA on the embedding alone": ("llama", {}, {"r": 2, "target_modules": ["embed_tokens"]}),
    "LoRA on a tied embedding": ("qwen2", TIED, {"r": 2, "target_modules": ["embed_tokens", "v_proj"]}),
    "LoRA on a tied head": ("llama", TIED, {"r": 2, "target_modules": ["lm_head", "v_proj"]}),
    "LoRA on a scaled embedding": ("gemma3_text", TIED, {"r": 2, "target_modules": ["embed_tokens"]}),
    "rsLoRA on both": (
        "gemma",
        {},
        {"r": 4, "rslora": True, "target_modules": ["embed_tokens", "lm_head"]},
    ),
    "tables by pattern": ("llama", {}, {"r": 2, "target_modules": "lm_head|model.embed.*|.*q_proj"}),
    "rows": ("llama", {}, {"r": 2, "tokens": [5, 70, 9]}),
    "rows of a tied pair": ("qwen3", TIED, {"r": 2, "tokens": [5, 70]}),
    "rows of a scaled embedding": ("gemma3_text", TIED, {"r": 2, "tokens": [5, 70]}),
    "rows of the head, all of the embedding": (
        "llama",
        {},
        {"r": 2, "tokens": [5], "modules_to_save": ["embed_tokens"]},
    ),
    "experts alone": ("qwen3_moe", ALL_SPARSE, {"r": 2, "target_modules": "mlp"}),
    "qwen3_moe": ("qwen3_moe", ALL_SPARSE, {"r": 3, "alpha": 5}),
} | {family: (family, {}, {"r": 3, "alpha": 5}) for family in FAMILIES if family != "qwen3_moe"}


@pytest.mark.trap(36)
@pytest.mark.trap(41)
@pytest.mark.trap(42)
@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft_and_back(name: str, tmp_path: Path) -> None:
    family, changes, settings = OURS[name]
    tiny = make_tiny(tmp_path / "base", family, **changes)
    adapter = trained(tiny, **settings)
    live = our_logits(tiny.decoder, [ROW])[0]
    folder = save(tmp_path / "adapter", tiny, adapter)
    peft = peft_of(reopened(tiny), folder)
    # transformers' own Gemma 2 is 1.0e-6 from what it computes in float64, the decoder 0.7e-6.
    assert apart(tiny.decoder, peft) < (2e-6 if family == "gemma2" else 1e-6)

    again = tmp_path / "again"
    peft.save_pretrained(again)
    mine = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(again / "adapter_model.safetensors")
    # PEFT keeps a copy of the base's table beside LoRA on it.
    assert set(mine) == {key for key in theirs if not key.endswith(".base_layer.weight")}
    for key, value in mine.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, theirs[key]), key

    for source in (folder, again):
        other = reopened(tiny)
        back = attach_adapter(other.decoder, read_adapter(source))
        assert set(back.tensors) == set(adapter.tensors)
        assert torch.equal(our_logits(other.decoder, [ROW])[0], live)


ROWS = {"trainable_token_indices": [3, 50]}
PEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "names": ("llama", {}, {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}),
    "all-linear": ("qwen3", {}, {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "pattern": ("llama", {}, {"r": 2, "target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "some layers": ("llama", {}, {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [0, 2]}),
    "all biases": ("qwen2", {}, {"r": 2, "bias": "all", "target_modules": ["k_proj"]}),
    "biases of adapted": ("qwen2", {}, {"r": 2, "bias": "lora_only", "target_modules": ["k_proj"]}),
    "norm": ("llama", {}, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
    "norms": ("llama", {}, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "head": ("llama", {}, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {}, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, head": ("llama", TIED, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, embedding": (
        "llama",
        TIED,
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "tied, both": (
        "qwen2",
        TIED,
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "LoRA on both tables": ("llama", {}, {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "LoRA on a tied pair": ("qwen2", TIED, {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "LoRA on a tied pair kept one": (
        "qwen2",
        TIED,
        {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "rows of the embedding": ("llama", {}, {"r": 2, "target_modules": ["q_proj"]} | ROWS),
    "rows of both": (
        "llama",
        {},
        {"r": 2, "target_modules": ["q_proj"]}
        | {"trainable_token_indices": {"embed_tokens": [3, 50], "lm_head": [50, 4]}},
    ),
    "rows of a tied pair": ("gemma3_text", TIED, {"r": 2, "target_modules": ["q_proj"]} | ROWS),
    "rows of a tied pair apart": (
        "qwen2",
        TIED,
        {"r": 2, "target_modules": ["q_proj"]}
        | {"trainable_token_indices": {"embed_tokens": [3, 50], "lm_head": [50, 4]}},
    ),
}


def peft_trained(tiny: Tiny, settings: dict[str, Any], folder: Path) -> Any:
    """An adapter that PEFT made, every trained number moved, saved by PEFT."""
    torch.manual_seed(5)  # PEFT draws A from the one generator that all share
    peft = get_peft_model(tiny.hf, PeftConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in peft.parameters():
            if value.requires_grad:
                value.add_(0.15 * torch.randn(value.shape, generator=generator))
    peft.save_pretrained(folder)
    return peft


@pytest.mark.trap(41)
@pytest.mark.parametrize("name", PEFT)
def test_peft_in_ours(name: str, tmp_path: Path) -> None:
    family, changes, settings = PEFT[name]
    tiny = make_tiny(tmp_path / "base", family, **changes)
    peft = peft_trained(tiny, settings, tmp_path / "adapter")
    adapter = attach_adapter(tiny.decoder, read_adapter(tmp_path / "adapter"))
    assert apart(tiny.decoder, peft) < 1e-6
    save(tmp_path / "again", tiny, adapter)
    first = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(second) == {key for key in first if not key.endswith(".base_layer.weight")}
    assert all(torch.equal(first[key], second[key]) for key in second)
    again = peft_of(reopened(tiny), tmp_path / "again")
    assert apart(tiny.decoder, again) < 1e-6


@pytest.mark.trap(40)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1, 7])
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({}, {}),
        ({"up_proj": 3}, {"q_proj": 11}),
        ({"proj": 3}, {"proj": 11, "mlp": 12, "layers.1": 13}),
        ({"layers.1.mlp.up_proj": 2, "up_proj": 5}, {"layers.1.mlp.up_proj": 3, "up_proj": 9}),
        ({r"model\.layers\.[12]\..*q_proj": 6}, {r".*\.0\..*": 5, "^model.layers.1.mlp.up_proj": 4}),
    ],
)
def test_scale_equals_peft(
    ranks: dict[str, int], alphas: dict[str, int], r: int, alpha: int, rslora: bool, tmp_path: Path
) -> None:
    tiny = make_tiny(tmp_path / "base")
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": ["q_proj", "up_proj"],
    }
    peft = peft_trained(tiny, settings, tmp_path / "adapter")
    adapter = attach_adapter(tiny.decoder, read_adapter(tmp_path / "adapter"))
    scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in peft.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)  # attention modules have one too
    }
    assert {path: adapter.spec.scale(path) for path in adapter.spec.ranks} == pytest.approx(scales)
    assert len(scales) == 6
    # And on through our own file: PEFT reads the patterns that we write as we do.
    save(tmp_path / "again", tiny, adapter)
    again = peft_of(reopened(tiny), tmp_path / "again")
    assert difference(hf_logits(again, ROW), hf_logits(peft, ROW)) < 1e-6


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Tiny, Path]:
    tiny = make_tiny(tmp_path / "base")
    folder = save(tmp_path / "adapter", tiny, trained(tiny, r=2, target_modules=["q_proj", "up_proj"]))
    return reopened(tiny), folder


def attach(tiny: Tiny, folder: Path, *, force: bool = False) -> Adapter:
    return attach_adapter(
        tiny.decoder, read_adapter(folder), fingerprint=tiny.base.fingerprint(), force=force
    )


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def reconfigure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(config), encoding="utf-8")


KEYS = [f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight" for side in "AB"]


@pytest.mark.trap(49)
@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_refused_by_name(saved: tuple[Tiny, Path], key: str) -> None:
    rewrite(saved[1], lambda tensors: tensors.pop(key))
    with pytest.raises(AdapterError) as caught:
        attach(*saved)
    assert "model.layers.1.mlp.up_proj.lora_" in str(caught.value)


@pytest.mark.trap(49)
@pytest.mark.parametrize(
    ("new", "named"),
    [
        ("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight", "layers.1.mlp.up_proj"),
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "model.layers.9.mlp.up_proj"),
        ("base_model.model.transformer.h.1.lora_A.weight", "transformer.h.1"),
        ("model.layers.1.mlp.up_proj.lora_A.weight", "model.layers.1.mlp.up_proj.lora_A.weight"),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_a.weight", "layers.1.mlp.up_proj"),
    ],
)
def test_a_renamed_key_is_refused_by_name(saved: tuple[Tiny, Path], new: str, named: str) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(KEYS[0])

    rewrite(saved[1], rename)
    with pytest.raises(AdapterError) as caught:
        attach(*saved)
    assert named in str(caught.value)


@pytest.mark.trap(49)
@pytest.mark.parametrize("key", ["base_model.model.score.weight", "base_model.model.model.norm.bias"])
def test_a_key_too_many_is_refused_by_name(saved: tuple[Tiny, Path], key: str) -> None:
    rewrite(saved[1], lambda tensors: tensors.update({key: torch.ones(3)}))
    with pytest.raises(AdapterError) as caught:
        attach(*saved)
    assert key.removeprefix("base_model.model.") in str(caught.value)


@pytest.mark.trap(50)
def test_another_base_of_the_same_shapes_is_refused(saved: tuple[Tiny, Path], tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", seed=9)
    with pytest.raises(AdapterError, match="another base") as caught:
        attach(other, saved[1])
    assert str(saved[0].folder) in str(caught.value)
    assert "--force" in str(caught.value)
    attach(other, saved[1], force=True)


@pytest.mark.trap(50)
def test_one_changed_layer_is_another_base(saved: tuple[Tiny, Path], tmp_path: Path) -> None:
    tiny, folder = saved
    shutil.copytree(tiny.folder, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.input_layernorm.weight"][0] += 0.001
    save_file(tensors, file)
    base = open_base(tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        attach(Tiny(base.path, None, base, tiny.decoder), folder)


@pytest.mark.trap(50)
def test_the_same_weights_elsewhere_are_accepted(saved: tuple[Tiny, Path], tmp_path: Path) -> None:
    tiny, folder = saved
    attach(tiny, folder)
    wanted = our_logits(tiny.decoder, [ROW])[0]
    moved = tmp_path / "moved"
    tiny.folder.rename(moved)
    base = open_base(moved)
    other = Tiny(moved, None, base, load_decoder(base, FP32))
    attach(other, folder)
    assert torch.equal(our_logits(other.decoder, [ROW])[0], wanted)


@pytest.mark.trap(50)
@pytest.mark.parametrize("change", [{"hidden_size": 30}, {"head_dim": 12}, {"intermediate_size": 48}])
def test_a_base_of_other_shapes_is_refused(
    saved: tuple[Tiny, Path], change: dict[str, int], tmp_path: Path
) -> None:
    """Even without fingerprints, as in a folder from PEFT, and even with force."""
    (saved[1] / "lorimer.json").unlink()
    other = make_tiny(tmp_path / "other", **change)
    with pytest.raises(AdapterError, match="another base") as caught:
        attach(other, saved[1], force=True)
    assert "has the shape" in str(caught.value)


@pytest.mark.trap(50)
def test_a_base_with_fewer_layers_is_refused(saved: tuple[Tiny, Path], tmp_path: Path) -> None:
    (saved[1] / "lorimer.json").unlink()
    with pytest.raises(AdapterError, match=r"no module `model\.layers\.2\."):
        attach(make_tiny(tmp_path / "other", num_hidden_layers=2), saved[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(saved: tuple[Tiny, Path], value: float) -> None:
    rewrite(saved[1], lambda tensors: tensors[KEYS[1]].view(-1)[-1:].fill_(value))
    with pytest.raises(AdapterError, match="holds NaN or infinity") as caught:
        read_adapter(saved[1])
    assert "model.layers.1.mlp.up_proj.lora_B.weight" in str(caught.value)


@pytest.mark.parametrize("left", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_refused(saved: tuple[Tiny, Path], left: int) -> None:
    file = saved[1] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match="damaged or cut short") as caught:
        read_adapter(saved[1])
    assert str(file) in str(caught.value)


def test_a_pickle_is_not_read(saved: tuple[Tiny, Path]) -> None:
    _, folder = saved
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle and is not read"):
        read_adapter(folder)


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_is_not_computed_here_is_refused(saved: tuple[Tiny, Path], name: str) -> None:
    reconfigure(saved[1], **{name: True})
    with pytest.raises(AdapterError, match=f"uses {name}"):
        read_adapter(saved[1])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"layer_replication": [[0, 3], [1, 3]]}, "layer_replication"),
    ],
)
def test_what_peft_writes_and_is_not_computed_here(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    tiny = make_tiny(tmp_path / "base")
    peft_trained(tiny, {"r": 2, "target_modules": ["q_proj"]} | settings, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=name):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("peft_type", ["IA3", "PROMPT_TUNING"])
def test_other_kinds_are_refused(saved: tuple[Tiny, Path], peft_type: str) -> None:
    reconfigure(saved[1], peft_type=peft_type)
    with pytest.raises(AdapterError, match=peft_type):
        read_adapter(saved[1])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", None, "adapter_config.json is missing"),
        ("adapter_config.json", "{", "cannot be read"),
        ("adapter_config.json", "[]", "should be a JSON object"),
        ("adapter_config.json", "[" * 100_000, "cannot be read"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("lorimer.json", "{", "cannot be read"),
        ("lorimer.json", "3", "should be a JSON object"),
    ],
)
def test_broken_files_are_named(
    saved: tuple[Tiny, Path], file: str, content: str | None, words: str
) -> None:
    path = saved[1] / file
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(saved[1])
    assert file in str(caught.value)


def test_no_alpha_no_guess(saved: tuple[Tiny, Path]) -> None:
    reconfigure(saved[1], lora_alpha=None)
    with pytest.raises(AdapterError, match="lora_alpha"):
        attach(*saved)


@pytest.mark.parametrize(
    "change",
    [{"lora_alpha": "x"}, {"lora_alpha": True}, {"alpha_pattern": [1]}, {"alpha_pattern": {"(": 3}},
     {"alpha_pattern": {"q_proj": "x"}}, {"lora_dropout": "x"}],
    ids=str,
)  # fmt: skip
def test_settings_that_are_no_numbers_are_named(saved: tuple[Tiny, Path], change: dict[str, Any]) -> None:
    tiny, folder = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=next(iter(change))):
        attach_adapter(tiny.decoder, read_adapter(folder))


def test_no_tensors(saved: tuple[Tiny, Path]) -> None:
    rewrite(saved[1], lambda tensors: tensors.clear())
    with pytest.raises(AdapterError, match="holds no tensors"):
        read_adapter(saved[1])


def test_files_of_a_saved_folder(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path / "base")
    adapter = trained(tiny, r=2, target_modules="mlp", layers=[1])
    save_adapter(
        tmp_path / "a",
        adapter,
        tiny.decoder,
        base="acme/tiny",
        ours={"x": "é"},
        extra_files={"tokenizer.json": b"{}"},
    )
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorimer.json",
        "manifest.json",
        "tokenizer.json",
    }
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert config["layers_to_transform"] == [1]
    assert config["base_model_name_or_path"] == "acme/tiny"
    assert "base_model: acme/tiny" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")


def test_trainable_line_equals_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = make_tiny(tmp_path)
    adapter = trained(tiny, r=2, target_modules=["q_proj"])
    line = trainable_line(adapter, tiny.base.parameters)
    get_peft_model(tiny.hf, PeftConfig(r=2, target_modules=["q_proj"])).print_trainable_parameters()
    assert capsys.readouterr().out.strip() == line
