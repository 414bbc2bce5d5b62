"""What is said about a run: each plain case in words, and nothing about a run that went well."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorimer.config import config_from
from lorimer.data.template import Example
from lorimer.errors import DivergenceError
from lorimer.train.diagnose import diagnose, suspicious
from lorimer.train.loop import Session, train
from lorimer.train.metrics import Silent
from small_base import write_rows


@pytest.fixture
def settings(short_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    write_rows(tmp_path / "train.jsonl", 40)
    short_run["train"] |= {"epochs": 6, "batch_size": 8, "learning_rate": 1e-2}
    return short_run


def falling(steps: int = 200, noise: float = 0.05) -> list[float]:
    random = np.random.Generator(np.random.PCG64(0))
    return [3 * math.exp(-step / 60) + 0.2 + noise * random.standard_normal() for step in range(steps)]


CASES: list[tuple[list[float], list[tuple[int, float]], str | None]] = [
    (falling(), [(50, 0.9), (100, 0.5), (200, 0.4)], None),
    (falling(), [], None),
    (falling()[:10], [], None),
    ([0.2] * 50, [], None),  # nothing was left to learn
    (
        falling(100) + [0.8 + 0.05 * n for n in range(100)],
        [],
        "it diverged: the loss was 0.87 until.*=3e-05",
    ),
    ([3.0 + 0.01 * (n % 3) for n in range(100)], [], "it hardly learned.*=5e-04"),
    ([3.0 + 1.5 * ((n // 10) % 2) for n in range(100)], [], "it diverged.*=3e-05"),
    (falling(), [(50, 0.9), (100, 0.5), (150, 0.6), (200, 0.8)], "overfitted.*0.500 at step 100"),
    (falling(), [(50, 0.9), (100, 0.5), (150, 0.51), (200, 0.505)], None),
]


@pytest.mark.parametrize(("losses", "valid", "says"), CASES)
def test_plain_cases_are_said_and_others_are_not(
    losses: list[float], valid: list[tuple[int, float]], says: str | None
) -> None:
    said = diagnose(losses, valid, 1e-4)
    assert len(said) == (says is not None)
    assert says is None or re.search(says, said[0])


def test_rates_that_are_far_off_are_said_of_real_runs(settings: dict[str, Any]) -> None:
    found = {}
    for name, rate in (("low", 1e-6), ("right", 1e-2)):
        settings["train"]["learning_rate"] = rate
        settings["output"]["name"] = name
        settings["train"]["lr_scheduler"] = "constant"
        run = train(config_from(settings)).path
        found[name] = json.loads((run / "run.json").read_text())["diagnosis"]
    assert "hardly learned" in found["low"][0]
    assert found["right"] == []


def example(prompt: list[int], answer: list[int], place: str) -> Example:
    flags = np.array([False] * len(prompt) + [True] * len(answer))
    return Example(np.array(prompt + answer, np.int32), flags, place)


def test_rows_that_stand_out_are_listed() -> None:
    examples = [example([1, 2, n], [n, 9], f"t:{n + 1}") for n in range(40)]
    examples.append(example([1, 2, 5], [7, 9], "t:41"))
    losses = {n: [2.0 + 0.01 * n, 0.3 + 0.001 * n] for n in range(41)}
    losses[3] = [0.001, 0.001]
    losses[17] = [4.0, 3.9]
    found = {one.kind: one.rows for one in suspicious(losses, examples)}
    assert found == {
        "rows were never learned": (("t:18", "loss 3.90"),),
        "rows were known before they were trained": (("t:4", "loss 0.00"),),
        "rows have another answer to the same prompt": (("t:41", "against t:6"),),
    }
    even = {n: [2.0, 0.3 + 0.01 * (n % 5)] for n in range(40)}
    assert suspicious(even, examples[:40]) == []


def test_each_row_of_each_step_is_on_record(settings: dict[str, Any]) -> None:
    settings["train"]["epochs"] = 1
    run = train(config_from(settings)).path
    lines = [json.loads(line) for line in (run / "row_losses.jsonl").read_text().splitlines()]
    assert sorted(row for line in lines for row in line["rows"]) == list(range(40))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    session = Session(config_from(settings), Silent())
    for line, step in zip(lines, steps, strict=True):
        tokens = [int(session.data.train[row].trained.sum()) for row in line["rows"]]
        mean = sum(n * loss for n, loss in zip(tokens, line["losses"], strict=True)) / sum(tokens)
        assert mean == pytest.approx(step["loss"], abs=1e-3)


@pytest.mark.trap(46)
@pytest.mark.parametrize("where", ["self_attn.q_proj", "mlp.down_proj", "embed_tokens"])
def test_nan_names_the_module_that_it_comes_from(
    settings: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.one_step

    def broken(self: Session, step: int) -> None:
        if step == 2:
            decoder = self.model.decoder
            layer = decoder.layers[1]
            group = layer.qkv if "attn" in where else layer.projections()[-1]
            weight = decoder.embedding.weight if where == "embed_tokens" else group.linear.weight
            weight.weight_OI.view(-1)[::7] = torch.nan  # type: ignore[attr-defined]
        real(self, step)

    monkeypatch.setattr(Session, "one_step", broken)
    with pytest.raises(DivergenceError, match=rf"at step 3.*not finite comes from `model\..*{where}"):
        train(config_from(settings))
