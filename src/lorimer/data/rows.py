"""Files and hub data sets -> rows that know their file and line; a set of rows -> its splits.

How each kind of file is read is in row_files.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lorimer.data.row_files import scan_file
from lorimer.errors import DataError

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read. `line` counts from 1; in Parquet and hub data it is the row's number."""

    value: dict[str, Any]
    path: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


def read_rows(source: Source) -> list[Row]:
    """All rows of a file, a hub id, or a list of those one after the other. Raises the first DataError."""
    rows = []
    for row in scan_rows(source):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    return rows


def scan_rows(source: Source) -> Iterator[Row | DataError]:
    """The same rows, but what cannot be read comes as a DataError in its place and reading goes on."""
    for path in [source] if isinstance(source, str | Path) else source:
        try:
            empty = True
            for item in scan_file(str(path)):
                empty = False
                yield item if isinstance(item, DataError) else Row(item[1], str(path), item[0])
            if empty:
                yield DataError("the file holds no rows", fix="Write one row a line into it.", path=path)
        except DataError as error:
            yield error


def split_rows(
    rows: Sequence[Row],
    valid_fraction: float,
    test_fraction: float,
    seed: int,
    keys: Sequence[str] | None = None,
) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, valid and test rows, each in file order. Equal rows stay together, so none is in two parts;
    with `keys`, rows of equal keys do.

    Rows are ordered by a hash of (seed, content); test is filled first, then valid, each up to
    round(fraction * rows). 10 rows with fractions 0.2 and 0.1 give 7, 2 and 1. Raises DataError
    where a fraction comes to no row at all, or leaves none to train on.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row_key(row.value) if keys is None else keys[i], []).append(i)
    order = iter(sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest()))
    parts: dict[str, list[int]] = {}
    for name, fraction in (("test", test_fraction), ("valid", valid_fraction)):
        wanted = round(fraction * len(rows))
        if fraction and not wanted:
            _too_small(rows, f"`data.{name}_fraction` {fraction:g} of {len(rows)} rows is not one row")
        parts[name] = []
        while len(parts[name]) < wanted and (key := next(order, None)) is not None:
            parts[name] += groups[key]
        if len(parts[name]) < wanted:
            _too_small(rows, f"{len(groups)} different rows are too few to set {name} rows aside")
    parts["train"] = [i for key in order for i in groups[key]]
    if not parts["train"]:
        _too_small(rows, f"{len(groups)} different rows leave nothing to train on")
    train, valid, test = ([rows[i] for i in sorted(parts[name])] for name in ("train", "valid", "test"))
    return train, valid, test


def _too_small(rows: Sequence[Row], problem: str) -> NoReturn:
    fix = "Give more rows, another fraction, or files of their own as `data.valid` and `data.test`."
    raise DataError(problem, fix=fix, path=rows[0].path if rows else None)


def row_key(value: Any) -> str:
    """Equal for values whose texts differ only in letter case and white space, in any order of keys."""
    text = json.dumps(_normal(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _normal(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, dict):
        return {str(key): _normal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(inner) for inner in value]
    return value
