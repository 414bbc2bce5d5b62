"""Each check before the first step passes on a sound run and fails when what it looks for is wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorimer.cli import app
from lorimer.config import config_from
from lorimer.data.near import near_prompts, near_rows, shingles, similarity
from lorimer.data.template import Example
from lorimer.errors import PreflightError, UserError
from lorimer.model.decoder import Decoder
from lorimer.train import preflight as module
from lorimer.train.loop import Session, train
from lorimer.train.metrics import Silent
from lorimer.train.preflight import CHECKS, Subject, preflight
from small_base import write_rows


@pytest.fixture
def settings(short_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    short_run["data"]["test"] = str(write_rows(tmp_path / "test.jsonl", 5, seed=9))
    short_run["train"]["max_steps"] = 2
    return short_run


def subject(settings: dict[str, Any]) -> Subject:
    session = Session(config_from(settings), Silent())
    return Subject(
        session.config, session.model, session.adapter, session.data, session.shares, session.trims
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_sound_run_passes_and_nothing_is_changed(
    settings: dict[str, Any], dtype: str, quant: str
) -> None:
    settings["train"]["dtype"], settings["quant"] = dtype, {"kind": quant}
    given = subject(settings)
    before = given.adapter.flat.detach().clone()
    ticks = preflight(given)
    assert [tick.name for tick in ticks] == list(CHECKS)
    assert all(tick.passed and tick.text for tick in ticks)
    assert torch.equal(given.adapter.flat.detach(), before)
    assert not given.adapter.flat.grad.any()  # type: ignore[union-attr]
    # And training after it is what it would have been without.
    skipped = train(config_from(settings), skip_preflight=list(CHECKS))
    settings["output"]["name"] = "looked"
    looked = train(config_from(settings))
    name = "adapter/adapter_model.safetensors"
    assert (skipped.path / name).read_bytes() == (looked.path / name).read_bytes()


def untrained(given: Subject, patch: pytest.MonkeyPatch) -> None:
    given.data.train[3].trained[:] = False


def no_end(given: Subject, patch: pytest.MonkeyPatch) -> None:
    for row in given.data.train[:4]:
        ends = [given.model.template.end_ids[-1], *given.model.tokenizer.eos_ids]
        row.trained[np.isin(row.ids, ends)] = False


def two_bos(given: Subject, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(given.model.tokenizer), "bos_id", property(lambda self: 5))
    for number, row in enumerate(given.data.train):
        ids = np.concatenate([np.array([5, 5] if number == 2 else [5], np.int32), row.ids])
        flags = np.concatenate([np.zeros(len(ids) - len(row.ids), bool), row.trained])
        given.data.train[number] = Example(ids, flags, row.place)


def one_without_bos(given: Subject, patch: pytest.MonkeyPatch) -> None:
    two_bos(given, patch)
    row = given.data.train[2]
    given.data.train[2] = Example(row.ids[2:], row.trained[2:], row.place)


def other_prompt(given: Subject, patch: pytest.MonkeyPatch) -> None:
    real = given.model.template.prompt_ids
    patch.setattr(given.model.template, "prompt_ids", lambda *a: [*real(*a)[:-1], 7])


def rows_see_each_other(given: Subject, patch: pytest.MonkeyPatch) -> None:
    real = Decoder.hidden

    def merged(self: Decoder, ids_T: Any, lengths: Any, **named: Any) -> Any:
        return real(self, ids_T, (sum(lengths),), **named)

    patch.setattr(Decoder, "hidden", merged)


def mean_of_means(given: Subject, patch: pytest.MonkeyPatch) -> None:
    real = module.pack_loss

    def own_mean(decoder: Any, pack: Any, *, weight: float) -> Any:
        return real(decoder, pack, weight=1.0 / pack.trained_tokens)

    patch.setattr(module, "pack_loss", own_mean)


def started(given: Subject, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        given.adapter.flat.add_(0.3)
    given.adapter.refresh()


def cut_off(given: Subject, patch: pytest.MonkeyPatch) -> None:
    """The last layer's down projection is not adapted in the forward, and stays in the optimizer."""
    given.model.decoder.layers[-1].projections()[-1].adapted = None


def untrained_token(given: Subject, patch: pytest.MonkeyPatch) -> None:
    weight = given.model.decoder.embedding.weight
    weight.weight_OI[given.model.template.end_ids[-1]] = 0.0  # type: ignore[attr-defined]


def trained_test_row(given: Subject, patch: pytest.MonkeyPatch) -> None:
    given.data.test.append(given.data.looked_at[4][0])


