"""lorimer data check and show, as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorimer.cli.data import app
from lorimer.errors import BaseError, ConfigError, DataError, TemplateError
from small_base import write_small_base

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small base and two files of rows; nothing is kept as a base here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORIMER_HOME", str(tmp_path / "home"))
    write_small_base(tmp_path / "base")
    (tmp_path / "good.jsonl").write_text(ROW + "\n", encoding="utf-8")
    second = ROW.replace("hi", "hello").replace("user", "robot")
    (tmp_path / "bad.jsonl").write_text(f"{ROW}\n{second}\nnonsense\n", encoding="utf-8")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def error_of(result: Result) -> Any:
    return result.exception


def test_clean_rows_end_with_0(folder: Path) -> None:
    result = run("check", "good.jsonl", "--base", "base")
    assert result.exit_code == 0
    assert result.output == (
        "train  1 row\n"
        "       25 tokens, 3 trained (12%)\n"
        "       formats: messages 1\n"
        "       messages: user 1, assistant 1\n"
        "       lengths by tenths: 25 25 25 25 25 25 25 25 25 25 25\n"
        "       (limit 1024)\n"
        "       longest: good.jsonl:1\n"
        "\n"
        "nothing found that is wrong\n"
        "tokens counted with base\n"
    )


def test_errors_end_with_2_and_name_every_line(folder: Path) -> None:
    result = run("check", "bad.jsonl", "--base", "base")
    assert result.exit_code == 2
    assert "error   message 1: the role `robot` is not known\n        bad.jsonl:2\n" in result.output
    assert "        bad.jsonl:3\n" in result.output
    assert "2 errors, 0 warnings, 0 notes\n" in result.output


@pytest.mark.trap(32)
def test_an_empty_file_ends_with_2_and_leaves_nothing(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    before = sorted(folder.iterdir())
    result = run("check", "empty.jsonl", "--base", "base")
    assert result.exit_code == 2
    assert "the file holds no rows" in result.output
    assert sorted(folder.iterdir()) == before


def test_all_lines_fit_in_60_columns(folder: Path) -> None:
    rows = [ROW.replace("hi", f"hello {n}" * 40) for n in range(30)]
    rows += [ROW, ROW, '{"prompt": "x", "completion": ""}', '{"foo": 1}', "nonsense"] * 3
    (folder / "long.jsonl").write_text("\n".join(rows), encoding="utf-8")
    result = run("check", "long.jsonl", "--test", "good.jsonl", "--max-tokens", "64", "--base", "base")
    assert result.exit_code == 2
    assert max(len(line) for line in result.output.splitlines()) <= 60
    assert "more (--json lists all)" in result.output


def test_json_has_every_place(folder: Path) -> None:
    (folder / "many.jsonl").write_text(f"{ROW}\n" + "nonsense\n" * 50, encoding="utf-8")
    result = run("check", "many.jsonl", "--base", "base", "--json")
    value = json.loads(result.output)
    assert result.exit_code == 2
    assert [(f["code"], f["count"], len(f["places"])) for f in value["findings"]] == [
        ("unreadable", 50, 50)
    ]
    assert value["totals"]["train"]["trained_tokens"] == 3


def test_without_a_base_the_rows_are_checked_but_not_counted(folder: Path) -> None:
    result = run("check", "good.jsonl")
    assert result.exit_code == 0
    assert "tokens not counted" in result.output
    assert "lorimer pull smollm2-135m" in " ".join(result.output.split())
    assert "trained" not in result.output


def test_a_base_that_was_named_must_exist(folder: Path) -> None:
    assert isinstance(error_of(run("check", "good.jsonl", "--base", "nowhere")), BaseError)
    assert isinstance(error_of(run("show", "good.jsonl")), BaseError)


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (["check", "good.jsonl", "--train-on", "user"], ConfigError, "--train-on: .*found 'user'"),
        (["check", "good.jsonl", "--max-tokens", "2"], ConfigError, "--max-tokens: .*found 2"),
        (["show", "none.jsonl"], DataError, "no such file"),
        (["show", "good.jsonl", "--row", "9"], DataError, "no row at line 9"),
        (["show", "good.jsonl", "--chat-template", "none.jinja"], TemplateError, "cannot be read"),
    ],
)
def test_what_is_wrong_is_raised_for_the_program_to_print(
    folder: Path, words: list[str], kind: type[Exception], text: str
) -> None:
    result = run(*words, "--base", "base")
    with pytest.raises(kind, match=text):
        raise error_of(result)


SHOWN = (
    "⟦trained⟧ not trained\n\n"
    "good.jsonl:1\n25 tokens, 3 trained\n"
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n\n"
)


@pytest.mark.trap(8)
def test_show_marks_what_is_trained(folder: Path) -> None:
    assert run("show", "good.jsonl", "--base", "base").output == SHOWN


def test_show_all_and_last(folder: Path) -> None:
    more = ', {"role": "user", "content": "more"}, {"role": "assistant", "content": "ok"}]}'
    (folder / "two.jsonl").write_text(ROW.replace("]}", more), encoding="utf-8")
    texts = {
        on: run("show", "two.jsonl", "--base", "base", "--train-on", on).output
        for on in ("assistant", "last_assistant", "all")
    }
    assert "⟦yo<|im_end|>⟧" in texts["assistant"]
    assert "⟦ok<|im_end|>⟧" in texts["assistant"]
    assert "\nyo<|im_end|>\n" in texts["last_assistant"]
    assert "⟦ok<|im_end|>⟧" in texts["last_assistant"]
    # The first token has nothing before it that could predict it.
    assert "<|im_start|>⟦user\nhi<|im_end|>" in texts["all"]


def test_show_ids(folder: Path) -> None:
    output = run("show", "good.jsonl", "--base", "base", "--ids").output
    numbers = output.splitlines()[-1].split()
    assert numbers[0] == "257"
    assert [n.strip("⟦⟧") for n in numbers if n[0] == "⟦" or n[-1] == "⟧"][-1] == "258"
    assert len(numbers) == 25


def test_show_as_json(folder: Path) -> None:
    (row,) = json.loads(run("show", "good.jsonl", "--base", "base", "--json").output)
    assert (row["place"], row["tokens"], row["trained_tokens"]) == ("good.jsonl:1", 25, 3)
    assert [part["text"] for part in row["stretches"] if part["trained"]] == ["yo", "<|im_end|>"]
    assert sum(len(part["ids"]) for part in row["stretches"]) == 25


def test_show_chooses_rows(folder: Path) -> None:
    rows = [ROW.replace("hi", f"hello {n}") for n in range(6)]
    (folder / "six.jsonl").write_text("\n\n".join(rows), encoding="utf-8")
    assert run("show", "six.jsonl", "--base", "base").output.count("tokens,") == 3
    assert run("show", "six.jsonl", "--base", "base", "-n", "5").output.count("tokens,") == 5
    only = run("show", "six.jsonl", "--base", "base", "--row", "9").output
    assert "six.jsonl:9\n" in only
    assert "hello 4<" in only
    assert only.count("tokens,") == 1


def test_data_cannot_act_on_the_terminal(folder: Path) -> None:
    sly = r"\u001b[2J\u0007\u009b1m"
    (folder / "sly.jsonl").write_text(
        ROW.replace("hi", sly) + "\n" + ROW.replace("user", sly) + "\n", encoding="utf-8"
    )
    output = run("show", "sly.jsonl", "--base", "base", "-n", "1").output
    output += run("check", "sly.jsonl", "--base", "base").output
    assert "␛[2J␇" in output
    assert not set(output) & {"\x1b", "\x07", "\x9b"}


def in_terminal(folder: Path, *words: str, **environment: str) -> str:
    """What the command prints when its output is a terminal."""
    code = "import sys; from lorimer.cli.data import app; sys.argv[0] = 'data'; app()"
    main, other = pty.openpty()
    environ = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | environment
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        stdout=other,
        env=environ,
        timeout=120,
        check=False,
    )
    os.close(other)
    text = b""
    try:
        while piece := os.read(main, 65536):
            text += piece
    except OSError:  # the other end is closed and all is read
        pass
    os.close(main)
    assert done.returncode == 0
    return text.decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_colour_is_for_terminals_that_want_it(folder: Path) -> None:
    words = ("show", "good.jsonl", "--base", "base")
    coloured = in_terminal(folder, *words)
    assert "\x1b[32m\x1b[1myo\x1b[0m" in coloured
    assert "⟦" not in coloured
    assert in_terminal(folder, *words, NO_COLOR="1") == SHOWN
