"""Whole runs through the command line: the same losses however a step is split, and wrong input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from lorimer import storage
from lorimer.cli.app import run
from small_base import write_chat_base, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def here(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows and a config, and the shell in it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", 22)
    settings = {
        "base": str(base),
        "data": {"train": "train.jsonl", "max_tokens": 200},
        "lora": {"r": 4, "alpha": 8},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "dtype": "fp32", "threads": 1},
        "output": {"dir": "runs", "save_every": "never"},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.trap(12)
@pytest.mark.trap(14)
@pytest.mark.trap(18)
def test_packed_unpacked_and_split_steps_have_the_same_losses(here: Path) -> None:
    variants = {
        "packed": [],
        "alone": ["data.pack=false"],
        "split": ["train.micro_batch_tokens=60"],
        "halves": ["train.micro_batch_tokens=200"],
    }
    for name, overrides in variants.items():
        assert run(["train", "my.yaml", f"output.name={name}", *overrides]) == 0
    found = {name: losses(here / "runs" / name) for name in variants}
    assert len(found["packed"]) == 6
    for name in variants:
        assert np.allclose(found[name], found["packed"], rtol=0, atol=1e-5), name


def _cut_weights(here: Path, base: Path) -> list[str]:
    broken = here / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return [f"base={broken}"]


def _other_base_adapter(here: Path, base: Path) -> list[str]:
    other = write_chat_base(here / "other", hidden_size=42)
    run(["train", "my.yaml", f"base={other}", "train.max_steps=1", "output.dir=elsewhere", "output.name=o"])
    return ["lora.adapter=elsewhere/o/adapter"]


def _gguf_cut(here: Path, base: Path) -> list[str]:
    file = here / "cut.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (9).to_bytes(8, "little") * 2)
    return ["base=cut.gguf"]


def _nan_weights(here: Path, base: Path) -> list[str]:
    run(["train", "my.yaml", "train.max_steps=1", "output.dir=elsewhere", "output.name=n"])
    file = here / "elsewhere/n/adapter/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[:] = np.nan
    save_file(tensors, file)
    return ["lora.adapter=elsewhere/n/adapter"]


def _file(name: str, content: bytes) -> Callable[[Path, Path], list[str]]:
    def make(here: Path, base: Path) -> list[str]:
        (here / name).write_bytes(content)
        return [f"data.train={name}"]

    return make


def _said(*overrides: str) -> Callable[[Path, Path], list[str]]:
    return lambda here, base: list(overrides)


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
ROW = CHAT.encode() + b"\n"
WRONG: dict[str, tuple[Callable[[Path, Path], list[str]], int, list[str]]] = {
    "a file that is not there": (_said("data.train=no.jsonl"), 2, ["no.jsonl"]),
    "an empty file": (_file("e.jsonl", b""), 2, ["e.jsonl"]),
    "UTF-16": (_file("u.jsonl", CHAT.encode("utf-16")), 2, ["u.jsonl", "UTF-16"]),
    "a last line cut off": (_file("c.jsonl", ROW + ROW[:40]), 2, ["c.jsonl:2"]),
    "a list in place of lines": (_file("l.jsonl", b"[" + ROW + b"]"), 2, ["l.jsonl", ".json"]),
    "CSV named .jsonl": (_file("v.jsonl", b"prompt,completion\na,b\n"), 2, ["v.jsonl", "CSV"]),
    "null content": (_file("n.jsonl", ROW + ROW.replace(b'"b"', b"null")), 2, ["n.jsonl:2", "null"]),
    "an unknown role": (_file("r.jsonl", ROW.replace(b'"user"', b'"wizard"')), 2, ["r.jsonl:1", "wizard"]),
    "only user turns": (
        _file("o.jsonl", ROW.replace(b'"assistant"', b'"user"')),
        2,
        ["o.jsonl:1", "assistant"],
    ),
    "a row that is too long": (
        _said("data.max_tokens=12", "data.too_long=error"),
        2,
        ["longer than 12 tokens", "train.jsonl:1"],
    ),
    "a value of another type": (_said("train.epochs=many"), 2, ["train.epochs", "many"]),
    "an unknown key": (_said("train.learning_rat=1"), 2, ["train.learning_rate"]),
    "another tool's key": (_said("train.num_train_epochs=1"), 2, ["train.epochs"]),
    "no such base": (_said("base=smollm"), 2, ["smollm"]),
    "weights cut in the middle": (_cut_weights, 2, ["model.safetensors", "cut short"]),
    "a GGUF file cut in the middle": (_gguf_cut, 2, ["cut.gguf"]),
    "an adapter for another base": (_other_base_adapter, 2, ["another base"]),
    "an adapter with NaN": (_nan_weights, 2, ["NaN"]),
    "a target that does not exist": (_said("lora.target_modules=[c_attn]"), 2, ["c_attn", "q_proj"]),
    "a device that does not exist": (_said("train.device=cuda:9"), 2, ["cuda:9"]),
    "an output folder in a file": (_said("output.dir=my.yaml/runs"), 4, ["my.yaml"]),
    "an output folder that cannot be written": (_said("output.dir=/proc/runs"), 4, ["/proc"]),
}


@pytest.mark.parametrize("case", WRONG, ids=list(WRONG))
def test_wrong_input_is_one_message_with_its_place_and_leaves_nothing(
    here: Path, base: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code, says = WRONG[case]
    overrides = make(here, base)
    capsys.readouterr()
    assert run(["train", "my.yaml", *overrides]) == code
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert "bug" not in text
    for part in says:
        assert part in text, text
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + ROW * 9, ROW.replace(b"\n", b"\r\n") * 9],
    ids=["byte order mark", "CRLF"],
)
@pytest.mark.trap(30)
def test_marks_of_other_editors_are_read(here: Path, content: bytes) -> None:
    (here / "w.jsonl").write_bytes(content)
    assert run(["train", "my.yaml", "data.train=w.jsonl", "train.max_steps=1", "output.name=w"]) == 0


def test_a_full_disk_is_said_and_the_earlier_checkpoint_stays(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = storage._sync
    calls = 0

    def full(path: Path) -> None:
        nonlocal calls
        if "step-000003" in str(path):
            calls += 1
            raise OSError(28, os.strerror(28), str(path))
        real(path)

    monkeypatch.setattr(storage, "_sync", full)
    assert run(["train", "my.yaml", "output.save_every=1", "output.name=full"]) == 4
    text = capsys.readouterr().err
    assert calls == 1
    assert "step-000003" in text
    assert "bytes free" in text
    kept = {path.name for path in (here / "runs/full/checkpoints").iterdir()}
    assert kept == {"step-000001", "step-000002"}
    assert all(storage.verify_folder(here / "runs/full/checkpoints" / name) is None for name in kept)


def test_the_answer_of_a_run_can_be_used_everywhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "my.yaml", "output.name=use"]) == 0
    capsys.readouterr()
    answers: list[Any] = []
    for place in ("runs/use", "runs/use/adapter", "runs/last"):
        assert run(["generate", place, "abc", "--max-tokens", "5"]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    assert run(["merge", "runs/use", "--out", "merged", "--dtype", "fp32"]) == 0
    capsys.readouterr()
    assert run(["generate", "merged", "abc", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == answers[0]
