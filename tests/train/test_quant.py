"""QLoRA runs: LoRA on the dequantised weights, exactly; the adapter knows how its base was stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorimer.bases.open import open_base
from lorimer.config import QuantConfig, RunConfig, config_from
from lorimer.errors import AdapterError, ConfigError
from lorimer.generate.model import load
from lorimer.model.load import load_decoder
from lorimer.quant.linear import DenseLinear, QuantLinear
from lorimer.train.loop import train
from lorimer.train.metrics import Silent
from small_base import write_chat_base, write_rows
from tiny import FP32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny")


def settings(folder: Path, base: Path, **changes: Any) -> RunConfig:
    value: dict[str, Any] = {
        "base": str(base),
        "data": {"train": str(write_rows(folder / "train.jsonl", 40)), "max_tokens": 256},
        "lora": {"r": 4, "alpha": 8},
        "train": {"max_steps": 50, "batch_size": 4, "learning_rate": 2e-3, "dtype": "fp32", "threads": 1},
        "output": {"dir": str(folder / "runs"), "name": "run", "save_every": "never"},
    }
    for key, change in changes.items():
        block, _, name = key.rpartition("__")
        (value.setdefault(block, {}) if block else value)[name] = change
    return config_from(value)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def dequantised_copy(base: Path, folder: Path, quant: QuantConfig) -> Path:
    """A base whose weights are the numbers that the quantised ones stand for, in fp32."""
    decoder = load_decoder(open_base(base), FP32, quant)
    tensors = load_file(base / "model.safetensors")
    for group in decoder.projections():
        parts = group.linear.weight.dequantise().split(list(group.rows))
        for name, part in zip(group.names, parts, strict=True):
            tensors[f"{group.path}.{name}.weight"] = part.clone()
    for table in (decoder.embedding, decoder.head):
        tensors[f"{table.path}.weight"] = table.weight.dequantise().clone()
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_quantised_weights_are_computed_with_in_16_bits(
    kind: str, dtype: str, base: Path, tmp_path: Path
) -> None:
    """Each type of QLoRA's compute, beside fp32."""
    wide, narrow = (
        losses(train(settings(tmp_path, base, quant=kind, train__dtype=name, **given)).path)
        for name, given in (("fp32", {}), (dtype, {"output__name": "narrow"}))
    )
    apart = max(abs(a - b) for a, b in zip(wide, narrow, strict=True))
    assert 0 < apart < {"bf16": 4e-2, "fp16": 5e-3}[dtype]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_losses_are_those_of_lora_on_the_dequantised_weights(kind: str, base: Path, tmp_path: Path) -> None:
    """50 steps in fp32: within 1e-5."""
    quant = {"kind": kind, "embeddings": True}
    dense = dequantised_copy(base, tmp_path / "dense", QuantConfig(**quant))
    mine = train(settings(tmp_path, base, quant=quant), reporter=Silent())
    theirs = train(settings(tmp_path, dense, output__name="dense"), reporter=Silent())
    plain = train(settings(tmp_path, base, output__name="plain"), reporter=Silent())
    apart = [abs(a - b) for a, b in zip(losses(mine.path), losses(theirs.path), strict=True)]
    assert len(apart) == 50
    assert max(apart) < 1e-5
    assert max(abs(a - b) for a, b in zip(losses(mine.path), losses(plain.path), strict=True)) > 1e-4
    assert losses(mine.path)[-1] < losses(mine.path)[0]


def test_an_adapter_answers_on_a_base_stored_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    run = train(settings(tmp_path, base, quant="nf4", train__max_steps=3), reporter=Silent()).path
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["info"]["quant"]["kind"] == "nf4"
    model = load(run, dtype="fp32")
    stored = {type(group.linear.weight) for group in model.decoder.projections()}
    assert stored == {QuantLinear}
    assert record["info"]["quant"]["bytes"] == model.decoder.frozen_bytes
    other = load(run, dtype="fp32", quant="none")
    assert {type(group.linear.weight) for group in other.decoder.projections()} == {DenseLinear}
    # The adapter itself is PEFT's, of any base.
    for name, tensor in model.adapter.tensors.items():
        assert torch.equal(tensor, other.adapter.tensors[name])
    manifest = run / "adapter" / "lorimer.json"
    ours = json.loads(manifest.read_text(encoding="utf-8"))
    ours["base"]["quant"] = {"kind": "nf3"}
    manifest.write_text(json.dumps(ours), encoding="utf-8")
    with pytest.raises(AdapterError, match="nf3"):
        load(run)


def test_a_run_resumes_on_the_base_stored_as_before(base: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, base, quant="int8", train__max_steps=6, output__save_every=3)
    run = train(config, reporter=Silent()).path
    wanted = losses(run)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    train(None, resume=run)
    assert losses(run) == wanted
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    with pytest.raises(ConfigError, match=r"`quant\.kind` is 'nf4' and the run was begun with 'int8'"):
        train(settings(tmp_path, base, quant="nf4", train__max_steps=6), resume=run)
