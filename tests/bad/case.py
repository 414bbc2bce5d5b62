"""One bad input: what is wrong with it, how it is made, and what must be said about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN = ("train", "c.yaml")
# Turns a folder of sound inputs (tests/crash/inputs.py) into one with a bad one.
Make = Callable[[Path], object]
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    """`says` is what the message holds: the place, what is wrong, and what to do.

    `code` is another exit code than 2 where the documentation says so.
    """

    what: str
    make: Make
    says: tuple[str, ...]
    command: Sequence[str] = TRAIN
    code: int = 2


def put(name: str, content: bytes | str) -> Make:
    """A file with this content, in place of one that may be there."""

    def make(folder: Path) -> None:
        raw = content.encode() if isinstance(content, str) else content
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)

    return make


def kept(name: str, target: str | None = None) -> Make:
    """A file of this collection, under its own name or in place of `target`."""
    file = HERE / name
    return put(file.name if target is None else target, file.read_bytes())


def change(name: str, **values: Any) -> Make:
    """A JSON file with other values; `a__b` is `b` within `a`, and `...` takes a key away."""

    def make(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        for path, value in values.items():
            *outer, last = path.split("__")
            inner = whole
            for key in outer:
                inner = inner[key]
            if value is ...:
                del inner[last]
            else:
                inner[last] = value
        (folder / name).write_text(json.dumps(whole))

    return make


def edit(name: str, old: bytes, new: bytes) -> Make:
    """A file with one stretch of it replaced."""

    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content, f"{old!r} is not in {name}"
        (folder / name).write_bytes(content.replace(old, new, 1))

    return make


def gone(name: str) -> Make:
    return lambda folder: (folder / name).unlink()


def both(*makes: Make) -> Make:
    return lambda folder: [make(folder) for make in makes]


def nothing(folder: Path) -> None:
    """The command itself is what is wrong."""
