"""Whole runs on bases that transformers computes: losses of PEFT, resume, and every command."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from foreign_bases import write_foreign_chat
from lorimer.cli.app import run as main
from lorimer.config import config_from
from lorimer.errors import ConfigError, Interrupted
from lorimer.generate.model import load
from lorimer.train.loop import train
from lorimer.train.metrics import Silent
from path.oracle import Oracle, mark_answers, plain_losses, quiet, write_adapter
from path.test_losses_equal_peft_trl import assert_equal, our_losses
from small_base import CHATML, write_rows
from tiny import difference, hf_logits, our_logits

STEPS = 12


@pytest.mark.parametrize("family", ["gpt_neo", "bloom", "codegen", "granitemoe"])
def test_losses_of_12_steps_equal_peft(family: str, tmp_path: Path) -> None:
    base = write_foreign_chat(tmp_path / "base", family)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(base / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<bos>"
        )
    tokenizer.chat_template = CHATML
    mark_answers(tokenizer)
    write_adapter(model, tmp_path / "adapter", r=6, alpha=9)
    oracle = Oracle(
        model=model,
        tokenizer=tokenizer,
        adapter=tmp_path / "adapter",
        rows=write_rows(tmp_path / "rows.jsonl", 8 * STEPS),
        steps=STEPS,
        micro_batch=4,
        accumulate=2,
        learning_rate=2e-3,
    )
    theirs = plain_losses(oracle)
    assert theirs[-1] < theirs[0] - 0.02
    assert_equal(our_losses(oracle, base, tmp_path / "runs"), theirs, steps=STEPS)


def settings(tmp_path: Path, base: Path, **lora: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "data": {"train": str(write_rows(tmp_path / "train.jsonl", 24))},
        "lora": {"r": 4, "alpha": 8} | lora,
        "train": {"max_steps": 6, "batch_size": 6, "learning_rate": 5e-3, "dtype": "fp32", "threads": 1},
        "evaluate": {"max_new_tokens": 3},
        "output": {"dir": str(tmp_path / "runs"), "name": "run", "save_every": 2},
    }


class StopsAt(Silent):
    """As Ctrl-C after this step."""

    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.last:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("family", ["gpt_neo", "mamba"])
def test_a_stopped_run_ends_in_the_same_bytes(family: str, tmp_path: Path) -> None:
    """With dropout, which is a function of the step."""
    base = write_foreign_chat(tmp_path / "base", family)
    given = settings(tmp_path, base, dropout=0.2)
    skip = ("embeddings",)
    whole = train(config_from(given), skip_preflight=skip).path
    given["output"]["name"] = "stopped"
    with pytest.raises(Interrupted):
        train(config_from(given), reporter=StopsAt(3), skip_preflight=skip)
    stopped = train(None, resume=tmp_path / "runs/stopped").path
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    one, other = ((run / "row_losses.jsonl").read_bytes() for run in (whole, stopped))
    assert one == other


def test_every_command_takes_such_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_foreign_chat(tmp_path / "base", "bloom")
    given = settings(tmp_path, base)
    given["data"]["test"] = str(write_rows(tmp_path / "test.jsonl", 5, seed=7))
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(given), encoding="utf-8")
    run, merged = str(tmp_path / "runs/run"), str(tmp_path / "merged")
    said = "architecture `bloom` runs through transformers, slower: lorimer's own decoder does not know it"

    def output(*arguments: str, code: int = 0) -> str:
        assert main([*arguments]) == code, capsys.readouterr()
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert said in output("show", str(base))
    assert json.loads(output("show", str(base), "--json"))["slower"] == said
    planned = json.loads(output("plan", str(file), "--json", "--tflops", "0.1"))
    assert planned["peak"] > planned["parts"]["program"] > 0
    assert planned["seconds"] > 0
    trained = output("train", str(file), "--skip-preflight", "embeddings", "--skip-preflight", "leaks")
    assert said in trained
    assert "gguf" not in trained  # what is offered next can be done
    assert "the same bytes" in output("verify", run, "--replay")
    output("merge", run, "--out", merged, "--dtype", "fp32")
    answers = [output("generate", model, "ab cd", "--max-tokens", "4") for model in (run, merged)]
    assert answers[0] == answers[1]
    assert "loss" in output("eval", run)
    refused = output("export", run, "--to", "gguf-lora", code=2)
    assert "`bloom` cannot be exported so" in refused
    assert "Traceback" not in refused


@pytest.mark.trap(43)
@pytest.mark.parametrize("family", ["bloom", "codegen", "openai-gpt"])
def test_tokens_are_added_and_merged(family: str, tmp_path: Path) -> None:
    """Tied and not, with a bias at the head, and tensors that are named without the outermost part."""
    given = settings(tmp_path, write_foreign_chat(tmp_path / "base", family))
    rows = Path(given["data"]["train"])
    text = rows.read_text(encoding="utf-8")
    rows.write_text(text.replace('"assistant", "content": "', '"assistant", "content": "<tool> '), "utf-8")
    assert "<tool>" in rows.read_text("utf-8")
    given["data"]["add_tokens"] = ["<tool>"]
    given["output"]["name"] = "whole"
    skip = ("embeddings",)
    whole = train(config_from(given), skip_preflight=skip)
    given["output"]["name"] = "stopped"
    with pytest.raises(Interrupted):
        train(config_from(given), reporter=StopsAt(3), skip_preflight=skip)
    stopped = train(None, resume=tmp_path / "runs/stopped").path
    name = "adapter/adapter_model.safetensors"
    assert (whole.path / name).read_bytes() == (stopped / name).read_bytes()
    said = (whole.adapter / "README.md").read_text("utf-8")
    assert ("PEFT leaves out the bias" in said) == (family == "codegen")
    model = load(whole.path, dtype="fp32")
    ids = model.prompt_ids("ab <tool>")
    assert 259 in ids
    assert main(["merge", str(whole.path), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.get_input_embeddings().weight.shape[0] == 260
    assert difference(our_logits(model.decoder, [ids])[0], hf_logits(merged, ids)) < 1e-5


def test_dropout_before_lora_on_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    given = settings(tmp_path, write_foreign_chat(tmp_path / "base", "codegen"), dropout=0.1)
    given["lora"]["target_modules"] = ["lm_head"]
    with pytest.raises(ConfigError, match="does more than a product") as caught:
        train(config_from(given), reporter=Silent())
    assert "lora.dropout: 0" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_plan_counts_tables_that_are_trained(tmp_path: Path) -> None:
    given = settings(tmp_path, write_foreign_chat(tmp_path / "base", "codegen"))
    given["lora"]["modules_to_save"] = ["wte"]
    given["data"]["add_tokens"] = ["<tool>"]
    run = train(config_from(given), skip_preflight=("embeddings",))
    planned = json.loads((run.path / "run.json").read_text(encoding="utf-8"))["planned_memory"]
    adapter = load(run.path, dtype="fp32").adapter
    assert adapter is not None
    assert planned["gradients"] == 4 * adapter.parameters
