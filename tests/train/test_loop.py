"""Whole runs on a tiny base: the equivalences, the records, and what stops a run."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorimer.config import RunConfig, config_from
from lorimer.data.conversation import to_conversation
from lorimer.data.rows import read_rows
from lorimer.errors import (
    AdapterError,
    ConfigError,
    DataError,
    DivergenceError,
    Interrupted,
    StorageError,
)
from lorimer.generate.engine import generate_ids
from lorimer.generate.model import load
from lorimer.generate.sampling import Sampling
from lorimer.lora.adapter import read_adapter
from lorimer.train import loop as loop_module
from lorimer.train import step as step_module
from lorimer.train.loop import train
from lorimer.train.metrics import Silent
from small_base import write_chat_base, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def settings(tmp_path: Path, base: Path) -> dict[str, Any]:
    return {
        "base": str(base),
        "data": {"train": str(write_rows(tmp_path / "train.jsonl", 21)), "max_tokens": 256},
        "lora": {"r": 4, "alpha": 8},
        "train": {
            "epochs": 2,
            "batch_size": 6,
            "learning_rate": 5e-3,
            "dtype": "fp32",
            "threads": 1,
        },
        "output": {"dir": str(tmp_path / "runs"), "name": "run", "save_every": "never"},
    }


def config(settings: dict[str, Any], **changes: Any) -> RunConfig:
    """The settings with dotted changes, as `train__epochs=3`."""
    value = json.loads(json.dumps(settings))
    for key, item in changes.items():
        block, _, name = key.partition("__")
        value[block][name] = item
    return config_from(value)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_run_leaves_what_its_folder_promises(settings: dict[str, Any]) -> None:
    result = train(config(settings, output__save_every="epoch"))
    names = {path.name for path in result.path.iterdir()}
    assert names >= {"config.yaml", "run.json", "metrics.jsonl", "adapter", "checkpoints", "report.html"}
    assert "8 steps in" in (result.path / "report.html").read_text(encoding="utf-8")
    assert (result.path.parent / "last").resolve() == result.path.resolve()
    record = json.loads((result.path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["steps"] == 8
    assert {"train_seconds", "load_seconds", "data_hash", "base_fingerprint"} <= set(record)
    lines = metrics(result.path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["rows"] for line in lines] == [6, 6, 6, 3] * 2
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.trap(2)
@pytest.mark.trap(8)
def test_an_epoch_trains_each_answer_and_its_end_of_turn_and_nothing_else(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """The tiny base has a token for each byte, and one for the end of a turn."""
    rows = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lines = metrics(train(config(settings, train__epochs=1)).path)
    assert sum(line["trained_tokens"] for line in lines) == sum(len(row[1]["content"]) + 1 for row in rows)
    assert sum(line["rows"] for line in lines) == len(rows)


@pytest.mark.trap(12)
@pytest.mark.trap(17)
@pytest.mark.parametrize(
    "changes",
    [{"data__pack": False}, {"train__micro_batch_tokens": 64}, {"train__micro_batch_tokens": 150}],
)
def test_how_a_step_is_split_or_packed_changes_nothing_but_rounding(
    settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    whole = losses(train(config(settings)).path)
    split = losses(train(config(settings, **changes)).path)
    assert max(abs(a - b) for a, b in zip(whole, split, strict=True)) < 1e-5


def test_dropout_does_not_depend_on_how_a_step_is_split(settings: dict[str, Any]) -> None:
    settings["lora"]["dropout"] = 0.3
    whole = losses(train(config(settings)).path)
    split = losses(train(config(settings, data__pack=False)).path)
    settings["lora"]["dropout"] = 0.0
    without = losses(train(config(settings)).path)
    assert max(abs(a - b) for a, b in zip(whole, split, strict=True)) < 1e-5
    assert max(abs(a - b) for a, b in zip(whole, without, strict=True)) > 1e-3


def test_the_same_settings_give_the_same_bytes(settings: dict[str, Any]) -> None:
    assert weights(train(config(settings)).path) == weights(train(config(settings)).path)


def test_a_run_without_room_for_its_report_is_a_finished_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: object) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(loop_module, "write_report", full)
    result = train(config(settings, train__max_steps=1))
    assert json.loads((result.path / "run.json").read_text())["status"] == "finished"
    assert "no report.html: no space left" in (result.path / "train.log").read_text()


class StopAfter(Silent):
    """Presses Ctrl-C once a step is done."""

    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.last:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.trap(59)
@pytest.mark.trap(60)
@pytest.mark.trap(61)
@pytest.mark.trap(65)
@pytest.mark.parametrize(("stop", "dtype"), [(1, "fp32"), (4, "fp32"), (6, "fp32"), (3, "fp16")])
def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, dtype: str
) -> None:
    """In float16 the first steps find the scale of the loss, which goes on from there."""
    monkeypatch.setattr(step_module, "FIRST_SCALE", 2.0**30)
    settings["lora"]["dropout"] = 0.1
    settings["train"]["dtype"] = dtype
    settings["data"]["valid"] = str(write_rows(tmp_path / "valid.jsonl", 5, seed=7))
    whole = train(config(settings, output__name="whole")).path
    with pytest.raises(Interrupted, match="--resume") as stopped:
        train(config(settings, output__name="cut"), reporter=StopAfter(stop))
    assert stopped.value.exit_code == 130
    cut = tmp_path / "runs/cut"
    assert json.loads((cut / "run.json").read_text())["status"] == "interrupted"
    assert len(losses(cut)) == stop
    assert f"interrupted after step {stop} of 8" in (cut / "report.html").read_text(encoding="utf-8")
    train(None, resume=cut)
    assert "interrupted after" not in (cut / "report.html").read_text(encoding="utf-8")
    assert [x.hex() for x in losses(cut)] == [x.hex() for x in losses(whole)]
    assert weights(cut) == weights(whole)


def test_a_resumed_run_keeps_the_day_it_was_begun_on(
    settings: dict[str, Any], tmp_path: Path, base: Path
) -> None:
    """A template that writes the time: rows of the resumed run are those that it was begun with."""
    written = (base / "chat_template.jinja").read_text(encoding="utf-8")
    path = tmp_path / "dated.jinja"
    path.write_text("{{ strftime_now('%Y %H:%M:%S') }} " + written, encoding="utf-8")
    settings["data"]["chat_template"] = str(path)
    with pytest.raises(Interrupted):
        train(config(settings), reporter=StopAfter(2))
    run = tmp_path / "runs/run"
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    time.sleep(1.01)
    train(None, resume=run)
    after = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (after["started"], after["data_hash"]) == (record["started"], record["data_hash"])
    assert len(losses(run)) == 8


@pytest.mark.trap(62)
@pytest.mark.trap(65)
def test_resume_refuses_other_settings_and_other_data(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(config(settings), reporter=StopAfter(2))
    run = tmp_path / "runs/run"
    with pytest.raises(ConfigError, match=r"train.seed.*3.*0"):
        train(config(settings, train__seed=3), resume=run)
    for key, value in {
        "train__optimizer": "adamw_8bit",
        "train__batch_size": 5,
        "train__learning_rate": 1e-3,
        "lora__r": 8,
        "lora__dropout": 0.1,
        "data__max_tokens": 99,
        "data__shuffle": False,
    }.items():
        with pytest.raises(
            ConfigError, match=f"`{key.replace('__', '.')}` is .* and the run was begun with"
        ):
            train(config(settings, **{key: value}), resume=run)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write((tmp_path / "train.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="the data is not what this run was begun"):
        train(None, resume=run)


def test_resume_refuses_another_base(settings: dict[str, Any], tmp_path: Path, base: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    with pytest.raises(Interrupted):
        train(config(settings | {"base": str(own)}), reporter=StopAfter(2))
    file = own / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 0.01
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="the base is not what this run was begun with"):
        train(None, resume=tmp_path / "runs/run")


def test_resume_takes_more_epochs(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(config(settings, train__lr_scheduler="constant"), reporter=StopAfter(2))
    longer = config(settings, train__lr_scheduler="constant", train__epochs=3)
    assert train(longer, resume=tmp_path / "runs/run").steps == 12


@pytest.mark.trap(63)
def test_a_damaged_checkpoint_is_passed_over(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = train(config(settings, output__name="whole")).path
    with pytest.raises(Interrupted):
        train(config(settings, output__save_every=2, output__name="cut"), reporter=StopAfter(5))
    cut = tmp_path / "runs/cut"
    newest = sorted((cut / "checkpoints").iterdir())[-1] / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    train(None, resume=cut, reporter=Notes())
    assert any("damaged" in note for note in notes)
    # It went back to step 4: the line of step 5, which was there already, is there once.
    assert [line["step"] for line in metrics(cut)] == list(range(1, 9))
    assert losses(cut) == losses(whole)
    assert weights(cut) == weights(whole)


@pytest.mark.trap(64)
def test_old_checkpoints_are_dropped_after_the_new_one(settings: dict[str, Any], tmp_path: Path) -> None:
    run = train(config(settings, output__save_every=1, output__keep=2)).path
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000007", "step-000008"]


def test_early_stopping_keeps_the_best_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    valid = tmp_path / "valid.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "~~~~"}]
    valid.write_text(json.dumps({"messages": turns}) + "\n")
    run = train(
        config(
            settings,
            data__valid=str(valid),
            train__learning_rate=0.05,
            train__eval_every=1,
            train__early_stopping_patience=2,
            train__epochs=8,
        )
    )
    lines = [line for line in metrics(run.path) if "valid_loss" in line]
    best = min(lines, key=lambda line: line["valid_loss"])
    assert [line["best"] for line in lines[-2:]] == [False, False]
    assert run.steps == best["step"] + 2
    assert run.valid_loss == best["valid_loss"]
    assert read_adapter(run.adapter).ours["step"] == best["step"]


@pytest.mark.parametrize(("family", "resumed"), [("llama", False), ("llama", True), ("gpt_neox", False)])
def test_the_best_adapter_is_proved_and_kept_though_it_is_not_the_last(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, resumed: bool
) -> None:
    """Validation losses that are best after 2 of 4 steps; the best one survives a stop after it. GPT-NeoX
    has its rows in another order in files than in memory."""
    if family != "llama":
        settings["base"] = str(write_chat_base(tmp_path / family, family))
    told = iter([3.0, 1.0, 2.0, 1.5])

    class Told(loop_module.Session):
        def evaluate(self) -> None:
            worth = next(told)
            trained = self.valid_packs[0].trained_tokens
            with pytest.MonkeyPatch.context() as patch:
                each = torch.full((trained,), worth)
                patch.setattr(loop_module, "pack_losses", lambda *given: each)
                super().evaluate()

    monkeypatch.setattr(loop_module, "Session", Told)
    rows = {
        f"data__{name}": str(write_rows(tmp_path / f"{name}.jsonl", 1, seed=7))
        for name in ("valid", "test")
    }
    chosen = config(settings, train__eval_every=1, train__max_steps=4, **rows)
    skip = ["embeddings"]  # the control tokens of random weights were never trained
    if resumed:
        with pytest.raises(Interrupted):
            train(chosen, reporter=StopAfter(3), skip_preflight=skip)
    resume = tmp_path / "runs/run" if resumed else None
    result = train(chosen, resume=resume, skip_preflight=skip)
    assert result.valid_loss == 1.0
    assert read_adapter(result.adapter).ours["step"] == 2
    assert json.loads((result.path / "run.json").read_text())["best_step"] == 2
    # What was proved is what lies in the folder.
    model = load(result.path, dtype="fp32")
    (row,) = read_rows(tmp_path / "test.jsonl")
    (nats,) = model.token_losses(model.template.examples(to_conversation(row)))
    assert result.after is not None
    assert result.after.rows[0].loss_sum == pytest.approx(float(nats.sum()), rel=1e-6)


@pytest.mark.trap(21)
@pytest.mark.trap(22)
def test_the_valid_loss_is_that_of_the_model_that_is_kept(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "MICRO_BATCH_TOKENS", 90)  # several packs of validation rows
    valid = write_rows(tmp_path / "valid.jsonl", 5, seed=7)
    run = train(config(settings, data__valid=str(valid)))
    model = load(run.path, dtype="fp32")
    examples = [e for row in read_rows(valid) for e in model.template.examples(to_conversation(row))]
    rows = model.token_losses(examples)
    mean = sum(float(row.sum()) for row in rows) / sum(len(row) for row in rows)
    assert run.valid_loss == pytest.approx(mean, abs=1e-6)


@pytest.mark.trap(45)
def test_float16_trains_as_float32_does_with_the_adapter_in_float32(settings: dict[str, Any]) -> None:
    wide = losses(train(config(settings, train__max_steps=40)).path)
    half = train(config(settings, train__max_steps=40, train__dtype="fp16", output__name="half"))
    assert max(abs(a - b) for a, b in zip(wide, losses(half.path), strict=True)) < 5e-3
    tensors = load_file(half.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.trap(11)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = step_module.pack_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, each = real(*args, **kwargs)
        return (loss * float("nan") if calls == 3 else loss), each

    monkeypatch.setattr(step_module, "pack_loss", broken)
    with pytest.raises(DivergenceError, match=r"the loss is nan at step 3, in .*train\.jsonl:\d+"):
        train(config(settings, output__save_every=1))
    record = json.loads((tmp_path / "runs/run/run.json").read_text())
    assert record["status"] == "failed"
    assert (tmp_path / "runs/run/checkpoints/step-000002").is_dir()


@pytest.mark.trap(1)
def test_after_sixty_steps_on_eight_rows_every_answer_ends(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    train_file = write_rows(tmp_path / "eight.jsonl", 8)
    asked = [json.loads(line)["messages"][0]["content"] for line in train_file.read_text().splitlines()]
    ended = []
    changes = {"data__train": str(train_file), "lora__r": 16, "train__batch_size": 8, "train__epochs": 60}
    run = train(config(settings, **changes, train__learning_rate=2e-2))
    for model in (load(settings["base"], dtype="fp32"), load(run.path, dtype="fp32")):
        prompts = [model.prompt_ids([{"role": "user", "content": text}]) for text in asked]
        answers = generate_ids(
            model.decoder, prompts, max_new_tokens=48, sampling=Sampling(), eos_ids=model.eos_ids
        )
        ended.append([answer.ended for answer in answers])
    assert ended[0] != ["eos"] * 8
    assert ended[1] == ["eos"] * 8


@pytest.mark.trap(32)
@pytest.mark.parametrize("rows", [1, 5])
def test_fewer_rows_than_a_step_takes_are_trained_as_one(
    settings: dict[str, Any], tmp_path: Path, rows: int
) -> None:
    few = str(write_rows(tmp_path / "few.jsonl", rows))
    run = train(config(settings, data__train=few))
    assert [line["step"] for line in metrics(run.path) if "loss" in line] == [1, 2]


def test_before_and_after_are_proved_on_held_out_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    test = str(write_rows(tmp_path / "test.jsonl", 4, seed=9))
    result = train(config(settings, data__test=test))
    assert result.comparison is not None
    assert result.comparison["loss"].after < result.comparison["loss"].before
    assert (result.path / "eval/before.json").is_file()
    assert (result.path / "eval/after.json").is_file()


@pytest.mark.trap(48)
def test_an_adapter_can_be_trained_further(settings: dict[str, Any], tmp_path: Path) -> None:
    """All that was trained before goes on, and nothing else: the same tensors, each moved."""
    first = train(config(settings))
    files = {file: file.read_bytes() for file in Path(settings["base"]).iterdir()}
    second = train(config(settings, lora__adapter=str(first.adapter), train__max_steps=2))
    assert losses(second.path)[0] < losses(first.path)[0]
    before, after = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert {file: file.read_bytes() for file in Path(settings["base"]).iterdir()} == files
    assert read_adapter(second.adapter).ours["started_from"] == str(first.adapter)


@pytest.mark.trap(45)
@pytest.mark.trap(47)
@pytest.mark.trap(48)
@pytest.mark.parametrize("rung", ["none", "mlp", "layers", "offload"])
def test_every_adapter_tensor_moves_and_the_base_does_not(settings: dict[str, Any], rung: str) -> None:
    before = load(settings["base"], dtype="fp32")
    run = train(config(settings, train__max_steps=2, train__recompute=rung))
    model = load(run.path, dtype="fp32")
    assert model.adapter is not None
    ups = {name: tensor for name, tensor in model.adapter.tensors.items() if "lora_B" in name}
    assert all(bool(tensor.any()) for tensor in ups.values())
    assert all(tensor.dtype == torch.float32 for tensor in ups.values())
    for old, new in zip(before.decoder.projections(), model.decoder.projections(), strict=True):
        assert torch.equal(old.linear.weight.dequantise(), new.linear.weight.dequantise())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"data__train": "missing.jsonl"}, (ConfigError, DataError), "missing.jsonl"),
        ({"data__max_tokens": 8}, DataError, "no train rows are left"),
        ({"lora__target_modules": ["c_attn"]}, ConfigError, "c_attn"),
        ({"lora__layers": "7-9"}, ConfigError, "0 to 2"),
        ({"lora__adapter": "nowhere"}, (ConfigError, AdapterError), "nowhere"),
    ],
)
@pytest.mark.trap(32)
def test_wrong_input_leaves_no_folder_behind(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: Any, says: str
) -> None:
    with pytest.raises(error, match=says):
        train(config(settings, **change))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_said_before_loading(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        train(config(settings, output__dir=str(tmp_path / "file/runs")))


@pytest.mark.trap(19)
@pytest.mark.trap(9)
@pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
def test_rows_that_are_too_long_are_treated_as_asked_and_said(
    settings: dict[str, Any], tmp_path: Path, policy: str
) -> None:
    long = {"role": "user", "content": "a" * 300}, {"role": "assistant", "content": "b"}
    some = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 300}
    with (tmp_path / "train.jsonl").open("a") as file:
        for row in (long, some):
            file.write(json.dumps({"messages": row}) + "\n")
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

        def start(self, info: dict[str, Any]) -> None:
            notes.append(f"{info['rows']} rows are trained")

    if policy == "error":
        with pytest.raises(
            DataError, match=r"2 rows are longer than 256 .*train.jsonl:22, .*train.jsonl:23"
        ):
            train(config(settings, data__too_long=policy))
        return
    train(config(settings, data__too_long=policy, train__max_steps=1), reporter=Notes())
    told = " ".join(notes)
    assert ("left out" if policy == "drop" else "cut at the end") in told
    assert ("21 rows are trained" if policy == "drop" else "22 rows are trained") in told