PLANTED: dict[str, tuple[Callable[[Subject, pytest.MonkeyPatch], None], str, str]] = {
    "a row without trained tokens": (untrained, "trained", "train.jsonl:4"),
    "no end of turn": (no_end, "end-of-turn", "train.jsonl:1"),
    "two bos": (two_bos, "bos", "1 rows begin with two.*train.jsonl:3"),
    "a row without bos": (one_without_bos, "bos", "1 of 21 rows begin without it.*train.jsonl:3"),
    "another prompt than inference": (other_prompt, "inference", "not those that inference feeds"),
    "packed rows see each other": (rows_see_each_other, "packing", "other losses packed than alone"),
    "a mean of means": (mean_of_means, "splitting", "depends on how it is split"),
    "an adapter that begins as something": (started, "start", "changes losses by"),
    "tensors without a gradient": (cut_off, "gradients", "2 of 42 adapter tensors.*down_proj"),
    "an untrained control token": (untrained_token, "embeddings", "never trained: `<|im_end|>`"),
    "a test row in train": (trained_test_row, "leaks", "1 of 6 held-out rows are also trained on"),
}


@pytest.mark.trap(10)
@pytest.mark.trap(44)
@pytest.mark.parametrize("case", PLANTED)
def test_what_is_wrong_fails_its_check_by_name(
    settings: dict[str, Any], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, name, says = PLANTED[case]
    given = subject(settings)
    plant(given, monkeypatch)
    others = [check for check in CHECKS if check != name]
    with pytest.raises(PreflightError, match=f"preflight `{name}`: .*{says}") as failed:
        preflight(given, skip=others)
    assert f"--skip-preflight {name}" in str(failed.value)
    assert failed.value.exit_code == 2


def test_names_are_checked_and_what_is_skipped_is_in_the_record(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no preflight check `leak`"):
        train(config_from(settings), skip_preflight=["leak"])
    run = train(config_from(settings), skip_preflight=["leaks"]).path
    record = json.loads((run / "run.json").read_text())
    assert record["preflight"]["leaks"] == "skipped"
    assert set(record["preflight"]) == set(CHECKS)


def test_the_command_stops_and_leaves_nothing(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write((tmp_path / "train.jsonl").read_text().splitlines()[7] + "\n")
    (tmp_path / "c.yaml").write_text(json.dumps(settings), encoding="utf-8")
    assert app.run(["train", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert "test.jsonl:6 = " in said
    assert "train.jsonl:8" in said
    assert not (tmp_path / "runs").exists()
    assert app.run(["train", str(tmp_path / "c.yaml"), "--skip-preflight", "leaks"]) == 0
    assert "skip leaks" in capsys.readouterr().out


# --- near duplicates -------------------------------------------------------------------------------


def numbers(count: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.Generator(np.random.PCG64(seed)).integers(5, 5000, count).astype(np.int32)


def test_similarity_is_the_jaccard_index_of_runs_of_three() -> None:
    one, other = np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 4, 9])
    assert similarity(shingles(one), shingles(other)) == 2 / 4
    assert similarity(shingles(one), shingles(one)) == 1.0
    assert similarity(shingles(one[:2]), shingles(one[:2])) == 1.0
    assert similarity(shingles(one), shingles(one + 50)) == 0.0


@pytest.mark.trap(23)
def test_edited_rows_are_found_and_others_are_not() -> None:
    """Rows of 70 to 300 tokens with one in thirty tokens changed, dropped or doubled."""
    picks = random.Random(3)
    train = [numbers(picks.randint(70, 300), seed) for seed in range(400)]
    edited = []
    for number in range(100):
        row = list(train[number])
        for _ in range(max(1, len(row) // 60)):
            at = picks.randrange(len(row))
            row[at : at + 1] = picks.choice([[], [row[at]] * 2, [4]])
        edited.append(np.array(row, np.int32))
    fresh = [numbers(200, 10_000 + seed) for seed in range(100)]
    found = list(near_rows(train, edited + fresh, 0.8))
    assert len({near.other for near in found}) >= 95
    assert all(near.one == near.other for near in found)


def test_short_prompts_must_nearly_agree() -> None:
    train = ["turn on the light in the kitchen please", "is the door of the garage open"]
    assert not near_prompts(train, ["turn off the light in the kitchen please"])
    assert [n.one for n in near_prompts(train, ["Turn on the light, in the kitchen. Please!"])] == [0]
