"""lorimer export on a finished run: files where they are said to be, and every wrong flag refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lorimer.bases.gguf import GgufFile
from lorimer.cli import app
from small_base import write_chat_base, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and one short run on it, runs/tiny."""
    folder = tmp_path_factory.mktemp("export")
    write_chat_base(folder / "base")
    write_rows(folder / "train.jsonl", 16)
    (folder / "c.yaml").write_text(
        "base: base\ndata: {train: train.jsonl}\nlora: {r: 4, alpha: 8}\n"
        "train: {max_steps: 2, batch_size: 8, learning_rate: 1e-2, dtype: fp32, threads: 1}\n"
        f"output: {{dir: {folder / 'runs'}, name: tiny}}\n",
        encoding="utf-8",
    )
    assert app.run(["train", str(folder / "c.yaml")]) == 0
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_a_merged_file_answers_as_the_run_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["export", "runs/tiny", "--to", "gguf", "--type", "f32"]) == 0
    text = capsys.readouterr().out
    assert "runs/tiny/exports/tiny-f32.gguf" in text
    assert "21 weights carry the update" in text
    answers = []
    for target in ("runs/tiny", "runs/tiny/exports/tiny-f32.gguf"):
        assert app.run(["generate", target, "abc de", "--max-tokens", "8", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]


def test_an_adapter_file_and_the_commands_that_use_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["export", "base", "--to", "gguf", "--out", "base.gguf", "--json"]) == 0
    base = json.loads(capsys.readouterr().out)
    assert base["types"] == {"F16": 23, "F32": 7}
    assert app.run(["export", "runs/tiny", "--to", "gguf-lora"]) == 0
    text = capsys.readouterr().out
    path = Path("runs/tiny/exports/tiny-lora.gguf")
    assert GgufFile(path).metadata["adapter.lora.alpha"] == 8
    assert f"--lora {path}" in text
    assert f"FROM %s\\nADAPTER %s\\n' {Path('base-f16.gguf').absolute()} {path.absolute()}" in text
    commands = [
        line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith("  lorimer")
    ]
    assert app.run(shlex.split(commands[0])[1:]) == 0


def test_an_adapter_on_a_gguf_file_names_that_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["export", "base", "--to", "gguf", "--type", "q8_0", "--out", "b8.gguf"]) == 0
    assert app.run(["train", "c.yaml", "base=b8.gguf", "output.name=on-gguf"]) == 0
    capsys.readouterr()
    assert app.run(["export", "runs/on-gguf", "--to", "gguf-lora", "--out", "x/l.gguf", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["path"] == "x/l.gguf"
    assert value["commands"][0] == f"llama-server -m {here / 'b8.gguf'} --lora x/l.gguf"


def test_peft_and_merged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["export", "runs/tiny", "--to", "peft", "--out", "p"]) == 0
    assert Path("p/adapter_model.safetensors").read_bytes() == (
        Path("runs/tiny/adapter/adapter_model.safetensors").read_bytes()
    )
    assert app.run(["generate", "p", "abc", "--max-tokens", "2"]) == 0
    assert app.run(["export", "runs/tiny", "--to", "merged", "--out", "m", "--type", "fp32"]) == 0
    assert Path("m/model.safetensors").is_file()
    assert app.run(["export", "runs/tiny", "--to", "peft", "--out", "p"]) == 2
    assert "something there already" in capsys.readouterr().err


def test_four_bits_for_bitsandbytes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["export", "runs/tiny", "--to", "bnb"]) == 0
    text = capsys.readouterr().out
    assert "runs/tiny/exports/tiny-nf4: " in text
    assert "21 of 30 weights in nf4" in text
    assert "21 weights carry the update" in text
    command = shlex.split(text.splitlines()[-1].removeprefix("next: lorimer chat"))
    assert app.run(["generate", *command, "abc", "--max-tokens", "2"]) == 0
    assert app.run(["export", "base", "--to", "bnb", "--type", "fp4", "--out", "f4", "--json"]) == 0
    capsys.readouterr()
    config = json.loads(Path("f4/config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"


WRONG = [
    ([], "missing argument"),
    (["runs/tiny"], "missing option '--to'"),
    (["runs/tiny", "--to", "onnx"], "--to onnx is not known"),
    (["runs/tiny", "--to", "gguf", "--quantize", "q8_0"], "no such option"),
    (["runs/tiny", "--to", "gguf", "--type", "q3_k_s"], "`q3_k_s` is not known"),
    (["runs/tiny", "--to", "gguf", "--type", ""], "`` is not known"),
    (["runs/tiny", "--to", "gguf-lora", "--type", "q8_0"], "not one for an adapter"),
    (["runs/tiny", "--to", "peft", "--type", "f16"], "exclude each other"),
    (["runs/tiny", "--to", "bnb", "--type", "int8"], "int8 is not known"),
    (["runs/tiny", "--to", "bnb", "--out", "base"], "something there already"),
    (["runs/tiny", "--to", "merged"], "--out FOLDER"),
    (["runs/tiny", "--to", "merged", "--out", "y", "--type", "q8_0"], "q8_0"),
    (["runs/tiny", "--to", "merged", "--out", "y", "--json"], "--json"),
    (["runs/tiny", "--to", "gguf", "--out", "y.bin"], ".gguf"),
    (["runs/tiny", "--to", "gguf", "--out", "taken.gguf"], "something there already"),
    (["runs/nope", "--to", "gguf"], "nope"),
    (["base", "--to", "gguf-lora"], "without an adapter"),
    (["base", "--to", "peft"], "without an adapter"),
    (["base", "--to", "merged", "--out", "y"], "nothing to merge"),
    (["runs/tiny", "--to", "gguf", "--base", "nope"], "nope"),
    (["runs/tiny", "runs/tiny", "--to", "gguf"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "part"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_flags_are_refused_and_write_nothing(
    here: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken.gguf").write_text("mine", encoding="utf-8")
    before = {file: file.stat().st_size for file in here.rglob("*")}
    assert app.run(["export", *arguments]) == 2
    assert part in capsys.readouterr().err
    assert {file: file.stat().st_size for file in here.rglob("*")} == before


def test_a_place_that_cannot_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("", encoding="utf-8")
    assert app.run(["export", "runs/tiny", "--to", "gguf", "--out", "file/a.gguf"]) == 4
    assert "cannot write" in capsys.readouterr().err
