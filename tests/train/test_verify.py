"""lorimer verify: a whole run passes, with its last steps done again; each kind of damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorimer.cli import app
from lorimer.run import RunFolder
from lorimer.train.verify import verify_run
from small_base import write_chat_base, write_rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_chat_base(folder / "base")
    write_rows(folder / "train.jsonl", 21)
    write_rows(folder / "valid.jsonl", 4, seed=7)
    (folder / "c.yaml").write_text(
        "base: base\ndata: {train: train.jsonl, valid: valid.jsonl, test: valid.jsonl}\n"
        "evaluate: {max_new_tokens: 3}\n"
        "lora: {r: 2, dropout: 0.1}\n"
        "train: {epochs: 2, batch_size: 6, learning_rate: 5e-3, dtype: fp32, threads: 1, eval_every: 2}\n"
        f"output: {{dir: {folder / 'runs'}, name: whole, save_every: 3}}\n",
        encoding="utf-8",
    )
    assert app.run(["train", str(folder / "c.yaml")]) == 0
    return folder / "runs" / "whole"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(whole, tmp_path / "run")))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def test_a_whole_run_passes_and_its_last_steps_come_out_the_same(run: RunFolder) -> None:
    before = tree(run.path)
    parts = verify_run(run, replay=True)
    assert [part.damage for part in parts] == [None] * len(parts)
    assert parts[-1].note == "steps 7 to 8: the same losses and the same bytes"
    assert {part.name for part in parts} >= {
        "checkpoints/step-000008",
        "adapter",
        "base",
        "eval/after.json",
    }
    assert tree(run.path) == before


def flip(name: str, at: int = -1) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return damage


def line(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "metrics.jsonl"
        file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")

    return damage


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (flip("adapter/adapter_model.safetensors"), "adapter", "does not have the content"),
    (flip("checkpoints/step-000008/optimizer.safetensors"), "checkpoints/step-000008", "optimizer"),
    (flip("checkpoints/step-000006/state.json", 30), "checkpoints/step-000006", "state.json"),
    (
        lambda f: (f / "checkpoints/step-000008/manifest.json").unlink(),
        "checkpoints/step-000008",
        "missing",
    ),
    (lambda f: (f / "config.yaml").write_text("base: [\n"), "config.yaml", ""),
    (lambda f: (f / "run.json").write_text("{"), "run.json", ""),
    (lambda f: (f / "eval/after.json").write_text("{"), "eval/after.json", ""),
    (line(lambda lines: lines[:-3]), "metrics.jsonl", "there is a checkpoint of step 8"),
    (line(lambda lines: [*lines[:1], *lines[2:]]), "metrics.jsonl", "is step 3 (wanted: 2)"),
    (line(lambda lines: [*lines, lines[-1][:9]]), "metrics.jsonl", "cannot be read"),
]


@pytest.mark.parametrize(("damage", "name", "says"), DAMAGE, ids=[f"{n} {s}" for _, n, s in DAMAGE])
def test_damage_is_named(run: RunFolder, damage: Callable[[Path], None], name: str, says: str) -> None:
    damage(run.path)
    found = {part.name: part.damage for part in verify_run(run)}
    assert found.pop(name) is not None
    # What depends on a damaged file may fall with it; nothing else.
    others = {key for key, value in found.items() if value is not None}
    assert others <= ({"base"} if name in ("config.yaml", "run.json") else set())
    if says:
        assert says in str({part.name: part.damage for part in verify_run(run)}[name])


def test_a_changed_loss_and_a_changed_checkpoint_do_not_survive_a_replay(run: RunFolder) -> None:
    lines = run.metrics.read_text().splitlines()
    value = json.loads(lines[-2])
    assert value["step"] == 8
    value["loss"] += 1e-12
    run.metrics.write_text("\n".join([*lines[:-2], json.dumps(value), lines[-1]]) + "\n")
    assert "step 8 has the loss" in str(verify_run(run, replay=True)[-1].damage)


def test_the_command(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["verify", str(run.path), "--replay"]) == 0
    assert "ok   replay" in capsys.readouterr().out
    flip("adapter/adapter_model.safetensors")(run.path)
    assert app.run(["verify", str(run.path)]) == 1
    said = capsys.readouterr()
    assert "BAD  adapter" in said.out
    assert "1 of " in said.err
    assert app.run(["verify", str(run.path), "--json"]) == 1
    assert any(part["damage"] for part in json.loads(capsys.readouterr().out)["parts"])
    assert app.run(["verify", "no-run"]) == 2
    assert "there is no run" in capsys.readouterr().err
