"""Each kind of file -> the values in it with their lines.

The name of a file says how it is read: .jsonl and .ndjson (one object a line), .json (a list of
objects, or one object that holds one list of them), .csv and .tsv (a header line, then text cells),
.parquet; `owner/name` or `owner/name:split` is a data set of the hub. A file whose content is not
what its name says is refused with one message: guessing would hide a wrong export.

Text is UTF-8, with or without a byte order mark. Lines end at \\n alone: U+2028, U+0085 and form
feeds stay inside a row.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lorimer.data.json_text import ListWalk, kind_of, one_value
from lorimer.errors import DataError

Found = tuple[int, dict[str, Any]] | DataError

KINDS = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet"
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.%\[\]:+-]+))?")
BOM = b"\xef\xbb\xbf"
# First bytes -> what the file is, and the command that makes UTF-8 text of it.
FOREIGN = (
    (b"\xff\xfe\0\0", "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "a gzip archive", "gunzip -c"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "zstd -dc"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", None),
    (b"PAR1", "a Parquet file", None),
)
CSV_HEADER = re.compile(r'"?[\w .-]+"?(?:[,;\t]"?[\w .-]+"?)+')
WHOLE_LIST = re.compile(r'\[$|\[\s*\{(?!\s*"(?:role|from|content|value)")')


CUT_OFF = re.compile("not JSON: unterminated|found the end$")


def scan_file(source: str) -> Iterator[Found]:
    """(line, value) of each row, and a DataError with its line for each that cannot be read.

    A DataError that is raised is about the whole file.
    """
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    hub = HUB_ID.fullmatch(source)
    if kind in (".jsonl", ".ndjson"):
        return _lines(path, source)
    if kind == ".json":
        return _json(path, source)
    if kind in (".csv", ".tsv"):
        return _table(path, source, "," if kind == ".csv" else "\t")
    if kind == ".parquet":
        return _parquet(path, source)
    if hub and not path.exists():
        return _hub(source, hub[1], hub[2] or "train")
    with _opened(path, source):
        raise DataError(
            f"its name does not say how to read it: it ends in `{kind or path.name}`",
            fix=f"Give a file that ends in one of {KINDS}.",
            path=source,
        )


@contextmanager
def _opened(path: Path, source: str) -> Iterator[BinaryIO]:
    """The file's bytes. DataError if it cannot be opened or is plainly something else."""
    try:
        with path.open("rb") as file:
            _refuse_foreign(file.peek(64)[:64], source)
            yield file
    except FileNotFoundError:
        near = _nearest(path)
        fix = f"Did you mean {near}?" if near else "Check the path; it counts from the folder you are in."
        raise DataError("there is no such file", fix=fix, path=source) from None
    except IsADirectoryError:
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in KINDS.split(", "))[:5]
        fix = f"Name a file in it: {', '.join(inside)}." if inside else f"Give a file: {KINDS}."
        raise DataError("this is a folder", fix=fix, path=source) from None
    except PermissionError:
        # On Windows a folder opens with this error too.
        what = "this is a folder" if path.is_dir() else "there is no permission to read it"
        raise DataError(what, fix="Give a file that you may read.", path=source) from None
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror or error}", path=source) from None


def _nearest(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.with_name(near[0])) if near else None


def _refuse_foreign(head: bytes, source: str) -> None:
    for start, kind, convert in FOREIGN:
        if head.startswith(start):
            what, command = kind, convert
            break
    else:
        # A file that was made longer and never written, as after a crash.
        if head and not head.strip(b"\0"):
            raise DataError("it begins with zeros: it was not written", fix="Make it again.", path=source)
        # Text of one-byte characters in UTF-16 has a zero in every other byte.
        if b"\0" not in head[:2]:
            return
        what = "UTF-16BE text" if head[:1] == b"\0" else "UTF-16LE text"
        command = f"iconv -f {what.split()[0]} -t UTF-8"
    fix = f"Convert it: `{command} {source} > NEW`." if command else "Unpack it, or give it its right name."
    raise DataError(f"this is {what}, wanted UTF-8 text", fix=fix, path=source)


def _lines(path: Path, source: str) -> Iterator[Found]:
    with _opened(path, source) as file:
        first = True
        for line, raw in enumerate(file, start=1):
            raw = raw.removeprefix(BOM)
            if not raw.strip():
                continue
            if first:
                _refuse_other_kind(raw, source, line)
            first = False
            try:
                yield line, _row(one_value(_decoded(raw)))
            except DataError as error:
                problem, fix = error.problem, error.fix
                if b"\r" in raw.strip() and problem.startswith("not JSON"):
                    problem = "its lines end as on old Macs, in a carriage return alone"
                    fix = f"Convert it: `tr '\\r' '\\n' < {source} > NEW`."
                elif not raw.endswith(b"\n") and CUT_OFF.search(problem):
                    problem = f"the last line is cut off ({problem})"
                    fix = "Write the file again, or delete its last line."
                yield DataError(problem, fix=fix, path=source, line=line)


