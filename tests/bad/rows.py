# ruff: noqa: E501  (tables)
"""Training rows. Files lie in rows/; what an editor would not show is written out here."""

from __future__ import annotations

from pathlib import Path

from bad.case import Case, Make, both, kept, nothing, put

ROW = '{"prompt": "2+2", "completion": "4"}\n'


def file(what: str, name: str, *says: str) -> Case:
    return Case(what, kept(f"rows/{name}"), says, ("train", "c.yaml", f"data.train={name}"))


def made(what: str, name: str, content: bytes | str, *says: str) -> Case:
    return Case(what, put(name, content), says, ("train", "c.yaml", f"data.train={name}"))


def parquet(*rows: dict[str, object]) -> Make:
    def make(folder: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / "rows.parquet")

    return make


def table(what: str, make: Make, *says: str) -> Case:
    return Case(what, make, says, ("train", "c.yaml", "data.train=rows.parquet"))


def in_latin(folder: Path) -> None:
    """Text columns whose bytes are not UTF-8: the library does not look at them when it opens a file."""
    parquet({"prompt": "abcabc", "completion": "b"})(folder)
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole.replace(b"abcabc", b"caf\xe9 a"))


def cut(folder: Path) -> None:
    whole = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole[: len(whole) // 2])


CASES = [
    # the file
    Case("there is no such file", nothing, ("tran.jsonl", "Did you mean `train.jsonl`"),
         ("train", "c.yaml", "data.train=tran.jsonl")),
    Case("a folder", lambda folder: (folder / "rows.jsonl").mkdir(), ("rows.jsonl: this is a folder", "Give a file"),
         ("train", "c.yaml", "data.train=rows.jsonl")),
    file("an ending that says nothing", "chat.txt", "chat.txt: its name does not say", ".jsonl"),
    made("nothing in it", "empty.jsonl", "", "empty.jsonl: the file holds no rows", "Write one row a line"),
    made("only blank lines", "blank.jsonl", "\n \r\n\t\n", "blank.jsonl: the file holds no rows", "Write one row"),
    made("zeros, as after a crash", "zeros.jsonl", bytes(4096), "zeros.jsonl: it begins with zeros", "Make it again"),
    made("gzip", "rows.jsonl", b"\x1f\x8b\x08\0\0\0\0\0", "rows.jsonl: this is a gzip archive", "gunzip"),
    made("an Excel file", "rows.csv", b"PK\x03\x04\x14\0", "rows.csv: this is a zip archive or an Excel", "Unpack it"),
    file("a web page", "web-page.jsonl", "web-page.jsonl:1: this is HTML", "web page"),
    file("a Git LFS pointer", "git-lfs-pointer.jsonl", "git-lfs-pointer.jsonl:1:", "git lfs pull"),
    # its encoding
    made("UTF-16", "rows.jsonl", ROW.encode("utf-16"), "rows.jsonl: this is UTF-16", "iconv -f UTF-16"),
    made("UTF-16 without a mark", "rows.jsonl", ROW.encode("utf-16-be"), "rows.jsonl: this is UTF-16BE", "iconv"),
    made("UTF-32", "rows.json", ROW.encode("utf-32"), "rows.json: this is UTF-32", "iconv -f UTF-32"),
    made("Latin-1", "rows.jsonl", ROW.encode() + '{"text": "café"}\n'.encode("latin-1"),
         "rows.jsonl:2: byte 14 of the line is 0xe9", "Save it as UTF-8"),
    made("a letter cut in two", "rows.csv", "prompt,completion\na,é".encode()[:-1],
         "rows.csv:2: byte 3 of the line is 0xc3", "UTF-8"),
    # its lines
    made("lines that end as on old Macs", "rows.jsonl", (ROW * 2).replace("\n", "\r"),
         "rows.jsonl:1: its lines end as on old Macs", "tr '\\r' '\\n'"),
    made("rows parted by U+2028", "rows.jsonl", ROW.strip() + "\u2028" + ROW, "rows.jsonl:1: not JSON: text after the value", "Write one object a line"),
    file("two rows on one line", "two-rows-on-a-line.jsonl", "two-rows-on-a-line.jsonl:2:", "Write one object a line"),
    file("the last line is cut off", "cut-off.jsonl", "cut-off.jsonl:2: the last line is cut off", "delete its last line"),
    file("one JSON list", "one-list.jsonl", "one-list.jsonl:1: this is one JSON list", "Rename it to end in .json"),
    file("one object over several lines", "pretty-printed.jsonl", "pretty-printed.jsonl:1:", "Write each row on one line"),
    file("a table by the name .jsonl", "a-table.jsonl", "a-table.jsonl:1: this is CSV", "Rename it to end in .csv"),
    file("lines by the name .json", "lines.json", "lines.json:1: this is one JSON object a line", "end in .jsonl"),
    file("an object with two lists", "two-lists.json", "two-lists.json:1:", "`train`, `test`", "Keep the list of rows alone"),
    file("a list after the list", "list-after-list.json", "list-after-list.json:2:", "Keep one list in the file"),
    file("a text alone", "only-a-text.json", "only-a-text.json:1: the file is text, wanted a list of objects", "Write the rows as a list"),
    # JSON
    file("NaN", "nan.jsonl", "nan.jsonl:2: NaN is not JSON", "Write null"),
    file("a key twice", "key-twice.jsonl", "key-twice.jsonl:2: the key `completion` is there twice", "Keep one"),
    file("half of an emoji", "half-an-emoji.jsonl", "half-an-emoji.jsonl:2: \\ud83d is half of a character", "mend or delete"),
    file("Python's notation", "python-notation.jsonl", "python-notation.jsonl:2: not JSON", "single quotes", "json.dumps"),
    file("a comma after the last", "comma-after-the-last.jsonl", "comma-after-the-last.jsonl:2: not JSON", "column 35", "Take the comma before it away"),
    file("a comment", "comment.jsonl", "comment.jsonl:2: not JSON", "column 1", "Mend it there"),
    file("a number in place of a row", "a-number.jsonl", "a-number.jsonl:2: this row is a number", "Write each row as an object"),
    made("a control character inside a text", "rows.jsonl", '{"prompt": "a\x01", "completion": "b"}\n', "rows.jsonl:1: not JSON", "Write it as \\u0001"),
    made("brackets without end", "rows.jsonl", "[" * 200_000, "rows.jsonl:1: it nests deeper than 100 levels", "Take the nesting out"),
    made("a number of 5,000 digits", "rows.jsonl", '{"prompt": ' + "9" * 5000 + ', "completion": "b"}', "rows.jsonl:1: it holds a number of more digits", "Write it as text"),
    # tables
    file("semicolons", "semicolons.csv", "semicolons.csv:1: the cells are separated by ';'", "Save it with commas"),
    file("commas by the name .tsv", "commas.tsv", "commas.tsv:1: the cells are separated by ','", ".csv"),
    file("a cell is missing", "cell-missing.csv", "cell-missing.csv:3: 1 cells, wanted 2", "between quotes"),
    file("a quote that stays open", "open-quote.csv", "open-quote.csv:3: not a table", "A quote inside"),
    file("two columns of one name", "one-name-twice.csv", "one-name-twice.csv:1:", "Name every column differently"),
    file("a column without a name", "column-without-name.csv", "column-without-name.csv:1:", "Name every column"),
    file("a header alone", "header-alone.csv", "header-alone.csv: the file holds no rows"),
    table("Parquet that is none", put("rows.parquet", b"PAR2"), "rows.parquet: it cannot be read as Parquet", "Copy it again"),
    table("Parquet that is cut short", cut, "rows.parquet: it cannot be read as Parquet", "Copy it again"),
    table("Parquet of Latin-1", in_latin, "rows.parquet: it cannot be read as Parquet", "Copy it again"),
    table("Parquet of numbers", parquet({"prompt": 1, "completion": 2}), "rows.parquet:1: `prompt` is a number, wanted text", "Write it as text"),
    table("Parquet of bytes", parquet({"prompt": b"a", "completion": b"b"}), "rows.parquet:1: `prompt` is bytes, wanted text", "Write it as text"),
    # what a row says
    file("keys that no format has", "other-keys.jsonl", "other-keys.jsonl:2: no format has the keys `answer`, `question`", "`messages`"),
    file("a role that is not known", "unknown-role.jsonl", "unknown-role.jsonl:2: message 1: the role `robot`", "Wanted: system"),
    file("no role", "role-missing.jsonl", "role-missing.jsonl:2: message 1: it has no `role`", "Write `role`"),
    file("a number for a text", "content-is-a-number.jsonl", "content-is-a-number.jsonl:2: message 1: `content` is a number", 'Write it as text: "7"'),
    file("null for a text", "content-is-null.jsonl", "content-is-null.jsonl:2: message 2: `content` is null", "delete the row"),
    file("text for the messages", "messages-are-text.jsonl", "messages-are-text.jsonl:2: `messages` is text", "Write it as [{"),
    file("no messages", "no-messages.jsonl", "no-messages.jsonl:2: the chat has no messages", "Delete the row"),
    file("no answer", "no-answer.jsonl", "no-answer.jsonl:2: the chat has no assistant message", "Add the answer"),
    file("a picture", "a-picture.jsonl", "a-picture.jsonl:2: message 1:", "type `image_url`", "take the part out"),
    file("arguments that are not JSON", "arguments-not-json.jsonl", "arguments-not-json.jsonl:2: message 2: `arguments`", "Write it as JSON"),
    file("a user who calls a tool", "user-calls-a-tool.jsonl", "user-calls-a-tool.jsonl:2: message 1:", "Only the assistant"),
    file("tools that are a number", "tools-are-a-number.jsonl", "tools-are-a-number.jsonl:2: `tools` is a number", "Write each as"),
    file("a mark not to train", "asks-not-to-train.jsonl", "asks-not-to-train.jsonl:2: message 2: `weight: 0`", "last_assistant"),
    file("an answer that is missing", "output-missing.jsonl", "output-missing.jsonl:2:", "`output`"),
    file("a history of single texts", "history-of-one.jsonl", "history-of-one.jsonl:2: `history`", "[question, answer]"),
    file("an answer within the prompt", "answer-in-the-prompt.jsonl", "answer-in-the-prompt.jsonl:2: `prompt` holds an assistant", "as `messages`"),
    file("an empty text", "empty-text.jsonl", "empty-text.jsonl:2: `text` is empty", "Delete the row"),
    Case("a row longer than is allowed", put("rows.jsonl", ROW + '{"prompt": "x", "completion": "' + "y" * 400 + '"}\n'),
         ("rows.jsonl:2", "longer than 256 tokens", "Raise `data.max_tokens`"),
         ("train", "c.yaml", "data.train=rows.jsonl", "data.max_tokens=256", "data.too_long=error")),
    Case("bad rows among good, listed all at once",
         both(kept("rows/nan.jsonl", "rows.jsonl"), lambda f: (f / "rows.jsonl").open("a").write("[1]\n")),
         ("NaN is not JSON", "rows.jsonl:2", "Write null", "this row is a list", "rows.jsonl:3", "Write each row as an object"), ("data", "check", "rows.jsonl", "--base", "base")),
]  # fmt: skip
