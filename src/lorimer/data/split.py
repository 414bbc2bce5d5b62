"""One file of rows -> train, valid and test that do not leak into each other.

Rows that belong together go into one part: those of one group (a user, a document), those that ask the
same, and those that ask nearly the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorimer.data.conversation import to_conversation
from lorimer.data.near import Index, enough, words
from lorimer.data.rows import Row, row_key, split_rows
from lorimer.errors import DataError


def split(
    rows: Sequence[Row],
    valid: float,
    test: float,
    *,
    group: str | None = None,
    near: bool = True,
    seed: int = 0,
    format: str = "auto",
) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, valid and test rows. `group` is a key of the rows, dots for what is inside (`meta.user`).

    Raises DataError for a row that cannot be read or lacks the key, and where a part would be empty.
    """
    asked = [to_conversation(row, format).asked for row in rows]
    together = _Sets(len(rows))
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        keys = ["asked " + row_key(asked[number])]
        if group is not None:
            keys.append("group " + row_key(_value(row, group)))
        for key in keys:
            together.join(number, first.setdefault(key, number))
    if near:
        _join_near(asked, together)
    # A set is named by what is in it, not by its place: rows that are added move no others.
    names: dict[int, str] = {}
    for number, row in enumerate(rows):
        key, root = row_key(row.value), together.root(number)
        names[root] = min(key, names.get(root, key))
    return split_rows(rows, valid, test, seed, [names[together.root(n)] for n in range(len(rows))])


class _Sets:
    """Numbers in sets that are joined (union and find)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        self._parent[self.root(one)] = self.root(other)


def _join_near(asked: Sequence[str], together: _Sets) -> None:
    index = Index()
    for number, text in enumerate(asked):
        ids = words(text)
        best, other = index.most_similar(ids)
        if other >= 0 and best >= enough(len(ids)):
            together.join(number, other)
        index.add(ids)


def _value(row: Row, key: str) -> Any:
    value: Any = row.value
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise DataError(
                f"there is no `{key}` in this row",
                fix=f"It has: {', '.join(row.value)}.",
                path=row.path,
                line=row.line,
            )
        value = value[part]
    return value
