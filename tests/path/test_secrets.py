# ruff: noqa: E501  (tables)
"""Tokens of the environment and of addresses: in no file of a run, and in no message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorimer.cli import app
from small_base import write_chat_base, write_rows

TOKENS = {name: f"{name.lower()}-0123456789abcdef" for name in (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD",
)}  # fmt: skip
IN_ADDRESS = "hf_fedcba9876543210"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    monkeypatch.chdir(tmp_path)
    write_chat_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 9)
    write_rows(tmp_path / "test.jsonl", 3, seed=7)
    (tmp_path / "c.yaml").write_text(
        "base: base\ndata: {train: train.jsonl, test: test.jsonl}\nevaluate: {max_new_tokens: 2}\n"
        "train: {max_steps: 1, batch_size: 3, dtype: fp32, threads: 1}\noutput: {dir: runs, name: one}\n",
        encoding="utf-8",
    )
    return tmp_path


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    # run.json keeps the command as it was given, and shells put tokens in front of it or into it.
    monkeypatch.setattr(sys, "argv", ["lorimer", *arguments, f"note={TOKENS['HF_TOKEN']}"])
    return app.run(arguments)


def leaks(folder: Path, said: str) -> list[str]:
    secrets = [*TOKENS.values(), IN_ADDRESS]
    files = [file for file in folder.rglob("*") if file.is_file()]
    found = [
        f"{file.name}: {secret}"
        for file in files
        for secret in secrets
        if secret.encode() in file.read_bytes()
    ]
    return found + [secret for secret in secrets if secret in said]


@pytest.mark.trap("S10")
def test_a_run_its_proof_and_its_exports_hold_no_secret(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["train", "c.yaml"], monkeypatch) == 0
    assert call(["merge", "runs/one", "--out", "runs/one/exports/merged"], monkeypatch) == 0
    assert (here / "runs/one/run.json").is_file()
    captured = capsys.readouterr()
    assert leaks(here / "runs", captured.out + captured.err) == []


@pytest.mark.trap("S10")
@pytest.mark.parametrize("key", ["base", "data.train", "lora.adapter"])
def test_an_address_with_a_token_is_refused_without_repeating_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    address = f"https://user:{IN_ADDRESS}@huggingface.co/owner/name"
    assert call(["train", "c.yaml", f"{key}={address}"], monkeypatch) == 2
    said = capsys.readouterr().err
    assert "huggingface.co/owner/name" in said
    assert leaks(here / "runs", said) == []
    assert not (here / "runs").exists()
