"""A base whose tensors are not those of its config is refused, and what is wrong is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorimer.bases.open import open_base
from lorimer.errors import BaseError
from lorimer.model.families import read_spec
from lorimer.model.load import load_decoder
from lorimer.model.tensors import tensor_names
from model_cases import CASES
from tiny import FP32, make_tiny

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


@pytest.mark.parametrize("name", CASES)
def test_names_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    family, changes = CASES[name]
    tiny = make_tiny(tmp_path, family, **changes)
    head = {f"{tiny.decoder.spec.names.head}.weight"} if tiny.decoder.spec.tied_head else set()
    assert set(tensor_names(read_spec(tiny.base.config, path="x"))) | head == set(tiny.base.tensors) | head


def another_head(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["tie_word_embeddings"] = True


def three_of_nine(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for layer in range(3):
        for name in ("mlp.up_proj", "self_attn.q_proj"):
            del tensors[f"model.layers.{layer}.{name}.weight"]


WRONG: dict[str, tuple[Change, list[str]]] = {
    "one missing": (
        lambda config, tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
        ["the weight `model.layers.1.mlp.up_proj.weight` is missing"],
    ),
    "many missing": (
        three_of_nine,
        ["6 weights (`model.layers.0.self_attn.q_proj", "and more) are"],
    ),
    "fewer layers said": (
        lambda config, tensors: config.update(num_hidden_layers=2),
        ["no place for 9 weights (`model.layers.2.", "number of layers"],
    ),
    "biases not said": (
        lambda config, tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(60)}),
        ["no place for the weight `model.layers.0.self_attn.q_proj.bias`"],
    ),
    "no head": (
        lambda config, tensors: tensors.pop("lm_head.weight"),
        ["`lm_head.weight` is missing", "tie_word_embeddings: true"],
    ),
    "another head than the embedding": (another_head, ["are one, but", "tie_word_embeddings: false"]),
    "narrower than said": (
        lambda config, tensors: config.update(intermediate_size=50),
        ["gate_proj.weight` has the shape [52, 36] (wanted: [50, 36])"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    change, words = WRONG[name]
    make_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(file)
    change(config, tensors)
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseError) as caught:
        load_decoder(open_base(tmp_path), FP32)
    for word in words:
        assert word in str(caught.value)


def test_buffers_of_older_files_are_left_alone(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    # As the first files of GPT-2 were: without the prefix, with the mask as a buffer.
    older = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    older["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    older["h.0.attn.masked_bias"] = torch.ones(())
    save_file(older, file, {"format": "pt"})
    again = load_decoder(open_base(tmp_path), FP32)
    assert torch.equal(again.embedding.weight.dequantise(), tiny.decoder.embedding.weight.dequantise())
