"""JSON text -> values, more strictly than the standard library reads it.

Refused with a DataError (no path; `line` within the text): a key twice in one object, NaN and
Infinity, nesting that would overflow a stack, half characters, anything after the value.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from lorimer.errors import DataError

# Chats nest about six deep. Far deeper is damage, and would overflow the stack of whatever walks it.
DEEPEST = 100
SPACE = re.compile(r"[ \t\n\r]*")
KINDS = {
    str: "text",
    int: "a number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    bytes: "bytes",
}


# How Python prints a row.
PYTHON = re.compile(r"\s*[\[{]\s*'")
FLATTER = "Take the nesting out of the row, or write that part as text."


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return KINDS.get(type(value), f"a {type(value).__name__}")


def skip_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def one_value(text: str) -> Any:
    """The only value in the text."""
    text = text.rstrip("\r\n")  # else an end that is missing would be at column 1 of the line after it
    value, end = value_at(text, skip_space(text, 0))
    if skip_space(text, end) != len(text):
        rest = text[end : end + 20].strip()
        problem = f"not JSON: text after the value, at column {end + 1}: `{rest}`"
        raise DataError(problem, fix="Write one object a line.")
    return value


def value_at(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at `position`, and where it ends."""
    try:
        value, end = DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise DataError(_syntax(text, error), fix=_mend(text, error), line=error.lineno) from None
    except RecursionError:
        raise DataError(f"it nests deeper than {DEEPEST} levels", fix=FLATTER) from None
    except ValueError:
        fix = "Write it as text, or leave it out."
        raise DataError("it holds a number of more digits than Python reads", fix=fix) from None
    piece = text[position:end]
    if piece.count("[") + piece.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise DataError(f"it nests deeper than {DEEPEST} levels", fix=FLATTER)
    if "\\ud" in piece or "\\uD" in piece:
        _refuse_half_characters(value)
    return value, end


def _syntax(text: str, error: json.JSONDecodeError) -> str:
    near = text[error.pos : error.pos + 20].split("\n")[0].strip()
    found = f"`{near}`" if near else "the end"
    hint = " (single quotes: this is Python's notation)" if PYTHON.match(text) else ""
    what = (error.msg[:1].lower() + error.msg[1:]).removesuffix(" at")
    return f"not JSON: {what} at column {error.colno}, found {found}{hint}"


def _mend(text: str, error: json.JSONDecodeError) -> str:
    if PYTHON.match(text):
        return "Write the rows with json.dumps, not with str or print."
    if error.msg.startswith("Invalid control character"):
        return f"Write it as \\u{ord(text[error.pos]):04x} inside a text, or take it out."
    if text[error.pos : error.pos + 1] in ("}", "]") and text[: error.pos].rstrip().endswith(","):
        return "Take the comma before it away."
    return "Mend it there, or write the rows again with a JSON library."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for twice, _ in pairs:
            if twice in seen:
                break
            seen.add(twice)
        raise DataError(f"the key `{twice}` is there twice in one object", fix="Keep one of the two.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise DataError(f"{name} is not JSON", fix='Write null, or a text such as "NaN".')


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        fix = "A text was cut inside an emoji: mend or delete the row."
        raise DataError(f"{half} is half of a character", fix=fix) from None


class ListWalk:
    """The items of the one list in a JSON text, each with the line it begins on.

    The list is the whole value, or the only list in an object; an object that is itself one chat
    (`messages` or `conversations`) is the only item.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0  # of the value being read, for messages
        self._line, self._counted = 1, 0

    def items(self) -> list[tuple[int, Any]]:
        """(line, value) of each item. Raises DataError with the line."""
        try:
            start = self.position = skip_space(self.text, 0)
            if self.text[start] == "[":
                items, end = self._list(start)
            elif self.text[start] == "{":
                items, end = self._only_list(start)
            else:
                value = one_value(self.text)
                fix = "Write the rows as a list of objects, or one object a line as .jsonl."
                raise DataError(f"the file is {kind_of(value)}, wanted a list of objects", fix=fix)
            self.position = skip_space(self.text, end)
            if self.position != len(self.text):
                raise DataError("text follows the end of the list", fix="Keep one list in the file.")
        except DataError as error:
            line = error.line or self._line_at(self.position)
            raise DataError(error.problem, fix=error.fix, line=line) from None
        return [(self._line_at(position), value) for position, value in items]

    def _line_at(self, position: int) -> int:
        """The line of a position. Items come in order, so their text is counted once."""
        if position < self._counted:
            self._line, self._counted = 1, 0
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def _value(self, position: int) -> tuple[Any, int]:
        self.position = position
        return value_at(self.text, position)

    def _list(self, start: int) -> tuple[list[tuple[int, Any]], int]:
        """Items of the list that opens at `start` with their positions, and where it ends."""
        items: list[tuple[int, Any]] = []
        position = skip_space(self.text, start + 1)
        if self.text[position : position + 1] == "]":
            return items, position + 1
        while True:
            value, end = self._value(position)
            items.append((position, value))
            position = self._after(end)
            if self.text[position] == "]":
                return items, position + 1
            position = skip_space(self.text, position + 1)

    def _after(self, position: int) -> int:
        """Where the comma or bracket after an item stands."""
        self.position = position = skip_space(self.text, position)
        found = self.text[position : position + 1]
        if found not in (",", "]"):
            what = f"`{found}`" if found else "the end of the file: it is cut off"
            fix = "Mend it there, or write the file again."
            raise DataError(f"not JSON: wanted `,` or `]`, found {what}", fix=fix)
        return position

    def _only_list(self, start: int) -> tuple[list[tuple[int, Any]], int]:
        whole, end = self._value(start)
        if self.text.startswith("{", skip_space(self.text, end)):
            raise DataError("this is one JSON object a line", fix="Rename it to end in .jsonl.")
        lists = [key for key, value in whole.items() if isinstance(value, list)]
        if "messages" in lists or "conversations" in lists:
            return [(start, whole)], end
        if len(lists) != 1:
            names = ", ".join(f"`{key}`" for key in lists) or "none"
            raise DataError(
                f"the file is an object with {len(lists)} lists ({names}), wanted one list of rows",
                fix="Keep the list of rows alone in the file.",
            )
        # The object is sound and its other values are no lists: walk to the list for its lines.
        position = skip_space(self.text, start + 1)
        while True:
            _, position = self._value(position)
            position = skip_space(self.text, skip_space(self.text, position) + 1)
            if self.text[position] == "[":
                return self._list(position)[0], end
            _, position = self._value(position)
            position = skip_space(self.text, skip_space(self.text, position) + 1)
