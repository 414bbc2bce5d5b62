"""A run and its adapter through the command line, on a tiny base."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from lorimer.cli import app
from small_base import write_chat_base, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, a config file and one finished run, runs/tiny."""
    folder = tmp_path_factory.mktemp("use")
    write_chat_base(folder / "base")
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "test.jsonl", 4, seed=1)
    (folder / "c.yaml").write_text(
        "base: base\n"
        "data: {train: train.jsonl, test: test.jsonl}\n"
        "lora: {r: 4, alpha: 8}\n"
        "train: {epochs: 1, batch_size: 8, learning_rate: 1e-2, dtype: fp32, threads: 1}\n"
        "evaluate: {max_new_tokens: 4}\n"
        f"output: {{dir: {folder / 'runs'}, name: tiny}}\n",
        encoding="utf-8",
    )
    assert app.run(["train", str(folder / "c.yaml")]) == 0
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_train_prints_a_result_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train", "c.yaml", "train.max_steps=1", "output.name=json", "--json"]) == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert value["steps"] == 1
    assert Path(value["adapter"], "adapter_config.json").is_file()
    assert "exact_match" in value["comparison"]["metrics"]
    assert "trainable params:" in captured.err


def test_train_goes_on_with_other_steps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train", "c.yaml", "output.name=more", "train.max_steps=2"]) == 0
    assert app.run(["train", "--resume", "last", "train.max_steps=3"]) == 0
    lines = Path("runs/more/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2, 3]
    assert app.run(["train", "--resume", "more", "lora.r=8"]) == 2
    assert "lora.r" in capsys.readouterr().err


def test_eval_compares_with_the_base(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["eval", "runs/tiny"]) == 0
    text = capsys.readouterr().out
    assert "before" in text
    assert "95 % interval" in text
    assert app.run(["eval", "runs/tiny", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["comparison"]["rows"] == 4
    kept = json.loads(Path("runs/tiny/eval/after.json").read_text(encoding="utf-8"))
    assert value["metrics"]["loss"] == pytest.approx(kept["metrics"]["loss"])


def test_eval_takes_another_file_and_the_base_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        app.run(
            ["eval", "runs/tiny/adapter", "--data", "train.jsonl", "--rows", "3", "--no-base", "--json"]
        )
        == 0
    )
    value = json.loads(capsys.readouterr().out)
    assert (len(value["scores"]["rows"]), value["comparison"]) == (3, None)
    assert app.run(["eval", "base", "--data", "test.jsonl", "--max-new-tokens", "2"]) == 0
    assert "4 rows" in capsys.readouterr().out


def test_eval_is_a_gate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "runs/tiny", "--no-base", "--rows", "2"]
    assert app.run([*command, "--min-score", "loss<=1000"]) == 0
    assert app.run([*command, "--min-score", "exact_match=1", "--min-score", "loss<=0.0001"]) == 3
    err = capsys.readouterr().err
    assert "exact_match is" in err
    assert "loss is" in err
    assert app.run([*command, "--min-score", "nonsense=1"]) == 2


def test_eval_without_rows_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["eval", "base"]) == 2
    assert "--data" in capsys.readouterr().err


