"""One GGUF file (versions 2 and 3): metadata and tensors, memory-mapped.

Every count, length, type and offset is checked against the size of the file before it is used, so
a broken or lying header costs nothing.

Layout: "GGUF", version u32, tensors u64, entries u64; entries (key, type u32, value); tensor
infos (name, dimensions u32, sizes u64 fastest first, type u32, offset u64); data, aligned.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from lorimer.bases.mapped import Bytes, MappedFile
from lorimer.errors import BaseError


class TensorEntry(NamedTuple):
    """A tensor as its file describes it; `shape` in the order of torch, (out, in)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Storage(NamedTuple):
    """A tensor type: `elements` numbers are stored in `size` bytes."""

    name: str
    elements: int
    size: int


# ggml's numbers for its tensor types.
TYPES = {
    0: Storage("F32", 1, 4),
    1: Storage("F16", 1, 2),
    2: Storage("Q4_0", 32, 18),
    3: Storage("Q4_1", 32, 20),
    6: Storage("Q5_0", 32, 22),
    7: Storage("Q5_1", 32, 24),
    8: Storage("Q8_0", 32, 34),
    12: Storage("Q4_K", 256, 144),
    13: Storage("Q5_K", 256, 176),
    14: Storage("Q6_K", 256, 210),
    28: Storage("F64", 1, 8),
    30: Storage("BF16", 1, 2),
}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
NESTING = 4


