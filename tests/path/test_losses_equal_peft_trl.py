"""Losses equal those of PEFT under TRL: same adapter to start from, same rows, float32, step by step.

TRL pads rows into micro-batches and accumulates; lorimer packs them without padding. Only rounding may
differ, and a mean far below the largest difference says that nothing else does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lorimer.config import config_from
from lorimer.train.loop import train
from path.oracle import Oracle, mark_answers, plain_losses, quiet, trl_losses, write_adapter
from small_base import CHATML, write_chat_base, write_rows

# The largest difference and the mean one, in nats: of tiny models, and of SmolLM2.
MAX, MEAN = 1e-5, 1e-6
MAX_SMOLLM2, MEAN_SMOLLM2 = 1e-4, 1e-5
# Heads wider together than the hidden states, few key/value heads, tied and untied, biases, head norms, a
# sliding window shorter than the rows.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 4, "head_dim": 14}),
    "qwen3": ("qwen3", {}),
    # Norms around each part, capped scores and logits; a fused weight beside a unit without a gate.
    "gemma2": ("gemma2", {"sliding_window": 24}),
    "falcon": ("falcon", {}),
}


def tiny_oracle(folder: Path, family: str, *, steps: int) -> Oracle:
    name, changes = SHAPES[family]
    base = write_chat_base(folder / "base", name, **changes)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(base / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<bos>"
        )
    tokenizer.chat_template = CHATML
    mark_answers(tokenizer)
    write_adapter(model, folder / "adapter", r=6, alpha=9)
    return Oracle(
        model=model,
        tokenizer=tokenizer,
        adapter=folder / "adapter",
        rows=write_rows(folder / "rows.jsonl", 16 * 20),
        steps=steps,
        micro_batch=4,
        accumulate=4,
        learning_rate=2e-3,
    )


def read_gguf(path: Path) -> tuple[Any, Any]:
    """The file as transformers dequantises it. The trainer refuses a model that was quantised, so it
    is told that this one no longer is."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        model.is_quantized = False
        return model, AutoTokenizer.from_pretrained(**where)


def our_losses(oracle: Oracle, base: Path, folder: Path) -> list[float]:
    config = config_from(
        {
            "base": str(base),
            "data": {"train": str(oracle.rows), "shuffle": False},
            "lora": {"adapter": str(oracle.adapter)},
            "train": {
                "max_steps": oracle.steps,
                "batch_size": oracle.batch_size,
                "micro_batch_tokens": 400,  # several packs a step
                "learning_rate": oracle.learning_rate,
                "lr_scheduler": "cosine",
                "warmup_steps": 0,
                "dtype": "fp32",
                "device": "cpu",
                "threads": 1,
                "eval_every": "never",
            },
            "output": {"dir": str(folder), "name": "run", "save_every": "never"},
        }
    )
    run = train(config).path
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def assert_equal(
    mine: list[float], theirs: list[float], *, steps: int, most: float = MAX, mean: float = MEAN
) -> None:
    assert len(mine) == len(theirs) == steps
    apart = [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
    assert max(apart) <= most, f"step {apart.index(max(apart)) + 1} differs by {max(apart):.2e}"
    assert sum(apart) / steps <= mean


@pytest.mark.parametrize("family", SHAPES)
def test_the_oracle_equals_a_loop_written_out_by_hand(tmp_path: Path, family: str) -> None:
    oracle = tiny_oracle(tmp_path, family, steps=6)
    assert_equal(trl_losses(oracle, tmp_path / "trl"), plain_losses(oracle), steps=6)


@pytest.mark.trap(13)
@pytest.mark.trap(15)
@pytest.mark.parametrize("family", SHAPES)
def test_losses_of_50_steps_equal_trl(tmp_path: Path, family: str) -> None:
    oracle = tiny_oracle(tmp_path, family, steps=50)
    theirs = trl_losses(oracle, tmp_path / "trl")
    assert theirs[-1] < theirs[0] - 0.1  # it learns, so the updates are compared and not only the start
    assert_equal(our_losses(oracle, tmp_path / "base", tmp_path / "runs"), theirs, steps=50)


def test_losses_of_10_steps_equal_trl_on_smollm2(tmp_path: Path, smollm2: Path) -> None:
    model, tokenizer = read_gguf(smollm2)
    mark_answers(tokenizer)
    write_adapter(model, tmp_path / "adapter", r=16, alpha=32)
    oracle = Oracle(
        model=model,
        tokenizer=tokenizer,
        adapter=tmp_path / "adapter",
        rows=write_rows(tmp_path / "rows.jsonl", 2 * 10),
        steps=10,
        micro_batch=2,
        accumulate=1,
        learning_rate=2e-4,
    )
    theirs = trl_losses(oracle, tmp_path / "trl")
    mine = our_losses(oracle, smollm2, tmp_path / "runs")
    assert_equal(mine, theirs, steps=10, most=MAX_SMOLLM2, mean=MEAN_SMOLLM2)