def test_eval_finds_the_rows_that_a_fraction_set_aside(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["data.test=null", "data.test_fraction=0.25", "output.name=part", "train.max_steps=1"]
    assert app.run(["train", "c.yaml", *settings]) == 0
    capsys.readouterr()
    assert app.run(["eval", "runs/part", "--no-base", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    kept = json.loads(Path("runs/part/eval/after.json").read_text(encoding="utf-8"))
    assert [row["place"] for row in value["scores"]["rows"]] == [row["place"] for row in kept["rows"]]


def test_generate_answers_a_prompt_a_pipe_and_files(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "runs/tiny", "--max-tokens", "3", "--json"]
    assert app.run([*command, "abc"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["prompt"] == "abc"
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
    assert app.run(command) == 0
    assert json.loads(capsys.readouterr().out) == one
    Path("prompts.txt").write_text("abc\n\nde\n", encoding="utf-8")
    assert app.run([*command, "--file", "prompts.txt"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["abc", "de"]
    assert app.run([*command, "--file", "test.jsonl"]) == 0
    turns = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert [turn[-1]["role"] for turn in turns] == ["user"] * 4
    assert app.run([*command, "abc", "--system", "be brief"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"][0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["abc", "--file", "test.jsonl"], "exclude each other"),
        ([""], "empty"),
        (["--file", "nope.txt"], "nope.txt"),
        (["--file", "empty.txt"], "no prompt"),
        (["abc", "--raw", "--system", "x"], "--raw"),
        (["abc", "--temperature", "-1"], "temperature"),
        (["abc", "--top-p", "2"], "top_p"),
    ],
)
def test_generate_refuses(
    here: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("\n", encoding="utf-8")
    assert app.run(["generate", "runs/tiny", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_chat_keeps_the_turns_and_compares(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "/base",
        "abc",
        "/base",
        "/adapter nope",
        "/adapter",
        "/base",
        "/adapter runs/tiny",
        "/nope",
        "/help",
    ]
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("\n".join([*lines, "/system brief", "/reset", "/exit", "no"]))
    )
    assert app.run(["chat", "runs/tiny", "--max-tokens", "3"]) == 0
    captured = capsys.readouterr()
    for part in ("nothing was said yet", "nope", "adapter: none", "this is the base", "no command /nope"):
        assert part in captured.err
    assert "/adapter FOLDER" in captured.out


def test_chat_feeds_what_was_said_before(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorimer.cli.chat import Chat

    asked: list[list[dict[str, str]]] = []

    class Fake:
        adapter = None

        def stream(self, messages: list[dict[str, str]], **settings: object) -> object:
            asked.append(list(messages))
            yield "a"
            if len(asked) == 2:
                raise KeyboardInterrupt
            yield "b"

    chat = Chat(Fake(), {}, "be brief")  # type: ignore[arg-type]
    for line in ("one", "two", "three"):
        chat.take(line)
    assert [message["content"] for message in asked[-1]] == ["be brief", "one", "ab", "two", "a", "three"]
    chat.take("/system loud")
    assert chat.messages == [{"role": "system", "content": "loud"}]


def test_merge_writes_a_model_that_answers_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["merge", "runs/tiny", "--out", "merged"]) == 0
    assert "weights carry the update" in capsys.readouterr().out
    answers = []
    for target in ("runs/tiny", "merged"):
        assert app.run(["generate", target, "abc de", "--max-tokens", "8", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]
    assert app.run(["merge", "runs/tiny", "--out", "merged"]) == 2
    assert app.run(["merge", "base", "--out", "other"]) == 2
    assert "nothing to merge" in capsys.readouterr().err


@pytest.mark.trap(51)
@pytest.mark.trap(52)
def test_merge_after_quantised_training_compares_both_ways(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app.run(["train", "c.yaml", "quant=nf4", "output.name=nf4"]) == 0
    capsys.readouterr()
    assert app.run(["merge", "runs/nf4", "--out", "nearer", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "beside the model as it was trained (nf4)" in said
    assert "into the dequantised weights, which are nearer" in said
    table = [line.split() for line in said.splitlines() if line.endswith("%") and line.startswith("  ")]
    kl = {way: float(value) for way, value, _ in table}
    assert kl["dequantised"] < 1e-6
    assert kl["original"] > 1e-4
    # The other way is refused once it is too far off, and nothing is written.
    monkeypatch.setattr("lorimer.cli.merge.MOST_KL", kl["original"] / 2)
    given = ["merge", "runs/nf4", "--into", "original", "--dtype", "fp32"]
    assert app.run([*given, "--out", "off"]) == 2
    assert "is not what was trained" in capsys.readouterr().err
    assert not Path("off").exists()
    assert app.run([*given, "--out", "off", "--force"]) == 0
    assert app.run(["merge", "runs/nf4", "--out", "third", "--into", "else"]) == 2
    assert app.run(["merge", "runs/nf4", "--out", "nearer"]) == 2
    assert "something there already" in capsys.readouterr().err


def test_a_base_is_stored_as_asked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("nf4", "int8"):
        assert app.run(["generate", "base", "abc", "--max-tokens", "3", "--quant", kind]) == 0
    assert app.run(["generate", "base", "abc", "--quant", "keep"]) == 2
    assert "this one is not" in capsys.readouterr().err
    assert app.run(["generate", "base", "abc", "--quant", "nf5"]) == 2
    assert "`nf5` is not known" in capsys.readouterr().err


def test_the_recipes_are_whole() -> None:
    import hashlib

    from lorimer.config import read_config
    from lorimer.recipes import recipe, recipe_names

    assert recipe_names() == ["address", "home"]
    for name in recipe_names():
        found = recipe(name)
        config = read_config(found.config)
        assert (config.base, config.output.name) == ("smollm2-135m", name)
        manifest = json.loads((found.folder / "MANIFEST.json").read_text(encoding="utf-8"))
        for file, facts in manifest["files"].items():
            assert hashlib.sha256((found.folder / file).read_bytes()).hexdigest() == facts["sha256"]
        assert list(found.folder.glob("LICENSE*"))
