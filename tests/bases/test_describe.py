"""What a base or an adapter is, in plain facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gguf_files import write_model
from lorimer.bases.describe import describe, kept
from lorimer.errors import AdapterError, BaseError
from small_base import write_small_base


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    return tmp_path / "home/bases"


def manifest(folder: Path, **facts: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")


def test_a_gguf_file(tmp_path: Path) -> None:
    facts = describe(write_model(tmp_path / "model.gguf", dtype="Q4_0"))
    wanted = {
        "kind": "base",
        "name": "model.gguf",
        "format": "gguf",
        "architecture": "llama",
        "layers": 1,
        "hidden_size": 256,
        "max_tokens": 512,
        "types": {"Q4_0": 8, "F32": 3},
        "tokenizer": "BPE (gpt2, gpt-2), 40 tokens",
        "chat_template": True,
        "licence": "mit",
        "source": None,
        "path": str(tmp_path / "model.gguf"),
    }
    assert {key: facts[key] for key in wanted} == wanted
    assert len(facts["fingerprint"]) == 64


def test_a_folder(tmp_path: Path) -> None:
    facts = describe(write_small_base(tmp_path / "base", template=None))
    wanted = {
        "name": "base",
        "format": "safetensors",
        "parameters": 4,
        "bytes": 16,
        "types": {"F32": 1},
        "tokenizer": "BPE, 256 tokens",
        "chat_template": False,
        "licence": None,
        "max_tokens": None,
    }
    assert {key: facts[key] for key in wanted} == wanted


def test_a_kept_base_has_what_its_manifest_says(root: Path) -> None:
    root.mkdir(parents=True)
    folder = write_small_base(root / "small")
    files = {file.name: {"bytes": file.stat().st_size} for file in folder.iterdir()}
    said = {"name": "small", "licence": "MIT", "source": "hub a/b", "about": "x"}
    manifest(folder, **said, pulled="2026-01-02", files=files)
    assert describe("small").items() >= said.items()
    total = sum(file["bytes"] for file in files.values())
    line = {"name": "small", "bytes": total, "kind": "safetensors", "source": "hub a/b"}
    assert kept() == [line | {"licence": "MIT", "pulled": "2026-01-02"}]


def test_a_manifest_beside_any_other_folder_says_nothing(tmp_path: Path) -> None:
    folder = write_small_base(tmp_path / "base")
    manifest(folder, name="other", licence="MIT")
    assert (describe(folder)["name"], describe(folder)["licence"]) == ("base", None)


@pytest.mark.parametrize("files", [None, [], {"a": 5}, {"a": {}}, {"a": {"bytes": "many"}}])
def test_a_manifest_that_lists_nonsense_counts_nothing(root: Path, files: object) -> None:
    (root / "small").mkdir(parents=True)
    manifest(root / "small", name="small", files=files)
    assert kept()[0]["bytes"] == 0


def test_a_tokenizer_that_is_not_one_is_refused(tmp_path: Path) -> None:
    folder = write_small_base(tmp_path / "base")
    for text in ("{", "[]", '{"model": 5}', '{"model": {"vocab": 5}}'):
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(BaseError, match=r"tokenizer.json: this is not a tokenizer"):
            describe(folder)


ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "smollm2-135m",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "target_modules": ["v_proj", "q_proj"],
    "modules_to_save": None,
}


def write_adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | changes), encoding="utf-8")
    weights = {
        "x.lora_A.weight": np.ones((8, 4), np.float32),
        "x.lora_B.weight": np.ones((4, 8), np.float32),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_folder(tmp_path: Path) -> None:
    assert describe(write_adapter(tmp_path / "mine")) == {
        "kind": "adapter",
        "name": "mine",
        "path": str(tmp_path / "mine"),
        "base": "smollm2-135m",
        "r": 8,
        "alpha": 16,
        "dropout": 0.1,
        "rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": [],
        "parameters": 64,
        "bytes": 256,
        "types": {"F32": 2},
    }
    assert describe(write_adapter(tmp_path / "b", target_modules="all-linear"))["target_modules"] == [
        "all-linear"
    ]


def test_an_adapter_folder_that_is_broken_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "mine", peft_type="IA3")
    with pytest.raises(AdapterError, match=r"of the kind IA3 \(wanted: LORA\)"):
        describe(folder)
    for text, words in (("{", "cannot be read as JSON"), ("[]", "should be a JSON object")):
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(AdapterError, match=words):
            describe(folder)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError, match="damaged or cut short"):
        describe(folder)
