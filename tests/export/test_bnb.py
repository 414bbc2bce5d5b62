"""A run merged into 4 bits: transformers with bitsandbytes computes from it what lorimer does."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorimer.bases.open import open_base
from lorimer.cli import app
from lorimer.config import QuantConfig
from lorimer.export.bnb import export_bnb
from lorimer.export.source import open_source
from lorimer.lora.merge import merge
from lorimer.model.load import load_decoder, read_weight
from lorimer.quant.bnb import read_part
from lorimer.quant.nf4 import quantise
from small_base import write_chat_base, write_rows
from tiny import FP32, difference, our_logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.nn import Linear4bit

# Multiples of the block, where bitsandbytes' own CPU kernel is right.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bnb")
    write_chat_base(folder / "base", **SIZES)
    write_rows(folder / "train.jsonl", 16)
    (folder / "c.yaml").write_text(
        f"base: {folder / 'base'}\ndata: {{train: {folder / 'train.jsonl'}}}\nlora: {{r: 4, alpha: 8}}\n"
        "train: {max_steps: 3, batch_size: 8, learning_rate: 1e-2, dtype: fp32, threads: 1}\n"
        f"output: {{dir: {folder / 'runs'}, name: tiny}}\n",
        encoding="utf-8",
    )
    assert app.run(["train", str(folder / "c.yaml")]) == 0
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_transformers_computes_the_same_from_it(run: Path, kind: str, tmp_path: Path) -> None:
    source = open_source(str(run))
    report = export_bnb(source, tmp_path / "out", kind, "fp32", source.tokenizer.files())
    assert report.adapted == 21
    base = open_base(tmp_path / "out")
    kept = load_decoder(base, FP32, QuantConfig(kind="keep"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, module in theirs.named_modules():
        if isinstance(module, Linear4bit):
            dense = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(dense, read_weight(base, source.spec, f"{name}.weight")), name
    row = list(range(3, 40))
    with torch.no_grad():
        wanted = theirs(torch.tensor([row])).logits[0]
    (mine,) = our_logits(kept, [row])
    # Its CPU kernel multiplies in bf16 whatever the type of the states.
    assert difference(mine, wanted) < 3e-2


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_it_holds_the_merged_weights_quantised(run: Path, kind: str, tmp_path: Path) -> None:
    source = open_source(str(run))
    export_bnb(source, tmp_path / "out", kind, "fp32", {})
    merge(source.base, source.spec, source.update, tmp_path / "merged", dtype="fp32")
    merged, base = load_file(tmp_path / "merged" / "model.safetensors"), open_base(tmp_path / "out")
    for name, value in merged.items():
        if name.endswith("_proj.weight"):
            part, wanted = read_part(base, name), quantise(value, kind, 64, double=True)
            assert torch.equal(part.data, wanted.data)
            assert torch.equal(part.scales(0, 2), wanted.scales(0, 2))
        else:
            assert torch.equal(read_weight(base, source.spec, name), value)
