"""A checkpoint gives back what was saved, and is refused where it would not."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorimer.config import LoraConfig, TrainConfig
from lorimer.errors import ConfigError, StorageError
from lorimer.lora.adapter import fill_adapter, new_adapter
from lorimer.lora.layers import Adapter
from lorimer.model.decoder import Decoder
from lorimer.model.load import load_decoder
from lorimer.run import RunFolder
from lorimer.train.checkpoint import (
    FORMAT,
    Progress,
    newest_checkpoint,
    read_progress,
    restore,
    save_checkpoint,
)
from lorimer.train.optimizer import AdamW, Optimizer
from tiny import FP32, make_tiny, our_logits, random_rows, shake

ROW = random_rows([17])[0]
EVERY_KIND = {"r": 3, "bias": "all", "modules_to_save": ["norm", "lm_head"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    return make_tiny(folder, "qwen2", num_key_value_heads=2).base


def trained(base: Any, seed: int, **settings: Any) -> tuple[Decoder, Adapter, Optimizer]:
    """An adapter away from where it began, with an optimizer that has made `seed` steps."""
    decoder = load_decoder(base, FP32)
    adapter, _ = new_adapter(decoder, LoraConfig(**(EVERY_KIND | settings)), seed=seed)
    shake(adapter, seed=seed)
    optimizer = AdamW(adapter, TrainConfig())
    for step in range(seed):
        generator = torch.Generator().manual_seed(step)
        adapter.flat.grad = torch.randn(adapter.flat.shape, generator=generator)
        optimizer.step(1e-3)
    return decoder, adapter, optimizer


def save(
    run: RunFolder, step: int, made: tuple[Decoder, Adapter, Optimizer], keep: int = 9, **facts: Any
) -> Path:
    decoder, adapter, optimizer = made
    return save_checkpoint(
        run,
        Progress(step=step, **facts),
        optimizer,
        lambda folder: fill_adapter(folder, adapter, decoder, "base", {}, {}),
        keep=keep,
    )


def no_words(text: str) -> None:
    raise AssertionError(text)


def test_what_was_saved_comes_back(base: Any, tmp_path: Path) -> None:
    """Parameters of every kind, the copies that are computed with, both moments, the count of steps."""
    first, other = trained(base, 3), trained(base, 1)
    path = save(RunFolder(tmp_path), 3, first)
    assert {file.name for file in path.iterdir()} >= {"state.json", "optimizer.safetensors"}
    wanted = our_logits(first[0], [ROW])[0]
    assert not torch.equal(our_logits(other[0], [ROW])[0], wanted)
    restore(path, other[1], other[2])
    assert torch.equal(other[1].flat, first[1].flat)
    assert torch.equal(our_logits(other[0], [ROW])[0], wanted)
    state, found = first[2].state(), other[2].state()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)
    assert other[2].steps == 3
    assert other[1].flat.requires_grad


def test_how_far_the_run_is_comes_back(base: Any, tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "tokens": 11,
        "trained_tokens": 5,
        "train_seconds": 1.5,
        "elapsed": 2.5,
        "evaluated": 2,
        "best_loss": 0.25,
        "best_step": 2,
        "evaluations_without_gain": 1,
        "data_hash": "d",
        "base_fingerprint": "b",
    }
    path = save(RunFolder(tmp_path), 4, trained(base, 1), **facts)
    assert path == tmp_path / "checkpoints" / "step-000004"
    assert read_progress(path) == Progress(step=4, **facts)
    text = (path / "state.json").read_text(encoding="utf-8")
    assert json.loads(text)["format"] == FORMAT
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("before", "step", "keep", "left"),
    [
        ([1, 2, 3], 4, 2, [3, 4]),
        ([1, 2, 3], 4, 1, [4]),
        ([1, 2], 3, 9, [1, 2, 3]),
        # Damaged ones of later steps were passed over, and the run went on from an earlier one.
        ([1, 9], 4, 1, [4, 9]),
    ],
)
def test_the_newest_are_kept_and_always_the_one_just_written(
    base: Any, tmp_path: Path, before: list[int], step: int, keep: int, left: list[int]
) -> None:
    run, made = RunFolder(tmp_path), trained(base, 1)
    for number in before:
        save(run, number, made)
    save(run, step, made, keep)
    assert run.saved_steps() == left
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step-{n:06d}" for n in left]


def test_the_newest_whole_one_is_found_and_damage_is_said(base: Any, tmp_path: Path) -> None:
    run, made = RunFolder(tmp_path), trained(base, 1)
    assert newest_checkpoint(run, no_words) is None
    for step in (1, 2, 10):
        save(run, step, made)
    assert newest_checkpoint(run, no_words) == run.checkpoint(10)
    (run.checkpoint(10) / "state.json").unlink()
    said: list[str] = []
    assert newest_checkpoint(run, said.append) == run.checkpoint(2)
    assert said == ["the checkpoint step-000010 is damaged and not used: state.json is missing"]
    for step in (1, 2):
        (run.checkpoint(step) / "manifest.json").unlink()
    assert newest_checkpoint(run, said.append) is None
    assert len(said) == 4


@pytest.mark.trap(63)
def test_200_damages_of_each_file_are_found_before_it_is_used(base: Any, tmp_path: Path) -> None:
    """A bit is flipped, or the file cut. Of the manifest: from its list on; its last byte ends a line."""
    run, random = RunFolder(tmp_path), Random(0)
    path = save(run, 1, trained(base, 1))
    names = sorted(file.name for file in path.iterdir())
    assert len(names) >= 6
    for name in names:
        file = path / name
        whole = file.read_bytes()
        first = whole.index(b'"files"') if name == "manifest.json" else 0
        for number in range(200):
            at = random.randrange(first, len(whole) - 1)
            flipped = bytes([whole[at] ^ 1 << random.randrange(8)])
            file.write_bytes(whole[:at] + (flipped + whole[at + 1 :] if number % 4 else b""))
            said: list[str] = []
            assert newest_checkpoint(run, said.append) is None, (name, at)
            assert len(said) == 1
        file.write_bytes(whole)
    assert newest_checkpoint(run, no_words) == path


@pytest.mark.parametrize(
    ("change", "said"),
    [({"format": FORMAT - 1}, str(FORMAT - 1)), ({"format": None}, "None"), ({"mood": 1}, str(FORMAT))],
)
def test_another_format_is_refused(base: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = save(RunFolder(tmp_path), 1, trained(base, 1))
    state = json.loads((path / "state.json").read_text(encoding="utf-8")) | change
    if state["format"] is None:
        del state["format"]
    (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=rf"has the format {said} \(this version reads: {FORMAT}\)"
    ) as caught:
        read_progress(path)
    assert caught.value.path == str(path)


def test_a_run_that_has_counted_nothing_yet_comes_back(base: Any, tmp_path: Path) -> None:
    """Zeros, and a loss that rounding took below zero."""
    path = save(RunFolder(tmp_path), 0, trained(base, 1), best_loss=-1e-9)
    assert read_progress(path) == Progress(best_loss=-1e-9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is not JSON: "),
        ("[" * 100_000, "it is not JSON: "),
        ("[3]", "it is not a JSON object"),
        ({"tokens": 1.5}, "`tokens` is 1.5 (wanted: int)"),
        ({"tokens": -1}, "`tokens` is -1 (wanted: int)"),
        ({"tokens": True}, "`tokens` is True (wanted: int)"),
        ({"tokens": None}, "`tokens` is None (wanted: int)"),
        ({"elapsed": "1"}, "`elapsed` is '1' (wanted: float)"),
        ({"elapsed": float("inf")}, "`elapsed` is inf (wanted: float)"),
        ({"elapsed": float("nan")}, "`elapsed` is nan (wanted: float)"),
        ({"elapsed": 10**400}, f"`elapsed` is {10**400} (wanted: float)"),
        ({"best_loss": False}, "`best_loss` is False (wanted: float | None)"),
        ({"best_step": -2}, "`best_step` is -2 (wanted: int | None)"),
        ({"data_hash": 7}, "`data_hash` is 7 (wanted: str)"),
        ({"data_hash": None}, "`data_hash` is None (wanted: str)"),
        ({"step": 2}, "`step` is 2, and the folder is step-000001"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_a_state_without_sense_is_refused(
    base: Any, tmp_path: Path, text: str | dict[str, Any], said: str
) -> None:
    path = save(RunFolder(tmp_path), 1, trained(base, 1))
    state = path / "state.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(state.read_text(encoding="utf-8")) | text)
    state.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_progress(path)
    assert caught.value.problem.startswith(f"the checkpoint cannot be used: {said}")
    assert caught.value.path == str(state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "is missing"),
        (lambda found: found[:-1], "is torch.float32 [{less}]"),
        (lambda found: found.double(), "is torch.float64 [{size}]"),
    ],
    ids=["missing", "shape", "type"],
)
def test_an_optimizers_state_that_does_not_fit_is_refused(
    base: Any, tmp_path: Path, change: Any, said: str
) -> None:
    first, other = trained(base, 3), trained(base, 1)
    path = save(RunFolder(tmp_path), 3, first)
    file = path / "optimizer.safetensors"
    kept = load_file(file)
    name = max(kept, key=lambda name: kept[name].numel())
    size = kept[name].numel()
    found = kept.pop(name)
    save_file(kept | ({} if change is None else {name: change(found)}), file)
    before = {name: value.clone() for name, value in other[2].state().items()}
    with pytest.raises(ConfigError) as caught:
        restore(path, other[1], other[2])
    assert caught.value.problem == (
        f"the checkpoint cannot be used: `{name}` {said.format(size=size, less=size - 1)} "
        f"(wanted: torch.float32 [{size}])"
    )
    assert caught.value.path == str(file)
    assert all(torch.equal(before[name], value) for name, value in other[2].state().items())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_optimizers_state_that_is_not_finite_is_refused(base: Any, tmp_path: Path, value: str) -> None:
    first, other = trained(base, 3), trained(base, 1)
    path = save(RunFolder(tmp_path), 3, first)
    file = path / "optimizer.safetensors"
    kept = load_file(file)
    name = max(kept, key=lambda name: kept[name].numel())
    kept[name][-1] = float(value)
    save_file(kept, file)
    with pytest.raises(ConfigError) as caught:
        restore(path, other[1], other[2])
    assert caught.value.problem == f"the checkpoint cannot be used: `{name}` holds NaN or infinity"
    assert caught.value.path == str(file)


def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(base: Any, tmp_path: Path) -> None:
    path = save(RunFolder(tmp_path), 1, trained(base, 1))
    _, adapter, optimizer = trained(base, 2, modules_to_save=["norm"])
    before = adapter.flat.detach().clone()
    with pytest.raises(StorageError, match="does not fit this run's settings") as caught:
        restore(path, adapter, optimizer)
    assert caught.value.path == str(path)
    assert torch.equal(adapter.flat, before)
    assert optimizer.steps == 2


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(base: Any, tmp_path: Path) -> None:
    run, made = RunFolder(tmp_path), trained(base, 1)
    save(run, 1, made)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(run, Progress(step=2), made[2], full, keep=1)
    assert run.saved_steps() == [1]
    assert newest_checkpoint(run, no_words) == run.checkpoint(1)
