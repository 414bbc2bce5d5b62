"""A run with tokens of its own, from rows to answers, and what a stop in the middle changes: nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorimer
from lorimer.config import config_from
from lorimer.errors import ConfigError
from lorimer.train.loop import train
from small_base import write_chat_base

TOKENS = {"add_tokens": ["<tool>", "</tool>"], "add_special_tokens": ["<|never|>"]}
TABLES = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}


def settings(folder: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    lines = []
    for number in range(12):
        word = f"{number * 7919 % 1000:03d}"
        turns = [("user", f"use <tool> on {word}"), ("assistant", f"<tool>{word[::-1]}</tool>")]
        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    value: dict[str, dict[str, Any]] = {
        "data": {"train": str(folder / "train.jsonl")},
        "lora": {"r": 2},
        "train": {"batch_size": 4, "max_steps": 4, "dtype": "fp32", "learning_rate": 5e-3, "threads": 1},
        "output": {"dir": str(folder / "runs"), "name": name, "save_every": 2},
    }
    return {"base": str(folder / "base")} | {k: v | changes.get(k, {}) for k, v in value.items()}


@pytest.mark.trap(43)
@pytest.mark.parametrize("changes", [{"data": TOKENS}, {"lora": TABLES}], ids=["tokens", "LoRA on tables"])
def test_a_run_and_the_same_run_resumed(changes: dict[str, Any], tmp_path: Path) -> None:
    write_chat_base(tmp_path / "base", tie_word_embeddings=True)
    whole = train(config_from(settings(tmp_path, "whole", **changes)))
    first = settings(tmp_path, "parts", **changes)
    first["train"] |= {"max_steps": 2, "lr_scheduler": "constant", "warmup_ratio": 0.0}
    again = settings(tmp_path, "again", **changes)
    again["train"] |= {"lr_scheduler": "constant", "warmup_ratio": 0.0}
    train(config_from(first))
    first["train"]["max_steps"] = 4
    parts, unbroken = train(config_from(first), resume="parts"), train(config_from(again))
    name = "adapter_model.safetensors"
    assert (parts.adapter / name).read_bytes() == (unbroken.adapter / name).read_bytes()
    record = json.loads((whole.path / "run.json").read_text(encoding="utf-8"))
    model = lorimer.load(whole.path, dtype="fp32")
    if "data" in changes:
        assert "2 added tokens in use are trained in this run" in record["preflight"]["embeddings"]
        assert "`<|never|>` is added and in no training row" in (whole.path / "train.log").read_text(
            "utf-8"
        )
        assert "rows of <tool>, </tool>, <|never|>" in record["info"]["targets"]
        ids = model.prompt_ids("use <tool>")
        assert 259 in ids
        config = settings(tmp_path, "more", lora={"adapter": str(whole.adapter)})
        assert train(config_from(config)).steps == 4
        config["data"]["add_tokens"] = ["<other>"]
        with pytest.raises(ConfigError, match=r"trained with \(<tool>, </tool>, <\|never\|>\)"):
            train(config_from(config))
    planned = record["planned_memory"]["gradients"]
    assert planned == 4 * model.adapter.parameters  # type: ignore[union-attr]