@dataclass(slots=True)
class _Cursor:
    """A place in the header; every read is checked against the end of the file."""

    path: Path
    data: memoryview
    at: int = 0

    def fail(self, what: str) -> NoReturn:
        raise BaseError(
            f"the GGUF file is damaged at byte {self.at:,}: {what} ({len(self.data):,} bytes in all)",
            fix="Download it again, or compare its size with the original.",
            path=self.path,
        )

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.data) - self.at:
            self.fail(f"{what} needs {count:,} bytes, {len(self.data) - self.at:,} are left")
        part = self.data[self.at : self.at + count]
        self.at += count
        return part

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind), what))[0]

    def text(self, what: str) -> str:
        raw = bytes(self.take(self.number("Q", what), what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            # llama.cpp keeps vocabularies with broken bytes; ids must not shift for it.
            return raw.decode("utf-8", "surrogateescape")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            self.fail(f"{what} has the unknown type {kind}")
        if depth == NESTING:
            self.fail(f"{what} nests arrays too deeply")
        inner, count = self.number("I", what), self.number("Q", what)
        least = struct.calcsize(SCALARS[inner]) if inner in SCALARS else 8
        if count * least > len(self.data) - self.at:
            self.fail(f"{what} says it holds {count:,} values, more than the file has room for")
        if inner in SCALARS:
            raw = self.take(count * least, what)
            return np.frombuffer(raw, dtype=np.dtype(SCALARS[inner]).newbyteorder("<")).tolist()
        return [self.value(inner, what, depth + 1) for _ in range(count)]


class GgufFile:
    """A GGUF file: `metadata` by key, `tensors` by their names in the file."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._mapped = _map(self.path)
        self._data = self._mapped.bytes
        cursor = _Cursor(self.path, self._data.data)
        if bytes(cursor.take(4, "the magic")) != b"GGUF":
            raise BaseError(
                "this is not a GGUF file: it does not begin with GGUF",
                fix="Give a .gguf file, or a folder in Hugging Face layout.",
                path=self.path,
            )
        version = cursor.number("I", "the version")
        if version in (2 << 24, 3 << 24):
            raise BaseError(
                "the file is big-endian", fix="Get or convert a little-endian one.", path=self.path
            )
        if version not in (2, 3):
            raise BaseError(
                f"the GGUF version is {version} (wanted: 2 or 3)",
                fix="Get a newer file of the model, or convert it again with llama.cpp.",
                path=self.path,
            )
        tensors, entries = cursor.number("Q", "the header"), cursor.number("Q", "the header")
        # The shortest tensor info takes 24 bytes, the shortest entry 13.
        if tensors * 24 + entries * 13 > len(self._data):
            cursor.fail(f"it says it holds {tensors:,} tensors and {entries:,} entries")
        self.metadata: dict[str, Any] = {}
        self._spans: dict[str, slice] = {}
        for _ in range(entries):
            key = cursor.text("a key")
            if key in self.metadata:
                cursor.fail(f"the key `{key}` comes twice")
            start = cursor.at
            self.metadata[key] = cursor.value(cursor.number("I", key), key)
            self._spans[key] = slice(start, cursor.at)
        self._places: dict[str, int] = {}
        self.tensors = self._read_infos(cursor, tensors)

    def _read_infos(self, cursor: _Cursor, count: int) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        offsets: dict[str, int] = {}
        for _ in range(count):
            name = cursor.text("a tensor's name")
            if name in entries:
                cursor.fail(f"the tensor `{name}` comes twice")
            dimensions = cursor.number("I", f"`{name}`")
            if dimensions > 4:
                cursor.fail(f"`{name}` has {dimensions} dimensions")
            sizes = [cursor.number("Q", f"`{name}`") for _ in range(dimensions)]
            kind = cursor.number("I", f"`{name}`")
            if kind not in TYPES:
                known = ", ".join(storage.name for storage in TYPES.values())
                raise BaseError(
                    f"the tensor `{name}` has the type number {kind}, which is not supported",
                    fix=f"Supported: {known}. Choose another quantisation of this model.",
                    path=self.path,
                )
            entries[name] = self._entry(cursor, name, TYPES[kind], sizes)
            offsets[name] = cursor.number("Q", f"`{name}`")
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            cursor.fail(f"the alignment is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        for name, entry in entries.items():
            self._places[name] = start + offsets[name]
            if offsets[name] % alignment:
                cursor.fail(f"the tensor `{name}` lies at {offsets[name]:,}, no multiple of {alignment}")
            if self._places[name] + entry.nbytes > len(self._data):
                end = self._places[name] + entry.nbytes
                raise BaseError(
                    f"the GGUF file is cut short or damaged: the tensor `{name}` ends at byte {end:,}, "
                    f"the file has {len(self._data):,}",
                    fix="Download it again.",
                    path=self.path,
                )
        last = 0
        for name in sorted(entries, key=self._places.__getitem__):
            # One that shares bytes would let a small file fill any amount of memory.
            if self._places[name] < last:
                cursor.fail(f"the tensor `{name}` overlaps another")
            last = self._places[name] + entries[name].nbytes
        return entries

    def _entry(self, cursor: _Cursor, name: str, storage: Storage, sizes: list[int]) -> TensorEntry:
        if any(size == 0 for size in sizes) or math.prod(sizes) > 8 * len(self._data):
            cursor.fail(f"`{name}` has the sizes {sizes}, more than the file can hold")
        row = sizes[0] if sizes else 1
        if row % storage.elements:
            cursor.fail(f"`{name}` has rows of {row}, not a multiple of {storage.elements}")
        nbytes = math.prod(sizes) // storage.elements * storage.size
        return TensorEntry(name, storage.name, tuple(reversed(sizes)), nbytes)

    def entry(self, key: str) -> bytes:
        """A metadata value as it lies in the file, its type in front."""
        return self._data[self._spans[key]].tobytes()

    def raw(self, name: str) -> Bytes:
        """The tensor's bytes as they lie in the file, not copied."""
        start = self._places[name]
        return self._data[start : start + self.tensors[name].nbytes]

    def release(self) -> None:
        """Give back the memory that reading filled."""
        self._mapped.release()


def _map(path: Path) -> MappedFile:
    try:
        if path.stat().st_size == 0:
            raise BaseError("the file is empty", fix="Download it again.", path=path)
        return MappedFile(path)
    except OSError as error:
        fix = "Give a file that you may read."
        raise BaseError(
            f"the file cannot be read: {error.strerror or error}", fix=fix, path=path
        ) from error
