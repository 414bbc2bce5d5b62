"""The commands where the system's encoding is ASCII, and a row that is far too long."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lorimer
from small_base import write_chat_base

# Python would make UTF-8 of the C locale by itself if it were let.
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
WORDS = "café – 日本 🙂"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny")


def lorimer_run(here: Path, *words: str, **named: object) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | ASCII | {"PYTHONPATH": str(Path(lorimer.__file__).parents[1])}
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:lorimer", "-m"]
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*command, "lorimer", *words], cwd=here, env=environment, capture_output=True, check=False, **named
    )


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False)


@pytest.mark.trap(31)
def test_words_of_all_scripts_are_read_trained_and_written_where_the_system_speaks_ascii(
    tmp_path: Path, base: Path
) -> None:
    rows = "".join(chat(f"{WORDS} {n}", f"{WORDS}\u200b {n}") + "\n" for n in range(9))
    (tmp_path / "train.jsonl").write_bytes(rows.encode())
    settings = {
        "base": str(base),
        "data": {"train": "train.jsonl", "system": WORDS},
        "train": {"max_steps": 1, "batch_size": 3, "dtype": "fp32", "threads": 1},
        "output": {"dir": "runs", "name": "one"},
    }
    (tmp_path / "my.yaml").write_bytes(yaml.safe_dump(settings, allow_unicode=True).encode())

    checked = lorimer_run(tmp_path, "data", "check", "train.jsonl", "--base", str(base), "--fix", "clean")
    assert (checked.returncode, checked.stderr) == (0, b"")
    mended = (tmp_path / "clean" / "train.jsonl").read_bytes().decode()
    assert mended == rows.replace("\u200b", "")
    shown = lorimer_run(tmp_path, "data", "show", "train.jsonl", "--base", str(base), "--json")
    assert shown.returncode == 0
    trained = lorimer_run(tmp_path, "train", "my.yaml")
    assert (trained.returncode, b"Traceback" in trained.stderr) == (0, False)
    kept = yaml.safe_load((tmp_path / "runs" / "one" / "config.yaml").read_bytes().decode())
    assert kept["data"]["system"] == WORDS


def limited() -> None:
    """At most so much of the processor and of memory: what grows with the square would end here.

    A token takes some 450 bytes while it is looked at, and this base has one for each byte.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))


@pytest.mark.trap(33)
def test_a_row_of_a_million_tokens_is_named_and_holds_nothing_up(tmp_path: Path, base: Path) -> None:
    rows = [chat(f"q {n}", f"a {n}") for n in range(5)] + [chat("long", 'word "é" <|im_end|> x' * 50_000)]
    (tmp_path / "train.jsonl").write_bytes("".join(row + "\n" for row in rows).encode())
    checked = lorimer_run(
        tmp_path, "data", "check", "train.jsonl", "--base", str(base), "--json", preexec_fn=limited
    )
    assert (checked.returncode, checked.stderr) == (0, b"")
    findings = {finding["code"]: finding for finding in json.loads(checked.stdout)["findings"]}
    assert findings["too-long"]["places"] == ["train.jsonl:6"]
    assert set(findings) == {"too-long", "control-markers"}
