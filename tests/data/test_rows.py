"""Files -> rows: what is read, and the one message for what is not."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from lorimer.data.rows import Row, read_rows, scan_rows, split_rows
from lorimer.errors import DataError

ROW = b'{"text": "a"}'
CHAT = '{"messages": [{"role": "user", "content": "hi"}]}'


def write(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def texts(source: str) -> list[str]:
    return [row.value["text"] for row in read_rows(source)]


def refusal(source: str | list[str]) -> DataError:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return caught.value


GOOD = {
    "lines": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "no newline at the end": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "blank lines are skipped": ("a.jsonl", b'\n{"text": "a"}\n   \n\r\n{"text": "b"}\n\n', ["a", "b"]),
    "CRLF": ("a.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
    "byte order mark": ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
    "files with marks put together": (
        "a.jsonl",
        b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}',
        ["a", "b"],
    ),
    "U+2028 inside a row": ("a.jsonl", '{"text": "a\u2028b"}\n', ["a\u2028b"]),
    "U+2029 inside a row": ("a.jsonl", '{"text": "a\u2029b"}\n', ["a\u2029b"]),
    "U+0085 inside a row": ("a.jsonl", '{"text": "a\u0085b"}\n', ["a\u0085b"]),
    "escaped line end": ("a.jsonl", b'{"text": "a\\nb\\u0000"}\n', ["a\nb\0"]),
    "emoji as two escapes": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n', ["\U0001f600"]),
    ".ndjson": ("a.ndjson", b'{"text": "a"}\n', ["a"]),
    "upper-case ending": ("A.JSONL", b'{"text": "a"}\n', ["a"]),
    ".json list": ("a.json", b'[{"text": "a"},\n {"text": "b"}]\n', ["a", "b"]),
    ".json list with mark and CRLF": ("a.json", b'\xef\xbb\xbf[\r\n{"text": "a"}\r\n]', ["a"]),
    ".json object with one list": ("a.json", b'{"v": 1, "data": [{"text": "a"}], "of": {"x": [1]}}', ["a"]),
    ".csv": ("a.csv", b"text,other\na,1\nb,2\n", ["a", "b"]),
    ".csv with mark and CRLF": ("a.csv", b"\xef\xbb\xbftext,other\r\na,1\r\n", ["a"]),
    ".csv with lines and quotes in a cell": ("a.csv", b'text,n\n"a\nb ""c"", d",1\n', ['a\nb "c", d']),
    ".csv keeps U+2028": ("a.csv", "text,n\na\u2028b,1\n", ["a\u2028b"]),
    ".tsv": ("a.tsv", b"text\tother\na,b\t1\n", ["a,b"]),
}


@pytest.mark.trap(30)
@pytest.mark.parametrize(("name", "content", "wanted"), GOOD.values(), ids=GOOD.keys())
def test_reads(tmp_path: Path, name: str, content: bytes | str, wanted: list[str]) -> None:
    assert texts(write(tmp_path, name, content)) == wanted


# name of the file, its bytes, line of the message, words of the message, words of the fix
BAD = {
    "empty": ("a.jsonl", b"", None, "no rows", "one row a line"),
    "only blank lines": ("a.jsonl", b"\n \n\r\n", None, "no rows", ""),
    "empty list": ("a.json", b"[]", None, "no rows", ""),
    "empty .json": ("a.json", b" ", None, "no rows", ""),
    "CSV with a header alone": ("a.csv", b"text,n\n", None, "no rows", ""),
    "UTF-16 with mark": ("a.jsonl", ROW.decode().encode("utf-16"), None, "UTF-16", "iconv -f UTF-16 "),
    "UTF-16LE": ("a.jsonl", ROW.decode().encode("utf-16-le"), None, "UTF-16LE", "iconv -f UTF-16LE"),
    "UTF-16BE": ("a.csv", b"\0t\0e\0x\0t", None, "UTF-16BE", "iconv -f UTF-16BE"),
    "UTF-32": ("a.json", ROW.decode().encode("utf-32"), None, "UTF-32", "iconv"),
    "Latin-1": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "caf\xe9"}',
        2,
        "byte 14 of the line is 0xe9",
        "WINDOWS-1252",
    ),
    "Latin-1 .json": (
        "a.json",
        b'[{"text": "a"},\n{"text": "caf\xe9"}]',
        2,
        "byte 14 of the line is 0xe9",
        "UTF-8",
    ),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\0", None, "gzip", "gunzip"),
    "zip": ("a.csv", b"PK\x03\x04", None, "zip archive or an Excel", "Unpack"),
    "Parquet by another name": ("a.jsonl", b"PAR1\x15\x04", None, "Parquet", "right name"),
    "cut off": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b',
        2,
        "last line is cut off",
        "delete its last line",
    ),
    "cut off .json": ("a.json", b'[{"text": "a"},\n{"text": "b"}', 2, "cut off", ""),
    "cut inside a .json row": ("a.json", b'[{"text": "a"},\n{"text": "b', 2, "not JSON", ""),
    "list by the name .jsonl": ("a.jsonl", b'[\n{"text": "a"}\n]\n', 1, "JSON list", ".json"),
    "list on one line": ("a.jsonl", b'[{"text": "a"}]', 1, "JSON list", ".json"),
    "lines by the name .json": (
        "a.json",
        b'{"text": "a"}\n{"text": "b"}\n',
        1,
        "one JSON object a line",
        ".jsonl",
    ),
    "a list of messages a line": (
        "a.jsonl",
        b'[{"role": "user", "content": "a"}]\n',
        1,
        "a list",
        '"messages"',
    ),
    "object on many lines": ("a.jsonl", b'{\n"text": "a"\n}\n', 1, "several lines", "one line"),
    "CSV by the name .jsonl": ("a.jsonl", b"instruction,output\na,b\n", 1, "this is CSV", ".csv"),
    "quoted CSV by the name .jsonl": ("a.jsonl", b'"instruction","output"\n"a","b"\n', 1, "CSV", ".csv"),
    "TSV by the name .jsonl": ("a.jsonl", b"text\tn\na\t1\n", 1, "tab-separated", ".tsv"),
    "JSON by the name .csv": ("a.csv", b'{"text": "a", "n": 1}\n', 1, "this is JSON", ".jsonl"),
    "semicolons": ("a.csv", b"text;n\na;1\n", 1, "separated by ';'", "commas"),
    "HTML": ("a.jsonl", b"<!DOCTYPE html>\n<html>", 1, "HTML", "web page"),
    "Git LFS pointer": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\n",
        1,
        "LFS",
        "git lfs pull",
    ),
    "Python's notation": ("a.jsonl", b"{'text': 'a'}\n", 1, "single quotes", ""),
    "key twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n', 1, "`text` is there twice", "Keep one"),
    "key twice inside": ("a.json", b'[\n{"m": [{"role": 1, "role": 2}]}]', 2, "`role` is there twice", ""),
    "no closing brace": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b"\n',
        2,
        "delimiter at column 13, found the end",
        "",
    ),
    "NaN": ("a.jsonl", b'{"text": NaN}\n', 1, "NaN is not JSON", "null"),
    "-Infinity": ("a.jsonl", b'{"text": -Infinity}\n', 1, "-Infinity is not JSON", ""),
    "half an emoji": ("a.jsonl", b'{"text": "\\ud83d"}\n', 1, "\\ud83d is half of a character", "emoji"),
    "number of 5000 digits": ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", 1, "more digits", "as text"),
    "deep": ("a.jsonl", b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}\n", 1, "nests deeper", ""),
    "too deep for Python": ("a.jsonl", b"[" * 200_000 + b"\n", 1, "nests deeper", ""),
    "too deep .json": ("a.json", b"[" * 200_000, 1, "nests deeper", ""),
    "two objects on a line": (
        "a.jsonl",
        b'{"text": "a"} {"text": "b"}\n',
        1,
        "text after the value",
        "one object",
    ),
    "a number": ("a.jsonl", b'{"text": "a"}\n42\n', 2, "a number, wanted an object", ""),
    "a text in a .json list": ("a.json", b'[{"text": "a"},\n\n"b"]', 3, "text, wanted an object", ""),
    ".json of two lists": ("a.json", b'{"a": [], "b": []}', 1, "2 lists (`a`, `b`)", "alone"),
    ".json of no list": ("a.json", b'{"a": 1}', 1, "0 lists", ""),
    ".json number": ("a.json", b"42", 1, "a number", ""),
    "text after the list": ("a.json", b'[{"text": "a"}]\nx', 2, "follows the end", ""),
    "cells missing": ("a.csv", b"text,n\na,1\nb\n", 3, "1 cells, wanted 2", "quotes"),
    "row after a cell of two lines": ("a.csv", b'text,n\n"a\nb",1\nc\n', 4, "1 cells", ""),
    "column without a name": ("a.csv", b"text,\na,1\n", 1, "no name", ""),
    "columns of one name": ("a.csv", b"text,text\na,1\n", 1, "same name", ""),
    "open quote": ("a.csv", b'text,n\n"a,1\n', 2, "not a table", ""),
    "unknown ending": ("a.txt", b"a\n", None, "ends in `.txt`", ".jsonl"),
    "not Parquet": ("a.parquet", b"PAR2", None, "cannot be read as Parquet", ""),
}


@pytest.mark.trap(30)
@pytest.mark.parametrize(("name", "content", "line", "problem", "fix"), BAD.values(), ids=BAD.keys())
def test_refuses(
    tmp_path: Path, name: str, content: bytes, line: int | None, problem: str, fix: str
) -> None:
    path = write(tmp_path, name, content)
    error = refusal(path)
    assert (error.path, error.line) == (path, line)
    assert problem in error.problem
    assert fix in (error.fix or "")


@pytest.mark.trap(30)
@pytest.mark.parametrize(
    "encoding",
    [
        "cp1252",
        "latin-1",
        "mac-roman",
        "cp437",
        "cp1251",
        "koi8-r",
        "shift-jis",
        "gb18030",
        "euc-kr",
        "big5",
    ],
)
def test_other_encodings_are_never_read_as_something_else(tmp_path: Path, encoding: str) -> None:
    words = {
        "cp1251": "привет",
        "koi8-r": "привет",
        "shift-jis": "日本語",
        "gb18030": "汉语",
        "euc-kr": "한국",
        "big5": "漢語",
    }
    row = json.dumps({"text": words.get(encoding, "café")}, ensure_ascii=False)
    error = refusal(write(tmp_path, "a.jsonl", row.encode(encoding) + b"\n"))
    assert "not UTF-8" in error.problem


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", ROW)
    error = refusal(str(tmp_path / "trian.jsonl"))
    assert "no such file" in error.problem
    assert f"Did you mean {tmp_path / 'train.jsonl'}?" == error.fix


def test_folder_names_the_files_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    write(folder, "train.jsonl", ROW)
    error = refusal(str(folder))
    assert "folder" in error.problem
    assert "train.jsonl" in (error.fix or "")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", ROW)
    os.chmod(path, 0)
    if os.access(path, os.R_OK):  # root reads everything

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    assert "no permission" in refusal(path).problem


def test_rows_know_their_place_across_files(tmp_path: Path) -> None:
    first = write(tmp_path, "a.jsonl", b'\n{"text": "a"}\n\n{"text": "b"}\n')
    second = write(tmp_path, "b.json", b'[\n  {"text": "c"},\n\n  {"text": "d"}\n]')
    third = write(tmp_path, "c.csv", b'text,n\n"e\ne",1\nf,2\n')
    places = [row.place for row in read_rows([first, second, third])]
    assert places == [f"{first}:2", f"{first}:4", f"{second}:2", f"{second}:4", f"{third}:2", f"{third}:4"]


def test_a_single_chat_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.json", '{"messages": [{"role": "user", "content": "hi"}]}'))
    assert [list(row.value) for row in rows] == [["messages"]]


def test_scan_goes_on_after_bad_rows_and_bad_files(tmp_path: Path) -> None:
    mixed = write(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": \n[]\n{"text": "b"}\n')
    empty = write(tmp_path, "b.jsonl", b"")
    last = write(tmp_path, "c.jsonl", b'{"text": "c"}\n')
    found = [
        item.value["text"] if isinstance(item, Row) else (Path(item.path or "").name, item.line)
        for item in scan_rows([mixed, str(tmp_path / "none.jsonl"), empty, last])
    ]
    assert found == ["a", ("a.jsonl", 2), ("a.jsonl", 3), "b", ("none.jsonl", None), ("b.jsonl", None), "c"]


@pytest.mark.trap(33)
def test_one_row_of_ten_megabytes(tmp_path: Path) -> None:
    text = 'word "é" \\ {[' * 800_000
    path = write(tmp_path, "a.jsonl", json.dumps({"text": text}) + "\n")
    (row,) = read_rows(path)
    assert row.value["text"] == text


@pytest.mark.trap(33)
def test_one_cell_of_ten_megabytes(tmp_path: Path) -> None:
    assert len(texts(write(tmp_path, "a.csv", "text,n\n" + "a" * 10_000_000 + ",1\n"))[0]) == 10_000_000


def test_many_keys_with_the_last_one_twice(tmp_path: Path) -> None:
    keys = ",".join(f'"k{i}":1' for i in range(200_000))
    assert "`k199999`" in refusal(write(tmp_path, "a.jsonl", f'{{{keys},"k199999":1}}\n')).problem


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    path = str(tmp_path / "a.parquet")
    messages = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "yo", "name": "x"},
    ]
    parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": messages}, {"messages": messages[:1]}]), path
    )
    rows = read_rows(path)
    assert rows[0].value == {"messages": messages}
    assert [row.line for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("module", "source", "fix"),
    [
        ("pyarrow", "a.parquet", "pip install 'lorimer[parquet]'"),
        ("datasets", "owner/name", "pip install 'lorimer[hub]'"),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(source)
    assert module in error.problem
    assert fix in (error.fix or "")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if name == "owner/none":
            raise FileNotFoundError("no data set\nlong story")
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = read_rows(["owner/name", "owner/name.v2:test[:10%]"])
    assert [(row.path, row.line) for row in rows] == [
        ("owner/name", 1),
        ("owner/name", 2),
        ("owner/name.v2:test[:10%]", 1),
        ("owner/name.v2:test[:10%]", 2),
    ]
    assert asked == [("owner/name", "train"), ("owner/name.v2", "test[:10%]")]
    error = refusal("owner/none")
    assert "no data set" in error.problem
    assert "long story" not in error.problem


def rows_of(*values: str) -> list[Row]:
    return [Row({"text": value}, "a.jsonl", line) for line, value in enumerate(values, start=1)]


def contents(part: list[Row]) -> list[str]:
    return [row.value["text"] for row in part]


def test_split_takes_its_share_and_keeps_order() -> None:
    rows = rows_of(*(f"row {i}" for i in range(100)))
    train, valid, test = split_rows(rows, 0.2, 0.1, seed=3)
    assert [len(part) for part in (train, valid, test)] == [70, 20, 10]
    assert sorted(row.line for part in (train, valid, test) for row in part) == list(range(1, 101))
    assert all(
        [row.line for row in part] == sorted(row.line for row in part) for part in (train, valid, test)
    )


def test_split_depends_on_content_and_seed_alone() -> None:
    rows = rows_of(*(f"row {i}" for i in range(100)))
    first, again, other = (split_rows(rows, 0.2, 0, seed=seed)[1] for seed in (1, 1, 2))
    moved = split_rows(list(reversed(rows)), 0.2, 0, seed=1)[1]
    assert contents(first) == contents(again)
    assert contents(first) != contents(other)
    assert sorted(contents(first)) == sorted(contents(moved))
    # Pinned: the split of a data set must not change from one version to the next.
    assert contents(split_rows(rows_of(*"abcdefghij"), 0.2, 0.1, seed=0)[1]) == ["e", "h"]


@pytest.mark.trap(23)
@pytest.mark.parametrize("seed", range(20))
def test_equal_rows_are_never_in_two_parts(seed: int) -> None:
    values = [f"row {i % 30}" if i < 60 else f"  ROW\n{i % 30} " for i in range(90)]
    parts = [
        {" ".join(text.split()).lower() for text in contents(part)}
        for part in split_rows(rows_of(*values), 0.2, 0.2, seed)
    ]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30


@pytest.mark.trap(23)
@pytest.mark.trap(32)
@pytest.mark.parametrize(
    ("values", "valid", "test", "problem"),
    [
        ((), 0.5, 0.0, "0 rows is not one row"),
        (("a",), 0.1, 0.0, "1 rows is not one row"),
        (("a",), 0.0, 0.6, "leave nothing to train on"),
        (("a", "a", "A "), 0.4, 0.0, "leave nothing to train on"),
        (("a", "a", "a", "a"), 0.4, 0.4, "too few to set valid rows aside"),
    ],
)
def test_a_set_too_small_gives_an_error_and_no_copy(
    values: tuple[str, ...], valid: float, test: float, problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        split_rows(rows_of(*values), valid, test, seed=0)
