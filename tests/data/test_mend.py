"""Repaired copies, and splits that do not leak."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorimer.cli import app
from lorimer.data.rows import Row, read_rows
from lorimer.data.split import split
from lorimer.errors import DataError
from small_base import write_chat_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny")


def chat(question: str, answer: str, *more: dict[str, str]) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *more]
    return {"messages": turns}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


BAD: list[Any] = [
    chat("good", "one"),
    "{not json",
    {"messages": [{"role": "robot", "content": "x"}]},
    chat("good", "one"),
    chat("held", "out"),
    chat("\u200bhidden", "a\u200bb"),
    chat("edges", " x \n"),
    chat("left {question}", "x"),
    chat("open", "x", {"role": "user", "content": "and?"}),
    chat("empty", ""),
]


def test_a_repaired_copy_has_nothing_left_to_mend(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", BAD)
    test = write(tmp_path / "test.jsonl", [chat("held", "out"), chat("fresh", "x")])
    before = train.read_bytes(), test.read_bytes()
    out = tmp_path / "clean"
    command = ["data", "check", "--base", str(base), "--test"]
    assert app.run([*command, str(test), str(train), "--fix", str(out)]) == 2
    said = capsys.readouterr().out
    assert "train: 10 rows, 4 in" in said
    assert "1 duplicate" in said
    assert "1 shared" in said
    assert (train.read_bytes(), test.read_bytes()) == before
    assert lines(out / "train.jsonl") == [
        chat("good", "one"),
        chat("hidden", "ab"),
        chat("edges", "x"),
        chat("open", "x"),
    ]
    assert lines(out / "test.jsonl") == lines(test)
    assert app.run([*command, str(out / "test.jsonl"), str(out / "train.jsonl")]) == 0
    assert "nothing found that is wrong" in capsys.readouterr().out
    assert app.run([*command, str(test), str(train), "--fix", str(out)]) == 2
    assert "something there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "mended"),
    [
        ({"instruction": "a", "output": " b "}, {"instruction": "a", "output": "b"}),
        ({"prompt": "a", "completion": "b\n"}, {"prompt": "a", "completion": "b"}),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " b"}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        ),
    ],
)
def test_each_format_is_mended_in_its_own_form(
    tmp_path: Path, base: Path, row: dict[str, Any], mended: dict[str, Any]
) -> None:
    train = write(tmp_path / "train.jsonl", [row])
    app.run(["data", "check", str(train), "--base", str(base), "--fix", str(tmp_path / "c")])
    assert lines(tmp_path / "c/train.jsonl") == [mended]


def test_what_was_read_in_a_wrong_encoding_is_read_again_where_it_can_be(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Windows-1252 or Latin-1; a text that is not all of it so stays out."""
    right = [chat("café – “so”", "É 日本 🙂"), chat("à Á Í", "x")]
    wrong = [
        chat("caf\u00c3\u00a9 \u00e2\u20ac\u201c \u00e2\u20ac\u0153so\u00e2\u20ac\x9d", "É 日本 🙂"),
        chat("\u00c3\u00a0 \u00c3\x81 \u00c3\x8d", "x"),
    ]
    lost = [chat("caf\u00c3\u00a9 日本", "x"), chat("what was \ufffd", "y")]
    train = write(tmp_path / "train.jsonl", [*wrong, *lost])
    assert app.run(["data", "check", str(train), "--base", str(base), "--fix", str(tmp_path / "c")]) == 0
    assert lines(tmp_path / "c/train.jsonl") == right
    assert "train: 4 rows, 2 in" in capsys.readouterr().out


# --- split -----------------------------------------------------------------------------------------


def rows_of(values: list[dict[str, Any]]) -> list[Row]:
    return [Row(value, "x.jsonl", number) for number, value in enumerate(values, 1)]


@pytest.mark.trap(23)
def test_what_belongs_together_is_never_parted() -> None:
    long = "how does one make {} bread at home with flour and water and salt and some time and patience "
    long += "when there is no oven in the kitchen and the shop around the corner is closed until next week"
    values = [chat(f"question {n}", f"answer {n}") | {"meta": {"user": n % 30}} for n in range(120)]
    values += [chat(f"question {n}", "another answer") | {"meta": {"user": 100 + n}} for n in range(20)]
    values += [chat(long.format(kind), kind) | {"meta": {"user": 200}} for kind in ("rye", "white")]
    values += [chat(long.format("good"), "x") | {"meta": {"user": 201}}]
    parts = split(rows_of(values), 0.2, 0.2, group="meta.user", seed=3)
    assert sum(map(len, parts)) == len(values)
    assert all(len(part) > 10 for part in parts)
    keys: tuple[Callable[[Row], Any], ...] = (
        lambda row: row.value["meta"]["user"],
        lambda row: row.value["messages"][0]["content"],
        lambda row: "bread" if "bread" in row.value["messages"][0]["content"] else row.line,
    )
    for key in keys:
        found = [{key(row) for row in part} for part in parts]
        assert not found[0] & found[1]
        assert not found[0] & found[2]
        assert not found[1] & found[2]


def test_a_split_does_not_depend_on_the_order_and_does_on_the_seed() -> None:
    values = [chat(f"question {n}", f"answer {n}") for n in range(60)]

    def held(rows: list[dict[str, Any]], seed: int) -> set[str]:
        return {row.value["messages"][0]["content"] for row in split(rows_of(rows), 0.0, 0.2, seed=seed)[2]}

    assert held(values, 0) == held(values[::-1], 0)
    assert held(values, 0) != held(values, 1)


def test_a_missing_group_is_named() -> None:
    with pytest.raises(DataError, match=r"x.jsonl:1: there is no `meta.user` in this row"):
        split(rows_of([chat("a", "b")]), 0.1, 0.1, group="meta.user")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "all.jsonl", [chat(f"question {n}", f"answer {n}") for n in range(40)])
    out = tmp_path / "parts"
    assert app.run(["data", "split", str(source), "--out", str(out), "--test", "0.25", "--valid", "0"]) == 0
    assert "30 rows" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == ["test.jsonl", "train.jsonl"]
    assert len(read_rows(out / "test.jsonl")) == 10
    for wrong, says in (
        (["--test", "0.25"], "something there already"),
        (["--test", "0.6", "--valid", "0.4"], "leave nothing to train on"),
        (["--group", "user", "--out", str(tmp_path / "q")], "there is no `user`"),
        (["--test", "0.001", "--out", str(tmp_path / "q")], "is not one row"),
    ):
        assert app.run(["data", "split", str(source), "--out", str(out), *wrong]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
