"""Every family from a config file to a merged model, and on native kernels what it is without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorimer.cli.app import run as lorimer
from lorimer.config import LoraConfig
from lorimer.data.pack import make_pack
from lorimer.kernels.native import library
from lorimer.lora.adapter import new_adapter
from lorimer.model.loss import pack_loss
from small_base import write_chat_base, write_rows
from tiny import CLASSIC, FAMILIES, difference, example, make_tiny, random_rows, shake

# Heads of a size that the native attention takes; the families before Llama have it from the width.
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 96},
    "gpt_neox": {"hidden_size": 96},
    "opt": {"hidden_size": 96, "word_embed_proj_dim": 96},
    "falcon": {"hidden_size": 96},
} | {
    name: {"hidden_size": 96, "head_dim": 16}
    for name in ("phi3", "olmo2", "cohere", "stablelm", "starcoder2", "glm4")
}


def gradients(tiny: Any, recompute: str) -> tuple[float, dict[str, torch.Tensor]]:
    adapter, _ = new_adapter(tiny.decoder, LoraConfig(r=4, alpha=8), seed=1)
    shake(adapter)
    tiny.decoder.recompute = recompute
    rows = random_rows((5, 30, 17, 30))
    rows = [rows[1][:9] + row for row in rows]  # a beginning that all share
    pack = make_pack([example(row) for row in rows], range(4), share=True)
    loss, _ = pack_loss(tiny.decoder, pack, weight=1 / pack.trained_tokens)
    loss.backward()
    return float(loss.detach()), {
        n: t.grad.clone() for n, t in adapter.tensors.items() if t.grad is not None
    }


@pytest.mark.parametrize("recompute", ["none", "mlp", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_gradients_are_those_of_the_reference(family: str, recompute: str, tmp_path: Path) -> None:
    """Rows with a shared beginning, packed, float32."""
    if not library.available():
        pytest.skip("no native kernels here")
    changes = SIZES.get(family, {} if family in CLASSIC else {"head_dim": 16})
    loss, mine = gradients(make_tiny(tmp_path / "a", family, **changes), recompute)
    with library.using("reference"):
        twin, theirs = gradients(make_tiny(tmp_path / "b", family, **changes), "none")
    assert loss == pytest.approx(twin, rel=1e-5)
    assert set(mine) == set(theirs)
    for name, gradient in theirs.items():
        # An expert that no token of the pack takes has no gradient.
        assert difference(mine[name], gradient) < 1e-4 or not gradient.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_train_merge_and_answer(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_chat_base(tmp_path / "base", family, **({"n_positions": 512} if family == "gpt2" else {}))
    config = {
        "base": str(base),
        "data": {"train": str(write_rows(tmp_path / "train.jsonl", 24))},
        "lora": {"r": 4, "alpha": 8},
        "train": {"max_steps": 3, "batch_size": 6, "learning_rate": 5e-3, "dtype": "fp32", "threads": 1},
        "evaluate": {"max_new_tokens": 3},
        "output": {"dir": str(tmp_path / "runs"), "name": "run", "save_every": 2},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    # The control tokens of random weights were never trained, and preflight says so.
    skip = ["--skip-preflight", "embeddings"]
    assert lorimer(["plan", str(file)]) == 0, capsys.readouterr()
    assert lorimer(["train", str(file), *skip]) == 0, capsys.readouterr()
    losses = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert lorimer(["verify", str(tmp_path / "runs/run"), "--replay"]) == 0, capsys.readouterr()
    merged = tmp_path / "merged"
    assert lorimer(["merge", str(tmp_path / "runs/run"), "--out", str(merged), "--dtype", "fp32"]) == 0
    capsys.readouterr()
    answers = []
    for model in (str(tmp_path / "runs/run"), str(merged)):
        code = lorimer(["generate", model, "ab cd", "--max-tokens", "4"])
        answers.append((code, capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert answers[0][0] == 0
