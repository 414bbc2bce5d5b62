"""The adapter file: W + alpha / rank * B A is the merged weight, in llama.cpp's names and order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorimer.bases.gguf import GgufFile
from lorimer.bases.open import open_base
from lorimer.errors import AdapterError, UserError
from lorimer.export.gguf import export_gguf
from lorimer.export.gguf_lora import export_gguf_lora
from lorimer.export.source import open_source
from small_base import write_chat_base

Make = Callable[..., Any]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, rsLoRA": ("llama", {"r": 4, "alpha": 3, "rslora": True}),
    "llama, some modules in one layer": (
        "llama",
        {"target_modules": ["k_proj", "down_proj"], "layers": "last:1"},
    ),
    "mistral": ("mistral", {"r": 2}),
    "qwen2": ("qwen2", {"alpha": 1}),
    "qwen3": ("qwen3", {}),
}


def numbers(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, by the gguf package, as [out, in]."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def patterned(source: Any, **changes: Any) -> Any:
    """The same adapter with other settings in its adapter_config.json."""
    path = source.adapter.path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")
    return open_source(str(source.adapter.path))


def check(source: Any, tmp_path: Path) -> tuple[float, dict[str, np.ndarray]]:
    """Base file plus factors equals merged file, as llama.cpp computes it."""
    base = open_source(str(source.base.path))
    plain = numbers(export_gguf(base, tmp_path / "plain.gguf", "f32").path)
    merged = numbers(export_gguf(source, tmp_path / "merged.gguf", "f32").path)
    path = export_gguf_lora(source, tmp_path / "lora.gguf").path
    factors, alpha = numbers(path), GgufFile(path).metadata["adapter.lora.alpha"]
    for name, weight in plain.items():
        down, up = factors.pop(f"{name}.lora_a", None), factors.pop(f"{name}.lora_b", None)
        if down is None or up is None:
            assert np.array_equal(weight, merged[name]), name
            continue
        assert (down.shape[1], up.shape[0], down.shape[0]) == (
            weight.shape[1],
            weight.shape[0],
            up.shape[1],
        )
        np.testing.assert_allclose(weight + alpha / len(down) * (up @ down), merged[name], atol=2e-6)
        assert np.abs(weight - merged[name]).max() > 1e-3, name
    assert not factors
    return alpha, numbers(path)


@pytest.mark.parametrize("name", CASES)
def test_base_file_and_adapter_file_are_the_merged_file(name: str, tmp_path: Path, make: Make) -> None:
    family, lora = CASES[name]
    source, _ = make(family, **lora)
    alpha, factors = check(source, tmp_path)
    settings = {"r": 3, "alpha": 5} | lora
    scale = settings["r"] ** 0.5 if settings.get("rslora") else 1
    assert alpha == pytest.approx(settings["alpha"] * scale)
    # Not one bit of the factors changes where the file's alpha is theirs.
    path = "model.layers.2.mlp.down_proj"
    if "down_proj" in str(lora.get("target_modules", "down_proj")):
        for side, own in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            wanted = source.update.tensors[f"{path}.{own}.weight"].numpy()
            assert np.array_equal(factors[f"blk.2.ffn_down.weight.{side}"], wanted)


def test_alphas_of_their_own_are_folded_into_b(tmp_path: Path, make: Make) -> None:
    source, _ = make()
    alpha, _ = check(
        patterned(source, alpha_pattern={"q_proj": 11, r"layers\.1\.mlp\.up_proj": 2}), tmp_path
    )
    assert alpha == 5


def test_ranks_of_their_own_with_rslora(tmp_path: Path, make: Make) -> None:
    source, _ = make()
    path = source.adapter.path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if ".1.self_attn.q_proj.lora_A" in name:
            tensors[name] = value[:2].clone()
        if ".1.self_attn.q_proj.lora_B" in name:
            tensors[name] = value[:, :2].clone()
    save_file(tensors, path)
    alpha, _ = check(patterned(source, use_rslora=True), tmp_path)
    assert alpha == pytest.approx(5 * 3**0.5)


def test_what_the_file_says_of_itself(tmp_path: Path, make: Make) -> None:
    source, _ = make()
    report = export_gguf_lora(source, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(report.path).fields
    wanted = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": source.name,
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 5.0,
    }
    assert {key: field.contents() for key, field in fields.items() if "GGUF." not in key} == wanted
    assert (report.tensors, report.adapted, report.types) == (42, 21, {"F32": 42})
    assert report.bytes == report.path.stat().st_size


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_sixteen_bit_factors(kind: str, dtype: torch.dtype, tmp_path: Path, make: Make) -> None:
    source, _ = make("qwen2")
    found = numbers(export_gguf_lora(source, tmp_path / "a.gguf", kind).path)
    wanted = source.update.tensors["model.layers.0.mlp.up_proj.lora_A.weight"].to(dtype).float().numpy()
    assert np.array_equal(found["blk.0.ffn_up.weight.lora_a"], wanted)


def test_a_file_for_the_very_gguf_that_was_trained_on(tmp_path: Path, make: Make) -> None:
    folder = write_chat_base(tmp_path / "base")
    first = export_gguf(open_source(str(folder)), tmp_path / "base.gguf", "q8_0").path
    source, _ = make(base=first)
    check(source, tmp_path)
    names = {
        name.removesuffix(".lora_a") for name in numbers(tmp_path / "lora.gguf") if name.endswith("lora_a")
    }
    assert names <= set(GgufFile(first).tensors)
    assert open_base(first).config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("lora", "word"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"modules_to_save": ["norm"]}, "model.norm.weight"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_what_an_adapter_file_cannot_hold_is_refused(
    lora: dict[str, Any], word: str, tmp_path: Path, make: Make
) -> None:
    source, _ = make("qwen2", **lora)
    with pytest.raises(AdapterError, match="LoRA factors alone") as caught:
        export_gguf_lora(source, tmp_path / "a.gguf")
    assert word in str(caught.value)
    assert "--to gguf" in str(caught.value)
    assert not (tmp_path / "a.gguf").exists()


def test_other_refusals(tmp_path: Path, make: Make) -> None:
    source, _ = make()
    with pytest.raises(UserError, match="`q4_0` is not one for an adapter"):
        export_gguf_lora(source, tmp_path / "a.gguf", "q4_0")
    with pytest.raises(UserError, match=r"should end in \.gguf"):
        export_gguf_lora(source, tmp_path / "a")
    with pytest.raises(AdapterError, match="without an adapter"):
        export_gguf_lora(open_source(str(source.base.path)), tmp_path / "a.gguf")
    with pytest.raises(AdapterError, match="lora_alpha is 0"):
        export_gguf_lora(patterned(source, lora_alpha=0), tmp_path / "a.gguf")