def _refuse_other_kind(raw: bytes, source: str, line: int) -> None:
    """What the first line says about the whole file: one message in place of one for each line."""
    text = raw.decode("utf-8", errors="replace").strip()
    wanted = "wanted one JSON object a line"
    if CSV_HEADER.fullmatch(text):
        kind, suffix = ("tab-separated", ".tsv") if "\t" in text else ("CSV", ".csv")
        problem, fix = f"this is {kind}, {wanted}", f"Rename it to end in {suffix}."
    elif text.startswith("<"):
        problem, fix = f"this is HTML or XML, {wanted}", "Was a web page saved in place of the file?"
    elif text.startswith("version https://git-lfs"):
        problem, fix = "this is a Git LFS pointer, not the file itself", "Run `git lfs pull`."
    elif WHOLE_LIST.match(text):
        problem, fix = f"this is one JSON list, {wanted}", "Rename it to end in .json."
    elif text == "{":
        problem = f"this JSON is spread over several lines, {wanted}"
        fix = "Write each row on one line; if the file is one JSON value, rename it to end in .json."
    else:
        return
    raise DataError(problem, fix=fix, path=source, line=line)


def _row(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    fix = 'Write each row as an object, such as {"messages": [...]}.'
    raise DataError(f"this row is {kind_of(value)}, wanted an object", fix=fix)


def _decoded(raw: bytes) -> str:
    """UTF-8 text. DataError with the line within `raw`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(
            f"byte {column} of the line is 0x{raw[error.start]:02x}, which is not UTF-8",
            fix="Save it as UTF-8; from a Windows code page: `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`.",
            line=raw.count(b"\n", 0, error.start) + 1,
        ) from None


def _whole_text(path: Path, source: str) -> str:
    with _opened(path, source) as file:
        raw = file.read()
    try:
        return _decoded(raw.removeprefix(BOM))
    except DataError as error:
        raise DataError(error.problem, fix=error.fix, path=source, line=error.line) from None


def _json(path: Path, source: str) -> Iterator[Found]:
    text = _whole_text(path, source)
    if not text.strip():
        return
    try:
        items = ListWalk(text).items()
    except DataError as error:
        raise DataError(error.problem, fix=error.fix, path=source, line=error.line) from None
    for line, value in items:
        try:
            yield line, _row(value)
        except DataError as error:
            yield DataError(error.problem, fix=error.fix, path=source, line=line)


def _table(path: Path, source: str, separator: str) -> Iterator[Found]:
    text = _whole_text(path, source)
    # The csv module's own limit of 131,072 characters a cell is for the whole process.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield from list(_table_rows(text, source, separator))
    finally:
        csv.field_size_limit(limit)


def _table_rows(text: str, source: str, separator: str) -> Iterator[Found]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if not any(cells):
                pass
            elif not header:
                header = _header(cells, source, line)
            elif len(cells) != len(header):
                problem = f"{len(cells)} cells, wanted {len(header)} ({', '.join(header)})"
                fix = 'Put cells that hold the separator or a line end between quotes: "...".'
                yield DataError(problem, fix=fix, path=source, line=line)
            else:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        fix = 'A quote inside a quoted cell is written "".'
        yield DataError(f"not a table: {error}", fix=fix, path=source, line=line)


def _header(cells: list[str], source: str, line: int) -> list[str]:
    header = [cell.strip() for cell in cells]
    if header[0].startswith(("{", "[")):
        problem, fix = "this is JSON, wanted a table", "Rename it to end in .jsonl or .json."
    elif len(header) == 1 and (other := re.search(r"[;\t,]", header[0])):
        problem = f"the cells are separated by {other[0]!r}"
        fix = "Save it with commas as .csv, or with tabs as .tsv."
    elif not all(header):
        problem, fix = "a column has no name", "Name every column in the first line."
    elif len(set(header)) < len(header):
        problem, fix = "two columns have the same name", "Name every column differently."
    else:
        return header
    raise DataError(problem, fix=fix, path=source, line=line)


def _parquet(path: Path, source: str) -> Iterator[Found]:
    if not path.is_file():
        with _opened(path, source):  # says what is wrong
            return
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        _missing("pyarrow", "parquet", "reading Parquet", source)
    try:
        with parquet.ParquetFile(path) as file:
            batches: Iterable[Any] = file.iter_batches()
            yield from enumerate((value for batch in batches for value in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # also a text that is not UTF-8
        reason = str(error).splitlines()[0]
        fix = "Copy it again, or write it again as Parquet or .jsonl."
        raise DataError(f"it cannot be read as Parquet: {reason}", fix=fix, path=source) from None


def _hub(source: str, name: str, split: str) -> Iterator[Found]:
    try:
        import datasets
    except ImportError:
        _missing("datasets", "hub", "there is no such file, and reading a data set of the hub", source)
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds: network, names, formats
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"there is no such file, and the hub gave no data set `{name}`, split `{split}`: {reason}",
            fix="Check the path or the name; without a network, give a file.",
            path=source,
        ) from None
    for number, value in enumerate(rows, start=1):
        yield number, dict(value)


def _missing(package: str, extra: str, what: str, source: str) -> NoReturn:
    fix = f"Install it: pip install 'lorimer[{extra}]'"
    raise DataError(f"{what} needs {package}", fix=fix, path=source) from None
