"""A GGUF file (version 3) out of metadata and tensors; gguf.py draws the layout and reads it.

The header says where every tensor lies, so types and shapes are known before the first tensor is
computed, and tensors are written one at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from lorimer.bases.gguf import ARRAY, STRING, TYPES, TensorEntry
from lorimer.bases.mapped import Bytes

ALIGNMENT = 32
VERSION = 3
NUMBERS = {storage.name: number for number, storage in TYPES.items()}
U32, I32, F32, BOOL = 4, 5, 6, 7


def encode_value(value: Any) -> bytes:
    """A metadata value with its type in front.

    bool, int (unsigned 32 bits), float (32 bits), str, or a list of int (signed), float or str, as
    llama.cpp's keys have them; an empty list is one of str. `True` becomes 07 00 00 00 01.
    """
    if isinstance(value, list):
        first = type(value[0]) if value else str
        kind, letter = {str: (STRING, ""), float: (F32, "f"), int: (I32, "i")}[first]
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        if kind == STRING:
            return head + b"".join(map(_text, value))
        return head + struct.pack(f"<{len(value)}{letter}", *value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    return struct.pack("<If", F32, value)


def _text(value: str) -> bytes:
    # Vocabularies may hold bytes that are no text; gguf.py reads them so.
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def make_header(entries: Mapping[str, bytes], tensors: Sequence[TensorEntry]) -> bytes:
    """Everything before the tensors' data. `entries` are encoded values; shapes are (out, in)."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(entries))]
    parts += [_text(key) + value for key, value in entries.items()]
    offset = 0
    for tensor in tensors:
        sizes = tuple(reversed(tensor.shape))
        kind = NUMBERS[tensor.dtype]
        parts.append(_text(tensor.name))
        parts.append(struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset))
        offset += _padded(tensor.nbytes)
    header = b"".join(parts)
    return header.ljust(_padded(len(header)), b"\0")


def data_bytes(tensors: Iterable[TensorEntry]) -> int:
    """Bytes of all tensors' data, padding included."""
    return sum(_padded(tensor.nbytes) for tensor in tensors)


def write_gguf(
    file: BinaryIO, header: bytes, tensors: Sequence[TensorEntry], contents: Iterable[Bytes]
) -> None:
    """Write `header` and then the tensors' bytes, which must come in the header's order."""
    file.write(header)
    for tensor, content in zip(tensors, contents, strict=True):
        assert content.nbytes == tensor.nbytes, tensor
        file.write(content.data)
        file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
