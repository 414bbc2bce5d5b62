"""GGUF files written: the gguf package and our own reader find what was put in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lorimer.bases.gguf import GgufFile, TensorEntry
from lorimer.bases.gguf_write import data_bytes, encode_value, make_header, write_gguf

VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    "yes": True,
    "no": False,
    "count": 2**32 - 1,
    "ratio": 0.5,
    "words": ["", "a", "日本"],
    "kinds": [1, -2, 2**31 - 1],
    "scores": [0.0, -1.5],
}
TENSORS = [
    TensorEntry("a", "F32", (3,), 12),
    TensorEntry("b.weight", "Q8_0", (2, 32), 68),
    TensorEntry("c", "BF16", (1, 5), 10),
]


def written(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    contents = [np.arange(t.nbytes, dtype=np.uint8) for t in TENSORS]
    header = make_header({key: encode_value(value) for key, value in VALUES.items()}, TENSORS)
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        write_gguf(file, header, TENSORS, contents)
    assert path.stat().st_size == len(header) + data_bytes(TENSORS)
    return path, contents


def test_our_reader_and_the_gguf_package_read_it_alike(tmp_path: Path) -> None:
    path, contents = written(tmp_path)
    mine, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert mine.metadata == VALUES
    for key, value in VALUES.items():
        assert theirs.fields[key].contents() == value, key
    assert list(mine.tensors.values()) == TENSORS
    for tensor, content in zip(theirs.tensors, contents, strict=True):
        assert np.array_equal(mine.raw(tensor.name), content)
        assert np.array_equal(tensor.data.view(np.uint8).ravel(), content)
        assert tensor.data_offset % 32 == 0


def test_the_header_is_the_gguf_packages_byte_for_byte(tmp_path: Path) -> None:
    path, contents = written(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in list(VALUES.items())[1:]:
        add.get(type(value), writer.add_array)(key, value)
    for tensor, content in zip(TENSORS, contents, strict=True):
        kind = gguf.GGMLQuantizationType[tensor.dtype]
        rows = content.reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(tensor.name, rows, raw_shape=rows.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert path.read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_an_entry_is_handed_on_as_it_lies_in_the_file(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    for key, value in VALUES.items():
        assert GgufFile(path).entry(key) == encode_value(value)
    broken = encode_value("a\udcff")
    assert broken.endswith(b"\x02\0\0\0\0\0\0\0a\xff")


def test_an_empty_list_is_one_of_texts() -> None:
    assert encode_value([]) == bytes([9, 0, 0, 0, 8, 0, 0, 0]) + bytes(8)


def test_contents_that_do_not_fit_the_header_are_a_bug() -> None:
    header = make_header({}, TENSORS[:1])
    with pytest.raises(AssertionError):
        write_gguf(io.BytesIO(), header, TENSORS[:1], [np.zeros(13, np.uint8)])
    with pytest.raises(ValueError, match="shorter"):
        write_gguf(io.BytesIO(), header, TENSORS[:1], [])
